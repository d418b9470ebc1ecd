// Translation of the page when no WebUI does it: by exact text, in the browser's language or ?lang=ja_JP.
(function () {
    "use strict";
    const asked = new URLSearchParams(location.search).get("lang");
    const wanted = (asked || navigator.language || "").replace("-", "_");
    const languages = Object.keys(window.loramergeWords);
    const language = languages.find((name) => name === wanted) ||
        languages.find((name) => wanted && name.split("_")[0] === wanted.split("_")[0]);
    const words = language ? window.loramergeWords[language] : null;
    window.getTranslation = window.getTranslation || ((text) => (words ? words[text] : undefined));
    if (!words) return;
    window.localization = words; // Where a WebUI has them; the tab's own script looks there.
    document.documentElement.lang = language.split("_")[0];

    function translate(node) {
        if (node.nodeType === Node.TEXT_NODE) {
            const shown = node.textContent.trim();
            const text = words[shown];
            const parent = node.parentElement;
            // The same in both languages: putting it in would be a change to look at, again and again.
            if (!text || text === shown || !parent) return;
            if (!["SCRIPT", "STYLE", "TEXTAREA"].includes(parent.tagName)) node.textContent = text;
            return;
        }
        if (node.nodeType !== Node.ELEMENT_NODE) return;
        for (const name of ["placeholder", "title"]) {
            const text = node.getAttribute(name) && words[node.getAttribute(name)];
            if (text) node.setAttribute(name, text);
        }
        node.childNodes.forEach(translate);
    }

    translate(document.body);
    new MutationObserver((changes) => {
        for (const change of changes) {
            if (change.type === "characterData") translate(change.target);
            else change.addedNodes.forEach(translate);
        }
    }).observe(document.body, { childList: true, subtree: true, characterData: true });
})();
