// "See it in pictures": the form's LoRAs go into the txt2img prompt, and the WebUI's X/Y/Z plot gets an axis of ours.
// Back again: a button below the pictures saves the merge that made the chosen one.
(function () {
    "use strict";

    const SCRIPT = "X/Y/Z plot";
    const PLOT = "#script_txt2img_xyz_plot_";
    const LOOK = 100; // ms between looks, of which there are so many at most
    const TRIES = 100;
    const OFFER = 2000; // ms between looks for the buttons below the pictures
    const SETTLED = 80; // looks for as long as an answer of the plot's server may come

    const PAGES = ["txt2img", "img2img"]; // that have pictures

    let last = ""; // what was asked for last, with its time

    const root = () => window.loramergeRoot();
    const say = (text) => (window.localization && window.localization[text]) || text;

    function shown(selector) {
        const element = root().querySelector(`#tab_txt2img ${selector}`);
        return element && element.offsetParent !== null ? element : null;
    }

    function until(look) {
        return new Promise((resolve) => {
            let tries = 0;
            const timer = setInterval(() => {
                const found = look();
                if (!found && ++tries < TRIES) return;
                clearInterval(timer);
                resolve(found);
            }, LOOK);
        });
    }

    async function choose(id, text) {
        const field = await until(() => shown(`${id} input`));
        if (!field || field.value === text) return field;
        field.focus();
        await new Promise((done) => window.loramergePick(field, text, done));
        field.blur();
        return until(() => field.value === text);
    }

    async function plot(prompt, axis, values) {
        if (typeof window.switch_to_txt2img === "function") window.switch_to_txt2img();
        const area = await until(() => shown("#txt2img_prompt textarea"));
        if (!area) return;
        const tags = prompt.match(/<lora:[^>]*>/g) || [];
        window.loramergeType(area, tags.reduce((text, tag) => window.loramergeWithTag(text, tag, []), area.value));
        if (!await choose("#script_list", SCRIPT)) return;
        // Text in place of the plot's lists: an axis with choices takes a typed list, too.
        const typed = await until(() => shown(`${PLOT}csv_mode input`));
        if (typed && !typed.checked) typed.click();
        // The grid alone has no picture to choose.
        const single = shown(`${PLOT}include_lone_images input`);
        if (single && !single.checked) single.click();
        await choose(`${PLOT}x_type`, axis);
        const field = await until(() => shown(`${PLOT}x_values textarea`) || shown(`${PLOT}x_values input`));
        if (!field) return;
        field.scrollIntoView({ block: "center" });
        // With tick and axis the plot asks its server, which may put back the values that it was asked with.
        const before = field.value;
        let kept = 0;
        await until(() => {
            if (field.value === before) window.loramergeType(field, values);
            else if (field.value !== values) return true; // The person writes there.
            return ++kept > SETTLED;
        });
    }

    // Of the chosen picture. What stands below the pictures of a plot is at first that of another than the grid.
    function infotext(page) {
        const all = root().querySelector(`#generation_info_${page} textarea`);
        try {
            const texts = JSON.parse(all.value).infotexts;
            return texts[texts.length > 1 ? window.selected_gallery_index() : 0] || "";
        } catch (error) {
            const info = root().querySelector(`#html_info_${page}`);
            return info ? info.innerText.trim() : "";
        }
    }

    function keep(page) {
        window.loramergePress("keep", infotext(page));
        const tabs = [...root().querySelectorAll("#tabs > .tab-nav > button, #tabs > div > .tab-nav > button")];
        const ours = tabs.find((tab) => tab.textContent.trim() === say("LoRA Merge"));
        if (ours) ours.click();
    }

    function offerToKeep(page) {
        const like = root().querySelector(`#image_buttons_${page} button`);
        if (!like || !root().querySelector("#loramerge_do_keep")) return false;
        if (root().querySelector(`#loramerge_keep_${page}`)) return true;
        const button = document.createElement("button");
        button.id = `loramerge_keep_${page}`;
        button.className = like.className;
        button.textContent = "💾 LoRA";
        button.title = say("Saves the merged LoRA that made the chosen picture.");
        button.addEventListener("click", () => keep(page));
        like.parentElement.append(button);
        return true;
    }

    // Gradio makes the page late, and makes it again after a lost connection.
    setInterval(() => PAGES.forEach(offerToKeep), OFFER);

    window.loramergePlot = (text) => {
        if (!text || text === last) return;
        last = text;
        const [prompt, axis, values] = JSON.parse(text);
        plot(prompt, axis, values);
    };
})();
