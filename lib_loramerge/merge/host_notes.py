"""Which program will leave out something of the file that a merge writes, and what can be done about it.

A merged file is written so that as many hosts as possible take all of it. Where that cannot
be, the plan says so before any work. What each host reads stands in its record alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from .. import dialects
from ..dialects.slots import KOHYA_STYLE
from ..errors import LoraMergeError, Sentence, counted
from ..hosts import HOSTS, Host
from ..models import Architecture
from .host_target import Spelling, bias_alone

if TYPE_CHECKING:
    from .layout import LayerPlan


def host_notes(
    architecture: Architecture,
    spelling: Spelling,
    host: str | None,
    layers: Sequence[LayerPlan],
    embeddings: int,
) -> list[str]:
    """Sentences for the plan's warnings.

    Args:
        spelling: In which the file will be written.
        host: The one that the file is for; what others make of it is then nobody's concern.
        embeddings: Number of bundled embedding tensors.
    """
    if architecture.id == "unknown":
        if host is None:
            return []
        return [
            Sentence(
                "The base model is not known, so neither is what {hosts} reads of this file. Names are kept "
                "as they are.",
                HOSTS[host].label,
            )
        ]
    known = [each for each in HOSTS.values() if architecture.id in each.base_models]
    unread = [each for each in known if not _reads_any(each, architecture.id, spelling, layers)]
    concerned = [each for each in known if each not in unread] if host is None else [HOSTS[host]]
    return list(_notes(architecture, unread if host is None else [], concerned, layers, embeddings))


def _notes(
    architecture: Architecture,
    unread: Sequence[Host],
    hosts: Sequence[Host],
    layers: Sequence[LayerPlan],
    embeddings: int,
) -> Iterator[str]:
    """Args:
    unread: Hosts that look for none of the file's names.
    hosts: Those that read it.
    """

    def those(what: Callable[[Host], bool]) -> str:
        return ", ".join(each.label for each in hosts if what(each))

    if unread:
        yield Sentence(
            "Not for these programs, which do not look for the names of this file: {hosts}. --for NAME "
            "writes it for one of them.",
            _labels(unread),
        )
    components = {layer.component for layer in layers}
    names = those(lambda each: architecture.id in each.denoiser_alone)
    if names and "unet" in components and len(components) > 1:
        yield Sentence(
            "{hosts} does not load a {model} LoRA that changes a text encoder too; for it, merge once "
            "more with a text encoder strength of 0.",
            names,
            architecture.label,
        )
    beside = sum(layer.bias for layer in layers if layer.rank is not None and not bias_alone(layer))
    names = those(lambda each: not each.biases_beside)
    if beside and names:
        yield Sentence(
            "A bias (diff_b) changes too in {layers}. These programs ignore it: {hosts}.",
            _layers(beside),
            names,
        )
    alone = sum(bias_alone(layer) for layer in layers)
    names = those(lambda each: not each.lone_biases)
    if alone and names:
        yield Sentence(
            "A bias alone changes in {layers}, whose width is unknown. These programs refuse the whole "
            "file: {hosts}. With the base model (--base CHECKPOINT) they will load it.",
            _layers(alone),
            names,
        )
    whole = sum(layer.rank is None and not bias_alone(layer) for layer in layers)
    names = those(lambda each: not each.whole_layers)
    if whole and names:
        yield Sentence(
            "{layers} will be stored whole (diff, w_norm), which these programs do not read from a "
            "LoRA: {hosts}. A rank rule cuts those that have a rank.",
            _layers(whole),
            names,
        )
    names = those(lambda each: each.unplaced_limit is not None and embeddings > each.unplaced_limit)
    if names:
        yield Sentence(
            "{count} embedding tensors are kept. These programs refuse a LoRA with so many tensors that "
            "they do not know: {hosts}.",
            embeddings,
            names,
        )


def _reads_any(host: Host, architecture: str, spelling: Spelling, layers: Sequence[LayerPlan]) -> bool:
    """Whether a host looks for the name of some layer, of some fifty; True where no layer has a name."""
    style = dialects.output_style(architecture, spelling.dialect, spelling.style)
    dotted = architecture in host.kohya_endings and style != KOHYA_STYLE
    named = False
    for layer in layers[:: max(1, len(layers) // 50)]:
        try:
            names = dialects.output_parts(architecture, layer.layer, spelling.dialect)
        except LoraMergeError:
            continue
        named = True
        if all(
            host.finds(architecture, layer.layer, name) and not (dotted and "." in name) for name, _ in names
        ):
            return True
    return not named


def _labels(hosts: Sequence[Host]) -> str:
    return ", ".join(host.label for host in hosts)


def _layers(count: int) -> str:
    return counted(count, "{count} layer", "{count} layers")
