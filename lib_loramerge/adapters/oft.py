"""OFT, diag-OFT and BOFT: the base weight turned by orthogonal blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..delta import Dense
from ..errors import IncompatibleError
from .kinds import AdapterKind, Layer, LayerFacts, Shape, Shapes, plain_kernel, register
from .scaling import number, wide


def _describe_oft(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    shape = shapes["oft_blocks"]
    if len(shape) == 4:
        return _describe_boft(shapes, where, kernel)
    return _facts("oft", "oft_blocks", shapes, where, kernel)


def _describe_diag(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    return _facts("oft_diag", "oft_diag", shapes, where, kernel)


def _describe_boft(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    stages, blocks, *_ = shapes["oft_blocks"]
    facts = _facts("boft", "oft_blocks", {**shapes, "oft_blocks": shapes["oft_blocks"][1:]}, where, kernel)
    size = shapes["oft_blocks"][-1]
    # Stage i mixes groups of 2^i * size outputs, in halves.
    if size % 2 or (blocks * size) % (2 ** (stages - 1) * size):
        raise IncompatibleError(
            "{where}: oft_blocks {blocks} are no butterfly of {outputs} outputs.",
            where,
            shapes["oft_blocks"],
            blocks * size,
        )
    return facts


def _facts(kind: str, slot: str, shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    shape = shapes[slot]
    if len(shape) != 3 or shape[1] != shape[2]:
        raise IncompatibleError(
            "{where}: {slot} has the shape {shape} where square blocks are needed.", where, slot, tuple(shape)
        )
    out = shape[0] * shape[1]
    if "rescale" in shapes and math.prod(shapes["rescale"]) != out:
        raise IncompatibleError(
            "{where}: rescale {shape} does not fit {outputs} outputs.", where, tuple(shapes["rescale"]), out
        )
    return LayerFacts(kind, out, None, plain_kernel(kernel or ()), needs_base=True)


def _build_oft(layer: Layer) -> Dense:
    return _turned_blocks(layer, _rotation(layer))


def _build_diag(layer: Layer) -> Dense:
    # Old LyCORIS files hold the rotation itself.
    return _turned_blocks(layer, layer.slots["oft_diag"].double())


def _turned_blocks(layer: Layer, rotation: Tensor) -> Dense:
    """Each block of output rows becomes ``R^T W``, so the change is ``(R - I)^T W``."""
    base = _base_rows(layer)
    blocks, size, _ = rotation.shape
    turn = _turn(rotation, base).transpose(1, 2)
    return _rescaled(layer, (turn @ base.reshape(blocks, size, -1)).reshape(base.shape))


def _build_boft(layer: Layer) -> Dense:
    """``R_m ... R_1 W``, stage i on outputs regrouped so that 2^i blocks are mixed."""
    base = _base_rows(layer)
    turn = _turn(_rotation(layer), base)
    stages, _, size, _ = turn.shape
    columns = base.shape[1]
    change = torch.zeros_like(base)
    for stage in range(stages):
        half = 2**stage * (size // 2)
        grouped = (base + change).reshape(-1, 2, half, columns).transpose(1, 2).reshape(-1, size, columns)
        turned = (turn[stage] @ grouped).reshape(-1, half, 2, columns).transpose(1, 2)
        change = change + turned.reshape(base.shape)
    return _rescaled(layer, change)


def _rotation(layer: Layer) -> Tensor:
    """Cayley's ``R = (I + Q) (I - Q)^-1`` of the skew-symmetric part of the blocks, float64.

    A positive alpha limits the Frobenius norm of all of Q to alpha * outputs
    (kohya, LyCORIS, A1111). An alpha of 0, or none, is no limit, as in A1111
    and LyCORIS; kohya's own code would make it an identity.
    """
    blocks = layer.slots["oft_blocks"].double()
    skew = blocks - blocks.transpose(-1, -2)
    alpha = number(layer.slots["alpha"], "alpha", layer.where) if "alpha" in layer.slots else 0.0
    assert layer.facts.out is not None
    limit = alpha * layer.facts.out
    size = float(torch.linalg.vector_norm(skew))
    if 0 < limit < size:
        skew = skew * (limit / size)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew, eye + skew)  # the two factors commute


def _turn(rotation: Tensor, base: Tensor) -> Tensor:
    """``R - I``: the change itself, so that a small turn is not lost in the size of the weight."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return (rotation - eye).to(base.dtype)


def _base_rows(layer: Layer) -> Tensor:
    assert layer.base is not None
    return wide(layer.base).flatten(1)


def _rescaled(layer: Layer, change: Tensor) -> Dense:
    """``rescale * (W + change) - W``, row by row."""
    assert layer.base is not None
    if "rescale" in layer.slots:
        scale = layer.slots["rescale"].double().reshape(-1, 1)
        change = change * scale.to(change.dtype)
        change.addcmul_(_base_rows(layer), (scale - 1).to(change.dtype))
    return Dense(change, plain_kernel(tuple(layer.base.shape[2:])))


OFT = register(
    AdapterKind(
        name="oft",
        label="OFT, diag-OFT",
        forms=(frozenset({"oft_blocks"}),),
        optional=frozenset({"rescale"}),
        family="OFT",
        needs_base=True,
        exact_low_rank=False,
        keys="`oft_blocks` of three axes, `rescale`",
        does="The turned base weight minus the base weight; full rank, cut to the rank asked for.",
        source="Qiu et al. 2023, https://arxiv.org/abs/2306.07280",
        describe=_describe_oft,
        build=_build_oft,
    )
)

OFT_DIAG = register(
    AdapterKind(
        name="oft_diag",
        label="diag-OFT of old LyCORIS",
        forms=(frozenset({"oft_diag"}),),
        optional=frozenset({"rescale"}),
        family="OFT",
        needs_base=True,
        exact_low_rank=False,
        keys="`oft_diag`",
        does="As OFT; the blocks are the rotation itself.",
        source="LyCORIS, https://github.com/KohakuBlueleaf/LyCORIS",
        describe=_describe_diag,
        build=_build_diag,
    )
)

BOFT = register(
    AdapterKind(
        name="boft",
        label="BOFT",
        forms=(frozenset({"oft_blocks"}),),
        optional=frozenset({"rescale"}),
        family="OFT",
        needs_base=True,
        exact_low_rank=False,
        keys="`oft_blocks` of four axes, `rescale`",
        does="As OFT, through a butterfly of stages.",
        source="Liu et al. 2023, https://arxiv.org/abs/2311.06243",
        describe=_describe_boft,
        build=_build_boft,
    )
)
