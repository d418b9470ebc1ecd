// Searching the lists of LoRAs by several words, each anywhere in name, folder, base model or rank. Gradio's own
// lists look for the whole text; for more than one word ours is shown in their place, and chooses through them.
(function () {
    "use strict";

    const FIELDS = "#loramerge_app [id^=loramerge_row][id$=_lora] input, #loramerge_fill_name input";
    const MOST = 100;
    const TRIES = 40; // times 50 ms that Gradio's list may take to follow

    let found = null; // the list: {field, list, place}

    // The lists of LoRAs, their choices, and the name that a choice shows; Gradio puts a tick before the chosen one.
    const isField = (element) => Boolean(element.matches && element.matches(FIELDS));
    const items = (place) => [...place.querySelectorAll("ul.options li, ul[role=listbox] li")];
    const nameOf = (item) => item.textContent.replace(/^[\s✓]+/, "").trim();
    window.loramergeLists = { isField, items, nameOf };

    const names = () => JSON.parse(window.loramergeData("names") || "[]");

    function close() {
        if (!found) return;
        found.list.remove();
        found.place.classList.remove("lm-searching");
        found = null;
    }

    function search(field) {
        const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
        const known = words.length > 1 ? names() : [];
        const matches = known.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
        // A name that was chosen is no search.
        if (!matches.length || known.includes(field.value)) {
            close();
            return;
        }
        if (!found || found.field !== field) {
            close();
            const place = field.closest(".secondary-wrap").parentElement;
            const list = document.createElement("ul");
            list.className = "options lm-found";
            list.setAttribute("role", "listbox");
            list.addEventListener("mousedown", (event) => {
                event.preventDefault(); // The field keeps the focus.
                event.stopPropagation();
                const item = event.target.closest("li");
                if (item) choose(item.dataset.name);
            });
            place.classList.add("lm-searching");
            place.append(list);
            found = { field, list, place };
        }
        found.list.replaceChildren(...matches.slice(0, MOST).map((name, index) => {
            const item = document.createElement("li");
            item.setAttribute("role", "option");
            item.setAttribute("aria-selected", String(index === 0));
            item.dataset.name = item.textContent = name;
            return item;
        }));
    }

    function type(field, text) {
        const kind = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
        Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(field, text);
        field.dispatchEvent(new Event("input", { bubbles: true }));
        field.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
    }

    function choose(name) {
        const { field, place } = found;
        found.list.remove();
        found = null;
        pick(field, name, () => place.classList.remove("lm-searching"));
    }

    // Through Gradio's own list, which alone knows how to choose; a text that is not in it is left as typed.
    function pick(field, name, done) {
        type(field, name);
        const place = field.closest(".secondary-wrap").parentElement.parentElement;
        let tries = 0;
        const timer = setInterval(() => {
            const item = items(place).find((one) => nameOf(one) === name);
            if (item) item.dispatchEvent(new MouseEvent("mousedown", { bubbles: true, cancelable: true }));
            if (!item && ++tries < TRIES) return;
            clearInterval(timer);
            done();
        }, 50);
    }

    // A file dropped onto a row is the listed LoRA of its name; else the file at its path, where the browser tells it.
    function dropped(transfer) {
        const line = transfer.getData("text/uri-list").split(/[\r\n]+/).find((one) => one.startsWith("file:"));
        const path = line ? decodeURIComponent(new URL(line).pathname).replace(/^\/(?=[A-Za-z]:)/, "") : "";
        const file = path ? path.split("/").pop() : transfer.files.length ? transfer.files[0].name : "";
        const stem = file.replace(/\.(safetensors|pt|ckpt|bin)$/i, "");
        const known = names().find((name) => name.split(" · ")[0].split("/").pop() === stem);
        return known || path || stem;
    }

    function rowField(event) {
        const row = event.target.closest && event.target.closest("#loramerge_form [id^=loramerge_row][id$=_line]");
        return row && row.querySelector("[id$=_lora] input");
    }

    window.loramergeType = type;
    window.loramergePick = pick;

    function move(step) {
        const all = [...found.list.children];
        const now = all.findIndex((item) => item.getAttribute("aria-selected") === "true");
        all[now].setAttribute("aria-selected", "false");
        const next = all[(now + step + all.length) % all.length];
        next.setAttribute("aria-selected", "true");
        next.scrollIntoView({ block: "nearest" });
    }

    document.addEventListener("input", (event) => {
        if (event.isTrusted && isField(event.target)) search(event.target);
    });
    document.addEventListener("keydown", (event) => {
        if (!found || event.target !== found.field) return;
        const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
        if (!step && event.key !== "Enter" && event.key !== "Escape") return;
        event.preventDefault();
        event.stopPropagation();
        if (step) move(step);
        else if (event.key === "Escape") close();
        else choose(found.list.querySelector("[aria-selected=true]").dataset.name);
    }, true);
    document.addEventListener("dragover", (event) => {
        if (rowField(event)) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
        const field = rowField(event);
        const name = field && event.dataTransfer ? dropped(event.dataTransfer) : "";
        if (!name) return;
        event.preventDefault();
        field.focus();
        pick(field, name, () => field.blur());
    });
    document.addEventListener("focusout", (event) => {
        if (found && event.target === found.field) close();
    });
})();
