"""The recipe as frozen data: one LoRA of it, and all of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from lib_loramerge.errors import RecipeError, Sentence
from lib_loramerge.recipe.check import (
    LONGEST_NAME,
    check_choice,
    check_flag,
    check_number,
    check_text,
    check_whole,
    shown,
)
from lib_loramerge.recipe.settings import Setting, setting

DTYPES = ("same", "float32", "float16", "bfloat16")
DIALECTS = {"auto": "Automatic", "kohya": "kohya (all WebUIs)", "diffusers": "diffusers"}
# Each has a module in ``hosts``, which is not imported for its name: a WebUI's start needs no base model.
_FIRST = ("a1111", "forge", "reforge", "neo", "sdnext", "comfyui", "diffusers")
HOSTS = (
    *_FIRST,
    *sorted(
        path.stem
        for path in (Path(__file__).parents[1] / "hosts").glob("[a-z]*.py")
        if path.stem not in _FIRST
    ),
)
NORMALIZE = ("none", "strongest")
RANK_WORDS = ("auto", "same", "full")
COMPONENTS = ("unet", "te", "te1", "te2", "te3")

MAX_INPUTS = 100
MAX_RANK = 65_536
MAX_SIZE = 1_000_000.0  # MB; a terabyte is no LoRA
MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
STRENGTH_LIMIT = 1000.0  # of strengths, block weights and x, either sign
LONGEST_BLOCKS = 16_384  # of lbw and lbwe
MAX_PARAMS = 64

_DEVICE = re.compile(r"auto|cpu|mps|(?:cuda|xpu)(?::[0-9]{1,3})?")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{8,64}")
# What may follow the colon of an entry of block weights by name; checked whole when it is resolved.
WEIGHT = re.compile(r"[+\-.0-9][.0-9eE+\-]*|R|U|X(?:[+-][.0-9]+)?")


def parse_rank(value: object) -> int | str:
    """A rank as people write it: ``32``, ``"32"``, ``"auto"``, ``"same"`` or ``"full"``.

    Raises:
        RecipeError: For anything else.
    """
    if isinstance(value, str) and value.strip().lower() in RANK_WORDS:
        return value.strip().lower()
    try:
        return check_whole("rank", value, 1, MAX_RANK, text=True)
    except RecipeError:
        raise _no_rank(value) from None


def _no_rank(value: object) -> RecipeError:
    words = ", ".join(RANK_WORDS[:-1])
    return RecipeError(
        "rank must be a whole number from 1 to {most}, {words} or {auto}, got {value}.",
        MAX_RANK,
        words,
        RANK_WORDS[-1],
        shown(value),
    )


def _check_rank(value: object) -> int | str:
    # Text is the command line's; a recipe holds a number or one of the words.
    if isinstance(value, str) and value not in RANK_WORDS:
        raise _no_rank(value)
    return parse_rank(value)


def _check_mode(value: object) -> str:
    if not (isinstance(value, str) and _WORD.fullmatch(value)):
        raise RecipeError("mode must be the name of a merge method, got {value}.", shown(value))
    return value


def _check_device(value: object) -> str:
    if not (isinstance(value, str) and _DEVICE.fullmatch(value)):
        raise RecipeError(
            "device must be auto, cpu, cuda, cuda:N, mps, xpu or xpu:N, got {value}.", shown(value)
        )
    return value


def _check_normalize(value: object) -> str | None:
    return None if check_choice("normalize", value, NORMALIZE) == NORMALIZE[0] else NORMALIZE[1]


def _check_retain(value: object) -> float:
    share = check_number("retain", value, 0, 1)
    if share == 0:
        raise RecipeError("retain must be a number above 0 and at most 1, got 0.")
    return share


def _check_keep(value: object) -> float:
    share = check_number("keep", value, 0, 1)
    if share == 0:
        raise RecipeError("keep must be a number above 0 and at most 1, got 0.")
    return share


def check_size(value: object) -> float:
    """Megabytes that a file may have."""
    size = check_number("size", value, 0, MAX_SIZE)
    if size == 0:
        raise RecipeError("size must be a number of MB above 0 and at most {most}, got 0.", f"{MAX_SIZE:.0f}")
    return size


def _set(instance: object, name: str, value: object) -> None:
    """Store a converted value on a frozen dataclass while it is being made."""
    object.__setattr__(instance, name, value)


@dataclass(frozen=True)
class LoraInput:
    """One LoRA of a recipe: what one ``<lora:...>`` tag says.

    Attributes:
        name: A LoRA name as the prompt has it, ``folder/name``, or a path.
        te: Strength of the text encoders; any sign, 1 is what ``<lora:name:1>`` applies.
        unet: Strength of the denoiser.
        te1: Strength of the first text encoder instead of ``te``.
        te2: The same for the second.
        te3: The same for the third.
        dyn: Only the first ``dyn`` ranks are used, with the scale unchanged.
        lbw: Block weights: a preset's name, a comma list or entries by name, as
            written; numbers alone in a stored recipe.
        lbwe: Elemental rules: a preset's name; in a stored recipe the literal
            ``blocks:elements:ratio,...``.
        x: What ``X`` entries of the block weights stand for; ``None`` is 1.
        hash: ``sshs_model_hash`` of the file, in a stored recipe.
    """

    name: str
    te: float = 1.0
    unet: float = 1.0
    te1: float | None = None
    te2: float | None = None
    te3: float | None = None
    dyn: int | None = None
    lbw: str | None = None
    lbwe: str | None = None
    x: float | None = None
    hash: str | None = None

    def __post_init__(self) -> None:
        # A file's name may end with a space; only text (a prompt) cannot say so.
        check_text(Sentence("The name of a LoRA"), self.name, LONGEST_NAME, padded=True)
        where = f"{shown(self.name)}: "
        for name in ("te", "unet", "te1", "te2", "te3", "x"):
            value = getattr(self, name)
            if value is not None or name in ("te", "unet"):
                _set(self, name, check_number(where + name, value, -STRENGTH_LIMIT, STRENGTH_LIMIT))
        if self.dyn is not None:
            _set(self, "dyn", check_whole(where + "dyn", self.dyn, 1, MAX_RANK))
        if self.lbw is not None:
            check_text(where + "lbw", self.lbw, LONGEST_BLOCKS)
            ends = [end.strip() for part in self.lbw.split(",") for end in part.split(":")[1:]]
            if not all(map(WEIGHT.fullmatch, ends)):
                raise RecipeError(
                    "{where}lbw must be a preset's name, a comma list or BLOCKS:WEIGHT entries, got {lbw}.",
                    where,
                    shown(self.lbw),
                )
        if self.lbwe is not None:
            check_text(where + "lbwe", self.lbwe, LONGEST_BLOCKS)
        if self.hash is not None and not (isinstance(self.hash, str) and _HASH.fullmatch(self.hash)):
            raise RecipeError(
                "{where}hash must be 8 to 64 digits 0-9a-f, got {hash}.", where, shown(self.hash)
            )

    def strength(self, component: str) -> float:
        """The strength that applies to a part of the model, before block weights.

        Args:
            component: ``"unet"``, ``"te"``, ``"te1"``, ``"te2"`` or ``"te3"``. The only
                text encoder of SD1 and SD2, ``"te"``, is their first.
        """
        if component == "unet":
            return self.unet
        if component not in COMPONENTS:
            raise ValueError(f"unknown component {component!r}")
        own = self.te1 if component == "te" else getattr(self, component)
        return self.te if own is None else own


@dataclass(frozen=True)
class MergeRecipe:
    """All settings of one merge, as data; the front ends and merged files share it.

    A new setting is one field here: the command line, JSON, the schema of REST and
    the stored recipe are made from :data:`SETTINGS`.

    Attributes:
        inputs: The LoRAs, at least one, at most :data:`MAX_INPUTS`.
        params: Values of the method's parameters; checked against the method when planned.
    """

    inputs: tuple[LoraInput, ...]
    mode: str = setting(
        "svd",
        _check_mode,
        "merge method, see `loramerge methods`",
        metavar="MODE",
        commands=("merge", "bake", "advise"),
    )
    params: Mapping[str, float | int | str | bool] = field(default_factory=dict, hash=False)
    rank: int | str = setting(
        "auto",
        _check_rank,
        "a number, same (the largest of the inputs), full (lossless), or auto: full where the result has a "
        "bounded rank, same in modes that choose single elements",
        metavar="N",
        words=RANK_WORDS,
        minimum=1,
        commands=("merge", "advise", "subtract"),
    )
    conv_rank: int | None = setting(
        None,
        lambda value: check_whole("conv_rank", value, 1, MAX_RANK),
        "rank of k x k convolutions instead of rank",
        kind=int,
        metavar="N",
        minimum=1,
        commands=("merge", "advise", "subtract"),
    )
    retain: float | None = setting(
        None,
        _check_retain,
        "smallest ranks that keep this share of each layer's Frobenius norm, 0 < F <= 1",
        kind=float,
        metavar="F",
        commands=("merge", "advise", "subtract"),
    )
    size: float | None = setting(
        None,
        check_size,
        "best ranks for a file of at most MB x 1,000,000 bytes",
        kind=float,
        metavar="MB",
        commands=("merge", "advise", "subtract"),
    )
    keep: float | None = setting(
        None,
        _check_keep,
        "smallest ranks with which every LoRA keeps this share of itself, 0 < F <= 1",
        kind=float,
        metavar="F",
        commands=("merge",),
    )
    fair: bool = setting(
        False,
        lambda value: check_flag("fair", value),
        "with a rank or a size: what is cut is chosen so that the LoRA kept least is kept most",
        kind=bool,
        commands=("merge",),
        label="Fair to the weaker LoRA",
    )
    normalize: str | None = setting(
        None,
        _check_normalize,
        "strongest lowers all strengths by one factor until the sum is no stronger than its strongest LoRA",
        words=NORMALIZE,
        metavar="none|strongest",
        commands=("merge", "bake", "compare", "advise"),
        label="Strength of the sum",
        labels={"": "As the strengths say", "strongest": "That of the strongest LoRA"},
    )
    seed: int = setting(
        0,
        lambda value: check_whole("seed", value, 0, MAX_SEED),
        "for random methods and random block weights",
        kind=int,
        metavar="N",
        minimum=0,
        commands=("merge", "bake", "advise"),
    )
    base: str | None = setting(
        None,
        lambda value: check_text("base", value, LONGEST_NAME),
        "base model, for adapters that change it in proportion",
        metavar="CHECKPOINT",
        commands=("merge", "convert", "compare", "advise"),
    )
    dtype: str = setting(
        "same",
        lambda value: check_choice("dtype", value, DTYPES),
        "precision of the file; same is the widest of the inputs",
        words=DTYPES,
        commands=("merge", "convert", "advise", "subtract"),
        label="Precision",
        labels={
            "same": "Same as the inputs",
            "float16": "float16 (half)",
            "bfloat16": "bfloat16",
            "float32": "float32 (full)",
        },
    )
    device: str = setting(
        "auto",
        _check_device,
        "where the arithmetic runs: auto, cpu, cuda, cuda:N, mps or xpu",
        metavar="DEVICE",
        commands=("merge",),
    )
    dialect: str = setting(
        "auto",
        lambda value: check_choice("dialect", value, DIALECTS),
        "how layers are named in the file; auto is right for all WebUIs",
        words=tuple(DIALECTS),
        commands=("merge", "convert", "extract", "subtract"),
        label="Names in the file",
        labels=DIALECTS,
    )
    host: str | None = setting(
        None,
        lambda value: check_choice("host", value, HOSTS),
        "program that the file is for: its spelling, and only what it loads",
        words=HOSTS,
        commands=("merge", "convert"),
        option="for",
        label="For",
        labels={
            "": "Any program",
            "a1111": "A1111",
            "forge": "Forge",
            "reforge": "reForge",
            "neo": "Forge Neo",
            "sdnext": "SD.Next",
            "comfyui": "ComfyUI",
            "diffusers": "diffusers",
        },
    )
    base_model: str | None = setting(
        None,
        lambda value: check_text("base_model", value, LONGEST_NAME),
        "base model that the LoRAs are for, where their layers leave it open",
        metavar="NAME",
        commands=("merge", "convert", "inspect", "compare", "advise"),
        label="Base model",
    )
    skip_unsupported: bool = setting(
        False,
        lambda value: check_flag("skip_unsupported", value),
        "leave out what cannot be merged, and list it",
        kind=bool,
        commands=("merge", "bake", "convert", "extract", "subtract"),
        label="Leave out what cannot be merged",
    )

    def __post_init__(self) -> None:
        self._check_inputs()
        self._check_params()
        for name, entry in SETTINGS.items():
            value = getattr(self, name)
            if value is not None or not entry.optional:
                _set(self, name, entry.check(value))
        self._check_one_rank_rule()

    def _check_inputs(self) -> None:
        if isinstance(self.inputs, (str, LoraInput)) or not isinstance(self.inputs, Sequence):
            raise RecipeError("inputs must be a list of LoRAs, got {value}.", shown(self.inputs))
        if not 1 <= len(self.inputs) <= MAX_INPUTS:
            raise RecipeError(
                "A recipe takes from 1 to {most} LoRAs, got {count}.", MAX_INPUTS, len(self.inputs)
            )
        for given in self.inputs:
            if not isinstance(given, LoraInput):
                raise RecipeError("inputs must be a list of LoRAs, got {value} in it.", shown(given))
        _set(self, "inputs", tuple(self.inputs))

    def _check_params(self) -> None:
        if not isinstance(self.params, Mapping):
            raise RecipeError("params must be names with values, got {value}.", shown(self.params))
        if len(self.params) > MAX_PARAMS:
            raise RecipeError("params must be at most {most}, got {count}.", MAX_PARAMS, len(self.params))
        for name, value in self.params.items():
            if not (isinstance(name, str) and _WORD.fullmatch(name)):
                raise RecipeError("params: {name} is no parameter's name.", shown(name))
            if isinstance(value, str):
                check_text(name, value, LONGEST_NAME)
            elif not isinstance(value, bool):
                check_number(name, value)
        _set(self, "params", dict(self.params))

    @property
    def own_ranks(self) -> str | None:
        """The rule that chooses the rank of each layer from its singular values, where there is one."""
        return next((n for n in ("retain", "size", "keep") if getattr(self, n) is not None), None)

    def _check_one_rank_rule(self) -> None:
        """``retain``, ``size`` and ``keep`` choose every rank themselves; nothing else may."""
        rules = [n for n in ("retain", "size", "keep") if getattr(self, n) is not None]
        if rules and self.rank not in ("auto", "same"):
            rules.append("rank")
        if rules and self.conv_rank is not None:
            rules.append("conv_rank")
        if len(rules) > 1:
            raise RecipeError("{rules} exclude each other: give one rule for the rank.", " and ".join(rules))
        if self.fair and (self.retain is not None or (not rules and self.rank in ("auto", "full"))):
            raise RecipeError(
                "fair chooses what a rank or a size cuts off: give a rank (a number or same) or a size."
            )


INPUT_FIELDS = tuple(f.name for f in fields(LoraInput))
RECIPE_FIELDS = tuple(f.name for f in fields(MergeRecipe))
SETTINGS: Mapping[str, Setting] = {
    f.name: replace(f.metadata["setting"], name=f.name)
    for f in fields(MergeRecipe)
    if "setting" in f.metadata
}
