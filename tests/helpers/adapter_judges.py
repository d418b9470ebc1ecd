"""What another project's module does to a layer, seen through its forward pass only.

Modules are run, in float64 where they can, on inputs that single out each weight, and the base
layer's answer is taken away, so that no formula of theirs or ours is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lib_loramerge.adapters import build, describe
from lib_loramerge.adapters.layers import LayerDelta

WHERE = "judged.safetensors: layer"
LINEAR = [(12, 20), (20, 12), (16, 16)]
CONV = [(12, 8, 3, 3), (8, 8, 3, 3), (12, 16, 1, 1), (8, 8, 1, 1)]


def base_layer(shape: tuple[int, ...], *, bias: bool = True, seed: int = 1) -> nn.Linear | nn.Conv2d:
    """A linear layer (out, in) or a convolution (out, in, kh, kw) with random weights."""
    torch.manual_seed(seed)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias)
    return nn.Conv2d(shape[1], shape[0], shape[2:], bias=bias)


def randomise(parameters: Mapping[str, Tensor], *, seed: int = 5, scale: float = 0.2) -> None:
    """Fill parameters with random numbers that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def probe(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs, one for each element of a row of the weight, then a zero input."""
    columns = torch.Size(shape[1:]).numel()
    eye = torch.cat([torch.eye(columns), torch.zeros(1, columns)]).to(dtype)
    return eye if len(shape) == 2 else eye.reshape(-1, *shape[1:])


def seen_delta(
    with_adapter: Callable[[Tensor], Tensor], base: nn.Module, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(weight, bias) change, (out, in * kh * kw) and (out,), from forward passes in the base's dtype."""
    with torch.no_grad():
        x = probe(shape, next(base.parameters()).dtype)
        change = (with_adapter(x) - base(x)).reshape(len(x), -1)
    return (change[:-1] - change[-1]).T, change[-1]


def ours(slots: Mapping[str, Tensor], shape: tuple[int, ...], **kwargs) -> LayerDelta:
    """Our delta of the stored tensors in float32, after checking that the header tells its sizes."""
    stored = {slot: t.detach().float().contiguous() for slot, t in slots.items()}
    kernel = kwargs.get("kernel", shape[2:])
    facts = describe({slot: tuple(t.shape) for slot, t in stored.items()}, where=WHERE, kernel=kernel)
    assert facts.out in (None, shape[0])
    assert facts.in_ in (None, shape[1])
    assert facts.kernel == (tuple(shape[2:]) if torch.Size(shape[2:]).numel() > 1 else ())
    delta = build(stored, where=WHERE, **{"kernel": kernel, **kwargs})
    if facts.rank is not None:
        assert delta.weight.rank <= facts.rank
    assert (delta.bias is not None) == facts.bias
    return delta


def assert_equal(mine: Tensor, theirs: Tensor, *, rtol: float = 1e-5) -> None:
    """Relative Frobenius distance below ``rtol``; exactly zero where theirs is."""
    assert mine.shape == theirs.shape
    error = torch.linalg.vector_norm(mine.double() - theirs.double())
    assert error <= rtol * torch.linalg.vector_norm(theirs.double()), f"{error:.3g}"
