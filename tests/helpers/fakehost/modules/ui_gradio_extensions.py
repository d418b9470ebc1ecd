import html
import json
import os

import gradio as gr

from modules import localization, paths_internal, scripts, shared

_original = gr.routes.templates.TemplateResponse


def _web(path):
    return html.escape(
        f"file={os.path.relpath(path) if path.startswith(os.getcwd()) else path}?{os.path.getmtime(path)}"
    )


def _head():
    words = localization.translations(shared.opts.localization)
    parts = [f"<script>window.localization = {json.dumps(words)};</script>"]
    own = os.path.join(paths_internal.script_path, "javascript", "host.js")
    # The host's own folder is among those that are listed.
    for path in dict.fromkeys([own, *(path for _, path in scripts.list_scripts("javascript", ".js"))]):
        parts.append(f'<script src="{_web(path)}"></script>')
    for _, path in scripts.list_scripts("javascript", ".mjs"):
        parts.append(f'<script type="module" src="{_web(path)}"></script>')
    return "\n".join(parts)


def reload_javascript():
    """Puts every extension's scripts and style sheets into the page that Gradio sends."""
    head = _head()
    sheets = "".join(
        f'<link rel="stylesheet" property="stylesheet" href="{_web(p)}">'
        for p in scripts.list_files_with_name("style.css")
    )

    def response(*args, **kwargs):
        answer = _original(*args, **kwargs)
        answer.body = answer.body.replace(b"</head>", f"{head}</head>".encode())
        answer.body = answer.body.replace(b"</body>", f"{sheets}</body>".encode())
        answer.init_headers()
        return answer

    gr.routes.templates.TemplateResponse = response
