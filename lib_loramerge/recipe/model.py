"""The recipe as frozen data: one LoRA of it, all of it, and one parameter of a method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lib_loramerge.errors import RecipeError
from lib_loramerge.recipe.check import (
    check_choice,
    check_flag,
    check_number,
    check_text,
    check_whole,
    nearest_hint,
    shown,
)

DTYPES = ("same", "float32", "float16", "bfloat16")
DIALECTS = ("auto", "kohya", "diffusers")
RANK_WORDS = ("same", "full")
COMPONENTS = ("unet", "te", "te1", "te2", "te3")

MAX_INPUTS = 100
MAX_RANK = 65_536
MAX_SIZE = 1_000_000.0  # MB; a terabyte is no LoRA
MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact
STRENGTH_LIMIT = 1000.0  # of strengths, block weights and x, either sign
LONGEST_NAME = 4096
LONGEST_BLOCKS = 16_384  # of lbw and lbwe
MAX_PARAMS = 64

_DEVICE = re.compile(r"auto|cpu|mps|(?:cuda|xpu)(?::[0-9]{1,3})?")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{8,64}")
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


@dataclass(frozen=True)
class Param:
    """One tunable of a merge method, told once; the tab, CLI and REST read it.

    Attributes:
        name: The field's name, ``lower_case``; ``--lower-case`` on the command line.
        default: Its value when not given; its type is the parameter's type.
        help: One sentence for the user.
        minimum: Smallest value allowed (numbers only).
        maximum: Largest value allowed (numbers only).
        choices: The values allowed (text only).
    """

    name: str
    default: float | int | str | bool
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: object) -> float | int | str | bool:
        """``value`` in the type of the default, converted from text if need be.

        Raises:
            RecipeError: Not of the type, not finite, out of the limits or not a
                choice; the message names the parameter, the limits and the value.
        """
        if isinstance(self.default, bool):
            return self._check_flag(value)
        if isinstance(self.default, int):
            # Sliders of some Gradio versions hand whole numbers over as floats.
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            low = None if self.minimum is None else int(self.minimum)
            high = None if self.maximum is None else int(self.maximum)
            return check_whole(self.name, value, low, high, text=True)
        if isinstance(self.default, float):
            return check_number(self.name, value, self.minimum, self.maximum, text=True)
        if self.choices:
            return check_choice(self.name, value, self.choices)
        return check_text(self.name, value, LONGEST_NAME)

    def range_text(self) -> str:
        """What it may be, and what it is when not given: ``"0.01 to 1, default 0.5"``."""
        if self.choices:
            limits = ", ".join(self.choices)
        elif isinstance(self.default, bool):
            limits = "yes or no"
        else:
            low = "" if self.minimum is None else f"{self.minimum:g}"
            high = "" if self.maximum is None else f"{self.maximum:g}"
            limits = (
                f"{low} to {high}"
                if low and high
                else f"from {low}"
                if low
                else f"up to {high}"
                if high
                else "any"
            )
        return f"{limits}, default {self.default}"

    def to_json(self) -> dict[str, Any]:
        """Everything about it, for programs; absent limits are null."""
        return {
            "name": self.name,
            "type": type(self.default).__name__,
            "default": self.default,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "choices": list(self.choices),
            "help": self.help,
        }

    def _check_flag(self, value: object) -> bool:
        if isinstance(value, str):
            if value.strip().lower() in _TRUE:
                return True
            if value.strip().lower() in _FALSE:
                return False
        return check_flag(self.name, value)


def check_params(params: Sequence[Param], given: Mapping[str, object], *, mode: str) -> dict[str, Any]:
    """Every parameter of a method with its given or default value, checked.

    Raises:
        RecipeError: A value that does not fit, or a name the method does not know.
    """
    known = {p.name: p for p in params}
    for name in given:
        if name not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            hint = nearest_hint(str(name), known)
            raise RecipeError(f"Mode {mode} has no parameter {shown(name)}. {takes}{hint}")
    return {p.name: p.check(given.get(p.name, p.default)) for p in params}


def parse_rank(value: object) -> int | str:
    """A rank as people write it: ``32``, ``"32"``, ``"same"`` or ``"full"``.

    Raises:
        RecipeError: For anything else.
    """
    if isinstance(value, str) and value.strip().lower() in RANK_WORDS:
        return value.strip().lower()
    try:
        return check_whole("rank", value, 1, MAX_RANK, text=True)
    except RecipeError:
        raise RecipeError(
            f"rank must be a whole number from 1 to {MAX_RANK}, same or full, got {shown(value)}."
        ) from None


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
        lbw: Block weights: a preset's name or a comma list, as written; numbers
            alone in a stored recipe.
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
        check_text("The name of a LoRA", self.name, LONGEST_NAME, padded=True)
        where = f"{shown(self.name)}: "
        for name in ("te", "unet", "te1", "te2", "te3", "x"):
            value = getattr(self, name)
            if value is not None or name in ("te", "unet"):
                _set(self, name, check_number(where + name, value, -STRENGTH_LIMIT, STRENGTH_LIMIT))
        if self.dyn is not None:
            _set(self, "dyn", check_whole(where + "dyn", self.dyn, 1, MAX_RANK))
        if self.lbw is not None:
            check_text(where + "lbw", self.lbw, LONGEST_BLOCKS)
            if ":" in self.lbw:
                raise RecipeError(
                    f"{where}lbw must be a preset's name or a comma list, got {shown(self.lbw)}."
                )
        if self.lbwe is not None:
            check_text(where + "lbwe", self.lbwe, LONGEST_BLOCKS)
        if self.hash is not None and not (isinstance(self.hash, str) and _HASH.fullmatch(self.hash)):
            raise RecipeError(f"{where}hash must be 8 to 64 digits 0-9a-f, got {shown(self.hash)}.")

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

    Attributes:
        inputs: The LoRAs, at least one, at most :data:`MAX_INPUTS`.
        mode: Name of the merge method.
        params: Values of the method's parameters; checked against the method when planned.
        rank: Rank of every layer; ``"same"`` the largest of the inputs, ``"full"`` lossless.
        conv_rank: Rank of convolutions instead of ``rank``.
        retain: Smallest rank that keeps this fraction of each layer's Frobenius norm, 0 < F <= 1.
        size: Best file of at most this many MB (1,000,000 bytes).
        dtype: What is saved; ``"same"`` is the widest of the inputs.
        device: Where the arithmetic runs.
        seed: Seeds every random choice.
        base: Checkpoint, for the adapter kinds that need one.
        dialect: Key names of the merged file.
        skip_unsupported: Leave out, and report, what cannot be merged.
    """

    inputs: tuple[LoraInput, ...]
    mode: str = "svd"
    params: Mapping[str, float | int | str | bool] = field(default_factory=dict, hash=False)
    rank: int | str = "same"
    conv_rank: int | None = None
    retain: float | None = None
    size: float | None = None
    dtype: str = "same"
    device: str = "auto"
    seed: int = 0
    base: str | None = None
    dialect: str = "auto"
    skip_unsupported: bool = False

    def __post_init__(self) -> None:
        self._check_inputs()
        if not (isinstance(self.mode, str) and _WORD.fullmatch(self.mode)):
            raise RecipeError(f"mode must be the name of a merge method, got {shown(self.mode)}.")
        self._check_params()
        self._check_rank()
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("dialect", self.dialect, DIALECTS)
        if not (isinstance(self.device, str) and _DEVICE.fullmatch(self.device)):
            raise RecipeError(
                f"device must be auto, cpu, cuda, cuda:N, mps, xpu or xpu:N, got {shown(self.device)}."
            )
        _set(self, "seed", check_whole("seed", self.seed, 0, MAX_SEED))
        if self.base is not None:
            check_text("base", self.base, LONGEST_NAME)
        check_flag("skip_unsupported", self.skip_unsupported)

    def _check_inputs(self) -> None:
        if isinstance(self.inputs, (str, LoraInput)) or not isinstance(self.inputs, Sequence):
            raise RecipeError(f"inputs must be a list of LoRAs, got {shown(self.inputs)}.")
        if not 1 <= len(self.inputs) <= MAX_INPUTS:
            raise RecipeError(f"A recipe takes from 1 to {MAX_INPUTS} LoRAs, got {len(self.inputs)}.")
        for given in self.inputs:
            if not isinstance(given, LoraInput):
                raise RecipeError(f"inputs must be a list of LoRAs, got {shown(given)} in it.")
        _set(self, "inputs", tuple(self.inputs))

    def _check_params(self) -> None:
        if not isinstance(self.params, Mapping):
            raise RecipeError(f"params must be names with values, got {shown(self.params)}.")
        if len(self.params) > MAX_PARAMS:
            raise RecipeError(f"params must be at most {MAX_PARAMS}, got {len(self.params)}.")
        for name, value in self.params.items():
            if not (isinstance(name, str) and _WORD.fullmatch(name)):
                raise RecipeError(f"params: {shown(name)} is no parameter's name.")
            if isinstance(value, str):
                check_text(name, value, LONGEST_NAME)
            elif not isinstance(value, bool):
                check_number(name, value)
        _set(self, "params", dict(self.params))

    def _check_rank(self) -> None:
        if not (isinstance(self.rank, str) and self.rank in RANK_WORDS):
            if isinstance(self.rank, str):
                raise RecipeError(
                    f"rank must be a whole number from 1 to {MAX_RANK}, same or full, got {shown(self.rank)}."
                )
            _set(self, "rank", parse_rank(self.rank))
        if self.conv_rank is not None:
            _set(self, "conv_rank", check_whole("conv_rank", self.conv_rank, 1, MAX_RANK))
        if self.retain is not None:
            _set(self, "retain", check_number("retain", self.retain, 0, 1))
            if self.retain == 0:
                raise RecipeError("retain must be a number above 0 and at most 1, got 0.")
        if self.size is not None:
            _set(self, "size", check_number("size", self.size, 0, MAX_SIZE))
            if self.size == 0:
                raise RecipeError(f"size must be a number of MB above 0 and at most {MAX_SIZE:.0f}, got 0.")
        self._check_one_rank_rule()

    def _check_one_rank_rule(self) -> None:
        """``retain`` and ``size`` choose every rank themselves; nothing else may."""
        rules = [n for n in ("retain", "size") if getattr(self, n) is not None]
        if rules and self.rank != "same":
            rules.append("rank")
        if rules and self.conv_rank is not None:
            rules.append("conv_rank")
        if len(rules) > 1:
            raise RecipeError(f"{' and '.join(rules)} exclude each other: give one rule for the rank.")


INPUT_FIELDS = tuple(f.name for f in fields(LoraInput))
RECIPE_FIELDS = tuple(f.name for f in fields(MergeRecipe))
