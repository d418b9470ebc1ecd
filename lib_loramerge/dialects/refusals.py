"""Files that look like a LoRA, or are put where LoRAs are, and cannot be merged: which, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .slots import split_key

# Tensors that adapters and whole models both have.
_PLAIN_SLOTS = frozenset({"ia3_weight", "bias", "scale"})


@dataclass(frozen=True)
class Kind:
    """A kind of file that is refused.

    Attributes:
        name: What the file is, with its article.
        pattern: Searched in a key.
        reason: Why it cannot be merged, or what it is good for.
        whole: It is a model of its own, so a key that ends like an adapter's is not of it.
    """

    name: str
    pattern: re.Pattern[str]
    reason: str
    whole: bool = False

    def claims(self, key: str) -> bool:
        """Whether a file of this kind has such a key."""
        if self.pattern.search(key) is None:
            return False
        split = split_key(key) if self.whole else None
        return split is None or split.slot in _PLAIN_SLOTS


def _kind(name: str, pattern: str, reason: str, *, whole: bool = False) -> Kind:
    return Kind(name, re.compile(pattern), reason, whole)


_NO_CHANGE = "it holds no change to a base model"

REFUSED: tuple[Kind, ...] = (
    _kind("a ControlNet-LLLite", r"^lllite_", "it steers with a picture and adds nothing to the weights"),
    _kind(
        "an IP-Adapter", r"^(?:ip_adapter|image_proj(?:_model)?)\.|\.processor\.to_[kv]_ip\b",
        "it adds new layers instead of changing those of the base model",
    ),
    _kind("an hlora", r"^hlora", "no public tool describes what its layers mean"),
    _kind(
        "a T-LoRA", r"\.(?:q_layer|p_layer)\.weight$|\.lambda_layer$",
        "it is relative to a decomposition of the base weights that is not in the file",
    ),
    _kind("a VeRA", r"\bvera_(?:lambda_[bd]|[AB])\b", "it scales random matrices that are not in the file"),
    _kind("a FourierFT adapter", r"\bfourierft_", "it stores a spectrum whose positions are not in the file"),
    _kind(
        "an AdaLoRA", r"\.lora_E\b|\.ranknum\b",
        "its scale depends on a number of ranks that is not in the file",
    ),
    _kind(
        "an adapter of PEFT's OFT", r"\.oft_[rR](?:\.[^.]+)?(?:\.weight)?$",
        "it stores the rotation in a packed form whose layout depends on the version of PEFT",
    ),
    _kind(
        "an adapter of PEFT's BOFT", r"\.boft_[Rs](?:\.[^.]+)?$",
        "no WebUI reads it; LyCORIS's BOFT can be merged",
    ),
    _kind(
        "an adapter of PEFT's (IA)^3", r"\.ia3_l(?:\.[^.]+)?$",
        "no WebUI reads it; LyCORIS's (IA)^3 can be merged",
    ),
    _kind("a HRA or bone adapter", r"\.(?:hra_u|bone_block|miss_block)\b", "no WebUI reads it"),
    _kind(
        "a LoRA of an embedding table", r"\.lora_embedding_[AB]\b",
        "no WebUI applies it to the token embeddings",
    ),
    _kind(
        "a ControlNet",
        r"^(?:control_model|controlnet)\.|^controlnet_(?:cond_embedding|down_blocks|mid_block)|^zero_convs\.|"
        r"^control_lora|^lora_controlnet$",
        "it is a network of its own beside the base model", whole=True,
    ),
    _kind(
        "a whole checkpoint",
        r"^(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders|"
        r"text_encoders\.\w+\.transformer)\.",
        "use a checkpoint merger for whole models", whole=True,
    ),
    _kind(
        "a VAE",
        r"^(?:vae\.)?(?:(?:encoder|decoder)\.(?:conv_in|conv_out|down|down_blocks|up|up_blocks|mid|mid_block)\.|"
        r"(?:post_)?quant_conv\.)",
        _NO_CHANGE, whole=True,
    ),
    _kind(
        "a textual inversion embedding", r"^(?:emb_params|string_to_param|string_to_token|clip_[lg]|<.+>)$",
        "embeddings are used by name in the prompt",
    ),
    _kind(
        "a T2I-Adapter", r"^(?:adapter\.)?body\.\d+\.",
        "it is a network of its own beside the base model", whole=True,
    ),
    _kind(
        "a whole text encoder or language model",
        r"^(?:text_model\.(?:encoder\.layers|embeddings)|transformer\.resblocks|encoder\.block|model\.layers)\.",
        _NO_CHANGE, whole=True,
    ),
    _kind(
        "a whole denoiser",
        r"^(?:diffusion_model\.)?(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|double_blocks|"
        r"single_blocks|transformer_blocks|single_transformer_blocks|joint_blocks|blocks|layers)\.",
        _NO_CHANGE, whole=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """What a file is, why it is refused, and the keys that show it."""

    name: str
    reason: str
    keys: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"this is {self.name}, which cannot be merged: {self.reason}"


def refusals(keys: Iterable[str]) -> tuple[Refusal, ...]:
    """Kinds of unmergeable files that these keys show; each key counts for the first that claims it."""
    found: dict[str, list[str]] = {}
    for key in keys:
        for kind in REFUSED:
            if kind.claims(key):
                found.setdefault(kind.name, []).append(key)
                break
    return tuple(
        Refusal(kind.name, kind.reason, tuple(found[kind.name])) for kind in REFUSED if kind.name in found
    )
