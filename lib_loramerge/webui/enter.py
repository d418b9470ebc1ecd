"""The plain page that those see who are not let in: where the address is, or a field for the password."""

from __future__ import annotations

import html
import json

WORDS = {
    "ja": {
        "title": "LoRA Merge",
        "address": "このページは、loramerge ui を起動したターミナルに表示されるアドレス"
        "（?token= を含むもの）で開いてください。",
        "password": "パスワード",
        "open": "開く",
        "wrong": "パスワードが違います。",
    },
    "en": {
        "title": "LoRA Merge",
        "address": "Open this page by the address that the terminal shows in which loramerge ui was started; "
        "it ends in ?token=...",
        "password": "Password",
        "open": "Open",
        "wrong": "The password is wrong.",
    },
}

_PAGE = """<!doctype html>
<html lang="{language}"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 36rem; margin: 15vh auto; padding: 0 1rem; }}
input, button {{ font: inherit; padding: .3rem .6rem; }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""

_FORM = """<form><label>{password} <input type="password" autocomplete="current-password" autofocus required>
</label> <button>{open}</button><p role="alert" hidden>{wrong}</p></form>
<script>
document.querySelector("form").addEventListener("submit", async (event) => {{
    event.preventDefault();
    const body = JSON.stringify({{ password: document.querySelector("input").value }});
    const headers = {{ "Content-Type": "application/json" }};
    const answer = await fetch("/loramerge/enter", {{ method: "POST", headers, body }});
    if (answer.ok) location.reload();
    else document.querySelector("[role=alert]").hidden = false;
}});
</script>"""


def enter_page(
    accepted: str | None,
    status: int,
    *,
    ask: bool = False,
    go_to: str | None = None,
    more: tuple[tuple[bytes, bytes], ...] = (),
) -> tuple[int, tuple[tuple[bytes, bytes], ...], bytes]:
    """Status, headers and body of the page.

    Args:
        accepted: The browser's ``Accept-Language``.
        ask: Show a field for the password.
        go_to: Leave for this place at once.
        more: Further headers.
    """
    language = "ja" if (accepted or "").strip().lower().startswith("ja") else "en"
    words = {name: html.escape(text) for name, text in WORDS[language].items()}
    if go_to is not None:
        target = json.dumps(go_to).replace("<", "\\u003c")
        body = f"<script>location.replace({target})</script>"
    else:
        body = _FORM.format(**words) if ask else "<p>{address}</p>".format(**words)
    page = _PAGE.format(language=language, title=words["title"], body=body)
    return status, ((b"content-type", b"text/html; charset=utf-8"), *more), page.encode()
