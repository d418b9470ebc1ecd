# ruff: noqa: E501
"""docs/FORMATS.md and docs/HOSTS.md, printed from the tables that the code works with.

``python -m tests.helpers.facts`` writes them; a test checks that they are current.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lib_loramerge.adapters import ADAPTERS, endings
from lib_loramerge.adapters.groups import COMPANIONS, MAGNITUDES
from lib_loramerge.dialects import DIALECTS
from lib_loramerge.hosts import HOSTS, Host
from lib_loramerge.models import ARCHITECTURES, Architecture
from lib_loramerge.refused import KINDS
from tests.helpers.readme_tables import table

DOCS = Path(__file__).resolve().parents[2] / "docs"
_MADE = (
    "Made by `python -m tests.helpers.facts` from the code's own tables; a test checks that it is current."
)


def _code(words: Iterable[str]) -> str:
    return " ".join(f"`{word}`" for word in words)


def _labels(models: Iterable[str]) -> str:
    chosen = set(models)
    return ", ".join(record.label for record in ARCHITECTURES.values() if record.id in chosen) or "–"


# --- FORMATS.md ---------------------------------------------------------------------------

_FORMATS = f"""# What LoRA files hold

{_MADE}

A key is the name of a layer and, after it, the ending of a slot: which tensor of the layer it is. A layer's name is
a beginning, by which the spellings differ, and the path of the layer in the base model's checkpoint or in its
diffusers pipeline, with dots or with underscores in place of them. All layers get one canonical name,
`lora_unet_` or `lora_te..._` and the flattened path of the checkpoint.

What a layer changes is `scale * delta`, and `delta` is the formula of its kind. The scale is `alpha / rank`, where
`rank` is the number of rows of the down factor (of `w2`, else `w1`, for LoKr); it is 1 without an alpha and where the
kind has no rank, and a stored `scale` stands in place of both. Convolutions are unfolded to (out, in * kh * kw). Of a
residual (`bias`, or `bias_indices` `bias_values` `bias_size`) the sum with the product is scaled.

"""


# The delta of each kind at scale 1; W is the base model's weight, * by element, x the Kronecker product.
_FORMULAS = {
    "lora": "up down",
    "tucker": "sum over m of up_n mid_nm down_m, for each place of the kernel",
    "loha": "(w1_a w1_b) * (w2_a w2_b)",
    "loha_tucker": "the same, each product with its core t1, t2 as in Tucker LoCon",
    "lokr": "w1 x w2, with w1 = w1_a w1_b and w2 = w2_a w2_b where they are factored",
    "dora": "g * (W + s delta) - W, g = magnitude / norm of (W + s delta) along the other axes; s and delta are those of its LoRA, LoHa or LoKr",
    "glora": "W a1 a2 + b1 b2; in the old order W a2 a1 + b2 b1",
    "oft": "(R - 1)^T W in each block of rows, R = (1 + Q) (1 - Q)^-1, Q = blocks - blocks^T, whose norm alpha * out limits; rows times rescale",
    "oft_diag": "(R - 1)^T W, R as it is stored",
    "boft": "R_m ... R_1 W - W, R_i on rows regrouped so that 2^i blocks are mixed",
    "ia3": "W * w along the inputs, or along the outputs",
    "full": "diff",
    "norm": "w_norm",
    "bias": "none; diff_b is added to the bias",
}


def _base_model(record: Architecture) -> tuple[str, ...]:
    if record.unet is not None:
        unet = record.unet
        widths = "/".join(str(unet.channels * width) for width in unet.widths)
        shape = f"U-Net of {widths} channels, reads {unet.context}"
    else:
        sizes = [
            f"{size.label + ': ' if size.label else ''}"
            + " ".join(f"{name}={value}" for name, value in size.dims.items())
            for size in record.sizes
        ]
        shape = "; ".join(sizes)
    encoders = ", ".join(
        f"`{part}` {encoder.comfy}, {encoder.layers} x {encoder.width}"
        + "".join(f" (or {name}, {width} wide)" for name, width in encoder.sizes.items())
        for part, encoder in record.encoders.items()
    )
    return record.label, f"`{record.id}`", _code(record.words), shape, encoders, record.spelling


def formats_page() -> str:
    """The whole page."""
    spellings = (
        (entry.label, _code(entry.parts) or "–", f"`{entry.example}`") for entry in DIALECTS.values()
    )
    kinds = (
        (kind.label, kind.keys, _FORMULAS.get(kind.name, ""), kind.does, kind.source)
        for kind in ADAPTERS.values()
    )
    owners = {slot: kind.label for kind in reversed(ADAPTERS.values()) for slot in kind.slots}
    along = COMPANIONS | MAGNITUDES
    slots = (
        (f"`{slot}`", "any" if slot in along else owners.get(slot, "refused"), _code(spelled))
        for slot, spelled in endings().items()
    )
    # A kind's name begins with its article.
    refused = ((kind.name.split(" ", 1)[1], f"{kind.reason[:1].upper()}{kind.reason[1:]}.") for kind in KINDS)
    models = (_base_model(record) for record in ARCHITECTURES.values() if not record.opaque)
    return "\n".join(
        (
            _FORMATS + "## Beginnings of names\n",
            table(("Written by", "Begins", "A key of it"), spellings),
            "## Kinds of adapters\n",
            table(
                (
                    "Kind",
                    "Slots in the file",
                    "Delta at scale 1",
                    "What becomes of it",
                    "Source of the formula",
                ),
                kinds,
            ),
            "## Endings of slots\n\nThe first is the one that is written in kohya's spelling.\n",
            table(("Slot", "Of", "Endings"), slots),
            "## Files that are refused\n",
            table(("File", "Because"), refused),
            "## Base models\n\nWords are how the metadata begin that name it. A size is what the shapes of its "
            "layers are written in;\nthe names themselves are in the tables of `lib_loramerge/models/`. Of text "
            "encoders: layers x width.\n",
            table(("Base model", "Id", "Words", "Size", "Text encoders", "Written as"), models),
        )
    )


# --- HOSTS.md -----------------------------------------------------------------------------

_HOSTS = f"""# What each program loads

{_MADE}

All of this was read from the programs' own code, at the version named, and is compared with the complete lists of
names that this code accepts (`tests/accepted_names`). [COMPATIBILITY.md](COMPATIBILITY.md) has what comes of it.
`checkpoint` means the path that a layer has in the base model's checkpoint, `diffusers` that of its pipeline,
`processor` and `attention` the two spellings that diffusers has for attention, `alias` any other that is read here.
A beginning that ends with an underscore is followed by the path with underscores in place of its dots.

"""
_RULES = (
    ("lone_biases", False, "It refuses a file in which a bias stands alone."),
    ("lone_norms", False, "It refuses a file with `w_norm` but no `b_norm`."),
    ("lone_alphas", False, "It refuses a file in which an alpha stands alone."),
    ("embeddings", False, "It refuses a file with bundled embeddings."),
    ("whole_layers", False, "It reads no layer stored whole: `diff`, norms, biases."),
    ("new_glora", False, "It computes GLoRA of the old order of factors alone."),
    ("control_adapters", True, "It converts BFL's control adapters as a whole."),
    ("flattened_alone", True, "It takes names only in kohya's spelling."),
    ("clip_in_part", True, "Of a CLIP it finds attention and feed-forward alone."),
    (
        "attention_as_one",
        True,
        "It applies q, k, v and out of an OpenCLIP encoder only when the file has all four.",
    ),
)


def _rules(host: Host) -> list[str]:
    found = [text for name, value, text in _RULES if getattr(host, name) is value]
    if host.unplaced_limit is not None:
        found.append(f"It refuses a file with more than {host.unplaced_limit} tensors that it cannot place.")
    if host.placed_share:
        found.append(f"It refuses a file of whose tensors it cannot place {host.placed_share:.0%}.")
    if host.kinds_missing:
        found.append(f"It has no formula for {', '.join(sorted(host.kinds_missing))}.")
    if host.ignores:
        found.append(f"It does not read the slots {_code(sorted(host.ignores))}.")
    if host.endings:
        found.append(f"It does not read up factors that end with {_code(sorted(host.endings))}.")
    for name, text in (
        ("kohya_endings", "Dotted names only with `lora_up.weight` and `alpha`"),
        ("without_alpha", "Only in the diffusers spelling without alpha"),
        ("diffusers_alone", "Only in the diffusers spelling"),
        ("alpha_needed", "In kohya's spelling only with an alpha in each layer"),
        ("denoiser_alone", "No file that changes a text encoder too"),
    ):
        if getattr(host, name):
            found.append(f"{text}: {_labels(getattr(host, name))}.")
    if not host.biases_beside:
        found.append("It ignores a bias (`diff_b`) beside a low-rank change.")
    found += [f"{what[:1].upper()}{what[1:]}." for what in host.kinds_differ.values()]
    return found


def _host(host: Host) -> str:
    names = (
        (f"`{start}`" if start else "none", path, _labels(models))
        for (start, path), models in sorted(host.names.items())
    )
    encoders = (
        (ARCHITECTURES[name].label if name else "all others", f"`{part}`", _code(starts))
        for name, parts in host.encoders.items()
        for part, starts in parts.items()
    )
    lost = (
        (record.label, f"`{host.lost[name].pattern}`")
        for name, record in ARCHITECTURES.items()
        if name in host.lost
    )
    parts = [
        f"## {host.label}\n\nRead from: {host.read_from}.\n\nBase models: {_labels(host.base_models)}.\n",
        table(("Names begin", "Path", "Base models"), names),
        table(("Text encoders of", "Component", "Names begin"), encoders),
    ]
    if host.comfy_encoders:
        parts.append(f"Names in `text_encoders.NAME.`: {_code(sorted(host.comfy_encoders))}.\n")
    if host.lost:
        parts.append(table(("Lost although their form is right", "Pattern"), lost))
    parts.append("".join(f"* {rule}\n" for rule in _rules(host)))
    return "\n".join(parts)


def hosts_page() -> str:
    """The whole page."""
    return _HOSTS + "\n".join(map(_host, HOSTS.values()))


PAGES = {"FORMATS.md": formats_page, "HOSTS.md": hosts_page}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make(), encoding="utf-8", newline="\n")
