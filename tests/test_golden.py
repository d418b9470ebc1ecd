"""Every written bit is that of the record, or where kernels differ, every result agrees within a bound.

``python -m tests.helpers.golden --renew`` after a change of results that is meant.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import golden
from tests.helpers.fixtures import sample_data

RECORD = golden.record()
RECIPES = dict(golden.recipes())
EXACT = RECORD["environment"] == golden.environment()
# Machine precision of what is stored; the sum itself is known much better.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# How far results of other kernels may be off: roundings of stored numbers that fall to the other side.
TIMES = 8
HOW = "`python -m tests.helpers.golden --show NAME` prints a result; with --renew it is the new record"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    golden.make_inputs(folder)
    return folder


def test_the_record_holds_the_recipes_and_no_others():
    assert RECORD["recipes"].keys() == RECIPES.keys(), HOW


@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_gives_what_it_always_gave(inputs, name):
    recipe, wanted = RECIPES[name], RECORD["recipes"][name]
    if recipe.real and sample_data() is None:
        pytest.skip("the sample data is not beside this checkout")
    workers = 1 + len(name) % 3
    found = golden.result(recipe, inputs, workers)
    assert found.layout == wanted["layout"], f"names, shapes or types of tensors are others: {HOW}"
    assert found.words == wanted["words"], f"the report says something else: {HOW}"
    tolerance = TIMES * coarsest(inputs)
    assert found.layers.keys() == wanted["layers"].keys()
    for layer, values in found.layers.items():
        bound = tolerance * max(values[0], 1e-30)
        assert values == pytest.approx(wanted["layers"][layer], rel=0, abs=bound), f"{layer}: {HOW}"
    assert found.numbers == pytest.approx(wanted["numbers"], rel=0.02, abs=1e-6), HOW
    if EXACT:
        assert (found.tensors, found.report) == (wanted["tensors"], wanted["report"]), HOW


def coarsest(folder) -> float:
    """Precision of the written tensors."""
    from safetensors import safe_open

    with safe_open(folder / "out.safetensors", "pt") as file:
        dtypes = {str(file.get_tensor(key).dtype) for key in file.keys() if not key.endswith("alpha")}  # noqa: SIM118
    return max(ROUNDING[dtype.removeprefix("torch.")] for dtype in dtypes)


def test_the_bound_would_see_a_strength_off_by_a_thousandth(inputs):
    """Whatever machine this is: a result that is slightly wrong lies outside what the record allows."""
    recipe = golden.Recipe(("a:0.8008", "b:-0.5"), RECIPES["mode svd"].fields)
    wanted = RECORD["recipes"]["mode svd"]["layers"]
    found = golden.result(recipe, inputs).layers
    for layer, values in found.items():
        bound = TIMES * ROUNDING["float32"] * values[0]
        assert values != pytest.approx(wanted[layer], rel=0, abs=10 * bound), layer


def test_the_environment_is_named_by_what_decides_bits():
    assert torch.__version__ in golden.environment()
    assert torch.backends.cpu.get_cpu_capability() in golden.environment()
