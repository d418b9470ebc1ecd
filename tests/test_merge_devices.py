"""Merges on an accelerator are the merges on the CPU, for every mode, kind of layer and rank rule."""

from __future__ import annotations

import pytest
import torch

from lib_loramerge.delta import device as device_module
from lib_loramerge.delta.device import devices
from lib_loramerge.errors import OutputError
from lib_loramerge.merge import layer as merging
from lib_loramerge.methods import METHODS
from tests.helpers import format_files as ff
from tests.helpers.fixtures import SD1_LAYERS, lora_tensors
from tests.helpers.simulated_device import simulated_device

CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
NORM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"
ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
# Every accelerator of the machine, too.
DEVICES = ("simulated", *(name for name in devices() if name != "cpu"))
RULES = (
    {"rank": "same"}, {"rank": "full"}, {"rank": 3, "conv_rank": 2}, {"retain": 0.8}, {"size": 0.3},
    {"rank": 4, "dtype": "float16"}, {"rank": 4, "dtype": "bfloat16"}, {"rank": 4, "dialect": "diffusers"},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path_factory):
    """Two LoRAs of all kinds: convolutions, Hadamard and Kronecker products, whole layers, biases, norms."""
    path = tmp_path_factory.mktemp("loras")
    layers = {**SD1_LAYERS, CONV: (320, 320, 3, 3)}
    first = lora_tensors(layers, rank=4, alpha=2.0, seed=1)
    second = lora_tensors(layers, rank=6, alpha=6.0, seed=2, dtype=torch.float16)
    for tensors, seed in ((first, 3), (second, 4)):
        sizes = {"hada_w1_a": (320, 3), "hada_w1_b": (3, 320), "hada_w2_a": (320, 3), "hada_w2_b": (3, 320)}
        tensors |= {f"{ATTENTION}k.{slot}": ff.rand(*size, seed=seed) for slot, size in sizes.items()}
        tensors |= {
            f"{ATTENTION}v.{slot}": ff.rand(*size, seed=seed)
            for slot, size in {"lokr_w1": (8, 8), "lokr_w2_a": (40, 4), "lokr_w2_b": (4, 40)}.items()
        }
        tensors |= {f"{NORM}.w_norm": ff.rand(320, seed=seed), f"{NORM}.b_norm": ff.rand(320, seed=seed + 9)}
    whole = f"{ATTENTION}out_0"
    second |= {f"{whole}.diff": ff.rand(320, 320, seed=5), f"{whole}.diff_b": ff.rand(320, seed=6)}
    ff.save(path / "a.safetensors", first)
    other = {key: tensor.flip(0) for key, tensor in first.items() if tensor.dim()}
    ff.save(path / "like_a.safetensors", other)
    ff.save(path / "b.safetensors", second)
    return path


@pytest.fixture(params=DEVICES)
def on_device(request, monkeypatch):
    """Merges of this test run on the device, but for those whose recipe says CPU."""
    device = simulated_device() if request.param == "simulated" else torch.device(request.param)
    choose = {"cpu": torch.device("cpu"), "auto": device}
    monkeypatch.setattr(merging, "compute_device", choose.__getitem__)


def merge_twice(folder, other="b", tolerance=2e-5, **fields):
    """Merges on the CPU and on the device, which must agree."""
    fields = {"dtype": "float32", **fields}
    here, there = (
        ff.merge(folder, "a:0.8", f"{other}:-0.5", out=device, device=device, **fields)
        for device in ("cpu", "auto")
    )
    assert (here.device, there.device == "cpu") == ("cpu", False)
    wanted, wanted_biases = ff.written(folder / "cpu.safetensors", lone_bias=True)
    got, biases = ff.written(folder / "auto.safetensors", lone_bias=True)
    assert got.keys() == wanted.keys()
    assert biases.keys() == wanted_biases.keys()
    for name, tensor in wanted.items():
        ff.assert_close(got[name], tensor, tolerance)
    for name, tensor in wanted_biases.items():
        ff.assert_close(biases[name], tensor, 1e-6)
    assert (there.ranks, there.layers) == (here.ranks, here.layers)
    assert there.error == pytest.approx(here.error, rel=1e-4, abs=1e-7)
    assert (there.from_sum is None) == (here.from_sum is None)
    if here.from_sum is not None:
        assert there.from_sum == pytest.approx(here.from_sum, rel=1e-4, abs=1e-7)


def test_the_simulated_device_keeps_its_tensors_apart_from_those_of_the_cpu():
    there = torch.ones(3, 2).to(simulated_device())
    assert there.device.type == "sim"
    assert (2 * there.mT @ there).sum().item() == 24
    assert torch.equal((there + 1).cpu(), torch.full((3, 2), 2.0))
    with pytest.raises(RuntimeError, match="device"):
        there @ torch.ones(2, 3)
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()


@pytest.mark.parametrize("mode", METHODS)
@pytest.mark.usefixtures("on_device")
def test_every_mode_gives_what_it_gives_on_the_cpu(folder, mode):
    other = "like_a" if mode == "add" else "b"  # It needs equal ranks.
    merge_twice(folder, other, mode=mode, rank=5 if METHODS[mode].uses_rank else "same")


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("mode", ["svd", "ties"])
@pytest.mark.usefixtures("on_device")
def test_every_rank_rule_precision_and_spelling_gives_what_it_gives_on_the_cpu(folder, mode, rule):
    coarse = "dtype" in rule  # The last bit of a rounded number may be another.
    merge_twice(folder, mode=mode, tolerance=4e-3 if coarse else 2e-5, **rule)


@pytest.mark.usefixtures("on_device")
def test_the_host_may_have_tf32_on(folder, monkeypatch):
    seen = []
    prepare = merging.Merger.prepare

    def look(*args: object) -> object:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return prepare(*args)

    monkeypatch.setattr(merging.Merger, "prepare", look)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        merge_twice(folder, rank=5)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    # Left alone by the merge on the CPU, off for the one on the device.
    assert seen == [True] * (len(seen) // 2) + [False] * (len(seen) // 2)


def full_card(*_: object) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def full_machine(*_: object) -> None:
    torch.empty(1 << 60)


def no_memory_for_python(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (full_card, r"memory of \S+ is too full .* Choose the CPU"),
        (full_machine, "memory of this machine is too full"),
        (no_memory_for_python, "memory of this machine is too full"),
    ],
)
@pytest.mark.usefixtures("on_device")
def test_a_full_memory_is_reported_and_leaves_nothing(folder, monkeypatch, fail, sentence):
    monkeypatch.setattr(merging.Merger, "prepare", fail)
    before = sorted(folder.iterdir())
    with pytest.raises(OutputError, match=sentence):
        ff.merge(folder, "a", "b", device="auto")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["mps", "xpu", "xpu:1"])
def test_a_device_without_float64_leaves_the_work_to_the_cpu_and_says_so(folder, monkeypatch, name):
    monkeypatch.setattr(device_module, "devices", lambda: ["cpu", name.partition(":")[0]])
    report = ff.merge(folder, "a", "b", device=name)
    assert report.device == "cpu"
    assert [note for note in report.warnings if "64-bit" in note and note.startswith(name)]
    assert not [note for note in ff.merge(folder, "a", "b", out="c").warnings if "64-bit" in note]
