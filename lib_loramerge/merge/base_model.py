"""The one base model of a merge: what all files fit, and how layers are written while it is not sure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .. import dialects, models
from ..errors import IncompatibleError, RecipeError, Sentence, UnsupportedError, joined
from ..hosts import HOSTS
from ..models import ARCHITECTURES, Architecture, Model
from ..recipe import nearest_hint
from .sources import Source, open_source


@dataclass(frozen=True)
class BaseModel:
    """What the files of a merge are for.

    Attributes:
        architecture: The model whose layers the merge is made of, with the words of its size for metadata;
            without any where several models fit.
        sources: The files, understood as for that model.
        candidates: Labels of all models that fit, one when it is sure.
        dialect: Spelling of the names to write.
        notes: Sentences for the report.
    """

    architecture: Architecture
    sources: tuple[Source, ...]
    candidates: tuple[str, ...]
    dialect: str
    notes: tuple[str, ...]


def model_id(name: str) -> str:
    """Id of a base model by its id, label or metadata's word, in any case.

    Raises:
        RecipeError: There is none of this name.
    """
    wanted = _plain(name)
    names: dict[str, str] = {}
    for record in ARCHITECTURES.values():
        sizes = [f"{record.label} {size.label}" for size in record.sizes]
        words = [word for size in record.sizes for word in size.words]
        for known in (*sizes, *words, *record.words, record.base_model_version, record.label, record.id):
            names.setdefault(_plain(known), record.id)
    if wanted not in names or names[wanted] == "unknown":
        ids = [record.id for record in ARCHITECTURES.values() if record.id != "unknown"]
        raise RecipeError(
            "There is no base model {name}.{hint} Base models: {models}.",
            repr(name),
            nearest_hint(name, ids),
            ", ".join(ids),
        )
    return names[wanted]


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum() or letter == ".")


def decide(sources: Sequence[Source], chosen: str | None, dialect: str) -> BaseModel:
    """Find the base model that all files of a merge fit.

    Args:
        sources: As their own layers and metadata show them.
        chosen: The user's word, which overrules them.
        dialect: The recipe's.

    Raises:
        IncompatibleError: No model fits all of them.
        UnsupportedError: Several do, and the names to write depend on which it is.
    """
    if chosen is not None:
        name = model_id(chosen)
        sources = [open_source(source.path, name) for source in sources]
    else:
        sources = _agreed(sources)
    first = sources[0]
    fits = _common(sources)
    names = list(dict.fromkeys(name for name, _ in fits))
    sizes = [size for name, size in fits if name == first.architecture.id]
    architecture = _sized(first.architecture, sizes[0] if len(sizes) == 1 else None)
    if len(names) < 2:
        return BaseModel(architecture, tuple(sources), (first.base_model,), dialect, ())
    labels = tuple(ARCHITECTURES[name].label for name in names)
    denoiser = any(models.component(layer) == "unet" for source in sources for layer in source.layers)
    if architecture.unet is not None and (denoiser or not _comfys(sources)):
        # Every host looks for both spellings of a U-Net's layers, so the names of one will do for all.
        return BaseModel(_unnamed(architecture), tuple(sources), labels, dialect, (_unsaid(_listed(labels)),))
    return _undecided(sources, names, labels, dialect, denoiser)


def _sized(architecture: Architecture, label: str | None) -> Architecture:
    size = next((size for size in architecture.sizes if size.label == label), None)
    if size is None:
        return architecture
    return replace(
        architecture,
        base_model_version=size.base_model_version or architecture.base_model_version,
        modelspec=size.modelspec or architecture.modelspec,
    )


def _common(sources: Sequence[Source]) -> list[Model]:
    """Models and sizes that every file fits, in the order of the first."""
    return [fit for fit in sources[0].candidates if all(fit in source.candidates for source in sources)]


def _agreed(sources: Sequence[Source]) -> list[Source]:
    """The files, all understood as for one base model."""
    ids = {source.architecture.id for source in sources}
    if ids == {"unknown"}:
        _refuse_strangers(sources)
        return list(sources)
    fits = _common(sources)
    if not fits:
        if len(ids) == 1 and not any(source.candidates for source in sources):
            return list(sources)
        _refuse(sources)
    if len(ids) == 1:
        return list(sources)
    # Files that are sure of it name the model; else the first guess that all share.
    guesses = [source.architecture.id for source in sources]
    names = {name for name, _ in fits}
    name = next((guess for guess in guesses if guess in names), fits[0][0])
    return [
        source if source.architecture.id == name else open_source(source.path, name) for source in sources
    ]


def _refuse(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if not _common((first, other)):
            raise IncompatibleError(
                "These are for different base models: {first} is for {model} ({why}), {second} for "
                "{other_model} ({other_why}). LoRAs can be merged only within one base model. If you know "
                "that it is the same, name it (--base-model NAME).",
                first.path.name,
                first.base_model,
                Sentence(first.reason),
                other.path.name,
                other.base_model,
                Sentence(other.reason),
            )
    raise IncompatibleError(
        "No base model fits all of these: {files}. LoRAs can be merged only within one base model.",
        joined(
            "; ",
            (
                Sentence(
                    "{file}: {model} ({why})", source.path.name, source.base_model, Sentence(source.reason)
                )
                for source in sources
            ),
        ),
    )


def _refuse_strangers(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.dialect != first.dialect:
            raise IncompatibleError(
                "The base model of {first} and {second} is not known, and they are spelled differently "
                "({dialect}, {other_dialect}), so their layers cannot be matched. Name it if you know it "
                "(--base-model NAME).",
                first.path.name,
                other.path.name,
                first.dialect,
                other.dialect,
            )


def _comfys(sources: Sequence[Source]) -> bool:
    """Whether all files have ComfyUI's names, which say of a text encoder which one it is."""
    return all(source.dialect == models.COMFY for source in sources)


def _undecided(
    sources: Sequence[Source], names: Sequence[str], labels: tuple[str, ...], dialect: str, denoiser: bool
) -> BaseModel:
    """Write names that are right for every model that fits, and claim none of them."""
    listed = _listed(labels)
    readings = {name: [open_source(source.path, name) for source in sources] for name in names}
    note = _unsaid(listed)
    # Names that no program looks for in a model speak against it.
    names = [name for name in names if _found_as_spelled(readings[name], name)] or names
    first = sources[0].architecture.id
    own = readings[first if first in names else names[0]]
    if not denoiser and dialect == "auto" and _comfys(sources):
        dialect = models.COMFY
    spelling = dialects.spelling_of(own[0].architecture.id, dialect)
    if len({_written(readings[name], name, spelling) for name in names}) == 1:
        return BaseModel(_unnamed(own[0].architecture), tuple(own), labels, dialect, (note,))
    if dialect not in ("auto", models.COMFY, models.DIFFUSERS):
        raise UnsupportedError(
            "The layers fit {models} alike, and the names to write in this spelling differ between them. "
            "Name the base model (--base-model NAME).",
            listed,
        )
    # diffusers' names are the ones that such models share. A model that fuses what another splits
    # would write the other members too.
    written = {name: _written(readings[name], name, models.DIFFUSERS) for name in names}
    least = min(names, key=lambda name: len(written[name]) or 10**9)
    shared = all(written[least] <= written[name] for name in names)
    # No WebUI looks for diffusers' names of a text encoder alone.
    if not written[least] or not shared or not (denoiser or dialect == models.DIFFUSERS):
        raise UnsupportedError(
            "The layers fit {models} alike, and each of them has other names for them. Name the base model "
            "(--base-model NAME).",
            listed,
        )
    listed = _listed([ARCHITECTURES[name].label for name in names])
    note = Sentence(
        "The layers fit {models} alike, so they are written in diffusers' names, which all of them "
        "share. --base-model NAME chooses one, and its own names.",
        listed,
    )
    chosen = readings[least]
    return BaseModel(_unnamed(chosen[0].architecture), tuple(chosen), labels, models.DIFFUSERS, (note,))


def _listed(labels: Sequence[str]) -> str:
    return joined(", ", labels, " and ")


def _unsaid(listed: str) -> str:
    return Sentence(
        "The layers fit {models} alike, so the file does not say which. Name the base model if you know "
        "it (--base-model NAME).",
        listed,
    )


def _written(sources: Sequence[Source], name: str, dialect: str) -> frozenset[str]:
    """Names that a merge would write; none where the dialect lacks one."""
    layers = {layer for source in sources for layer in source.layers}
    try:
        return frozenset(
            prefix for layer in layers for prefix, _ in dialects.output_parts(name, layer, dialect)
        )
    except UnsupportedError:
        return frozenset()


_ENOUGH = 100
_OF_DIFFUSERS = ("diffusers", "peft")


def _found_as_spelled(sources: Sequence[Source], name: str) -> bool:
    """Whether some program finds the layers of a base model under the names that the files have.

    diffusers' names are those of a trainer, whatever reads them.
    """
    sources = [source for source in sources if source.dialect not in _OF_DIFFUSERS]
    parts = (
        (layer, part.part) for source in sources for layer in source.layers for part in source.layers[layer]
    )
    return all(
        any(host.finds(name, layer, part.spelling) for host in HOSTS.values())
        for layer, part in itertools.islice(parts, _ENOUGH)
    )


def _unnamed(architecture: Architecture) -> Architecture:
    """A base model that the metadata do not name."""
    return replace(architecture, base_model_version="", modelspec="", implementation="", resolution="")
