// What extensions may call in a WebUI's page, and its translation by exact text.
function gradioApp() {
    return document;
}

const uiCallbacks = {loaded: [], update: [], after: []};
function onUiLoaded(callback) { uiCallbacks.loaded.push(callback); }
function onUiUpdate(callback) { uiCallbacks.update.push(callback); }
function onAfterUiUpdate(callback) { uiCallbacks.after.push(callback); }

function fakeTranslate(root) {
    const words = window.localization || {};
    if (Object.keys(words).length === 0) return;
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const parent = node.parentElement;
        if (!parent || ['SCRIPT', 'STYLE', 'TEXTAREA'].includes(parent.nodeName)) continue;
        const found = words[node.textContent.trim()];
        if (found !== undefined) node.textContent = found;
    }
    for (const element of root.querySelectorAll('[title],[placeholder]')) {
        for (const name of ['title', 'placeholder']) {
            const found = words[element.getAttribute(name)];
            if (found !== undefined) element.setAttribute(name, found);
        }
    }
}

document.addEventListener('DOMContentLoaded', function() {
    let started = false;
    let timer = null;
    new MutationObserver(function(records) {
        if (!started && document.querySelector('#txt2img_prompt')) {
            started = true;
            uiCallbacks.loaded.forEach((callback) => callback());
        }
        uiCallbacks.update.forEach((callback) => callback(records));
        clearTimeout(timer);
        timer = setTimeout(function() {
            fakeTranslate(document.body);
            uiCallbacks.after.forEach((callback) => callback());
        }, 200);
    }).observe(document, {childList: true, subtree: true});
});
