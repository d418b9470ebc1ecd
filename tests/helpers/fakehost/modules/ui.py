import html
import json

import gradio as gr

from modules import call_queue, processing, script_callbacks, scripts, shared
from modules.shared_cmd_options import cmd_opts


def create_ui():
    """txt2img with its prompt boxes, the tabs of the extensions, and the settings."""
    for kind in script_callbacks.callbacks["ui_settings"]:
        kind[1]()
    with gr.Blocks(analytics_enabled=False) as pictures_page:
        prompt = gr.Textbox(
            label="Prompt", elem_id="txt2img_prompt", show_label=False, lines=3, elem_classes=["prompt"]
        )
        gr.Textbox(label="Negative prompt", elem_id="txt2img_neg_prompt", show_label=False, lines=3)
        generate = gr.Button("Generate", elem_id="txt2img_generate")
        pictures = gr.Textbox(label="Pictures", elem_id="txt2img_pictures", lines=9)
        with gr.Row(elem_id="image_buttons_txt2img", elem_classes=["image-buttons"]):
            gr.Button("Open folder")
        chosen = gr.HTML(elem_id="html_info_txt2img", elem_classes=["infotext"])
        every = gr.Textbox(visible=False, elem_id="generation_info_txt2img")
        inputs = scripts.scripts_txt2img.setup_ui()
        generate.click(fn=make_pictures, inputs=[prompt, *inputs], outputs=[pictures, chosen, every])
        # The real page is longer than a window, too.
        gr.HTML('<div style="height: 1500px"></div>')
    with gr.Blocks(analytics_enabled=False) as settings:
        for key, info in shared.opts.data_labels.items():
            _setting(key, info)
    interfaces = [
        (pictures_page, "txt2img", "txt2img"),
        *script_callbacks.call("ui_tabs"),
        (settings, "Settings", "settings"),
    ]
    with gr.Blocks(theme=gr.themes.Default(), analytics_enabled=False, title="Stable Diffusion") as demo:
        with gr.Tabs(elem_id="tabs"):
            for interface, label, ident in interfaces:
                if label not in shared.opts.hidden_tabs:
                    with gr.TabItem(label, id=ident, elem_id=f"tab_{ident}"):
                        interface.render()
        if cmd_opts.sdnext:
            # Its ModernUI shows the page that makes pictures beside the tab of an extension.
            gr.Textbox(label="Prompt", elem_id="control_prompt", show_label=False, lines=3)
        gr.HTML("", elem_id="footer")
    if not cmd_opts.no_gradio_queue:
        demo.queue(64)
    return demo


def make_pictures(prompt, *args):
    """The infotexts of the pictures, and that of the last one as if it were chosen.

    What a script raises is said in their place.
    """
    p = processing.StableDiffusionProcessingTxt2Img(prompt, scripts.scripts_txt2img, args)
    with call_queue.queue_lock:
        try:
            processed = p.scripts.run(p, *args) or processing.process_images(p)
        except Exception as error:
            return f"{type(error).__name__}: {error}", "", ""
        finally:
            p.close()
    texts = [str(text) for text in processed.infotexts]
    shown = "<p>" + "<br>\n".join(map(html.escape, texts[-1].split("\n"))) + "</p>"
    return "\n\n".join(texts), shown, json.dumps({"infotexts": texts})


def _setting(key, info):
    value = getattr(shared.opts, key)
    kind = info.component
    if kind is None:
        kind = {bool: gr.Checkbox, str: gr.Textbox, int: gr.Number, float: gr.Number}.get(
            type(info.default), gr.JSON
        )
    arguments = info.component_args() if callable(info.component_args) else (info.component_args or {})
    kind(label=info.label, value=value, elem_id=f"setting_{key}", **arguments)
