"""Files that look like a LoRA, or are put where LoRAs are, and cannot be merged: which, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of file that is refused.

    Attributes:
        name: What the file is, with its article.
        pattern: Searched in a key.
        reason: Why it cannot be merged, or what it is good for.
    """

    name: str
    pattern: re.Pattern[str]
    reason: str


def _kind(name: str, pattern: str, reason: str) -> Kind:
    return Kind(name, re.compile(pattern), reason)


REFUSED: tuple[Kind, ...] = (
    _kind("a ControlNet-LLLite", r"^lllite_", "it steers with a picture and adds nothing to the weights"),
    _kind("an IP-Adapter", r"^(?:ip_adapter|image_proj(?:_model)?)\.|\.processor\.to_[kv]_ip\b",
          "it adds new layers instead of changing those of the base model"),
    _kind("an hlora", r"^hlora", "its layers belong to a host that no public tool describes"),
    _kind("a T-LoRA", r"\.(?:q_layer|p_layer)\.weight$|\.lambda_layer$",
          "it is relative to a decomposition of the base weights that is not in the file"),
    _kind("a VeRA", r"\bvera_(?:lambda_[bd]|[AB])\b", "it scales random matrices that are not in the file"),
    _kind("a FourierFT adapter", r"\bfourierft_", "it stores a spectrum whose positions are not in the file"),
    _kind("an AdaLoRA", r"\.lora_E\b|\.ranknum\b", "its ranks are pruned by a mask that is only in the trainer's state"),
    _kind("an adapter of PEFT's OFT", r"\.oft_[rR](?:\.[^.]+)?(?:\.weight)?$",
          "it stores the rotation in a packed form whose layout depends on the version of PEFT"),
    _kind("an adapter of PEFT's BOFT", r"\.boft_[Rs](?:\.[^.]+)?$",
          "no WebUI reads it; LyCORIS's BOFT can be merged"),
    _kind("an adapter of PEFT's (IA)^3", r"\.ia3_l(?:\.[^.]+)?$",
          "the file does not say whether it scales inputs or outputs"),
    _kind("a HRA or bone adapter", r"\.(?:hra_u|bone_block|miss_block)\b", "no WebUI reads it"),
    _kind("a LoRA of an embedding table", r"\.lora_embedding_[AB]\b", "no WebUI applies it to the token embeddings"),
    _kind("a ControlNet", r"^(?:control_model|controlnet)\.|^controlnet_(?:cond_embedding|down_blocks|mid_block)|^zero_convs\.|^control_lora",
          "it is a network of its own beside the base model"),
    _kind("a whole checkpoint", r"^(?:model\.diffusion_model\.(?:input_blocks|double_blocks|joint_blocks).+\.(?:weight|bias)$(?<!lora_down\.weight)"
          r"(?<!lora_up\.weight)(?<!lora_A\.weight)(?<!lora_B\.weight)|first_stage_model\.|cond_stage_model\.|conditioner\.embedders\.)",
          "use a checkpoint merger for whole models"),
    _kind("a VAE", r"^(?:encoder|decoder)\.(?:conv_in|conv_out|down|down_blocks|up|up_blocks|mid|mid_block)\.|^(?:post_)?quant_conv\.",
          "it holds no change to a base model"),
    _kind("a textual inversion embedding", r"^(?:emb_params|string_to_param|string_to_token|clip_[lg]|<.+>)$",
          "embeddings are used by name in the prompt"),
    _kind("a T2I-Adapter", r"^(?:adapter\.)?body\.\d+\.", "it is a network of its own beside the base model"),
    _kind("a whole text encoder or language model", r"^(?:text_model\.encoder\.layers|transformer\.resblocks|model\.layers)\..+(?<!lora_down)(?<!lora_up)(?<!lora_A)(?<!lora_B)\.(?:weight|bias)$",
          "it holds no change to a base model"),
    _kind("a whole denoiser", r"^(?:down_blocks|up_blocks|mid_block|input_blocks|double_blocks|transformer_blocks|joint_blocks|blocks)\..+\.(?:weight|bias)$"
          r"(?<!lora_down\.weight)(?<!lora_up\.weight)(?<!lora_A\.weight)(?<!lora_B\.weight)(?<!lora\.up\.weight)(?<!lora\.down\.weight)",
          "it holds no change to a base model"),
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
    """Kinds of unmergeable files that these keys belong to; each key counts for the first kind that claims it."""
    found: dict[str, list[str]] = {}
    for key in keys:
        for kind in REFUSED:
            if kind.pattern.search(key):
                found.setdefault(kind.name, []).append(key)
                break
    return tuple(Refusal(kind.name, kind.reason, tuple(found[kind.name])) for kind in REFUSED if kind.name in found)
