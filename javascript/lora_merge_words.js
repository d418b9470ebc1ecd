// Translation of the library's sentences. The WebUI translates whole texts; a sentence with names and numbers in
// it comes as [key, part, ...] in data-said, and localizations/*.json holds its key: "{file} is empty." A part
// that is a sentence is a list itself and translated too; any other text stays as it is.
(function () {
    "use strict";

    // Lists whose choices are words of ours, never names of files or presets.
    const LISTS = [
        "mode", "rank_rule", "dtype", "device", "dialect", "preview", "preset_layout", "see_axis",
        "bake_dtype", "bake_rounding", "extract_rule", "extract_parts", "extract_dtype",
    ];
    const LOOK = 250; // ms between looks for the tab, which Gradio makes late and may make again
    const SLOT = /(\{\w+\})/;
    const WIDE = /[\u3000-\u9fff\uff00-\uffef]/;

    let dictionary = {};

    const has = (text) => Object.prototype.hasOwnProperty.call(dictionary, text);
    const wide = (character) => WIDE.test(character || "");

    // Japanese sets foreign words apart by a space, its own not.
    function meet(left, right) {
        if (left.endsWith(" ") && wide(left[left.length - 2]) && wide(right[0])) return left.slice(0, -1) + right;
        if (right.startsWith(" ") && wide(left[left.length - 1]) && wide(right[1])) return left + right.slice(1);
        return left + right;
    }

    function translated([key, ...parts]) {
        const slots = [...new Set(key.split(SLOT).filter((piece) => SLOT.test(piece)))];
        let made = "";
        let ours = false; // whether what stands last is a sentence, or nothing at all
        for (const piece of (has(key.trim()) ? dictionary[key.trim()] : key).split(SLOT)) {
            const at = slots.indexOf(piece);
            const part = at in parts ? parts[at] : piece;
            const inner = Array.isArray(part);
            const text = inner ? translated(part) : part;
            made = ours || inner ? meet(made, text) : made + text;
            ours = inner || (at in parts && !text);
        }
        return made.trim();
    }

    function english(said) {
        dictionary = {};
        const words = translated(said);
        dictionary = window.localization || {};
        return words;
    }

    // A sentence as data-said has it, in the page's language; null when nothing of it is known.
    window.loramergeTranslate = (said) => {
        const before = english(said);
        const words = translated(said);
        return words === before ? null : words;
    };

    // --- the page ----------------------------------------------------------------------------------------------------

    function tell(element) {
        const said = JSON.parse(element.dataset.said);
        const words = window.loramergeTranslate(said);
        const button = element.dataset.button && watched.querySelector(element.dataset.button);
        if (words === null) return;
        if (button) tellButton(button, english(said), words);
        else element.textContent = words;
    }

    // Gradio keeps hold of the text in its buttons, so a place beside says what it is made of.
    function tellButton(button, before, words) {
        const text = [...button.childNodes].find((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
        if (text && text.data.trim() === before) text.data = words;
    }

    function describe(image) {
        const text = image.getAttribute("alt");
        if (text && has(text)) image.setAttribute("alt", dictionary[text]);
    }

    function look(node) {
        if (node.nodeType === Node.TEXT_NODE && node.parentElement && node.parentElement.matches("button[id]")) {
            const text = node.data.trim();
            if (has(text) && dictionary[text] !== text) node.data = dictionary[text];
            watched.querySelectorAll(`[data-button="#${node.parentElement.id}"]`).forEach(tell);
        }
        if (node.nodeType !== Node.ELEMENT_NODE) return;
        for (const [what, change] of [["[data-said]", tell], ["img[alt]", describe]]) {
            if (node.matches(what)) change(node);
            node.querySelectorAll(what).forEach(change);
        }
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
        if (!tab || tab === watched || !Object.keys(window.localization || {}).length) return;
        observer.disconnect();
        dictionary = window.localization;
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
