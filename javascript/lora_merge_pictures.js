// Small preview pictures in the lists of LoRAs. They are asked for when a list first opens, and again after a refresh.
(function () {
    "use strict";

    const PATIENCE = 15000; // ms that an answer may take; while it is awaited Gradio changes the place, too

    let asked = 0; // when, 0 with the answer
    let text = ""; // the answer that `pictures` came from
    let pictures = {};
    let watching = []; // observers of the list that is open and of the answer

    function paint(place) {
        const now = window.loramergeData("pictures");
        if (now !== text) {
            text = now;
            pictures = now ? JSON.parse(now) : {};
        }
        const { items, nameOf } = window.loramergeLists;
        for (const item of items(place)) {
            const picture = pictures[nameOf(item)];
            const shown = picture ? `url("${picture}")` : "";
            // Gradio uses the elements again for other names.
            if (item.style.getPropertyValue("--lm-picture") === shown) continue;
            item.style.setProperty("--lm-picture", shown);
            item.classList.toggle("lm-pictured", Boolean(picture));
        }
    }

    function ask() {
        if (window.loramergeData("pictures")) {
            asked = 0;
        } else if (Date.now() - asked > PATIENCE) {
            asked = Date.now();
            window.loramergePress("pictures");
        }
    }

    function watch(field) {
        const place = field.closest("[id$=_lora], #loramerge_fill_name");
        const answer = document.querySelector("#loramerge_pictures");
        close();
        if (!place || !answer) return;
        const items = new MutationObserver(() => paint(place));
        items.observe(place, { childList: true, subtree: true, characterData: true });
        const answers = new MutationObserver(() => { ask(); paint(place); }); // A refresh empties it.
        answers.observe(answer, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-pictures"] });
        watching = [items, answers];
        ask();
        paint(place);
    }

    function close() {
        watching.forEach((observer) => observer.disconnect());
        watching = [];
    }

    document.addEventListener("focusin", (event) => {
        if (window.loramergeLists.isField(event.target)) watch(event.target);
    });
    document.addEventListener("focusout", (event) => {
        if (window.loramergeLists.isField(event.target)) close();
    });
})();
