"""Everything the tab tells before a merge, from headers alone. Knows no Gradio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoraMergeError, Sentence
from . import baking, render, sidecar
from .form import NO_PREVIEW, Form, Reading, is_random, may_overwrite, mode_name, read_form, user_metadata
from .host import ConflictError
from .merge_jobs import check_beside, check_no_input
from .origins import changed_sources

if TYPE_CHECKING:
    from ..merge import Source
    from ..methods import MergeMethod
    from .analyse import Looks
    from .host import Host


@dataclass(frozen=True)
class Facts:
    """What the page shows for the form as it is now.

    Attributes:
        rows: Row number to the HTML below it: what the file is, or what is wrong.
        plan: HTML of what will come out.
        problems: Control to the sentence beside it.
        taken: Why the name cannot be used without overwriting, as it is right after a merge.
        replaced: Files that the merge would replace; Overwrite is ticked.
        overwrite: Whether Overwrite is ticked, and was ticked for these LoRAs.
        name: A free name for the result.
        activation_text: The union of the inputs' activation texts.
        presets: Row number to the presets of block weights that fit its base model.
        previews: Names of inputs that have a preview picture.
        needs_base: Whether some input needs the base checkpoint.
        base_models: Labels to choose the base model from, where the LoRAs leave it open.
        random: Whether the seed matters.
        float8: Whether the checkpoint that is baked into has float8 layers that change.
        ema: Whether it has EMA weights.
        ready: Whether Merge would be accepted.
    """

    rows: Mapping[int, str]
    plan: str
    problems: Mapping[str, str]
    taken: str = ""
    replaced: tuple[str, ...] = ()
    overwrite: bool = False
    name: str = ""
    activation_text: str = ""
    presets: Mapping[int, list[str]] = field(default_factory=dict)
    previews: tuple[str, ...] = (NO_PREVIEW,)
    needs_base: bool = False
    base_models: tuple[str, ...] = ()
    random: bool = False
    ready: bool = False
    float8: bool = False
    ema: bool = False

    def reasons(self, trial: bool) -> list[str]:
        """Everything that stops a merge of this form; a trial needs no name."""
        found = [text for name, text in self.problems.items() if not (trial and name == "name")]
        return list(dict.fromkeys([*found, *([self.taken] if self.taken and not trial else [])]))


@dataclass
class _Draft:
    rows: dict[int, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    sources: dict[int, Source] = field(default_factory=dict)
    taken: str = ""
    replaced: tuple[str, ...] = ()
    overwrite: bool = False
    looks: Looks | None = None


def gather(form: Form, host: Host, methods: Mapping[str, MergeMethod], looks: Looks | None = None) -> Facts:
    """Look at every row and at the whole; never raises for what a user typed.

    Args:
        looks: What was analysed before.
    """
    reading = read_form(form, host, methods)
    overwrite = may_overwrite(form, host.loras())
    draft = _Draft(problems=dict(reading.problems), overwrite=overwrite, looks=looks)
    bake = baking.is_bake(form)
    if not bake:
        _check_base(form, host, draft)
    _look_at_rows(reading, host, draft, _chosen_model(form, draft))
    outlook = _outlook(form, reading, host, draft)
    paths = [source.path for source in draft.sources.values()]
    proposed = ""
    if reading.inputs:
        propose = host.propose_name if not bake else partial(baking.propose_name, form, host=host)
        proposed = propose(reading.inputs)
    _check_name(form, proposed, host, draft)
    return Facts(
        rows={**draft.rows, **_row_problems(draft.problems, host)},
        plan=outlook.html,
        problems=draft.problems,
        taken=draft.taken,
        replaced=draft.replaced,
        overwrite=draft.overwrite,
        name=proposed,
        activation_text=sidecar.union(paths).activation_text,
        presets=_presets(draft.sources, host),
        previews=(NO_PREVIEW, *_with_preview(reading, draft)),
        needs_base=not bake
        and (any(source.needs_base for source in draft.sources.values()) or bool(form.get("base"))),
        base_models=_base_models(draft.sources.values()),
        random=is_random(reading, methods, mode_name(form.get("mode"), methods), host.presets().weights),
        ready=reading.recipe is not None and not draft.problems and not draft.taken,
        float8=outlook.float8,
        ema=outlook.ema,
    )


def _chosen_model(form: Form, draft: _Draft) -> str | None:
    """Id of the base model that the form names; None where it leaves that to the files."""
    from ..merge.base_model import model_id  # Not at the WebUI's start, see extension.py.

    name = str(form.get("base_model") or "").strip()
    try:
        return model_id(name) if name else None
    except LoraMergeError as error:
        draft.problems["base_model"] = str(error)
        return None


def _base_models(sources: Iterable[Source]) -> tuple[str, ...]:
    """What the files fit, where one does not decide or two of them differ; all, where it is unknown."""
    from ..models import ARCHITECTURES

    fitting = [source.fitting for source in sources]
    if len(set(fitting)) < 2 and all(len(labels) == 1 for labels in fitting):
        return ()
    if all(fitting):
        return tuple(dict.fromkeys(label for labels in fitting for label in labels))
    return tuple(record.label for name, record in ARCHITECTURES.items() if name != "unknown")


def _presets(sources: Mapping[int, Source], host: Host) -> dict[int, list[str]]:
    from ..blocks import fitting
    from ..merge.plan import block_map_of

    known = host.presets()
    return {row: fitting(known, block_map_of(source)) for row, source in sources.items()}


def _look_at_rows(reading: Reading, host: Host, draft: _Draft, chosen: str | None) -> None:
    from ..merge.plan import block_weights  # Not at the WebUI's start, see extension.py.
    from ..merge.sources import open_source

    presets = host.presets()
    for row, given in zip(reading.rows, reading.inputs, strict=True):
        try:
            draft.sources[row] = open_source(host.find(given.name), chosen)
            block_weights(given, draft.sources[row], presets, "0", [])
        except LoraMergeError as error:
            draft.problems[f"row{row}"] = str(error)
    first = next(iter(draft.sources.values()), None)
    for row, source in draft.sources.items():
        fits = first is None or not first.fitting or not set(first.fitting).isdisjoint(source.fitting)
        draft.rows[row] = render.row_facts(source, fits, sidecar.shown_preview(source.path, host))


def _row_problems(problems: Mapping[str, str], host: Host) -> dict[int, str]:
    return {
        int(name.removeprefix("row")): render.error_box(host.shown(text))
        for name, text in problems.items()
        if name.startswith("row") and name != "row" and name[3:].isdigit()
    }


def _outlook(form: Form, reading: Reading, host: Host, draft: _Draft) -> baking.Facts:
    """What will come out, a LoRA or a checkpoint."""
    if not baking.is_bake(form) or reading.recipe is None or draft.problems:
        return baking.Facts(_plan(reading, host, draft))
    found = baking.facts(form, reading.recipe, host)
    if found.problem:
        draft.problems["plan"] = found.problem
    return found


def _plan(reading: Reading, host: Host, draft: _Draft) -> str:
    """The facts of the whole merge, or the sentence that says why there will be none."""
    if not reading.inputs and not draft.problems:
        return f'<div class="lm-quiet">{render.say("Pick a LoRA to see here what will come out.")}</div>'
    if reading.recipe is None or draft.problems:
        text = render.say("Something in the form needs a look; it is marked in red.")
        return f'<div class="lm-quiet">{text}</div>'
    try:
        plan = host.plan(reading.recipe)
    except LoraMergeError as error:
        draft.problems["plan"] = str(error)
        return render.error_box(host.shown(str(error)))
    warnings = []
    free = host.free_bytes()
    if free is not None and free < plan.predicted_bytes:
        warnings.append(
            Sentence(
                "The disk of the LoRA folder has only {free} left, and the file may take {size}.",
                render.size_text(free),
                render.size_text(plan.predicted_bytes),
            )
        )
    from . import forecast  # Not at the WebUI's start, see extension.py.

    expected = forecast.seconds(plan)
    less = forecast.less_of(plan, None if draft.looks is None else draft.looks.known(plan))
    return render.plan_facts(
        plan,
        [*_changed(reading, host, draft), *warnings],
        forecast.notes(plan, None if less is None or "error" in less else less),
        expected if expected >= forecast.WORTH_TELLING else 0.0,
        less,
    )


def _changed(reading: Reading, host: Host, draft: _Draft) -> list[str]:
    """What a recipe was made with and is another file now, as far as is known without reading files whole."""
    inputs = zip(reading.rows, reading.inputs, strict=True)
    looked_at = [(given, draft.sources[row]) for row, given in inputs if row in draft.sources]
    return changed_sources(
        (given, source.path, host.source_hashes.find(source.path, source.header.metadata))
        for given, source in looked_at
    )


def _check_name(form: Form, proposed: str, host: Host, draft: _Draft) -> None:
    name = str(form.get("name") or "").strip()
    if not name or (name == form.get("name_auto") and name != proposed):
        return  # About to be replaced by the new proposal.
    if baking.is_bake(form):
        problem, draft.taken, draft.replaced = baking.check_name(form, host, draft.overwrite)
        draft.problems |= {"name": problem} if problem else {}
        return
    try:
        path = host.check_name(name, str(form.get("subfolder") or ""), draft.overwrite)
        check_no_input(path, (source.path for source in draft.sources.values()))
        data, preview = user_metadata(form), _picture(form, host)
        if not draft.overwrite:
            check_beside(path, data, preview)
        draft.replaced = tuple(
            file.name for file in (path, *sidecar.taken(path, data, preview)) if file.exists()
        )
    except ConflictError as error:
        draft.taken = str(error)
    except LoraMergeError as error:
        draft.problems["name"] = str(error)


def _picture(form: Form, host: Host) -> Path | None:
    """The preview picture that would be copied beside the result."""
    chosen = str(form.get("preview") or "")
    return None if chosen in ("", NO_PREVIEW) else sidecar.preview_of(host.find(chosen))


def _check_base(form: Form, host: Host, draft: _Draft) -> None:
    try:
        host.base_path(str(form.get("base") or ""))
    except LoraMergeError as error:
        draft.problems["base"] = str(error)


def _with_preview(reading: Reading, draft: _Draft) -> list[str]:
    return [
        given.name
        for row, given in zip(reading.rows, reading.inputs, strict=True)
        if row in draft.sources and sidecar.preview_of(draft.sources[row].path) is not None
    ]
