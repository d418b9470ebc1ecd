// "See it in pictures": the form's LoRAs go into the txt2img prompt, and the WebUI's X/Y/Z plot gets an axis of ours.
(function () {
    "use strict";

    const SCRIPT = "X/Y/Z plot";
    const PLOT = "#script_txt2img_xyz_plot_";
    const LOOK = 100; // ms between looks, of which there are so many at most
    const TRIES = 100;
    const SETTLED = 20; // looks in a row at which what was written still stands

    let last = ""; // what was asked for last, with its time

    function shown(selector) {
        const root = typeof window.gradioApp === "function" ? window.gradioApp() : document;
        const element = root.querySelector(`#tab_txt2img ${selector}`);
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
        await choose(`${PLOT}x_type`, axis);
        const field = await until(() => shown(`${PLOT}x_values textarea`) || shown(`${PLOT}x_values input`));
        if (!field) return;
        field.scrollIntoView({ block: "center" });
        // With tick and axis the plot asks its server, and puts back the values that it was asked with.
        let kept = 0;
        await until(() => {
            kept = field.value === values ? kept + 1 : 0;
            if (!kept) window.loramergeType(field, values);
            return kept > SETTLED;
        });
    }

    window.loramergePlot = (text) => {
        if (!text || text === last) return;
        last = text;
        const [prompt, axis, values] = JSON.parse(text);
        plot(prompt, axis, values);
    };
})();
