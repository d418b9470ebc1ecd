"""Which WebUI can load a file as it is, and what stops the others.

What is told here was read from the hosts' own loaders; a merged file is written
so that as many of them as possible take it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..merge.host_notes import FORGE_LIMIT
from ..merge.sources import Source

_SD3 = frozenset({"sd3", "sd3_large"})
_FLATTENED = ("lora_unet_", "lora_te", "oft_unet_")


@dataclass(frozen=True)
class Host:
    """One WebUI.

    Attributes:
        base_models: Architectures whose LoRAs it knows.
        kinds_missing: Adapter kinds it has no formula for.
    """

    name: str
    base_models: frozenset[str]
    kinds_missing: frozenset[str]
    check: Callable[[Source], str | None]


def hosts_that_load(source: Source) -> dict[str, str]:
    """WebUI to "yes", or to "no" with the reason."""
    return {host.name: _verdict(host, source) for host in HOSTS}


def _verdict(host: Host, source: Source) -> str:
    if source.architecture.id not in host.base_models:
        return f"no: it has no {source.architecture.label}"
    missing = sorted(host.kinds_missing & set(source.kinds))
    if missing:
        return f"no: it has no formula for {', '.join(missing)}"
    reason = host.check(source)
    return "yes" if reason is None else reason


def _a1111(source: Source) -> str | None:
    dotted = sum(not key.startswith((*_FLATTENED, "bundle_emb.")) for key in source.header.tensors)
    if source.architecture.id not in _SD3 and dotted:
        return "no: it takes names only in kohya's spelling (lora_unet_...)"
    if source.architecture.id in _SD3 and any(key.endswith(".alpha") for key in source.header.tensors):
        return "no: it takes SD3 only in the diffusers spelling without alpha"
    if "dora" in source.kinds:
        return "yes, but its DoRA scales input columns, whatever the file was trained with"
    return None


def _forge(source: Source) -> str | None:
    odd = len(source.unknown) + len(source.embeddings)
    odd += sum(key.endswith((".scalar", ".scale", ".bias")) for key in source.header.tensors)
    if odd > FORGE_LIMIT:
        return f"no: it refuses a file with more than {FORGE_LIMIT} tensors it cannot place, here are {odd}"
    if source.architecture.id in _SD3 and "kohya" not in source.dialect:
        return "no: it takes SD3 only in kohya's spelling"
    if "dora" in source.kinds:
        return "yes, but its DoRA takes the norm of the unchanged weight"
    return None


def _neo(source: Source) -> str | None:
    odd, whole = len(source.unknown) + len(source.embeddings), len(source.header.tensors)
    return "no: it refuses a file if it cannot place half of its tensors" if odd * 2 > whole else None


def _anything(source: Source) -> str | None:
    del source
    return None


_SD = frozenset({"sd1", "sd2", "sdxl", "sdxl_refiner"})
_NEWER = frozenset({"lumina2", "zimage", "qwen_image", "wan", "anima"})
HOSTS = (
    Host("A1111", _SD | _SD3, frozenset(), _a1111),
    Host("Forge", _SD | _SD3 | {"flux1", "chroma"}, frozenset({"ia3", "oft", "boft"}), _forge),
    Host(
        "reForge", _SD | _SD3 | {"flux1", "hunyuan_dit", "auraflow", "pixart"}, frozenset({"ia3"}), _anything
    ),
    Host("Forge Neo", frozenset({"sd1", "sdxl", "flux1", "chroma"}) | _NEWER, frozenset({"ia3"}), _neo),
    Host("SD.Next", _SD | _SD3 | _NEWER | {"flux1", "flux2", "chroma"}, frozenset(), _anything),
)
