"""Files that change a part of a model only: the model is named, or among those that are listed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pytest

from lib_loramerge.dialects import parse_file
from lib_loramerge.errors import LoraMergeError
from tests.helpers.accepted import MODELS, accepted
from tests.helpers.names_judge import header, parameter, spellings

_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_ATTENTION = re.compile(r"attn|attention|linear1(?!\d)|qkv", re.I)
_FEED_FORWARD = re.compile(r"mlp|ff[._]|feed_forward|ffn|linear2", re.I)
# These have the same paths as other spellings.
ALIKE = ("lycoris_", "lora_transformer_")
# Names by which ComfyUI's code finds layers of a model that are another model's.
ANOTHERS = {
    "lumina2": r"(?:transformer\.|lycoris_|diffusion_model\. other|bare)",  # Z-Image's
    "ltx2": "lora_te1_|text_encoders\\.t5xxl\\.",  # LTX-Video's
}


def parts(model: str, names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """One layer of each kind, and groups of layers of the first block and of all."""
    shapes = accepted("comfyui").shapes(model)
    matrices = {
        name: target
        for name, target in names.items()
        if parameter(target).endswith(".weight") and len(shapes.get(parameter(target), ())) > 1
    }
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("{}", name.replace("_", ".")), name)
    for name in kinds.values():
        yield name, {name: names[name]}
    first = {name: to for name, to in matrices.items() if _block(name) == 0}
    for what, group in (("block 0", first), ("all", matrices)):
        for part, pattern in (("", None), ("attention of ", _ATTENTION), ("feed-forward of ", _FEED_FORWARD)):
            yield part + what, {n: to for n, to in group.items() if pattern is None or pattern.search(n)}


def _block(name: str) -> int | None:
    found = _NUMBER.search(name.replace("_", "."))
    return int(found[0]) if found else None


@pytest.mark.parametrize(
    ("architecture", "model"), [(name, model) for name, models in MODELS.items() for model in models]
)
def test_a_part_of_a_model_is_never_taken_for_another_one_alone(architecture, model):
    wrong = []
    for spelling, names in spellings(model).items():
        if spelling.endswith(" bias") or re.match(ANOTHERS.get(model, "(?!)"), spelling):
            continue
        if spelling.startswith(("lora_te", "lora_prior_te", "text_encoders.transformer.", *ALIKE)):
            continue
        for part, chosen in parts(model, names):
            tensors = header(model, chosen)
            try:
                parsed = parse_file(tensors, {}) if tensors else None
            except LoraMergeError:
                continue
            if parsed is None or parsed.architecture.id == "unknown":
                continue
            fits = {name for name, _ in parsed.candidates}
            if architecture not in fits:
                wrong.append((spelling, part, sorted(fits)))
    assert wrong == []
