"""What becomes of every name that a host accepts: read by us, written again, looked up in the host's list.

``python -m tests.helpers.names_judge --renew`` writes what is known to be wrong or refused, so that the test
fails when it grows and when it shrinks.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from lib_loramerge.dialects import output_key, output_parts, parse_file
from lib_loramerge.dialects.slots import split_key
from lib_loramerge.errors import LoraMergeError
from tests.helpers.accepted import MODELS, accepted

KNOWN = Path(__file__).resolve().parents[1] / "data" / "names_known.json"

_SPELLINGS = re.compile(
    r"lora_unet_|lora_prior_unet_|lora_transformer_|lycoris_|diffusion_model\.|transformer\.|"
    r"unet\.base_model\.model\.|unet\.|base_model\.model\.|lora_(?:prior_)?te[123]?_|"
    r"text_encoders\.\w+\.|text_encoder(?:_\d)?\.|"
)
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_WORDS_OF_TEXT_ENCODERS = ("lora_te", "lora_prior_te", "text_encoder")


def parameter(target: str) -> str:
    """The parameter that a target means, without the rows of it."""
    return re.sub(r"(\[\d+:\d+\])?~?$", "", target)


def rows_of(target: str) -> tuple[int, int] | None:
    """The rows of the parameter that a target means, None for all."""
    found = re.search(r"\[(\d+):(\d+)\]", target)
    return (int(found[1]), int(found[2])) if found else None


@cache
def spellings(model: str) -> Mapping[str, Mapping[str, str]]:
    """Spelling to its names and their targets, of one model; each parameter once in a spelling.

    Apart stand the biases (``diffusion_model.X.bias``, which some hosts take as a layer of its own) and
    second names under one prefix. ComfyUI has one table for all of the Flux family: there Flux.2 has fused
    layers under their names, the others their parts.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    taken: set[tuple[str, str]] = set()
    names = sorted(accepted("comfyui").names(model).items(), reverse=model in ("flux1", "chroma", "longcat"))
    split = {(_prefix(name), parameter(target)) for name, target in names if rows_of(target)}
    whole = {(_prefix(name), target) for name, target in names if not rows_of(target)}
    for name, target in names:
        prefix = _prefix(name)
        path = parameter(target).removeprefix("diffusion_model.").removesuffix(".weight")
        spelling = prefix or "bare"
        if prefix in ("lora_unet_", "diffusion_model.") and name[len(prefix) :] not in (
            path, path.replace(".", "_"),
        ):  # fmt: skip
            spelling += " other"
        elif name.endswith(".bias"):
            spelling += " bias"
        fused = (prefix, parameter(target)) in whole & split and prefix != "diffusion_model."
        if fused and bool(rows_of(target)) == model.startswith("flux2"):
            continue
        if (prefix, target) not in taken:
            taken.add((prefix, target))
            found[spelling][name] = target
    return found


def _prefix(name: str) -> str:
    return _SPELLINGS.match(name)[0]  # type: ignore[index]


def header(model: str, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Tensors of an adapter of rank 4 that changes all that the names lead to, norms and parameters whole."""
    shapes, tensors = accepted("comfyui").shapes(model), {}
    for name, target in names.items():
        shape, rows = shapes.get(parameter(target)), rows_of(target)
        if shape is None:
            continue
        if parameter(target).endswith(".weight") and len(shape) > 1:
            out = rows[1] - rows[0] if rows else shape[0]
            ones = (1,) * (len(shape) - 2)
            ending = "_lora.{}.weight" if ".processor." in name else ".lora_{}.weight"
            up, down = ("B", "A") if "." in name and ".processor." not in name else ("up", "down")
            tensors[name + ending.format(up)] = (out, 4, *ones)
            tensors[name + ending.format(down)] = (4, *shape[1:])
        else:
            tensors[f"{name}.{'w_norm' if parameter(target).endswith('.weight') else 'diff'}"] = shape
    return tensors


def company(model: str, spelling: str) -> Mapping[str, str]:
    """Names of the denoiser that stand beside those of a text encoder in a file of this spelling."""
    if not spelling.startswith(_WORDS_OF_TEXT_ENCODERS):
        return {}
    prefix = "lora_unet_" if spelling.startswith("lora_") else "diffusion_model."
    return spellings(model).get(prefix, {})


def fate(architecture: str, model: str, spelling: str) -> dict[str, list[str]]:
    """Names, as patterns, that are lost or refused when a file of one spelling is read and written again.

    ``lost``: written under a name that the host does not find, or that means another parameter.
    ``refused``: not understood, so that a merge refuses the file or lists the tensor. ``taken for``:
    the base model that the file is mistaken for.
    """
    names = spellings(model)[spelling]
    if " " in spelling:
        own, rest = {parameter(target) for target in names.values()}, spellings(model)[spelling.split()[0]]
        others = {name: target for name, target in rest.items() if parameter(target) not in own}
    else:
        others = company(model, spelling)
    try:
        parsed = parse_file(header(model, {**others, **names}), {})
    except LoraMergeError as error:
        return {"refused": [str(error)]}
    result: dict[str, set[str]] = defaultdict(set)
    for key in parsed.unknown:
        split = split_key(key)
        if split is not None and split.layer in names:
            result["refused"].add(_NUMBER.sub("{}", split.layer))
    style = parsed.style if parsed.architecture.opaque else None
    for part in parsed.parts:
        target = names.get(part.spelling)
        if target is None:
            continue
        slot = next((slot for slot in ("up", "w_norm", "diff") if slot in part.slots), "")
        if not finds_again(parsed.architecture.id, model, part.layer, target, slot, style):
            result["lost"].add(_NUMBER.sub("{}", part.spelling))
    if parsed.architecture.id not in (architecture, "unknown"):
        result["taken for"].add(parsed.architecture.id)
    return {what: sorted(found) for what, found in sorted(result.items())}


def finds_again(architecture: str, model: str, layer: str, target: str, slot: str, style: str | None) -> bool:
    """Whether all that we write for a layer leads the host to the parameter again."""
    known = accepted("comfyui").names(model)
    try:
        parts = output_parts(architecture, layer, "auto")
    except LoraMergeError:
        return False
    for prefix, _ in parts:
        split = split_key(output_key(prefix, slot, "auto", style))
        if split is None or parameter(known.get(split.layer, "")) != parameter(target):
            return False
    return True


def cases() -> Iterator[tuple[str, str, str]]:
    """Base model, model of the facts, spelling."""
    for architecture, models in MODELS.items():
        for model in models:
            for spelling in spellings(model):
                yield architecture, model, spelling


def known() -> dict[str, dict[str, list[str]]]:
    """What is known to be lost or refused, by model and spelling."""
    return json.loads(KNOWN.read_text(encoding="utf-8"))


def renew() -> None:
    """Write down what is lost and refused now."""
    found = {f"{model} {spelling}": fate(of, model, spelling) for of, model, spelling in cases()}
    text = json.dumps({case: fates for case, fates in found.items() if fates}, indent=1, sort_keys=True)
    KNOWN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__" and sys.argv[1:] == ["--renew"]:
    renew()
