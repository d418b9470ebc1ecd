// Translation of the library's sentences. The WebUI translates whole texts; these have names and numbers in
// them, so localizations/*.json holds them with slots: "{0} is empty." A slot of the translation stays as it
// is, {0}, or is translated too where it holds words of ours, {0*}. Only the places of sentences inside the
// tab are touched, as text, and only when the page's dictionary has such keys.
(function () {
    "use strict";

    const PLACES = ".lm-error, .lm-note, .lm-warning, .lm-verdict, #loramerge_merge";
    // Lists whose choices are words of ours, never names of files or presets.
    const LISTS = [
        "mode", "rank_rule", "dtype", "device", "dialect", "preview", "preset_layout", "see_axis",
        "bake_dtype", "bake_rounding", "extract_rule", "extract_parts", "extract_dtype",
    ];
    const LOOK = 250; // ms between looks for the tab, which Gradio makes late and may make again
    const LONGEST = 4000; // characters of a text that is looked at
    const MOST_SENTENCES = 8;
    const MOST_TRIES = 20;
    const MOST_KEPT = 500;
    const DEEPEST = 5;
    const SLOT = /\{\d+\}/;
    const PREDICATE = /^[はのに]/; // Japanese puts these behind the name that a sentence is about.
    const WIDE = /[\u3000-\u9fff\uff00-\uffef]/;
    const SENTENCES = /[.!?]\s+\S/;
    const CUTS = /[.!?]\s+(?=\S)| (?=\()/g;
    const SHORTEST = 20; // characters of its own that a key without a full stop needs to be a sentence

    let dictionary = null;
    let templates = [];
    let told = new Map(); // what was asked before: the facts come again with every change

    const has = (text) => Object.prototype.hasOwnProperty.call(dictionary, text);

    // Keys with slots, cut at the slots, those with most words of their own first.
    function compile(words) {
        dictionary = words;
        told = new Map();
        templates = Object.entries(words)
            .filter(([key, value]) => SLOT.test(key) && typeof value === "string")
            .map(([key, value]) => {
                const parts = key.split(SLOT);
                const longest = parts.reduce((one, other) => (other.length > one.length ? other : one), "");
                const open = new Set([...value.matchAll(/\{(\d+)\*\}/g)].map((match) => Number(match[1])));
                const length = parts.join("").length;
                const sentence = length >= SHORTEST || /[.!?)](\{\d+\})*$/.test(key);
                return { parts, longest, open, value, length, sentence };
            })
            .sort((one, other) => other.length - one.length || one.parts.length - other.parts.length);
    }

    // Where a piece stands. After the end of a sentence comes a space or nothing: a name has dots in it, too.
    function place(piece, text, from, end, backwards) {
        if (piece === "") { // Between two slots: the first is a name with its colon, or empty.
            const colon = text.indexOf(": ", from);
            return colon >= 0 && colon + 2 <= end ? colon + 2 : from;
        }
        const step = (at) => (backwards ? text.lastIndexOf(piece, at - 1) : text.indexOf(piece, at + 1));
        let at = backwards ? text.lastIndexOf(piece, end - piece.length) : text.indexOf(piece, from);
        for (; at >= from && at + piece.length <= end; at = step(at)) {
            if (!/[.!?]$/.test(piece) || !/^\S/.test(text.slice(at + piece.length))) return at;
            if (backwards && at === 0) return -1;
        }
        return -1;
    }

    // What stands in the slots, the pieces found from the left or from the right; null when it is another text.
    function slots(parts, text, backwards) {
        const first = parts[0];
        const last = parts[parts.length - 1];
        if (text.length < first.length + last.length || !text.startsWith(first) || !text.endsWith(last)) return null;
        const found = [];
        let start = first.length;
        let end = text.length - last.length;
        const middle = parts.slice(1, -1);
        for (const piece of backwards ? middle.reverse() : middle) {
            const at = place(piece, text, start, end, backwards);
            if (at < 0) return null;
            if (backwards) {
                found.unshift(text.slice(at + piece.length, end));
                end = at;
            } else {
                found.push(text.slice(start, at));
                start = at + piece.length;
            }
        }
        if (backwards) found.unshift(text.slice(start, end));
        else found.push(text.slice(start, end));
        return found;
    }

    // A slot of ours: a sentence, a piece of one, or a list of such.
    function slot(text, depth) {
        const whole = translate(text, depth, true);
        if (whole !== null) return whole;
        const pieces = text.split(/(, | and | or |; )/);
        return pieces.map((piece) => (has(piece.trim()) ? dictionary[piece.trim()] : piece)).join("");
    }

    function filled(template, text, depth, strict) {
        let reserve = null;
        for (const backwards of [false, true]) {
            const found = slots(template.parts, text, backwards);
            if (found === null) return null;
            // A name with the end of a sentence in it is more likely another sentence.
            if (strict && found.some((words, index) => !template.open.has(index) && SENTENCES.test(words))) continue;
            let known = true;
            const value = template.value;
            const made = value.replace(/( ?)\{(\d+)(\*?)\}( ?)/g, (whole, before, number, open, after, at) => {
                const words = found[Number(number)] || "";
                if (!open) return before + words + after;
                const inner = words.trim() ? slot(words, depth + 1) : "";
                known = known && (inner !== words || !inner);
                // Japanese sets foreign words apart by a space, its own not.
                const joins = (one, other) => WIDE.test(one || "") && WIDE.test(other || "");
                const next = value[at + whole.length];
                const left = joins(value[at - 1], inner[0] || next) ? "" : before;
                return left + inner + (joins(inner[inner.length - 1] || value[at - 1], next) ? "" : after);
            });
            if (known || template.parts.length < 3) return made;
            reserve = reserve === null ? made : reserve;
        }
        return reserve;
    }

    // Pieces of sentences count only in a slot that is made for them.
    function byTemplate(text, depth, strict, pieces) {
        for (const template of templates) {
            if (!text.includes(template.longest) || !(pieces || template.sentence)) continue;
            const made = filled(template, text, depth, strict);
            if (made !== null) return made;
        }
        return null;
    }

    // A sentence behind one of the first pieces of a text, with what is before it.
    function behind(text, mark, depth, fits) {
        let at = text.indexOf(mark);
        for (let tries = 0; at > 0 && tries < MOST_TRIES; tries++, at = text.indexOf(mark, at + 1)) {
            const words = text.slice(at + mark.length);
            const rest = has(words) ? dictionary[words] : byTemplate(words, depth + 1, true, false);
            if (rest !== null && fits(rest)) return text.slice(0, at) + mark + rest;
        }
        return null;
    }

    // "name.safetensors: a sentence of ours", and "name.safetensors is a program, not a LoRA."
    function afterName(text, depth) {
        const named = behind(text, ": ", depth, () => true);
        return named === null ? behind(text, " ", depth, (rest) => PREDICATE.test(rest)) : named;
    }

    function one(text, depth) {
        if (has(text)) return dictionary[text];
        const made = byTemplate(text, depth, true, false);
        return made === null && depth < DEEPEST ? afterName(text, depth) : made;
    }

    // The longest run of sentences from here that is known; a name may look like two sentences.
    function longestFrom(text, start, ends, depth) {
        for (const strict of [true, false]) {
            for (const end of [...ends].reverse()) {
                if (start === 0 && end === text.length) continue;
                const words = text.slice(start, end).trim();
                const made = strict ? one(words, depth + 1) : byTemplate(words, depth + 1, false, false);
                if (made !== null) return { told: made, end };
            }
        }
        return { told: null, end: ends[0] };
    }

    function bySentences(text, depth) {
        const cuts = [...text.matchAll(CUTS)].map((match) => match.index + (match[0] === " " ? 0 : 1));
        if (!cuts.length || cuts.length > MOST_SENTENCES) return null;
        const ends = [...cuts, text.length];
        let made = "";
        let start = 0;
        let any = false;
        while (start < text.length) {
            const found = longestFrom(text, start, ends.filter((end) => end > start), depth);
            any = any || found.told !== null;
            const words = found.told === null ? text.slice(start, found.end).trim() : found.told;
            const joined = !made || /[。．）」]$/.test(made) || (WIDE.test(made[made.length - 1]) && WIDE.test(words[0]));
            made += joined ? words : ` ${words}`;
            start = found.end;
        }
        return any ? made : null;
    }

    // A text in the page's language; null when nothing of it is known.
    function translate(text, depth, pieces) {
        const words = text.trim();
        if (!words || words.length > LONGEST || depth > DEEPEST) return null;
        if (has(words)) return dictionary[words];
        const strict = byTemplate(words, depth, true, pieces);
        if (strict !== null) return strict;
        const split = bySentences(words, depth);
        if (split !== null) return split;
        const named = afterName(words, depth);
        return named === null ? byTemplate(words, depth, false, false) : named;
    }

    // A button has a few words only, see SHORTEST.
    window.loramergeTranslate = (text, isButton) => {
        const words = window.localization || {};
        if (dictionary !== words) compile(words);
        if (!templates.length) return null;
        if (!told.has(text)) {
            if (told.size >= MOST_KEPT) told.clear();
            told.set(text, translate(text, 0, Boolean(isButton)));
        }
        return told.get(text);
    };

    // --- the page ----------------------------------------------------------------------------------------------------

    function tell(element) {
        if (element.lmTold === element.textContent) return; // Our own change.
        const words = window.loramergeTranslate(element.dataset.says || element.textContent, element.matches("button"));
        const texts = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
        // Gradio keeps hold of the text in its buttons.
        if (words !== null && texts.length === 1 && element.matches("button")) texts[0].data = words;
        else if (words !== null) element.textContent = words;
        element.lmTold = element.textContent;
    }

    function describe(image) {
        const text = image.getAttribute("alt");
        if (text && has(text)) image.setAttribute("alt", dictionary[text]);
    }

    function look(node) {
        const element = node.nodeType === Node.ELEMENT_NODE ? node : node.parentElement;
        if (!element) return;
        const around = element.closest(PLACES);
        if (around) {
            tell(around);
            return;
        }
        if (node.nodeType !== Node.ELEMENT_NODE) return;
        element.querySelectorAll(PLACES).forEach(tell);
        if (element.matches("img[alt]")) describe(element);
        element.querySelectorAll("img[alt]").forEach(describe);
    }

    let watched = null;
    const observer = new MutationObserver((changes) => {
        for (const change of changes) {
            if (change.type === "characterData") look(change.target);
            else change.addedNodes.forEach(look);
        }
    });

    function watch() {
        const tab = window.loramergeRoot && window.loramergeRoot().querySelector("#loramerge_app");
        if (!tab || tab === watched || !window.localization) return;
        compile(window.localization);
        if (!templates.length) return;
        observer.disconnect();
        watched = tab;
        look(tab);
        observer.observe(tab, { childList: true, subtree: true, characterData: true });
    }

    // A list's field holds the choice that the server knows; what people read lies over it, see style.css.
    function showChoices() {
        if (!watched || !watched.isConnected) return;
        for (const name of LISTS) {
            const field = watched.querySelector(`#loramerge_${name} .secondary-wrap input`);
            if (!field) continue;
            const place = field.parentElement;
            const shown = has(field.value) && dictionary[field.value] !== field.value ? dictionary[field.value] : "";
            if (shown && place.dataset.shown !== shown) place.dataset.shown = shown;
            if (!shown && place.dataset.shown) delete place.dataset.shown;
        }
    }

    setInterval(() => {
        watch();
        showChoices();
    }, LOOK);
})();
