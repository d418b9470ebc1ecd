"""How well the layers of a file fit each base model: by names, numbers of blocks, and widths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

from .base import Architecture, Rows, Size, component, layer_path
from .dit import Spelled, flatten, look_up, may_be_apart, one_number, spelled
from .records import ARCHITECTURES
from .table import measure

# (rows, columns) as a file's tensors show them; None where they do not.
Widths = tuple[int | None, int | None]


@dataclass
class Group:
    """Layers of a file that differ in the number of their block alone.

    Attributes:
        template: Their flattened path with ``{}`` for the number, or the path where it has none.
        widths: Number, as the path has it, to the layer's widths.
    """

    template: str
    widths: dict[str, Widths] = field(default_factory=dict)

    @cached_property
    def last(self) -> int:
        """The highest number; -1 where the path has none."""
        return max(int(number) if number else -1 for number in self.widths)

    @cached_property
    def kinds(self) -> Counter[Widths]:
        """Widths to the number of layers that have them."""
        return Counter(self.widths.values())


def groups_of(layers: Mapping[str, Widths]) -> list[Group]:
    """Layers of a denoiser by the form of their names.

    Args:
        layers: Flattened path after the component, to widths.
    """
    groups: dict[str, Group] = {}
    for flat, widths in layers.items():
        template, number = one_number(flatten(flat))
        groups.setdefault(template, Group(template)).widths[number] = widths
    return list(groups.values())


@dataclass(frozen=True)
class Fit:
    """How a model fits a file: layers that it has, and widths and proportions that it contradicts."""

    architecture: Architecture
    size: Size
    found: int
    contradicted: int
    out_of_proportion: int
    complete: bool

    @property
    def order(self) -> tuple[int, int, int]:
        return (-self.found, self.contradicted, self.out_of_proportion)


def fitting(groups: list[Group], among: Iterable[Architecture] = ()) -> tuple[list[Fit], int]:
    """The models that fit best, the most usual first, and the number of layers.

    Args:
        among: The models to try; all by default.

    Returns:
        An empty list where no model has as much as half of the layers.
    """
    total = sum(len(group.widths) for group in groups)
    fits = [
        _fit(record, size, groups)
        for record in among or _by_use()
        if record.names is not None
        for size in record.sizes
    ]
    best = min((fit.order for fit in fits), default=(0, 0, 0))
    if total == 0 or -best[0] * 2 < total:
        return [], total
    fits = [fit for fit in fits if fit.order == best]
    # A file that goes to the last block of one model is hardly for a longer one.
    return [fit for fit in fits if fit.complete] or fits, total


# Most people's files, before the order of the records.
_USUAL = ("sd1", "sd2", "sdxl", "sdxl_refiner", "flux1", "sd3", "zimage", "qwen_image", "wan")


def _by_use() -> Iterable[Architecture]:
    yield from (ARCHITECTURES[name] for name in _USUAL)
    yield from (record for record in ARCHITECTURES.values() if record.id not in _USUAL)


def _fit(record: Architecture, size: Size, groups: list[Group]) -> Fit:
    found = contradicted = out_of_proportion = 0
    last: dict[str, int] = {}
    for group in groups:
        known = spelled(record.id, group.template)
        if known is not None and (group.last < 0 or _has_block(record, size, known, group.last)):
            members: Iterable[tuple[Spelled, Widths, int]] = (
                (known, widths, count) for widths, count in group.kinds.items()
            )
        else:
            members = _one_by_one(record, size, group, known)
        for entry, widths, count in members:
            found += count
            wrong, skewed = _compare(_shape(record.id, size.label, entry), widths)
            contradicted += count * wrong
            out_of_proportion += count * skewed
        if known is not None:
            root = known.path.partition(".{}")[0]
            last[root] = max(last.get(root, -1), group.last)
    return Fit(record, size, found, contradicted, out_of_proportion, _complete(record, size, last))


def _complete(record: Architecture, size: Size, last: Mapping[str, int]) -> bool:
    """Whether the file goes to the last block of each kind that the model has many of."""
    counts = record.names.counts if record.names is not None else {}
    blocks = {root: int(text) if text.isdigit() else size.dims[text] for root, text in counts.items()}
    many = {root: count for root, count in blocks.items() if count > 4 and root in _MAIN}
    return bool(many) and all(last.get(root, -1) == count - 1 for root, count in many.items())


# Roots of the blocks that a LoRA of the whole model changes.
_MAIN = frozenset({
    "double_blocks", "single_blocks", "transformer_blocks", "single_transformer_blocks", "joint_blocks",
    "blocks", "layers", "double_stream_blocks", "single_stream_blocks", "single_layers", "decoder.layers",
    "visual_transformer_blocks",
})  # fmt: skip


def _one_by_one(
    record: Architecture, size: Size, group: Group, known: Spelled | None
) -> Iterable[tuple[Spelled, Widths, int]]:
    """The layers of a group that a model has, where it has only some numbers, or names each apart."""
    if known is None and not may_be_apart(record.id, group.template):
        return
    for number, widths in group.widths.items():
        if known is not None:
            if _has_block(record, size, known, int(number)):
                yield known, widths, 1
            continue
        found = look_up(record.id, group.template.format(number))
        if found is not None and (not found[1] or _has_block(record, size, found[0], int(found[1][0]))):
            yield found[0], widths, 1


def _has_block(record: Architecture, size: Size, entry: Spelled, number: int) -> bool:
    if "{}" not in entry.path or record.names is None:
        return True
    count = record.names.counts.get(entry.path.partition(".{}")[0])
    if count is None:
        return True
    return number < (int(count) if count.isdigit() else size.dims[count])


@cache
def _shape(architecture_id: str, label: str, entry: Spelled) -> tuple[int | None, ...]:
    if entry.fused:
        return ()
    record = ARCHITECTURES[architecture_id]
    size = next(size for size in record.sizes if size.label == label)
    text = record.names.shapes.get(entry.path) if record.names is not None else None
    if text is None:
        return ()
    shape = measure(text, size.dims)
    return (_part_of(shape[0], entry.rows), *shape[1:])


def _part_of(rows: int | None, part: Rows | None) -> int | None:
    return rows if rows is None or part is None else rows * part.units // part.of


def _compare(shape: tuple[int | None, ...], widths: Widths) -> tuple[int, bool]:
    """How many of a layer's widths contradict a shape, and whether their proportion does too."""
    if not shape:
        return 0, False
    expected = (*shape, None)[:2]
    known = [(theirs, ours) for theirs, ours in zip(widths, expected, strict=True) if theirs and ours]
    wrong = sum(theirs != ours for theirs, ours in known)
    if len(known) < 2:
        return wrong, False
    (out, rows), (in_, columns) = known
    return wrong, out * columns != in_ * rows


# --- Text encoders ------------------------------------------------------------------------


_STARTS = {
    "t5": ("encoder_block_", "encoder_final_layer_norm", "shared"),
    "clip": (
        "text_model_", "encoder_layers_", "transformer_resblocks_", "resblocks_", "text_projection",
        "embeddings_", "final_layer_norm", "token_embedding", "positional_embedding", "ln_final",
    ),
    "llama": ("layers_", "embed_tokens", "norm", "lm_head"),
}  # fmt: skip


def encoder_kind(path: str) -> str | None:
    """Which kind of text encoder has a layer of such a flattened path."""
    path = path.removeprefix("transformer_").removeprefix("model_").removeprefix("language_model_")
    return next((kind for kind, starts in _STARTS.items() if path.startswith(starts)), None)


# Endings of layers that read as many channels as the encoder is wide.
_READS = {
    "clip": ("q_proj", "k_proj", "v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_c_fc"),
    "t5": ("SelfAttention_q", "SelfAttention_k", "SelfAttention_v", "_wi", "_wi_0", "_wi_1"),
    "llama": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
}
_READ_FOUR_TIMES = ("mlp_fc2", "mlp_c_proj")


def encoder_part(record: Architecture, part: str, path: str) -> str | None:
    """Component of a base model that a file's text encoder means; None if it has no such encoder."""
    kind, named = encoder_kind(path), record.text_encoders.get(part)
    encoder = record.encoders.get(named or "")
    if (encoder is not None and encoder.kind == kind) or (named is None and kind != "t5"):
        return named
    # Tools number the encoders differently, and diffusers puts some language models before a CLIP: the
    # layers show which it is.
    return next((name for name, each in record.encoders.items() if each.kind == kind), named)


def _takes(record: Architecture, name: str, width: int | None) -> bool:
    path = layer_path(name)
    part = encoder_part(record, component(name), path)
    encoder = record.encoders.get(part) if part is not None else None
    if encoder is None or encoder.kind != encoder_kind(path):
        return False
    _, number = one_number(path)
    if number and int(number) >= encoder.layers:
        return False
    if not width:
        return True
    widths = (encoder.width, *encoder.sizes.values())
    if path.endswith(_READ_FOUR_TIMES):
        return width in (4 * each for each in widths)
    return not path.endswith(_READS[encoder.kind]) or width in widths


def _has_encoders(record: Architecture, names: Iterable[str]) -> bool:
    known = {name for encoder in record.encoders.values() for name in (encoder.comfy, *encoder.sizes)}
    return known.issuperset(names)


def with_encoders(encoders: Mapping[str, int | None], called: Iterable[str] = ()) -> list[Architecture]:
    """Base models that have all of some text encoder layers, the most natural one first.

    Args:
        encoders: Layer name with its component, to the width that it reads.
        called: ComfyUI's names of the encoders, as far as the file has them.
    """
    if not encoders:
        return []
    records = [record for record in _by_use() if _has_encoders(record, called)]
    fitting = [
        record for record in records if all(_takes(record, name, width) for name, width in encoders.items())
    ]
    # Where no model has these widths, the names alone decide.
    named = [record for record in records if all(_takes(record, name, None) for name in encoders)]
    fitting = fitting or named
    # A file that says te1 is more likely for a model whose encoder is called te1.
    return sorted(fitting, key=lambda record: -sum(component(name) in record.encoders for name in encoders))
