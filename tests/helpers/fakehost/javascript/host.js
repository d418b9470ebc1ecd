// What extensions may call in a WebUI's page, and its translation by exact text.
function gradioApp() {
    return document;
}

function switch_to_txt2img() {
    gradioApp().querySelector('#tabs').querySelectorAll('button')[0].click();
}

const uiCallbacks = {loaded: [], update: [], after: []};
function onUiLoaded(callback) { uiCallbacks.loaded.push(callback); }
function onUiUpdate(callback) { uiCallbacks.update.push(callback); }
function onAfterUiUpdate(callback) { uiCallbacks.after.push(callback); }

function fakeTranslateText(node) {
    const parent = node.parentElement;
    if (!parent || ['SCRIPT', 'STYLE', 'TEXTAREA'].includes(parent.nodeName)) return;
    const found = window.localization[node.textContent.trim()];
    if (found !== undefined) node.textContent = found;
}

function fakeTranslate(node) {
    if (Object.keys(window.localization || {}).length === 0) return;
    if (node.nodeType === Node.TEXT_NODE) fakeTranslateText(node);
    if (node.nodeType !== Node.ELEMENT_NODE) return;
    for (const name of ['title', 'placeholder']) {
        const found = window.localization[node[name]];
        if (found !== undefined) node[name] = found;
    }
    const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    for (let text = walker.nextNode(); text; text = walker.nextNode()) fakeTranslateText(text);
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
        // At once, as the WebUI does, and only what is new.
        records.forEach((record) => record.addedNodes.forEach(fakeTranslate));
        clearTimeout(timer);
        timer = setTimeout(() => uiCallbacks.after.forEach((callback) => callback()), 200);
    }).observe(document, {childList: true, subtree: true});
    fakeTranslate(document.body);
});
