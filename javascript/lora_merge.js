// The browser's part of the LoRA Merge tab. The page asks the server again when the form has changed,
// follows running merges, draws the block sliders and shows help on hover. Everything is found by
// element id, so that it works in every version of Gradio, inside a WebUI and alone.
(function () {
    "use strict";

    const TICK = 100; // ms between looks at the page; what is the same twice is asked for, well within 300 ms
    const ANSWER = 4000; // ms to wait for an answer before asking again
    const LOST = 30000; // ms to wait for the facts: a late answer to an older question would take their place
    const POLL_ACTIVE = 400;
    const POLL_IDLE = 5000;
    const FORGOTTEN = 60000; // ms after which a merge that the server does not know is no longer asked for
    const DRAFT = "loramerge_draft";
    const FOLLOW = "loramerge_follow";
    const OWN = "loramerge_own";
    const MOST_OWN = 50;

    const state = {
        arguments: {}, // what the server gets with an event, by the event's name
        signature: null, // of the form, as asked last
        pending: null, // of the form, as seen at the last tick
        asked: 0,
        stamp: "",
        typed: null, // field of a list that somebody types a search into
        untaken: false, // the answer holds proposals for fields
        polled: 0,
        pollStamp: "",
        active: false,
        started: "", // merge that this page began last, and when
        ended: "", // merge whose result is shown
        changed: false, // there may be a new LoRA
        greeted: false,
        follow: "",
        followCreated: 0,
        own: new Set(), // merges that this page began
        open: new Set(), // rows whose options are shown
    };

    const root = () => (typeof window.gradioApp === "function" ? window.gradioApp() : document);
    const find = (selector) => root().querySelector(selector);
    const byId = (id) => find("#" + id);

    function press(name, argument) {
        const element = byId("loramerge_do_" + name);
        const button = element && (element.tagName === "BUTTON" ? element : element.querySelector("button"));
        if (!button) return false;
        if (argument !== undefined) state.arguments[name] = argument;
        button.click();
        return true;
    }

    function valueOf(id) {
        const element = find(`#${id} textarea, #${id} input`);
        return element ? element.value : "";
    }

    window.loramergeRoot = root;
    window.loramergePress = press;
    // What the server left for the scripts in the place of this name, as text; "" before it did.
    window.loramergeData = (name) => {
        const element = find(`#loramerge_${name} [data-${name}]`);
        return element ? element.dataset[name] : "";
    };
    // Called by Gradio as the JavaScript of an event: what it returns is what the server gets.
    window.loramergeArgument = (name) => [state.arguments[name] || ""];

    function proposals() {
        try {
            return JSON.parse(valueOf("loramerge_proposed") || "{}");
        } catch (error) {
            return {};
        }
    }

    // Somebody is in a field, or in the one whose last proposal it remembers.
    function isTypedIn(name) {
        const owner = { name_auto: "name", activation_auto: "activation_text" }[name] || name;
        const place = byId("loramerge_" + owner.replace(".", "_"));
        return Boolean(place && place.contains(document.activeElement));
    }

    // What the server proposes for fields, each only as long as it holds what the server saw, and nobody is in it.
    window.loramergeTake = (names, values) => {
        const proposed = proposals();
        return names.map((name, index) => {
            const [seen, wanted] = proposed[name] || [null, undefined];
            const now = values[index] === undefined || values[index] === null ? "" : values[index];
            if (wanted === undefined || (seen !== null && seen !== now)) return values[index];
            if (!isTypedIn(name)) return wanted;
            state.untaken = true;
            return values[index];
        });
    };

    // The prompt in view, as under SD.Next's ModernUI, which shows one beside our tab; else the first.
    function promptArea() {
        const areas = pageWords().prompts.map((id) => find(`#${id} textarea`)).filter(Boolean);
        return areas.find(isShown) || areas[0] || null;
    }

    window.loramergePrompt = () => {
        const area = promptArea();
        return area ? area.value : "";
    };

    // Called before each event of ours that goes to the server. Gradio 4 and 5 say "Too many arguments" of every
    // event that is no part of a page's API; of ours it says so no more, of others it may.
    let quiet = false;
    const warn = console.warn;
    console.warn = (...said) => {
        if (!(quiet && said[0] === "Too many arguments provided for the endpoint.")) warn.apply(console, said);
    };
    window.loramergeQuiet = () => {
        quiet = true;
        setTimeout(() => { quiet = false; }, 0);
    };

    window.loramergeCopy = (text) => {
        if (!text) return;
        const area = find("#loramerge_copy_text textarea, #loramerge_copy_text input");
        const old = () => {
            if (!area) return;
            area.focus();
            area.select();
            document.execCommand("copy");
        };
        if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(text).catch(old);
        else setTimeout(old, 50);
    };

    // --- words and hints ---------------------------------------------------------------------------------------------

    let words = null;

    function pageWords() {
        if (words) return words;
        const element = byId("loramerge_words");
        if (!element) return { hints: {}, prompts: [] };
        words = JSON.parse(element.dataset.words);
        return words;
    }

    function translated(text) {
        const found = typeof window.getTranslation === "function" ? window.getTranslation(text) : undefined;
        return found === undefined || found === null ? text : found;
    }

    function showHints() {
        const hints = pageWords().hints;
        for (const [id, hint] of Object.entries(hints)) {
            const text = translated(hint);
            const elements = id.includes("*")
                ? root().querySelectorAll(`[id^="${id.split("*")[0]}"][id$="${id.split("*")[1]}"]`)
                : [byId(id)];
            for (const element of elements) {
                if (element && element.title !== text) element.title = text;
            }
        }
    }

    // --- the form ----------------------------------------------------------------------------------------------------

    function isShown(element) {
        return Boolean(element && element.offsetParent !== null);
    }

    const settledText = new WeakMap(); // field of a list -> its text when the list was last closed

    function isSearched(element) {
        // While a list is open, what was typed since the last choice is a search, not a value. A field that is only
        // focused holds its value: in Gradio 3 a click on a choice may focus it, and open its list, once more.
        return element === document.activeElement && element === state.typed &&
            Boolean(root().querySelector("ul.options, ul[role=listbox]"));
    }

    document.addEventListener("input", (event) => {
        const field = event.target;
        state.typed = field.closest && field.closest("#loramerge_form .secondary-wrap") ? field : null;
    }, true);
    const chosen = () => { state.typed = null; };
    document.addEventListener("focusout", chosen, true);
    document.addEventListener("mousedown", (event) => {
        if (event.target.closest && event.target.closest("ul.options, ul[role=listbox]")) chosen();
    }, true);
    document.addEventListener("keydown", (event) => { if (event.key === "Enter") chosen(); }, true);

    function signatureOfForm() {
        const parts = [];
        for (const element of root().querySelectorAll("#loramerge_form input, #loramerge_form textarea")) {
            if (element.type === "file" || element.closest("#loramerge_fill")) continue;
            if (element.type === "checkbox" || element.type === "radio") {
                parts.push(element.checked);
                continue;
            }
            if (!isSearched(element)) settledText.set(element, element.value);
            parts.push(settledText.get(element) || "");
        }
        parts.push(valueOf("loramerge_rows"));
        return parts.join("\u0001");
    }

    function askForFacts(now) {
        const facts = find("#loramerge_facts [data-stamp]");
        const stamp = facts ? facts.dataset.stamp : "";
        const answered = stamp !== state.stamp;
        if (answered) {
            state.stamp = stamp;
            state.asked = 0;
            keepDraft();
            state.untaken = true;
        }
        const names = state.untaken ? Object.keys(proposals()) : [];
        if (!names.some(isTypedIn)) {
            state.untaken = false;
            if (names.length) press("take");
        }
        if (state.asked && now - state.asked < LOST) return;
        const signature = signatureOfForm();
        const settled = signature === state.pending;
        state.pending = signature;
        if (!settled || signature === state.signature) return;
        if (press("ask")) {
            state.signature = signature;
            state.asked = now;
        }
    }

    function keepDraft() {
        const draft = valueOf("loramerge_draft");
        if (draft) keep(DRAFT, draft);
    }

    function keep(key, text) {
        try {
            sessionStorage.setItem(key, text);
        } catch (error) { /* A browser may forbid storage: then a reload starts afresh. */ }
    }

    function stored(key) {
        try {
            return sessionStorage.getItem(key) || "";
        } catch (error) {
            return "";
        }
    }

    // --- merges ------------------------------------------------------------------------------------------------------

    function followJobs(now) {
        const jobs = find("#loramerge_jobs [data-stamp]");
        if (!jobs) return;
        const started = valueOf("loramerge_started");
        if (started !== state.started) {
            state.started = started;
            const [id, created] = started.split(" ");
            state.follow = id;
            state.own.add(id);
            keep(OWN, JSON.stringify([...state.own].slice(-MOST_OWN)));
            state.followCreated = Number(created || 0);
            state.lastAnswer = 0;
        }
        if (jobs.dataset.stamp !== state.pollStamp) {
            state.pollStamp = jobs.dataset.stamp;
            state.polled = 0;
            state.lastAnswer = now;
            // An answer to an older question must not turn the page back to an older merge.
            const created = Number(jobs.dataset.created || 0);
            if (jobs.dataset.follow && created >= state.followCreated) {
                state.follow = jobs.dataset.follow;
                state.followCreated = created;
            } else if (state.follow && !jobs.dataset.follow && now - state.followCreated * 1000 > FORGOTTEN) {
                state.follow = ""; // The server was started anew.
            } else if ((jobs.dataset.follow || "") !== state.follow) {
                state.lastAnswer = now - POLL_IDLE + POLL_ACTIVE; // Soon, not at once: that may be so for long.
            }
            keep(FOLLOW, state.follow);
            const active = jobs.dataset.state === "active";
            if (state.active && !active) state.changed = true;
            state.active = active;
            // Base model and rank of all LoRAs are known now, and were not when the lists were filled.
            const labels = jobs.dataset.labels;
            state.busy = labels === "busy";
            if (labels && !state.busy && labels !== state.labels) {
                state.newLabels = true;
                state.labels = labels;
            }
        }
        for (const merge of root().querySelectorAll("#loramerge_app [data-job]:is(.lm-job, .lm-result)")) {
            merge.classList.toggle("lm-foreign", !state.own.has(merge.dataset.job));
        }
        // A short merge is over before it was seen at work: its result tells.
        const results = root().querySelectorAll(":is(#loramerge_result, #loramerge_extract_result) .lm-result");
        const ended = [...results].map((result) => result.dataset.job).join();
        if (ended && ended !== state.ended) {
            state.ended = ended;
            state.changed = true;
            const analysed = find("#loramerge_extract_result .lm-show-look");
            if (analysed && state.own.has(analysed.dataset.look)) showAsked(analysed.dataset.look);
        }
        if (state.changed) {
            state.changed = false;
            press("greet"); // The lists hold a new LoRA now,
            state.signature = null; // and the name is taken.
        }
        // An open list is left alone.
        const focused = document.activeElement;
        if (state.newLabels && !(focused && focused.closest("#loramerge_app .secondary-wrap"))) {
            state.newLabels = false;
            press("greet");
        }
        if (state.polled && now - state.polled < ANSWER) return;
        const pause = state.active || state.busy ? POLL_ACTIVE : POLL_IDLE;
        if (now - (state.lastAnswer || 0) < pause) return;
        const analysis = find("#loramerge_extract_analysis [data-look]");
        const seen = analysis ? analysis.dataset.look : "";
        if (press("poll", `${state.follow} ${seen}`)) state.polled = now;
    }

    // --- analyses ----------------------------------------------------------------------------------------------------

    window.loramergeTheme = () =>
        document.querySelector("body.dark, .gradio-container.dark, html.dark") ? "dark" : "light";

    // What the server gets with a press of Analyse: the page's colours, and the look that it makes needless.
    window.loramergeLook = () => {
        const before = find("#loramerge_analyse_state [data-look]");
        state.looking = true;
        state.lookBefore = before ? before.dataset.stamp : "";
        const look = find("#loramerge_analyse_state [data-state=active]");
        return `${window.loramergeTheme()} ${look ? look.dataset.look : ""}`;
    };

    function followLook(now) {
        const look = find("#loramerge_analyse_state [data-look]");
        if (!look) return;
        if (look.dataset.state !== "active") {
            if (!state.looking || look.dataset.stamp === state.lookBefore) return;
            state.looking = false;
            state.signature = null; // The facts know more now.
            showAsked(look.dataset.look);
            return;
        }
        if (look.dataset.stamp !== state.lookStamp) {
            state.lookStamp = look.dataset.stamp;
            state.lookAnswer = now;
            state.lookAsked = 0;
        }
        if (state.lookAsked && now - state.lookAsked < ANSWER) return;
        if (now - state.lookAnswer < POLL_ACTIVE) return;
        if (press("look", look.dataset.look)) state.lookAsked = now;
    }

    // What was asked for opens in view, unless somebody is at another thing by now.
    function showAsked(id) {
        if (!document.activeElement.matches("input, textarea")) showLook(id);
    }

    function showLook(id) {
        const page = find(`#loramerge_app .lm-analysis[data-look="${id}"]`);
        if (page) page.scrollIntoView({ behavior: "smooth", block: "start" });
    }

    function savePicture(button) {
        const image = button.closest("figure").querySelector("img");
        const link = document.createElement("a");
        link.href = image.src;
        link.download = button.dataset.name;
        link.click();
    }

    // A prompt with the LoRA once: its tag, or that of a merge it took the place of, becomes the new one.
    function withTag(prompt, tag, replaced) {
        const name = tag.slice("<lora:".length).split(":")[0];
        let put = false;
        const text = prompt.replace(/<(?:lora|lyco):([^:>]+)(:[^>]*)?>/g, (old, other, strength) => {
            if (other !== name && !replaced.includes(other)) return old;
            if (put) return "";
            put = true;
            return other === name ? tag : `<lora:${name}${strength || ":1"}>`;
        });
        if (put) return text;
        return prompt.trim() ? prompt.replace(/\s+$/, "") + " " + tag : tag;
    }

    window.loramergeWithTag = withTag;

    function sendToPrompt(tag, replaced) {
        const area = promptArea();
        if (!area) return;
        const inView = isShown(area);
        area.value = withTag(area.value, tag, replaced);
        if (typeof window.updateInput === "function") window.updateInput(area);
        else area.dispatchEvent(new Event("input", { bubbles: true }));
        if (!inView && typeof window.switch_to_txt2img === "function") window.switch_to_txt2img();
        // The page stays scrolled as it was; the other tab may begin far above the window.
        requestAnimationFrame(() => area.scrollIntoView({ block: "nearest" }));
    }

    function onClick(event) {
        const target = event.target.closest && event.target.closest("button");
        if (!target || !target.closest("#loramerge_app")) return;
        if (target.matches(".lm-drop")) {
            target.disabled = true;
            press("drop", target.dataset.job);
        } else if (target.matches(".lm-again")) {
            target.disabled = true;
            press("again", target.dataset.job);
        } else if (target.matches(".lm-refill")) {
            press("refill", target.dataset.job);
        } else if (target.matches(".lm-use")) {
            press(target.closest("#loramerge_extract_analysis") ? "extract_use" : "use", target.dataset.use);
        } else if (target.matches(".lm-stop-look")) {
            target.disabled = true;
            press("unlook", target.dataset.look);
        } else if (target.matches(".lm-show-look")) {
            showLook(target.dataset.look);
        } else if (target.matches(".lm-save-picture")) {
            savePicture(target);
        } else if (target.matches(".lm-send")) {
            sendToPrompt(target.dataset.tag, JSON.parse(target.dataset.replaces));
        } else {
            if (target.id === "loramerge_refresh") {
                state.signature = null; // Files may have changed,
                state.lastAnswer = 0; // and labels be on their way.
            }
            const more = /^loramerge_row(\d+)_more$/.exec(target.id);
            if (more) toggleRow(Number(more[1]));
        }
    }

    // Jobs are drawn anew with every answer. A press that spans it would be lost: the browser makes no click of it.
    let pressed = null;

    const buttonOf = (event) => event.target.closest && event.target.closest("#loramerge_app .lm-button");

    function onPress(event) {
        pressed = buttonOf(event);
    }

    function onRelease(event) {
        const button = buttonOf(event);
        if (pressed && !pressed.isConnected && button && button.outerHTML === pressed.outerHTML) button.click();
        pressed = null;
    }

    // --- rows --------------------------------------------------------------------------------------------------------

    function toggleRow(row) {
        if (state.open.has(row)) state.open.delete(row);
        else state.open.add(row);
        showRowOptions();
    }

    function showRowOptions() {
        for (const line of root().querySelectorAll("[id^=loramerge_row][id$=_options]")) {
            const row = Number(line.id.match(/\d+/)[0]);
            const used = [...line.querySelectorAll("input, textarea")].some((element) => element.value);
            const shown = used || state.open.has(row);
            line.classList.toggle("lm-open", shown);
            const button = byId(`loramerge_row${row}_more`);
            if (button) button.setAttribute("aria-expanded", String(shown));
        }
    }

    // --- block sliders -----------------------------------------------------------------------------------------------

    const sliders = { text: null, count: 0, list: "", shown: "" };

    function presetField() {
        return find("#loramerge_preset_text textarea, #loramerge_preset_text input");
    }

    function blockIds() {
        const element = byId("loramerge_sliders");
        if (!element) return {};
        return JSON.parse(element.dataset.blocks);
    }

    // Norm by block of the LoRA in the row that is chosen here, where Analyse has measured it.
    function blockNorms() {
        const table = find("#loramerge_analyse_result [data-norms]");
        const name = valueOf("loramerge_preset_row").replace(/^\d+: /, "").split(" · ")[0].trim();
        return (table && name && JSON.parse(table.dataset.norms)[name]) || {};
    }

    function colourSliders(place) {
        const norms = blockNorms();
        const largest = Math.max(0, ...Object.values(norms));
        for (const cell of place.children) {
            const norm = norms[cell.firstChild.textContent];
            const share = largest && norm ? Math.round(100 * norm / largest) : 0;
            if (cell.dataset.norm === String(share)) continue;
            cell.dataset.norm = String(share);
            cell.style.setProperty("--lm-norm", share + "%");
            cell.title = share ? norm.toPrecision(3) : "";
        }
    }

    function drawSliders() {
        const place = byId("loramerge_sliders");
        const field = presetField();
        if (!place || !field || !isShown(field)) return;
        const elemental = find("#loramerge_preset_kind input:checked");
        const hidden = Boolean(elemental && elemental.value.startsWith("Elemental"));
        place.classList.toggle("lm-none", hidden);
        if (hidden) return;
        const layout = valueOf("loramerge_preset_layout");
        const entries = field.value.split(",").map((entry) => entry.trim());
        const lists = blockIds();
        const chosen = lists[layout] || [];
        // A text of another length that is a list, too, decides; else the layout that is chosen.
        const other = field.value.trim() && layout === sliders.list && entries.length !== chosen.length &&
            Object.values(lists).find((ids) => ids.length === entries.length);
        const ids = other || chosen, count = ids.length, shown = ids.join();
        if (place.childElementCount) colourSliders(place);
        if (field.value === sliders.text && shown === sliders.shown && layout === sliders.list &&
            place.childElementCount === count) return;
        sliders.text = field.value;
        sliders.list = layout;
        if (shown !== sliders.shown || place.childElementCount !== count) {
            sliders.shown = shown;
            sliders.count = count;
            place.replaceChildren(...ids.map((id, index) => makeSlider(id, index)));
            colourSliders(place);
        }
        const same = entries.length === count;
        [...place.children].forEach((cell, index) => {
            const entry = same ? entries[index] : "1";
            const number = Number(entry);
            const plain = entry !== "" && Number.isFinite(number);
            const [range, box] = cell.querySelectorAll("input");
            if (document.activeElement !== box) box.value = entry;
            range.disabled = !plain;
            if (plain) range.value = String(number);
        });
    }

    function makeSlider(id, index) {
        const cell = document.createElement("label");
        const name = document.createElement("span");
        const range = document.createElement("input");
        const box = document.createElement("input");
        name.textContent = id;
        range.type = "range";
        Object.assign(range, { min: "-1", max: "2", step: "0.05", value: "1" });
        range.setAttribute("aria-label", id);
        box.type = "text";
        box.setAttribute("aria-label", id);
        range.addEventListener("input", () => {
            box.value = range.value;
            setEntry(index, range.value);
        });
        box.addEventListener("input", () => {
            const entry = box.value.trim();
            range.disabled = entry === "" || !Number.isFinite(Number(entry));
            if (!range.disabled) range.value = entry;
            setEntry(index, entry);
        });
        cell.append(name, range, box);
        return cell;
    }

    // The text decides, not the sliders: they follow it a little later.
    function setEntry(index, entry) {
        const field = presetField();
        if (!field) return;
        const written = field.value.split(",").map((one) => one.trim());
        const entries = written.length === sliders.count ? written : new Array(sliders.count).fill("1");
        entries[index] = entry || "0";
        field.value = entries.join(",");
        field.dispatchEvent(new Event("input", { bubbles: true }));
    }

    // --- keyboard ----------------------------------------------------------------------------------------------------

    function openByKeyboard() {
        // Gradio 3 draws the heads of its accordions as plain text that only a mouse can press.
        for (const head of root().querySelectorAll("#loramerge_app div.label-wrap:not([tabindex])")) {
            head.tabIndex = 0;
            head.setAttribute("role", "button");
            head.addEventListener("keydown", (event) => {
                if (event.key !== "Enter" && event.key !== " ") return;
                event.preventDefault();
                head.click();
            });
        }
        for (const range of root().querySelectorAll("#loramerge_app [id$=_slide] input[type=range]:not([aria-label])")) {
            range.setAttribute("aria-label", translated("Strength slider"));
        }
    }

    // --- the loop ----------------------------------------------------------------------------------------------------

    function greet() {
        state.greeted = true;
        const draft = stored(DRAFT);
        state.follow = stored(FOLLOW);
        state.own = new Set(JSON.parse(stored(OWN) || "[]"));
        if (draft) press("restore", draft);
        else press("greet");
        press("poll", state.follow);
        state.polled = Date.now();
        showHints();
        showRowOptions();
    }

    let hinted = 0;

    function tick() {
        if (document.visibilityState === "hidden") return;
        const app = byId("loramerge_app");
        if (!isShown(app) || !byId("loramerge_do_poll")) return;
        const now = Date.now();
        if (!state.greeted) {
            greet();
            return;
        }
        if (isShown(byId("loramerge_form"))) {
            askForFacts(now);
            showRowOptions();
        }
        drawSliders();
        followJobs(now);
        followLook(now);
        if (now - hinted > 1000) {
            hinted = now;
            showHints();
            openByKeyboard();
        }
    }

    function guardedTick() {
        try {
            tick();
        } catch (error) {
            console.error("LoRA Merge:", error);
        }
    }

    document.addEventListener("paste", (event) => {
        // Lists of Gradio 3 take typed text when a key is released; pasting with the mouse releases none.
        const field = event.target;
        if (!field.closest || !field.closest("#loramerge_app .secondary-wrap")) return;
        setTimeout(() => field.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true })), 0);
    });
    document.addEventListener("click", onClick);
    document.addEventListener("pointerdown", onPress);
    document.addEventListener("pointerup", onRelease);
    setInterval(guardedTick, TICK);
})();
