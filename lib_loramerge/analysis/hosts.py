"""Which program can load a file as it is, how many of its layers, and what stops the others."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..adapters import GLORA_SLOTS, is_old_glora
from ..dialects import split_key
from ..hosts import HOSTS, Host, companions
from ..merge.sources import Source, SourcePart
from ..models import component

_FLATTENED = ("lora_unet_", "lora_te", "oft_unet_")
_ADAPTER_NAME = re.compile(r"lora_[AB]\.([^.]+)\.weight")


def hosts_that_load(source: Source) -> dict[str, str]:
    """What each host makes of a file.

    ``reads all``, ``reads n of m layers, not ...``, ``no: ...`` with the reason, or ``not known: ...``.
    """
    return {host.label: verdict(host, source) for host in HOSTS.values()}


def verdict(host: Host, source: Source) -> str:
    """What a host makes of a file."""
    architecture = source.architecture
    if architecture.id == "unknown":
        return "not known: which base model the file is for is not known"
    if architecture.id not in host.base_models:
        return f"no: it has no {architecture.label}"
    missing = sorted(host.kinds_missing & set(source.kinds))
    if missing:
        return f"no: it has no formula for {', '.join(missing)}"
    found, lost, unread = _reading(host, source)
    reason = _refuses(host, source, len(unread) if found else 0)
    if reason is not None:
        return f"no: {reason}"
    if source.layers and not found:
        return f"no: it does not look for names such as {unread[0]}"
    remarks = _remarks(host, source)
    if lost:
        head = f"reads {found} of {found + len(lost)} layers, not {lost[0]}"
    elif unread:
        head = f"reads all layers, but leaves out {_tensors(len(unread))}, such as {unread[0]}"
    else:
        head = "reads all"
    return "; ".join([head, *remarks])


def _reading(host: Host, source: Source) -> tuple[int, list[str], list[str]]:
    """Layers found, a name of each layer that is not, and tensors that are not read."""
    found, lost, unread = 0, [], []
    ignored = host.ignores - {"up_bias"} if _is_control(source) else host.ignores
    if not host.biases_beside:
        ignored |= {"diff_b"}
    for layer, parts in source.layers.items():
        known = True
        for part in parts:
            reads = _finds(host, source, part)
            known = known and reads
            whole = part.facts.kind in ("full", "bias")
            unread += [
                key
                for slot, key in part.part.slots.items()
                if not reads or (slot in ignored and not (whole and slot == "diff_b"))
            ]
        found += known
        if not known:
            lost.append(next(part.part.spelling for part in source.layers[layer]))
    return found, lost, [*unread, *source.unknown]


def _finds(host: Host, source: Source, part: SourcePart) -> bool:
    """Whether the host finds this part of a layer, and applies it."""
    ending = _ending(part)
    adapter = _ADAPTER_NAME.fullmatch(ending)
    if ending in host.endings or (adapter is not None and adapter[1] != "default"):
        return False
    architecture = source.architecture.id
    dotted = "." in part.part.spelling
    if dotted and architecture in host.kohya_endings and not ending.startswith("lora_up"):
        return False
    if not host.whole_layers and part.facts.kind in ("full", "norm", "bias"):
        return False
    if _is_control(source) and host.control_adapters:
        return True
    if host.attention_as_one and any(
        layer not in source.layers for layer in companions(architecture, part.part.layer)
    ):
        return False
    return host.finds(architecture, part.part.layer, _name(part))


def _name(part: SourcePart) -> str:
    """Name of the layer, as hosts take it from the key."""
    key, spelling = _key(part), part.part.spelling
    if ".processor." in key and ".processor." not in spelling:
        split = split_key(key)
        return split.layer.removesuffix("_lora") if split is not None else spelling
    return spelling


def _parts(source: Source) -> Iterable[SourcePart]:
    return (part for parts in source.layers.values() for part in parts)


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _is_control(source: Source) -> bool:
    """Whether ComfyUI's code takes it for a control adapter of BFL, which it converts as a whole."""
    return {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"} <= source.header.tensors.keys()


def _key(part: SourcePart) -> str:
    """A tensor of the layer that names it: its up factor, or whatever there is."""
    slots = part.part.slots
    return slots.get("up") or next(iter(slots.values()))


def _ending(part: SourcePart) -> str:
    split = split_key(_key(part))
    return split.ending if split is not None else ""


# --- Whole files --------------------------------------------------------------------------


def _refuses(host: Host, source: Source, unplaced: int) -> str | None:
    """Why the host would refuse the whole file, given how many tensors it cannot place; else None."""
    unplaced += len(source.embeddings)
    if host.unplaced_limit is not None and unplaced > host.unplaced_limit:
        limit = host.unplaced_limit
        return f"it refuses a file with more than {limit} tensors it cannot place, here are {unplaced}"
    if host.placed_share and unplaced > (1 - host.placed_share) * len(source.header.tensors):
        return "it refuses a file if it cannot place half of its tensors"
    if source.embeddings and not host.embeddings:
        return f"it refuses a file with embeddings in it ({sorted(source.embeddings.values())[0]})"
    return _wrong_spelling(host, source) or _wrong_parts(host, source)


def _wrong_spelling(host: Host, source: Source) -> str | None:
    name = source.architecture.id
    kohya = [part for part in _parts(source) if part.part.spelling.startswith("lora_unet_")]
    if name in host.without_alpha:
        if any(key.endswith(".alpha") for key in source.header.tensors):
            return "it takes SD3 only in the diffusers spelling without alpha"
        return None
    dotted = [_key(part) for part in _parts(source) if not part.part.spelling.startswith(_FLATTENED)]
    if host.flattened_alone and dotted:
        return f"it takes names only in kohya's spelling (lora_unet_...), not {dotted[0]}"
    if name in host.diffusers_alone and kohya:
        return "it takes SD3 only in the diffusers spelling"
    bare = [part for part in kohya if "alpha" not in part.part.slots]
    if name in host.alpha_needed and bare:
        return f"it takes this spelling only with an alpha in each layer, and {_key(bare[0])} has none"
    if name in host.denoiser_alone and kohya and any(component(layer) != "unet" for layer in source.layers):
        return f"it loads no {source.architecture.label} LoRA that changes a text encoder too"
    return None


def _wrong_parts(host: Host, source: Source) -> str | None:
    if source.orphans and not host.lone_alphas:
        return f"it refuses a file in which an alpha stands alone ({source.orphans[0]})"
    for part in _parts(source):
        if part.facts.kind == "bias" and not host.lone_biases:
            return f"it refuses a file in which a bias stands alone ({part.part.slots['diff_b']})"
        if part.facts.kind == "norm" and "b_norm" not in part.part.slots and not host.lone_norms:
            return f"it refuses a file with w_norm but no b_norm ({part.part.slots['w_norm']})"
    return _NEW_GLORA if not host.new_glora and _new_glora(source) else None


_NEW_GLORA = "it computes only GLoRA of the old order of factors"


def _new_glora(source: Source) -> bool:
    """Some GLoRA layer has the factors in the order of LyCORIS 2."""
    for part in _parts(source):
        slots = part.part.slots
        if part.facts.kind == "glora":
            shapes = {slot: source.header.tensors[slots[slot]].shape for slot in GLORA_SLOTS}
            if not is_old_glora(shapes):
                return True
    return False


def _remarks(host: Host, source: Source) -> list[str]:
    """What else is worth knowing of a file that a host loads."""
    return [what for kind, what in host.kinds_differ.items() if kind in source.kinds]
