"""What cannot be merged, and why: by the first bytes of a file, by its keys, and by the slot of a layer.

:mod:`.files.recognise` looks at the bytes, :mod:`.dialects.refusals` at the keys, :mod:`.adapters.groups` at
the slots.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from .errors import Sentence

# First bytes of files that are found under the name of a LoRA, and what the file is: the end of a sentence.
BYTES: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a git-lfs pointer, a short text in place of the LoRA: download the file itself.",
    ),
    (b"GGUF", "is a GGUF model with the wrong name, not a LoRA."),
    (b"\x89PNG", "is a PNG picture with the wrong name, not a LoRA."),
    (b"\xff\xd8\xff", "is a JPEG picture with the wrong name, not a LoRA."),
    (b"GIF8", "is a GIF picture with the wrong name, not a LoRA."),
    (b"RIFF", "is a WebP picture, sound or film with the wrong name, not a LoRA."),
    (b"%PDF", "is a PDF document with the wrong name, not a LoRA."),
    (b"\x1f\x8b", "is a gzip archive; unpack it first."),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first."),
    (b"Rar!", "is a RAR archive; unpack it first."),
    (b"\xfd7zXZ", "is an xz archive; unpack it first."),
    (b"\x89HDF", "is an HDF5 file with the wrong name, not a LoRA."),
    (b"\x93NUMPY", "is a NumPy array with the wrong name, not a LoRA."),
    (b"\x7fELF", "is a program, not a LoRA."),
    (b"MZ", "is a Windows program, not a LoRA."),
)


@dataclass(frozen=True)
class Kind:
    """A kind of file that is refused.

    Attributes:
        name: What the file is, with its article.
        pattern: Searched in a key.
        reason: Why it cannot be merged, or what it is good for.
        whole: It is a model of its own, so keys that end like an adapter's belong to something else.
        one_key: One key that begins so is enough, also beside layers that read like a LoRA's.
    """

    name: str
    pattern: str
    reason: str
    whole: bool = False
    one_key: bool = False

    @cached_property
    def found(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    @property
    def sentence(self) -> str:
        """Why a file of this kind is refused, after its name and a colon."""
        return Sentence(
            "this is {name}, which cannot be merged: {reason}", Sentence(self.name), Sentence(self.reason)
        )


_NO_CHANGE = "it holds no change to a base model"
_WHOLE_MODEL = "bake merges LoRAs into it, and extract makes a LoRA of it and its base model"
_BESIDE = "it is a network of its own beside the base model"
_NEW_LAYERS = "it adds new layers instead of changing those of the base model"

KINDS: tuple[Kind, ...] = (
    Kind(
        "a ControlNet-LLLite", r"^lllite_", "it steers with a picture and adds nothing to the weights",
        one_key=True,
    ),
    Kind("a Control-LoRA (a ControlNet)", r"^lora_controlnet$|^control_lora", _BESIDE, one_key=True),
    Kind(
        "an IP-Adapter",
        r"^(?:ip_adapter|image_proj(?:_model)?|ip_adapter_proj_model)\.|\.processor\.to_[kv]_ip\b",
        _NEW_LAYERS, one_key=True,
    ),
    Kind("a hypernetwork", r"^\d+\.[01]\.(?:linear|layers?)\b", _NEW_LAYERS, one_key=True),
    Kind("an hlora", r"^hlora", "no public tool describes what its layers mean"),
    Kind(
        "a T-LoRA", r"\.(?:q_layer|p_layer)\.weight$|\.lambda_layer$",
        "it is relative to a decomposition of the base weights that is not in the file",
    ),
    Kind("a VeRA", r"\bvera_(?:lambda_[bd]|[AB])\b", "it scales random matrices that are not in the file"),
    Kind("a FourierFT adapter", r"\bfourierft_", "it stores a spectrum whose positions are not in the file"),
    Kind(
        "an AdaLoRA", r"\.lora_E\b|\.ranknum\b",
        "its scale depends on a number of ranks that is not in the file",
    ),
    Kind(
        "an adapter of PEFT's OFT", r"\.oft_[rR](?:\.[^.]+)?(?:\.weight)?$",
        "it stores the rotation in a packed form whose layout depends on the version of PEFT",
    ),
    Kind(
        "an adapter of PEFT's BOFT", r"\.boft_[Rs](?:\.[^.]+)?$",
        "no WebUI reads it; LyCORIS's BOFT can be merged",
    ),
    Kind(
        "an adapter of PEFT's (IA)^3", r"\.ia3_l(?:\.[^.]+)?$",
        "no WebUI reads it; LyCORIS's (IA)^3 can be merged",
    ),
    Kind("a HRA or bone adapter", r"\.(?:hra_u|bone_block|miss_block)\b", "no WebUI reads it"),
    Kind(
        "a LoRA of an embedding table", r"\.lora_embedding_[AB]\b",
        "no WebUI applies it to the token embeddings",
    ),
    Kind(
        "a ControlNet",
        r"^(?:.*\.)?(?:control_model|controlnet_\w+|zero_convs|input_hint_block)\.|^controlnet\.",
        _BESIDE, whole=True,
    ),
    Kind("an AnimateDiff motion module", r"\bmotion_modules\.", _NEW_LAYERS, whole=True),
    Kind(
        "a whole checkpoint",
        r"^(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders|"
        r"text_encoders\.\w+\.transformer)\.",
        _WHOLE_MODEL, whole=True,
    ),
    Kind(
        "a VAE",
        r"^(?:vae\.)?(?:(?:encoder|decoder)\.(?:conv_in|conv_out|conv1|down|down_blocks|up|up_blocks|mid|"
        r"mid_block)\.|(?:post_)?quant_conv\.)",
        _NO_CHANGE, whole=True,
    ),
    Kind(
        "a textual inversion embedding",
        r"^(?:emb_params|clip_[lg](?:_out)?|t5(?:xxl)?|qwen\w*|string_to_(?:param|token)\b.*|<[^:]*>|\*)$",
        "embeddings are used by name in the prompt",
    ),
    Kind("a T2I-Adapter", r"^(?:adapter\.)?body\.\d+\.(?:block|in_conv|resnets)", _BESIDE, whole=True),
    Kind(
        "an upscaler", r"^(?:model\.\d+\.(?:sub\.|weight$|bias$)|RRDB_trunk\.|conv_first\.|body\.\d+\.)",
        _NO_CHANGE, whole=True,
    ),
    Kind("a CLIP vision model", r"^(?:vision_model|visual)\.", _NO_CHANGE, whole=True),
    Kind(
        "a whole text encoder or language model",
        r"^(?:(?:text_encoders?|transformer)\.)?(?:text_model\.|(?:transformer\.)?resblocks\.|"
        r"token_embedding\.|encoder\.block\.|shared\.|model\.(?:layers|embed_tokens)\.)",
        _NO_CHANGE, whole=True,
    ),
    Kind(
        "a whole denoiser",
        r"^(?:diffusion_model\.|model\.|transformer\.|unet\.)?(?:down_blocks|up_blocks|mid_block|"
        r"input_blocks|output_blocks|double_blocks|single_blocks|transformer_blocks|"
        r"single_transformer_blocks|joint_blocks|noise_refiner|blocks|layers)\.",
        _WHOLE_MODEL, whole=True,
    ),
)  # fmt: skip

# Slots that no formula can turn into a delta weight: what each does to the base model's.
SLOTS = {
    "set_weight": "replaces the base model's weight instead of adding to it",
    "reshape_weight": "changes the shape of the base model's weight",
}
