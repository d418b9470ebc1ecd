"""How much of a LoRA lies outside a merged one, against projections of whole matrices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_loramerge.cli import main
from lib_loramerge.delta import Delta, Dense, LowRank, norms_outside

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
OTHER = LAYER.replace("to_q", "to_v")
SIDE = 320


def delta(rank: int, kernel: tuple[int, ...] = ()) -> LowRank:
    inner = 30 * (kernel[0] * kernel[1] if kernel else 1)
    return LowRank(torch.randn(40, rank), torch.randn(rank, inner), float(rank), kernel)


def dense(part: Delta) -> np.ndarray:
    weight = part.weight if isinstance(part, Dense) else part.dense()
    return weight.reshape(weight.shape[0], -1).double().numpy()


def projected(whole: Delta, part: Delta) -> tuple[float, float]:
    """By the singular vectors of the matrices."""
    u, s, vt = np.linalg.svd(dense(whole))
    rank = int((s > 1e-9 * s[0]).sum())
    matrix = dense(part)
    inside = u[:, :rank].T @ matrix @ vt[:rank].T
    return float((matrix**2).sum() - (inside**2).sum()), float((matrix**2).sum())


def joined(*deltas: LowRank) -> LowRank:
    up, down = torch.cat([d.up for d in deltas], 1), torch.cat([d.down for d in deltas])
    return LowRank(up, down, float(up.shape[1]), deltas[0].kernel)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("matrix", [False, True])
def test_what_is_outside_is_what_projections_leave(kernel: tuple[int, ...], matrix: bool) -> None:
    known, new = delta(3, kernel), delta(2, kernel)
    part: Delta = joined(known, new)
    if matrix:
        assert isinstance(part, LowRank)
        part = Dense(part.dense())
    whole = joined(known, delta(4, kernel), known)  # Of rank 7, though it has ten components.
    assert norms_outside(whole, part) == pytest.approx(projected(whole, part), rel=1e-6)


def test_nothing_is_outside_a_sum_and_all_outside_nothing() -> None:
    known = delta(3)
    out, size = norms_outside(joined(known, delta(4)), known)
    assert out <= 1e-9 * size
    assert norms_outside(Dense(torch.randn(40, 30)), known)[0] == 0


def write(path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    tensors = {}
    for name, (up, down) in factors.items():
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    save_file(tensors, path)


def factors(rank: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(SIDE, rank) * 0.02, torch.randn(rank, SIDE) * 0.02


def test_subtract_tells_what_was_never_merged_in(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    a, b, c = ({LAYER: factors(), OTHER: factors()} for _ in range(3))
    for name, content in (("a", a), ("b", b), ("c", c)):
        write(tmp_path / f"{name}.safetensors", content)
    write(tmp_path / "half.safetensors", {LAYER: b[LAYER]})
    assert main(["merge", "a.safetensors", "b.safetensors:0.5", "-o", "ab"]) == 0
    assert main(["merge", "a.safetensors", "half.safetensors", "-o", "a_half"]) == 0
    capsys.readouterr()

    assert (
        main(["subtract", "ab.safetensors", "b.safetensors:0.5", "c.safetensors", "-o", "x", "--json"]) == 0
    )
    shares = json.loads(capsys.readouterr().out)["outside"]
    assert shares["b.safetensors"] < 0.01
    assert shares["c.safetensors"] > 0.9

    # One layer of b is in it, the other is not: by the norms of whole matrices.
    norms = [float(torch.linalg.matrix_norm(up.double() @ down.double())) for up, down in b.values()]
    assert main(["subtract", "a_half.safetensors", "b.safetensors", "-o", "y"]) == 0
    text = capsys.readouterr().out
    share = norms[1] / (norms[0] ** 2 + norms[1] ** 2) ** 0.5
    told = float(text.split("Left over")[1].split("%")[0])
    # What lies by chance in the space of a's four components is little.
    assert told == pytest.approx(100 * share, rel=0.01)
    assert "b.safetensors seems not to have been merged into a_half.safetensors" in text


def test_nothing_is_told_of_a_lora_without_matrices_or_of_strength_0(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.safetensors", {LAYER: factors()})
    write(tmp_path / "b.safetensors", {OTHER: factors()})
    norm = "lora_unet_down_blocks_0_attentions_0_norm"
    save_file(
        {f"{norm}.{end}": torch.randn(SIDE) for end in ("w_norm", "b_norm")}, tmp_path / "norm.safetensors"
    )
    words = ["a.safetensors", "b.safetensors:0", "norm.safetensors"]
    assert main(["subtract", *words, "-o", "x"]) == 0
    assert "Left over" not in capsys.readouterr().out
    assert main(["subtract", *words, "-o", "y", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outside"] == {}
