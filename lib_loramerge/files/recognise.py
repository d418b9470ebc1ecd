"""What a file that is no LoRA really is, said so that its owner knows what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lib_loramerge.errors import FileError, UnsupportedError

if TYPE_CHECKING:
    from lib_loramerge.files.header import Header


def size_text(count: int) -> str:
    """A number of bytes as people read it; one MB is 1,000,000 bytes."""
    if count < 1_000_000:
        return f"{count:,} bytes"
    if count < 1_000_000_000:
        return f"{count / 1_000_000:,.1f} MB"
    return f"{count / 1_000_000_000:,.2f} GB"


AGAIN = "Download the file itself again."
RENAME = "with the wrong name; rename it to .pt."
MAGIC: tuple[tuple[bytes, str], ...] = (
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
"""First bytes of files that are found under the name of a LoRA."""

PICKLE = re.compile(rb"\x80[\x02-\x05]")
MARKUP = re.compile(rb"\s*<(?:!doctype|html|head|\?xml|!--)", re.IGNORECASE)


def describe_bytes(head: bytes, size: int) -> str | None:
    """What a file is by its first bytes: the rest of a sentence that its name begins.

    Args:
        head: The first bytes of the file; 512 are enough.
        size: Size of the whole file in bytes.

    Returns:
        None if the bytes tell nothing; they may be safetensors.
    """
    for magic, what in MAGIC:
        if head.startswith(magic):
            return what
    if MARKUP.match(head.removeprefix(b"\xef\xbb\xbf")):
        return f"is a web page: the download met a log-in or an error page. {AGAIN}"
    if head.startswith(b"PK\x03\x04"):
        if any(name in head for name in (b"data.pkl", b"serialization_id", b"byteorder", b".format_version")):
            return f"is a PyTorch file (a zip with a pickle) {RENAME}"
        return "is a zip archive; unpack it first."
    if PICKLE.match(head):
        return f"is a PyTorch pickle {RENAME}"
    if not head.strip(b"\0"):
        return f"holds only zeros at its start ({size_text(size)}): the download never finished. {AGAIN}"
    if head[:1] in b"{[" and _is_text(head):
        return f"is JSON text, such as a server's error message, not a LoRA. {AGAIN}"
    if _is_text(head):
        return f"is a text file, not a LoRA. {AGAIN}"
    if size < 10:
        return f"is too short ({size} bytes) to be a LoRA. {AGAIN}"
    return None


def _is_text(head: bytes) -> bool:
    try:
        text = head[:-3].decode("utf-8") if len(head) >= 512 else head.decode("utf-8")
    except UnicodeDecodeError:
        try:
            text = head[: len(head) - 5].decode("utf-8")
        except UnicodeDecodeError:
            return False
    return bool(text) and all(character.isprintable() or character in "\t\r\n" for character in text)


@dataclass(frozen=True)
class OtherKind:
    """A kind of file that people take for a LoRA.

    Attributes:
        what: Completes "x.safetensors is ...".
        found: Tells it from its keys.
        adapter: True if such a file can hold keys that look like a LoRA's; it is
            then tried first.
    """

    what: str
    found: Callable[[Collection[str]], bool]
    adapter: bool = False


def _any(pattern: str) -> Callable[[Collection[str]], bool]:
    """True if one key matches from its start."""
    match = _matcher(pattern)
    return lambda keys: any(map(match(), keys))


def _all(pattern: str) -> Callable[[Collection[str]], bool]:
    """True if every key matches from its start."""
    match = _matcher(pattern)
    return lambda keys: all(map(match(), keys))


def _matcher(pattern: str) -> Callable[[], Callable[[str], object]]:
    """What matches a key, compiled when it is first asked for: a WebUI's start does not wait for it."""
    return cache(lambda: re.compile(pattern).match)


ADAPTER_KEY = re.compile(
    r"lora[_.:](?:up|down|mid|[ABab]\b|magnitude|linear_layer|embedding)|_lora[12]?\.|\.lora\.|hada_[wt]|lokr_[wt]"
    r"|oft_(?:blocks|diag|[rR])|dora_scale|on_input|\.diff(?:_b)?$|\.[wb]_norm$|\.set_weight$|\.alpha$"
    r"|:\d+:(?:up|down)$|vera_lambda|lambda_layer|\.[ab][12]\.weight$"
)
"""Found in a key that some adapter kind writes, in any dialect."""

EMBEDDING_PART = (
    r"(?:emb_params|clip_[lg](?:_out)?|t5(?:xxl)?|qwen\w*|string_to_(?:param|token)\b.*|<[^:]*>|\*"
    r"|name|step|sd_checkpoint\w*)$"
)
DENOISER_PART = (
    r"(?:diffusion_model\.|model\.|transformer\.|unet\.)?(?:double_blocks|single_blocks|joint_blocks|input_blocks"
    r"|down_blocks|transformer_blocks|single_transformer_blocks|noise_refiner|blocks(?=\.0\.(?:self|cross)_attn))\.0\."
)
TEXT_ENCODER_PART = (
    r"(?:(?:text_encoders?|transformer)\.)?(?:text_model|transformer\.resblocks|resblocks|token_embedding"
    r"|encoder\.block\.\d+\.layer|shared|model\.embed_tokens)\."
)

OTHER_KINDS: tuple[OtherKind, ...] = (
    OtherKind("a ControlNet-LLLite", _any(r"lllite_"), adapter=True),
    OtherKind("a Control-LoRA (a ControlNet)", _any(r"lora_controlnet$"), adapter=True),
    OtherKind(
        "an IP-Adapter",
        _any(r"(?:ip_adapter|image_proj(?:_model)?|ip_adapter_proj_model)\."),
        adapter=True,
    ),
    OtherKind(
        "a textual inversion embedding, whose place is the embeddings folder",
        _all(EMBEDDING_PART),
        adapter=True,
    ),
    OtherKind("a hypernetwork", _any(r"\d+\.[01]\.(?:linear|layers?)\b"), adapter=True),
    OtherKind(
        "a ControlNet",
        _any(r"(?:.*\.)?(?:control_model|controlnet_\w+|zero_convs|input_hint_block)\."),
    ),
    OtherKind("a T2I-Adapter", _any(r"(?:adapter\.)?body\.\d+\.(?:block|in_conv|resnets)")),
    OtherKind("an AnimateDiff motion module", _any(r".*motion_modules\.")),
    OtherKind(
        "a whole checkpoint",
        _any(r"(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders)\."),
    ),
    OtherKind("the denoiser of a whole model", _any(DENOISER_PART)),
    OtherKind(
        "a VAE",
        _any(
            r"(?:vae\.)?(?:encoder|decoder)\.(?:conv_in|down|up|mid|down_blocks|up_blocks|mid_block|conv1)\."
        ),
    ),
    OtherKind("a CLIP vision model", _any(r"(?:vision_model|visual)\.")),
    OtherKind("a text encoder", _any(TEXT_ENCODER_PART)),
    OtherKind(
        "an upscaler",
        _any(r"(?:model\.\d+\.(?:sub\.|weight$)|RRDB_trunk\.|conv_first\.|body\.0\.rdb1)"),
    ),
)
"""What is taken for a LoRA, by key names; the first row that fits counts."""


def refuse_non_lora(header: Header, path: Path, known: Callable[[str], bool] = lambda key: False) -> None:
    """Stop at a file that is something else than an adapter, by the names of its tensors.

    Files that no row of the table knows pass; their keys are judged by the dialects.

    Args:
        known: Whether a key is an adapter's besides those of :data:`ADAPTER_KEY`.

    Raises:
        FileError: If the file holds no tensor at all.
        UnsupportedError: If it is a checkpoint, a VAE, an embedding, a ControlNet or the like.
    """
    keys = header.tensors.keys()
    if not keys:
        what = "metadata but no tensors" if header.metadata else "no tensors"
        raise FileError(f"{path.name} holds {what}; there is nothing to merge.")
    is_adapter = any(map(ADAPTER_KEY.search, keys)) or any(map(known, keys))
    for kind in OTHER_KINDS:
        if (kind.adapter or not is_adapter) and kind.found(keys):
            raise UnsupportedError(
                f"{path.name} is {kind.what}; only adapters such as LoRA, LoCon, LoHa and LoKr can be merged."
            )
