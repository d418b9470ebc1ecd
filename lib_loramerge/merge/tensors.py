"""The tensors of a layer as a file has them: under which keys, in which shapes, rounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import dialects, models
from ..delta import Delta, LowRank, take_rows
from ..errors import OutputError
from .layout import LayerPlan, MergePlan, output_names


class LayerTensors:
    """Makes the tensors of a plan's layers.

    Attributes:
        dtype: Of all but alphas.
        has_alpha: The file has alphas; readers of files without them take the scale as 1.
        bias_slot: Of the bias beside factors. Without alphas PEFT's bias of the up factor is the bias itself.
    """

    def __init__(self, plan: MergePlan):
        self.plan = plan
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.has_alpha = dialects.has_alpha(plan.architecture.id, plan.dialect, plan.style)
        self.bias_slot = "diff_b" if self.has_alpha else "up_bias"
        self._style = dialects.output_style(plan.architecture.id, plan.dialect, plan.style)

    def factors(self, layer: LayerPlan, delta: LowRank) -> dict[str, Tensor]:
        """``lora_up``, ``lora_down`` and ``alpha`` of a layer whose factors are rounded already."""
        tensors: dict[str, Tensor] = {}
        for prefix, piece in self._pieces(layer, delta):
            assert isinstance(piece, LowRank)
            up, down = piece.up.cpu().contiguous(), piece.down.cpu().contiguous()
            if self._is_conv(layer):
                up = up.reshape(*up.shape, 1, 1)
                down = down.reshape(down.shape[0], layer.in_, *(layer.kernel or (1, 1)))
            tensors |= {self._key(prefix, "up"): up, self._key(prefix, "down"): down}
            if self.has_alpha:
                tensors[self._key(prefix, "alpha")] = torch.tensor(piece.alpha, dtype=torch.float32)
        return tensors

    def whole(self, layer: LayerPlan, slot: str, delta: Delta) -> tuple[dict[str, Tensor], float, float]:
        """The tensors of one slot, their squared rounding error, and the exact squared norm.

        Raises:
            OutputError: Its numbers are too large for the dtype.
        """
        tensors: dict[str, Tensor] = {}
        error_sq = exact_sq = 0.0
        for prefix, piece in self._pieces(layer, delta):
            exact = piece.dense()
            rounded = exact.to(self.dtype).cpu()
            if not bool(rounded.isfinite().all()):
                raise OutputError("the values are too large for {dtype}. Save as float32.", self.plan.dtype)
            error_sq += float((rounded.double() - exact.double().cpu()).square().sum())
            exact_sq += float(exact.double().square().sum())
            tensors[self._key(prefix, slot)] = self._shaped(layer, slot, rounded.contiguous())
        return tensors, error_sq, exact_sq

    def _shaped(self, layer: LayerPlan, slot: str, weight: Tensor) -> Tensor:
        if slot != "diff" or weight.dim() != 2 or not self._is_conv(layer):
            return weight
        return weight.reshape(weight.shape[0], layer.in_, *(layer.kernel or (1, 1)))

    def _is_conv(self, layer: LayerPlan) -> bool:
        return bool(layer.kernel) or models.is_conv(self.plan.architecture.id, layer.layer)

    def _pieces(self, layer: LayerPlan, delta: Delta) -> Iterator[tuple[str, Delta]]:
        """The layer under each name it is written as; several where a fused layer is written split."""
        for prefix, rows in output_names(self.plan, layer.layer):
            yield prefix, delta if rows is None else take_rows(delta, rows.cut(layer.out))

    def _key(self, prefix: str, slot: str) -> str:
        return dialects.output_key(prefix, slot, self.plan.dialect, self._style)
