"""The table of what each host reads of the files that we write, as ``docs/COMPATIBILITY.md`` has it.

``python -m tests.helpers.compatibility`` writes it. What a host accepts is looked up in
``tests/accepted_names``; for diffusers, which those do not cover, the record of
``lib_loramerge.hosts`` stands (a test of its own judges its names by diffusers' models).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lib_loramerge.dialects import output_key, output_parts, output_style, parse_file
from lib_loramerge.dialects.slots import split_key
from lib_loramerge.errors import LoraMergeError
from lib_loramerge.hosts import HOSTS
from lib_loramerge.models import ARCHITECTURES
from tests.helpers.accepted import MODELS, accepted
from tests.helpers.names_judge import header, spellings

TARGET = Path(__file__).resolve().parents[2] / "docs" / "COMPATIBILITY.md"
KINDS = {"up": "LoRA, LoHa, LoKr, `diff`", "w_norm": "norms", "diff": "parameters"}

_HEAD = """# What each program reads of the files that LoRA Merge writes

Made by `python -m tests.helpers.compatibility`; a test checks that it is current. Every layer of the model is
written in the spelling named, and its name looked up among those that the program's own code accepts: all, a
count of those it finds, or – for none; empty where it lacks the model. Adapters of every kind become LoRA
(or `diff`, when kept whole) under the same name, so they share a row; norms are `w_norm`, parameters those
tensors of a model that are no layer's weight. Text encoders are not counted.

`auto` is the default. `--for PROGRAM` chooses the row that the program reads best, with its endings, and
leaves out what it does not read.

"""


def _layers(architecture: str) -> tuple[str, list[tuple[str, str]]] | None:
    """Model of the facts, and (layer, slot) for all that its ComfyUI names of the denoiser lead to."""
    hosts = [accepted(host).models for host in HOSTS if host != "diffusers"]
    model = max(MODELS[architecture], key=lambda name: sum(name in models for models in hosts))
    found: dict[str, str] = {}
    for spelling in ("lora_unet_", "diffusion_model."):
        names = spellings(model).get(spelling, {})
        try:
            parsed = parse_file(header(model, names), {})
        except LoraMergeError:
            continue
        if parsed.architecture.id != architecture:
            continue
        for part in parsed.parts:
            slot = next((slot for slot in KINDS if slot in part.slots), "")
            if part.spelling in names and slot and part.rows is None:
                found.setdefault(part.layer, slot)
    return (model, sorted(found.items())) if found else None


def _reads(host: str, architecture: str, model: str, layer: str, slot: str, dialect: str) -> bool:
    record, facts = HOSTS[host], _facts(host, model)
    if facts is None and slot != "up":
        return False  # the loader of diffusers, which SD.Next uses for these too
    dotted_endings = output_style(architecture, dialect) != "lora_up.weight+alpha"
    try:
        parts = output_parts(architecture, layer, dialect)
    except LoraMergeError:
        return False
    for prefix, _ in parts:
        split = split_key(output_key(prefix, slot, dialect))
        name = split.layer if split is not None else prefix
        if not record.finds(architecture, layer, name) or (facts is not None and name not in facts):
            return False
        if "." in name and dotted_endings and architecture in record.kohya_endings:
            return False
    return True


def _facts(host: str, model: str) -> Mapping[str, str] | None:
    """Names that the host accepts of a model, None where diffusers' loader does it."""
    if host == "diffusers" or model not in accepted(host).models:
        return None
    return accepted(host).names(model)


def rows() -> Iterator[list[str]]:
    """Model, spelling, kind, and a cell for each host."""
    for architecture in MODELS:
        found = _layers(architecture) if architecture in ARCHITECTURES else None
        if found is None or ARCHITECTURES[architecture].opaque:
            continue
        model, layers = found
        for dialect in ("auto", "diffusers"):
            for slot, kind in KINDS.items():
                of_kind = [layer for layer, its in layers if its == slot]
                if not of_kind:
                    continue
                cells = []
                for host in HOSTS:
                    if architecture not in HOSTS[host].base_models:
                        cells.append("")
                        continue
                    count = sum(_reads(host, architecture, model, x, slot, dialect) for x in of_kind)
                    cells.append(
                        "all" if count == len(of_kind) else f"{count}/{len(of_kind)}" if count else "–"
                    )
                if any(cell not in ("", "–") for cell in cells):
                    yield [ARCHITECTURES[architecture].label, f"`{dialect}`", kind, *cells]


def text() -> str:
    """The page."""
    columns = ["base model", "spelling", "what", *(host.label for host in HOSTS.values())]
    lines = [columns, ["---"] * len(columns), *rows()]
    versions = "\n".join(f"* {host.label}: {host.read_from}" for host in HOSTS.values())
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_HEAD}{table}\n\nRead from these versions:\n\n{versions}\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
