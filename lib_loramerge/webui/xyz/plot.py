"""The pictures of a plot: their prompts are rewritten, and what tags cannot say is merged and goes again."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import Cancelled, LoraMergeError, Sentence
from ...recipe.text import tag_bodies
from ..host.webui import host_module
from ..origins import stamp_of
from ..trial import Made, Trials
from . import tags
from .axes import Axis, check_values
from .cell import Cell, words

if TYPE_CHECKING:
    from ...merge import Shared
    from ...recipe import MergeRecipe
    from ..host import Host
    from .theirs import Picture

# Of the host's object for one picture: the cell, and whether the end of its plot is known.
CELL, BOUND = "loramerge_cell", "loramerge_bound"
INFOTEXT = "LoRA Merge"


class Plot:
    """What the axes of one process share. The host makes one picture at a time.

    Merges of cells are trials apart from those of the tab, which a plot must not push out. They live until
    the plot ends, however it ends.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.trials = Trials(host.register_trial, host.unregister_trial)
        self._shared: Shared | None = None
        self._plots = 0  # that have begun
        atexit.register(self.end)

    def end(self) -> None:
        """Removes what the plot has merged."""
        with suppress(Exception):  # The host's lists, perhaps while it ends.
            self._shared = None
            self.trials.remove_all()

    # What the host's plot calls

    def apply(self, axis: Axis, p: Picture, value: object) -> None:
        """Notes a value in the picture that is to be made.

        ``p`` is a shallow copy of the plot's own: what it holds must not be changed in place.
        """
        setattr(p, CELL, axis.change(getattr(p, CELL, None) or Cell(), value))

    def confirm(self, axis: Axis, p: Picture, values: Sequence[object]) -> None:
        """Checks the values of an axis before the first picture.

        Raises:
            RuntimeError: In words for a person, as the host shows it.
        """
        try:
            self._until_closed(p)
            prompt = prompt_of(p)
            for cell in check_values(axis, prompt, values):
                rewritten = cell.rewritten(prompt)
                if cell.merges and tag_bodies(rewritten):
                    # A parameter is judged with the mode of another axis, which is not known yet.
                    alone = cell if not cell.params else replace(cell, params={}, rank="full")
                    self.host.plan(alone.recipe(rewritten, self.host.settings()), self.host.restricted())
        except LoraMergeError as error:
            raise RuntimeError(self.host.shown(str(error))) from None

    # What the host calls before each picture

    def before_process(self, p: Picture) -> None:
        """Rewrites the prompts of a picture that an axis of ours has a value for."""
        cell = getattr(p, CELL, None)
        if cell is None:
            return
        setattr(p, CELL, None)  # A copy for a second pass has its prompt already.
        try:
            self._until_closed(p)
            _dissolve_styles(p)
            for attribute in ("prompt", "hr_prompt"):
                given = getattr(p, attribute, None)
                if isinstance(given, list):
                    setattr(p, attribute, [self._rewritten(p, cell, text) for text in given])
                elif isinstance(given, str) and given:
                    setattr(p, attribute, self._rewritten(p, cell, given))
        except Cancelled:
            return  # The host has been interrupted and makes no picture.
        except LoraMergeError as error:
            _fail(p, self.host.shown(str(error)))
        except Exception as error:  # A bug of ours must not look like a picture of the recipe.
            self.host.log("a picture of a plot failed unexpectedly", error)
            _fail(
                p,
                Sentence(
                    "Unexpected error ({kind}: {error}). The console tells more.", type(error).__name__, error
                ),
            )

    def _rewritten(self, p: Picture, cell: Cell, prompt: str) -> str:
        prompt = cell.rewritten(prompt)
        if not cell.merges or not tag_bodies(prompt):
            return prompt
        recipe = cell.recipe(prompt, self.host.settings())
        name = self._merged(recipe)
        # A new one: the plot's own is shared by all of its pictures.
        known = getattr(p, "extra_generation_params", None) or {}
        p.extra_generation_params = {**known, INFOTEXT: words(recipe)}
        return tags.changed(prompt, lambda number, _: f"{name}:1" if number == 1 else None)

    def _merged(self, recipe: MergeRecipe) -> str:
        """The name of a trial of this recipe, merged unless this plot has it."""
        from ...merge import Shared, run_merge  # Not at the WebUI's start, see extension.py.

        strict = self.host.restricted()
        plan = self.host.plan(recipe, strict)
        base = self.host.base_path(recipe.base, strict)
        paths = [*(source.path for source in plan.sources), *([base] if base else [])]
        made = Made(plan.recipe, tuple((path, stamp_of(path)) for path in paths))
        trial = self.trials.find(made)
        if trial is None:
            path = self.trials.new_path()
            state = getattr(host_module("shared"), "state", None)
            self._shared = self._shared or Shared()
            report = run_merge(
                plan,
                path,
                cancel=lambda: bool(getattr(state, "interrupted", False)),
                shared=self._shared,
            )
            trial = self.trials.add(path, recipe, made, report)
        return trial.name

    def _until_closed(self, p: Picture) -> None:
        """Makes the plot end with the host's object for it, closed or gone after the last picture.

        Python may notice long afterwards that an object is gone: what the next plot has made stays then.
        """
        if getattr(p, BOUND, False):
            return
        setattr(p, BOUND, True)  # Copies, which are the pictures, have it too.
        self.end()  # The host makes one plot at a time, so the one before is over.
        self._plots += 1
        number = self._plots

        def ended() -> None:
            if number == self._plots:
                self.end()

        weakref.finalize(p, ended)
        close = getattr(p, "close", None)
        if close is not None:

            def closed() -> None:
                try:
                    close()
                finally:
                    ended()

            p.close = closed


def prompt_of(p: Picture) -> str:
    """The prompt of a plot, with what its styles add."""
    prompt = getattr(p, "prompt", "")
    if isinstance(prompt, list):
        prompt = prompt[0] if prompt else ""
    return _styled(p, prompt, "apply_styles_to_prompt")


def _styled(p: Picture, prompt: str, how: str) -> str:
    apply = getattr(getattr(host_module("shared"), "prompt_styles", None), how, None)
    styles = getattr(p, "styles", None)
    if apply is None or not styles:
        return prompt
    try:
        return str(apply(prompt, styles))
    except Exception:  # A fork with other arguments: the tags of styles are then the host's alone.
        return prompt


def _dissolve_styles(p: Picture) -> None:
    """Puts the styles into the prompts where they bring LoRAs, which the axes are to reach."""
    prompt = getattr(p, "prompt", None)
    if not isinstance(prompt, str):
        return
    styled = _styled(p, prompt, "apply_styles_to_prompt")
    if len(tag_bodies(styled)) == len(tag_bodies(prompt)):
        return
    p.prompt = styled
    if getattr(p, "hr_prompt", ""):
        p.hr_prompt = _styled(p, p.hr_prompt, "apply_styles_to_prompt")
    for attribute in ("negative_prompt", "hr_negative_prompt"):
        given = getattr(p, attribute, None)
        if isinstance(given, str) and (given or attribute == "negative_prompt"):
            setattr(p, attribute, _styled(p, given, "apply_negative_styles_to_prompt"))
    p.styles = []


def _fail(p: Picture, sentence: str) -> None:
    """Makes the host fail at this picture, with our sentence: it goes on with the next cell.

    What is raised here and now it only writes to its console. It fails where it prepares the sampling, as
    it then has everything that the grid's infotext needs.
    """
    if hasattr(p, "comment"):
        p.comment(sentence)

    def init(*args: object, **kwargs: object) -> None:
        raise RuntimeError(sentence)

    p.init = init
