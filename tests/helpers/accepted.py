"""The LoRA names that each host accepts, as ``tests/accepted_names`` keeps them.

Each file was made once by running the host's own code over models without weights, and states the
host and the commit. Names come in patterns: ``{}`` stands for a number, and the rows say which
numbers there are. What a name leads to is the parameter it changes, ``[a:b]`` the rows of it, and
``~`` that the host turns the halves round.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "accepted_names"
HOSTS = ("a1111", "forge", "reforge", "neo", "sdnext", "comfyui")

# Our base models to the models of the facts; where there are several, a layer counts as known if one has it.
MODELS: dict[str, tuple[str, ...]] = {
    "sd1": ("sd1",),
    "sd2": ("sd2",),
    "sdxl": ("sdxl",),
    "sdxl_refiner": ("sdxl_refiner",),
    "sd3": ("sd3", "sd35_medium"),
    "sd3_large": ("sd3_large",),
    "flux1": ("flux1",),
    "chroma": ("chroma",),
    "flux2": ("flux2_dev", "flux2_klein_9b", "flux2_klein_4b"),
    "hunyuan_image": ("hunyuan_image",),
    "hunyuan_video": ("hunyuan_video",),
    "lumina2": ("lumina2",),
    "zimage": ("zimage",),
    "qwen_image": ("qwen_image",),
    "wan": (
        "wan_i2v", "wan_t2v_14b", "wan_t2v_1_3b", "wan22_t2v_5b", "wan_vace", "wan_camera", "wan22_animate",
        "wan22_s2v", "wan_humo",
    ),
    "anima": ("anima",),
    "hunyuan_dit": ("hunyuan_dit1", "hunyuan_dit"),
    "stable_cascade": ("stable_cascade", "stable_cascade_b"),
    "auraflow": ("auraflow",),
    "pixart": ("pixart", "pixart_alpha"),
    "hidream": ("hidream",),
    "mochi": ("mochi",),
    "ace_step": ("ace_step",),
    "ace_step15": ("ace_step15",),
    "ltx_video": ("ltxv_13b", "ltxv"),
    "ltx2": ("ltx2",),
    "krea2": ("krea2",),
    "kandinsky5": ("kandinsky5", "kandinsky5_image"),
    "hunyuan_video15": ("hunyuan_video15",),
    "ideogram4": ("ideogram4",),
    "ernie_image": ("ernie_image",),
    "omnigen2": ("omnigen2",),
    "cosmos_predict2": ("cosmos_predict2", "cosmos_predict2_14b"),
    "longcat": ("longcat",),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Accepted:
    """What one host accepts.

    Attributes:
        facts: The file as it is: host, version, commit, source, endings, models.
    """

    facts: Mapping[str, Any]

    @cached_property
    def models(self) -> tuple[str, ...]:
        return tuple(self.facts["models"])

    @cache  # noqa: B019 - one object for each host, kept as long as the tests run
    def names(self, model: str) -> Mapping[str, str]:
        """Name to the parameter it leads to, of one model of the facts."""
        rows = self.facts["models"][model]["names"]
        return {name: target for row in rows for name, target in _expand(*row)}

    @cache  # noqa: B019
    def shapes(self, model: str) -> Mapping[str, tuple[int, ...]]:
        """Parameter to shape; ComfyUI's facts alone have them."""
        return {
            name: tuple(map(int, shape.split("x"))) if shape else ()
            for pattern, shape, numbers in self.facts["models"][model]["shapes"]
            for name, _ in _expand(pattern, "", numbers)
        }

    def finds(self, architecture: str, name: str) -> str | None:
        """The parameter that a name of a base model leads to, or None."""
        for model in MODELS.get(architecture, ()):
            if model in self.models and name in self.names(model):
                return self.names(model)[name]
        return None

    def has(self, architecture: str) -> bool:
        """Whether the host knows the base model."""
        return any(model in self.models for model in MODELS.get(architecture, ()))


def _expand(pattern: str, to: str, numbers: list[list[list[int]]]) -> Iterator[tuple[str, str]]:
    pieces = pattern.split("{}")
    for chosen in product(*[[n for start, stop in ranges for n in range(start, stop)] for ranges in numbers]):
        words = [str(n) for n in chosen]
        name = "".join(piece + word for piece, word in zip(pieces, [*words, ""]))
        yield name, to.format(*words)


@cache
def accepted(host: str) -> Accepted:
    """The facts of a host."""
    return Accepted(json.loads(gzip.decompress((FOLDER / f"{host}.json.gz").read_bytes())))
