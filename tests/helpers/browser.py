"""Driving the LoRA Merge tab in a real browser, by what a person sees and presses."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
# ms; the machine of the tests may be busy. Nothing waits so long that goes as it should.
PATIENCE = int(os.environ.get("LORAMERGE_TEST_PATIENCE", "90000"))
TRY = PATIENCE // 15
expect.set_options(timeout=PATIENCE)
# A real extension lies below the host's data folder, which Gradio serves; the checkout lies elsewhere.
SERVED = ("--gradio-allowed-path", str(Path(__file__).resolve().parents[2]))


def fresh_form() -> dict[str, Any]:
    """The values of a form that nobody has touched."""
    from lib_loramerge.methods import METHODS
    from lib_loramerge.webui.tab import baking
    from lib_loramerge.webui.tab.controls import CONTROLS, param_control

    controls = [
        *CONTROLS,
        *baking.CONTROLS,
        *(param_control(method.name, p) for method in METHODS.values() for p in method.params),
    ]
    values = {control.name: control.options.get("value") for control in controls}
    return {**values, "mode": METHODS["svd"].label, "device": "CPU"}


# Fields that the server fills by itself while nobody has.
PROPOSED = ["name", "name_auto", "activation_text", "activation_auto"]
# Whether the server has seen the wanted form: a LoRA may have its whole label by then.
SEEN_AS_WANTED = """([wanted, proposed]) => {
    const field = document.querySelector('#loramerge_draft textarea, #loramerge_draft input');
    const seen = JSON.parse((field && field.value) || '{}');
    const same = (name) => seen[name] === wanted[name]
        || (name.endsWith('.lora') && String(seen[name]).startsWith(wanted[name] + ' \\u00b7 '))
        || (proposed.includes(name) && !(name in wanted));
    return [...Object.keys(seen), ...Object.keys(wanted)].every(same);
}"""
# Whether the server has seen the name that the form holds, mostly the last thing that is typed.
NAME_IS_SEEN = """() => {
    const value = (name) => document.querySelector(
        `#loramerge_${name} textarea, #loramerge_${name} input`).value;
    return (JSON.parse(value('draft') || '{}').name || '') === value('name');
}"""
# Whether a press reached its button.
COUNT_PRESSES = """button => {
    window.lmPresses = 0;
    button.addEventListener('click', () => { window.lmPresses += 1; }, {capture: true, once: true});
}"""


@contextmanager
def launched() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """The tab in one browser window.

    Args:
        url: Of the host's page.
        title: Of the tab in the host's row of tabs; None when the page is the tab alone.
    """

    def __init__(
        self,
        browser: Browser,
        url: str,
        *,
        title: str | None = "LoRA Merge",
        width: int = 1400,
        query: str = "",
    ) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 1000}, locale="en-US")
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_default_timeout(PATIENCE)
        # The address of the page alone has a token in it.
        self.url, self.title = url + (query.replace("?", "&") if "?" in url else query), title
        self.load()

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    # --- the page ----------------------------------------------------------------------------

    def load(self) -> None:
        """Open the page, or open it again."""
        self.page.goto(self.url)
        if self.title is not None:
            self._turn_to("tabs", self.title)
        self.page.wait_for_selector("#loramerge_merge")
        # The page's script has asked its first questions when the facts and the jobs carry a stamp.
        self.page.wait_for_selector("#loramerge_facts [data-stamp]", state="attached")
        self.page.wait_for_selector('#loramerge_jobs [data-stamp]:not([data-stamp=""])', state="attached")

    def reset(self) -> None:
        """The form as a fresh page has it, without the time that loading a page takes."""
        if self.title is None:
            self.show_page("Merge")
        self.set_form({})
        for number in range(2):
            self.expect_value(f"row{number}_lora", "")
        self.wait_for_facts("Pick a LoRA")
        self.expect_value("name", "")
        self.errors.clear()

    def set_form(self, changes: dict[str, Any]) -> None:
        """A fresh form but for ``changes``, put in as the page puts back what a reload has lost."""
        from lib_loramerge.webui.tab.asking import worth_keeping

        wanted = {**fresh_form(), **changes}
        kept = {name: value for name, value in wanted.items() if worth_keeping(name, value)}
        self.page.evaluate(
            "draft => { window.usualArgument = window.usualArgument || window.loramergeArgument;"
            " window.loramergeArgument = name => {"
            "   if (name !== 'restore') return window.usualArgument(name);"
            "   window.loramergeArgument = window.usualArgument;"
            "   return [draft]; };"
            " const e = document.getElementById('loramerge_do_restore');"
            " (e.tagName === 'BUTTON' ? e : e.querySelector('button')).click(); }",
            json.dumps(wanted),
        )
        # Gradio asks for the argument some time after the click, and the answer takes its time again.
        self.page.wait_for_function("() => window.loramergeArgument === window.usualArgument")
        self.page.wait_for_function(SEEN_AS_WANTED, arg=[kept, PROPOSED])

    def press(self, name: str) -> None:
        if name in ("merge", "try"):
            # Facts that come in just now move the button away from under the mouse.
            self.page.wait_for_function(NAME_IS_SEEN)
        button = self.page.locator(f"#loramerge_{name}").first
        button.evaluate(COUNT_PRESSES)
        # What comes in between looking where the button is and pressing there moves it away, too.
        for _ in range(3):
            button.click()
            if self.page.evaluate("() => window.lmPresses"):
                break

    def open(self, name: str) -> None:
        """Open a folded part, if it is not open."""
        head = self.page.locator(f"#loramerge_{name} .label-wrap").first
        if "open" not in (head.get_attribute("class") or "").split():
            head.click()

    def show_page(self, title: str) -> None:
        """Turn to another page of the tab."""
        self._turn_to("loramerge_tabs", title)

    def _turn_to(self, tabs: str, title: str) -> None:
        # The newest Gradio measures its tabs with copies that nobody sees.
        heads = self.page.locator(f"#{tabs} button:not([aria-hidden=true] *)")
        heads.filter(has_text=title).first.click()

    def field(self, name: str) -> Any:
        return self.page.locator(
            f"#loramerge_{name} textarea, #loramerge_{name} input:not([type=range])"
        ).first

    def value(self, name: str) -> str:
        return self.field(name).input_value()

    def text(self, name: str) -> str:
        """Text of a place, in one line."""
        return " ".join(self.page.locator(f"#loramerge_{name}").first.inner_text().split())

    def expect_text(self, name: str, text: str | re.Pattern[str]) -> None:
        expect(self.page.locator(f"#loramerge_{name}").first).to_contain_text(text, timeout=PATIENCE)

    def expect_value(self, name: str, value: str | re.Pattern[str]) -> None:
        expect(self.field(name)).to_have_value(value, timeout=PATIENCE)

    # --- the form ----------------------------------------------------------------------------

    def fill(self, name: str, value: object) -> None:
        """Type into a field and leave it."""
        field = self.field(name)
        for _ in range(3):
            field.fill(str(value))
            # What the page itself puts in between the selection and the typing stays beside what is typed.
            if not isinstance(value, str) or field.input_value() == value:
                break
        # Lists of Gradio 3 take typed text when a key is released, which filling at once does not do.
        field.dispatch_event("keyup")
        field.press("Tab")

    def choose(self, name: str, text: str) -> None:
        """Type a part of a choice into a list and click the first one that has it."""
        field = self.field(name)
        option = self.page.locator("ul.options li, ul[role=listbox] li").filter(has_text=text).first
        chosen = re.compile(re.escape(text), re.IGNORECASE)
        for _ in range(10):
            # Gradio 4 hangs the list below its field, where the window may end already.
            field.evaluate("element => element.scrollIntoView({block: 'center'})")
            field.click()
            field.fill(text)
            try:
                option.wait_for(state="attached", timeout=TRY)
                self._take(option)
                expect(field).to_have_value(chosen, timeout=TRY)
                return
            except (PlaywrightTimeout, AssertionError):
                # An answer of the server has closed the list: open it again, as a person would.
                field.blur()
        expect(field).to_have_value(chosen)

    @staticmethod
    def _take(option: Locator) -> None:
        try:
            option.click(timeout=2000)
        except PlaywrightTimeout:
            # The list of a row far down may end below the window, where a person would scroll.
            option.dispatch_event("mousedown", timeout=2000)

    def tick(self, name: str, on: bool) -> None:
        self.page.locator(f"#loramerge_{name} input[type=checkbox]").set_checked(on)

    def row(self, number: int, lora: str, strength: float | None = None) -> None:
        """Fill a row, counted from 0."""
        self.choose(f"row{number}_lora", lora)
        if strength is not None:
            self.fill(f"row{number}_strength", strength)

    def rows(self) -> list[str]:
        """What the rows that are seen hold."""
        return [
            self.value(f"row{index}_lora")
            for index in range(16)
            if self.page.locator(f"#loramerge_row{index}_line").is_visible()
        ]

    def wait_for_facts(self, text: str) -> None:
        """Until the facts of the whole tell this, which says that the server saw the form as it is."""
        self.expect_text("facts", text)

    # --- merges ------------------------------------------------------------------------------

    def merge(self, name: str | None = None) -> str:
        """Press Merge and save, wait for the end, and give the text of the result."""
        if name is not None:
            self.fill("name", name)
        before = self.shown_job()
        self.press("merge")
        try:
            self.page.wait_for_function(
                "old => { const e = document.querySelector('#loramerge_jobs [data-stamp]');"
                " const r = document.querySelector('#loramerge_result [data-job]');"
                " return e && e.dataset.state === 'idle' && r && r.dataset.job !== old; }",
                arg=before,
            )
        except PlaywrightTimeout as error:
            raise AssertionError(self.page.locator("#loramerge_app").aria_snapshot()) from error
        return self.text("result")

    def shown_job(self) -> str:
        """Which merge's end is shown."""
        result = self.page.locator("#loramerge_result .lm-result")
        return (result.first.get_attribute("data-job") or "") if result.count() else ""

    def wait_until_running(self, share: float = 0.0) -> None:
        """Until a bar is seen that has passed ``share`` percent."""
        self.page.wait_for_function(
            "share => { const e = document.querySelector('#loramerge_jobs [role=progressbar]');"
            " return e && Number(e.getAttribute('aria-valuenow')) > share; }",
            arg=share,
        )

    def draft(self) -> dict[str, Any]:
        return json.loads(self.value("draft") or "{}")
