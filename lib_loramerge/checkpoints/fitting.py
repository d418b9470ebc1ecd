"""Ranks for an extraction whose file may have so many bytes, once all layers are known at the largest one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import dialects, ranks
from ..delta import LowRank, decompose
from ..delta.storing import round_cut
from ..errors import OutputError
from ..hosts import companions
from ..merge.layout import ENTRY_BYTES, ITEM_BYTES, FileCosts
from .differing import Found, Pair
from .tensors import Spill, layer_tensors, takes_vectors, write_layer, zero_layer

_ANY = 1000  # A rank of as many digits as any.
_TEXTS = 8192  # Bytes of the metadata.
_SLOT = 24  # Characters behind a layer's name.
_LAID_ASIDE = 4  # Bytes of a number.


def _place(layer: Found, slot: str) -> str:
    return ".".join((layer.name, slot))


def foreseen_bytes(pair: Pair, names: Sequence[str]) -> tuple[int, int]:
    """Bytes of the LoRA, and those on the disk while it is made, at most."""
    settings, item = pair.settings, ITEM_BYTES[pair.settings.dtype]
    one_rank = dialects.needs_one_rank(pair.identity, settings.dialect)
    size, aside = _TEXTS, 0
    for name in names:
        shape = pair.base.shape(pair.identity, name)
        prefixes = [prefix for prefix, _ in dialects.output_parts(pair.identity, name, settings.dialect)]
        entry = sum(len(prefix) + _SLOT + ENTRY_BYTES for prefix in prefixes)
        size += _vector_numbers(pair, name) * item + 2 * entry
        if len(shape) < 2:
            continue
        width = math.prod(shape[1:])
        rank = min(settings.limit(pair.has_kernel(name)), shape[0], width)
        aside += rank * (shape[0] + width) * _LAID_ASIDE
        if one_rank:  # Filled up with zeros to the largest.
            rank = max(settings.limit(False), settings.limit(True))
        numbers = rank * (shape[0] + width * len(prefixes))
        size += (numbers if one_rank else min(numbers, shape[0] * width)) * item + 3 * entry
    if settings.size is None:
        return size, 2 * size
    size = min(size, int(settings.size * 1_000_000))
    return size, aside + 2 * size


def _vector_numbers(pair: Pair, name: str) -> int:
    """Numbers of a layer's bias and norm that may be written."""
    if not takes_vectors(pair, name):
        return 0
    shape = pair.base.shape(pair.identity, name)
    return 2 * shape[0] if len(shape) == 1 else shape[0]


def lay_aside(layer: Found, shelf: Spill) -> None:
    """Keep a layer's factors on the disk until its rank is known."""
    if layer.best is not None:
        shelf.add(_place(layer, "up"), layer.best.up)
        shelf.add(_place(layer, "down"), layer.best.down)
        layer.best = None


def fit(
    pair: Pair,
    found: Sequence[Found],
    vectors: Mapping[str, Mapping[str, Tensor] | None],
    texts: int,
    shelf: Spill,
    tensors: Spill,
    check: Callable[[], None],
) -> None:
    """Cut what was laid aside to the ranks of least error that fit in the file, and write that.

    Args:
        texts: Bytes that the metadata take at most.
        check: Called often; what it raises ends the work.

    Raises:
        OutputError: Not even the least of it fits.
    """
    dtype = getattr(torch, pair.settings.dtype)
    fixed = not dialects.has_alpha(pair.identity, pair.settings.dialect)
    chosen = _ranks(pair, found, vectors, texts)
    for layer in found:
        check()
        rank = chosen.get(layer.name, 0)
        layer.capped &= layer.values is not None and rank >= len(layer.values)
        if not rank or layer.values is None:
            continue
        kernel = tuple(pair.base.shape(pair.identity, layer.name)[2:])
        whole = LowRank(
            shelf[_place(layer, "up")],
            shelf[_place(layer, "down")],
            float(len(layer.values)),
            kernel if kernel != (1, 1) else (),
            spectra=(layer.values,),
        )
        beyond = max(0.0, layer.exact - float(layer.values.square().sum()))
        spectrum = replace(decompose(whole), energy=layer.exact, beyond=beyond)
        layer.stored = round_cut(spectrum, rank, dtype, fixed_alpha=fixed)
        layer.take_numbers()
        write_layer(pair, layer, tensors)
        layer.stored = None


def costs_of(
    pair: Pair,
    found: Sequence[Found],
    values: Mapping[str, Tensor],
    vectors: Mapping[str, Mapping[str, Tensor] | None],
    texts: int,
) -> FileCosts:
    """What the bytes of the LoRA go to.

    Args:
        values: Singular values of the layers that are written, by name.
        texts: Bytes that the metadata take at most.
    """
    costs: dict[str, ranks.LayerCost] = {}
    zeros: dict[str, ranks.LayerCost] = {}
    fixed = texts
    for layer in found:
        beside = vector_bytes(vectors.get(layer.name))
        if layer.name not in values:
            fixed += beside if len(pair.base.shape(pair.identity, layer.name)) == 1 else 0
            continue
        group = companions(pair.identity, layer.name)
        for other in group:
            if other not in values and other not in zeros:
                zeros[other] = zeros_cost(pair, other, layer.name)
        cost = zeros_cost(pair, layer.name, layer.name)
        own = values[layer.name].numpy()
        costs[layer.name] = ranks.LayerCost(own, cost.per_rank, cost.fixed + beside, 1 if group else 0)
    one_rank = dialects.needs_one_rank(pair.identity, pair.settings.dialect)
    if one_rank:  # The zeros are filled up to the rank of the others.
        return FileCosts(fixed, {**costs, **zeros}, one_rank)
    return FileCosts(fixed + sum(cost.bytes(1) for cost in zeros.values()), costs, one_rank)


def vector_bytes(vectors: Mapping[str, Tensor] | None) -> int:
    """Bytes of a layer's bias and norm."""
    return sum(_bytes(key, tensor) for key, tensor in (vectors or {}).items())


def zeros_cost(pair: Pair, name: str, like: str) -> ranks.LayerCost:
    """What a layer costs that is written without a change; ``like`` as of :func:`.tensors.zero_layer`."""
    layer = zero_layer(pair, name, like)
    at_any = _at_rank(pair, layer, _ANY)
    per_rank = _at_rank(pair, layer, _ANY + 1) - at_any
    return ranks.LayerCost((), per_rank, at_any - _ANY * per_rank, least=1)


def _ranks(
    pair: Pair, found: Sequence[Found], vectors: Mapping[str, Mapping[str, Tensor] | None], texts: int
) -> dict[str, int]:
    assert pair.settings.size is not None
    values = {layer.name: layer.values for layer in found if layer.values is not None}
    whole = costs_of(pair, found, values, vectors, texts)
    costs, fixed, one_rank = whole.layers, whole.fixed, whole.one_rank
    layers = list(costs.values())
    budget = int(pair.settings.size * 1_000_000) - fixed
    least = ranks.least_bytes(layers, one_rank=one_rank)
    chosen = ranks.allot(layers, budget, one_rank=one_rank) if budget >= least else []
    if layers and not any(chosen):
        # Of a layer the first components are written together or not at all.
        some = ranks.smallest(layers, (1 - 1e-6) * sum(layer.tail(0) for layer in layers), one_rank=one_rank)
        raise OutputError(
            "{size} MB is too small for this difference; it takes at least {least} MB.",
            f"{pair.settings.size:g}",
            f"{math.ceil((fixed + max(least, some)) / 1e3) / 1e3:.3f}",
        )
    return {name: min(rank, len(costs[name].values)) for name, rank in zip(costs, chosen, strict=True)}


def _at_rank(pair: Pair, layer: Found, rank: int) -> int:
    """Bytes of a layer of zeros in the file, at another rank."""
    assert layer.stored is not None
    up, down = (
        torch.empty(shape, dtype=layer.stored.up.dtype, device="meta")
        for shape in ((layer.stored.up.shape[0], rank), (rank, layer.stored.down.shape[1]))
    )
    stored = replace(layer.stored, up=up, down=down)
    return sum(_bytes(key, tensor) for key, tensor in layer_tensors(pair, replace(layer, stored=stored)))


def _bytes(key: str, tensor: Tensor) -> int:
    """Bytes of a tensor and of its entry in the header."""
    entry = len(key.encode()) + len(str(tuple(tensor.shape))) + ENTRY_BYTES
    return tensor.numel() * tensor.element_size() + entry
