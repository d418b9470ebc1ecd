"""Products by the library that is quickest on this processor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lib_loramerge.delta import products
from lib_loramerge.delta.products import product
from lib_loramerge.delta.settings import own_settings


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


FACTORS = {
    "rows": (some(300, 32), some(32, 200)),
    "turned": (some(64, 300).T, some(200, 64).T),
    "slices": (some(300, 80)[7:207, 8:72], some(90, 300)[13:77, ::2]),
    "long": (some(16, 5000), some(5000, 24)),
    "small": (some(3, 2), some(2, 5)),
    "one row": (some(1, 600), some(600, 700)),
    "nothing between": (some(300, 0), some(0, 900)),
    "no rows": (some(0, 64), some(64, 900)),
}


def error(left: Tensor, right: Tensor) -> float:
    exact = left.double() @ right.double()
    made = product(left, right)
    assert made.dtype == left.dtype
    assert made.shape == exact.shape
    size = float(torch.linalg.vector_norm(exact)) or 1.0
    return float(torch.linalg.vector_norm(made.double() - exact)) / size


@pytest.mark.parametrize("name", FACTORS)
def test_it_is_the_product_in_float32(name: str) -> None:
    assert error(*FACTORS[name]) < 2e-6


def test_float64_stays_float64() -> None:
    assert error(some(300, 32).double(), some(32, 200).double()) < 1e-15


@pytest.mark.parametrize("operators", [SimpleNamespace(), SimpleNamespace(mkldnn=SimpleNamespace())])
def test_a_torch_without_the_operator_multiplies_as_it_can(
    operators: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "ops", operators)
    products._linear.cache_clear()
    try:
        assert products._linear() is None
        assert error(*FACTORS["rows"]) < 2e-6
    finally:
        products._linear.cache_clear()


def test_an_operator_that_takes_its_arguments_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(left: Tensor, right: Tensor, *_: object) -> Tensor:
        return left @ right.mT + 1

    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=SimpleNamespace(_linear_pointwise=other)))
    products._linear.cache_clear()
    try:
        assert products._linear() is None
    finally:
        products._linear.cache_clear()


def test_a_host_that_lets_products_be_rounded_does_not_round_ours() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with own_settings():
            assert error(*FACTORS["rows"]) < 2e-6
    finally:
        torch.set_float32_matmul_precision(before)
