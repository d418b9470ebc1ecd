"""One LoRA file as a merge sees it: its layers, their shapes and kinds.

Only headers are read here. What was learned of a file is remembered by its
path, size and time, so that a tab can ask again at every keystroke.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from .. import adapters, dialects, models
from ..errors import (
    FileError,
    IncompatibleError,
    Sentence,
    UnknownKeyError,
    UnsupportedError,
    counted,
    joined,
)
from ..files import Header, read_header, size_text, stamp_of, zero_tail
from .doubled import one_spelling
from .stated_scale import stated_scale_note

# A large file takes about two megabytes here; a form has 16 rows, and a list keeps its own small records.
REMEMBERED = 64

# A control adapter gives it the control picture's channels too; hosts widen it for such a file alone.
_FIRST_LAYER_OF_FLUX = "lora_unet_img_in"

LayerShape = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class SourcePart:
    """One part of a layer in a file, with what its shapes show.

    Attributes:
        spans: Row ranges of the whole layer that this part fills, in order;
            None when the part is the whole layer.
        out: Rows of the whole layer; None when only the base weight has them.
        taken: Row ranges of what the file has that are this part, where it joins several layers.
        kernel: What the base model is known to have here, for formats that do not say.
    """

    part: dialects.Part
    facts: adapters.LayerFacts
    spans: tuple[tuple[int, int], ...] | None
    out: int | None
    kernel: tuple[int, int] | None = None
    taken: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Source:
    """A LoRA file, understood from its header alone.

    Attributes:
        layers: Canonical layer name to the parts this file has of it.
        unsupported: Sentences, one for each layer that cannot be merged.
        unknown: Tensor names nobody understands.
        orphans: Keys of layers that have nothing but an ``alpha``; they change nothing.
        zeros: Bytes of zeros at the end of the file that no tool writes.
        size: The base model's size, where the file shows it.
        candidates: Every model and size that the file fits; several where its layers do not decide.
        remarks: Sentences on what was left out of the file, and on names that stay as they are.
    """

    path: Path
    header: Header
    dialect: str
    style: str
    architecture: models.Architecture
    reason: str
    layers: Mapping[str, tuple[SourcePart, ...]]
    embeddings: Mapping[str, str]
    unsupported: tuple[str, ...]
    unknown: tuple[str, ...]
    orphans: tuple[str, ...] = ()
    zeros: int = 0
    size: models.Size | None = None
    candidates: tuple[models.Model, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def base_model(self) -> str:
        """What people call the base model, its size included."""
        label = self.architecture.label
        return f"{label} {self.size.label}" if self.size is not None and self.size.label else label

    @property
    def fitting(self) -> tuple[str, ...]:
        """Labels of all base models that the file fits: one when it is sure, none when it is unknown."""
        names = dict.fromkeys(name for name, _ in self.candidates) or {self.architecture.id: None}
        return tuple(models.ARCHITECTURES[name].label for name in names if name != "unknown")

    @property
    def needs_base(self) -> bool:
        return any(part.facts.needs_base for parts in self.layers.values() for part in parts)

    @property
    def kinds(self) -> dict[str, int]:
        """Adapter kind to number of layers."""
        return dict(Counter(p.facts.kind for parts in self.layers.values() for p in parts).most_common())

    @property
    def ranks(self) -> dict[int, int]:
        """Rank to number of layers, for the layers that have one."""
        ranks = Counter(rank for layer in self.layers if (rank := self.rank(layer)))
        return dict(sorted(ranks.items(), reverse=True))

    @property
    def dtypes(self) -> dict[str, int]:
        """safetensors dtype name to number of tensors."""
        return dict(Counter(info.dtype for info in self.header.tensors.values()).most_common())

    def shape(self, layer: str) -> LayerShape | None:
        """(out, in, kernel) of the whole layer, ``in`` in channels; None when only the base weight says."""
        for part in self.layers[layer]:
            if part.out is not None and part.facts.in_ is not None:
                return part.out, part.facts.in_, part.facts.kernel
        return None

    def rank(self, layer: str) -> int | None:
        """Rank as the file states it, parts added up; None for a layer stored whole.

        What rests on the base weight (DoRA ...) has full rank, strictly; it counts
        with the rank that it was trained at. A bias alone has rank 0.
        """
        ranks = [
            0 if part.facts.kind == "bias" else part.facts.rank or self._trained_rank(part)
            for part in self.layers[layer]
        ]
        return None if any(rank is None for rank in ranks) else sum(r for r in ranks if r is not None)

    def is_dense(self, layer: str) -> bool:
        """Whether what the file changes in this layer is no exact low-rank product."""
        return any(part.facts.rank is None and part.facts.kind != "bias" for part in self.layers[layer])

    def _trained_ranks(self) -> set[int]:
        """Every rank that a factor of the file has, before products of factors are expanded."""
        slots = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
        keys = (p.part.slots.get(slot) for parts in self.layers.values() for p in parts for slot in slots)
        return {shape[0] for key in keys if key is not None and (shape := self.header.tensors[key].shape)}

    def _trained_rank(self, part: SourcePart) -> int | None:
        key = part.part.slots.get("down") or part.part.slots.get("hada_w1_b")
        return self.header.tensors[key].shape[0] if key is not None else None

    @property
    def weight_dtypes(self) -> set[str]:
        """safetensors dtypes of the tensors that carry the deltas, scalars such as alpha aside."""
        tensors = self.header.tensors
        return {
            tensors[key].dtype
            for parts in self.layers.values()
            for part in parts
            for key in part.part.slots.values()
            if tensors[key].shape not in ((), (1,)) and not tensors[key].dtype.startswith(("I", "U", "BOOL"))
        }

    def layer_needs_base(self, layer: str) -> bool:
        return any(part.facts.needs_base for part in self.layers[layer])

    def notes(self) -> set[str]:
        """What is worth knowing of the file and of its layers' adapters, each sentence once."""
        notes = {note for parts in self.layers.values() for part in parts for note in part.facts.notes}
        if self.zeros:
            notes.add(
                Sentence(
                    "the last {zeros} of the file are zeros, as where a download did not end; download it "
                    "again unless you know better.",
                    size_text(self.zeros),
                )
            )
        notes |= set(self.remarks)
        if self.orphans:
            notes.add(
                Sentence(
                    "{tensors} without factors dropped, for it changes nothing: {some}.",
                    counted(len(self.orphans), "{count} alpha", "{count} alphas"),
                    some_text(self.orphans),
                )
            )
        if not any("alpha" in part.part.slots for parts in self.layers.values() for part in parts):
            stated = stated_scale_note(self.path, self.header.metadata, self._trained_ranks())
            notes |= {stated} if stated is not None else set()
        return notes

    def refuse_leftovers(self) -> None:
        """Stop at anything in the file that would not go into the merge.

        Raises:
            UnknownKeyError: Tensor names that no dialect or adapter kind claims.
            UnsupportedError: Layers of a kind that cannot be merged.
        """
        if self.unknown:
            raise UnknownKeyError(
                "{file}: {tensors} not understood: {some}. Nothing was written; --skip-unsupported merges "
                "the rest and lists what was left out.",
                self.path.name,
                counted(len(self.unknown), "{count} tensor", "{count} tensors"),
                some_text(self.unknown),
            )
        if self.unsupported:
            more = len(self.unsupported) - 1
            others = Sentence(
                " ({layers} of {file} cannot be merged either.)",
                counted(more, "{count} more layer", "{count} more layers"),
                self.path.name,
            )
            raise UnsupportedError(joined("", [self.unsupported[0], *([others] if more else [])]))


def some_text(names: tuple[str, ...], limit: int = 3) -> str:
    """The first few names of many."""
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else Sentence("{shown} and {count} more", shown, len(names) - limit)


_remembered: OrderedDict[tuple[str | int, ...], Source] = OrderedDict()
_lock = Lock()


def open_source(path: Path, base_model: str | None = None) -> Source:
    """Understand a LoRA file from its header.

    Args:
        base_model: Id of a base model that overrules what the file looks like.

    Raises:
        FileError: Not readable, damaged, or not a LoRA.
        IncompatibleError: Two spellings of one layer, or shapes that do not fit.
        UnsupportedError: A kind of file that cannot be merged at all.
    """
    if not path.is_file():
        return _understand(path, read_header(path), base_model)  # which says what is wrong
    key: tuple[str | int, ...] = (str(path), *stamp_of(path.stat()), base_model or "")
    with _lock:
        if key in _remembered:
            _remembered.move_to_end(key)
            return _remembered[key]
    source = _understand(path, read_header(path), base_model)
    with _lock:
        _remembered[key] = source
        while len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return source


def _understand(path: Path, header: Header, base_model: str | None) -> Source:
    if not header.tensors:
        what = "metadata but no tensors" if header.metadata else "no tensors"
        raise FileError("{file} holds {what}; there is nothing to merge.", path.name, Sentence(what))
    shapes = {key: info.shape for key, info in header.tensors.items()}
    try:
        parsed = dialects.parse_file(shapes, header.metadata, base_model=base_model)
    except (IncompatibleError, UnsupportedError) as error:
        raise type(error)("{name}: {error}", path.name, error) from error
    layers: dict[str, list[SourcePart]] = {}
    unsupported: list[str] = []
    # The control adapters of Flux replace norms, and only they do.
    control = any("set_weight" in part.slots for part in parsed.parts)
    for part in parsed.parts:
        where = f"{path.name}: {part.spelling}"
        if control and part.layer == _FIRST_LAYER_OF_FLUX:
            unsupported.append(
                Sentence(
                    "{where} cannot be merged: this control adapter makes the layer wider than the base "
                    "model has it.",
                    where,
                )
            )
            continue
        try:
            described = _describe(part, shapes, parsed.architecture.id, where)
        except UnsupportedError as error:
            unsupported.append(str(error))
            continue
        if described is not None:
            layers.setdefault(part.layer, []).append(described)
    remarks = [*_remarks(parsed)]
    for layer, parts in layers.items():
        layers[layer], note = one_spelling(path, layer, parts)
        remarks += [note] if note is not None else []
        _check_parts(path, layer, layers[layer])
    return Source(
        path=path,
        header=header,
        dialect=parsed.dialect,
        style=parsed.style,
        architecture=parsed.architecture,
        reason=parsed.reason,
        layers={layer: tuple(parts) for layer, parts in sorted(layers.items())},
        embeddings=parsed.embeddings,
        unsupported=tuple(unsupported),
        unknown=parsed.unknown,
        orphans=parsed.orphans,
        zeros=zero_tail(path, header),
        size=parsed.size,
        candidates=parsed.candidates,
        remarks=tuple(remarks),
    )


def _remarks(parsed: dialects.ParsedFile) -> list[str]:
    remarks: list[str] = []
    if parsed.dropped:
        remarks.append(
            Sentence(
                "{tensors} that no WebUI reads left out: {some}.",
                counted(len(parsed.dropped), "{count} tensor", "{count} tensors"),
                some_text(parsed.dropped),
            )
        )
    if parsed.unlisted:
        remarks.append(
            Sentence(
                "{layers} not in our list of {model}, written under the name that the file gives: {some}.",
                counted(len(parsed.unlisted), "{count} layer", "{count} layers"),
                parsed.architecture.label,
                some_text(parsed.unlisted),
            )
        )
    return remarks


def _describe(
    part: dialects.Part, shapes: Mapping[str, tuple[int, ...]], architecture: str, where: str
) -> SourcePart | None:
    """Facts of one part, or None for an orphan that changes nothing (a lone alpha)."""
    slots = {slot: shapes[key] for slot, key in part.slots.items()}
    kernel = models.kernel(architecture, part.layer)
    facts = adapters.describe(slots, where=where, kernel=kernel)
    if facts.empty:
        return None
    if part.rows is None and part.take is None:
        return SourcePart(part, facts, None, facts.out, kernel)
    if facts.out is None:
        raise UnsupportedError(
            "{where}: {kind} on one part of a fused layer cannot be placed in it.", where, facts.kind
        )
    try:
        taken = part.take.cut(facts.out) if part.take is not None else None
        out = sum(stop - start for start, stop in taken) if taken is not None else facts.out
        if part.rows is None:
            return SourcePart(part, facts, None, out, kernel, taken)
        spans, total = part.rows.spans(out)
    except IncompatibleError as error:
        raise IncompatibleError("{name}: {error}", where, error) from error
    return SourcePart(part, facts, spans, total, kernel, taken)


def _check_parts(path: Path, layer: str, parts: list[SourcePart]) -> None:
    """All parts of one layer must speak of a layer of one shape."""
    known = [part for part in parts if part.out is not None]
    shapes = {(part.out, part.facts.in_, part.facts.kernel) for part in known}
    if len(shapes) > 1:
        raise IncompatibleError(
            "{file}: the parts of {layer} do not fit together: {parts}. The file is damaged or mixes two "
            "base models.",
            path.name,
            layer,
            joined(
                "; ",
                (
                    Sentence("{spelling} makes it {outputs} x {inputs}", p.part.spelling, p.out, p.facts.in_)
                    for p in parts
                ),
            ),
        )
