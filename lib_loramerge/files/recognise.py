"""What a file is whose first bytes are not those of a LoRA, said so that its owner knows what to do."""

from __future__ import annotations

import re

from lib_loramerge.refused import BYTES

from ..errors import Sentence


def size_text(count: int) -> str:
    """A number of bytes as people read it; one MB is 1,000,000 bytes."""
    if count < 1_000_000:
        return Sentence("{count} bytes", f"{count:,}")
    if count < 1_000_000_000:
        return f"{count / 1_000_000:,.1f} MB"
    return f"{count / 1_000_000_000:,.2f} GB"


AGAIN = "Download the file itself again."
RENAME = "with the wrong name; rename it to .pt."
PICKLE = re.compile(rb"\x80[\x02-\x05]")
MARKUP = re.compile(rb"\s*<(?:!doctype|html|head|\?xml|!--)", re.IGNORECASE)


def describe_bytes(head: bytes, size: int) -> str | None:
    """What a file is by its first bytes: the rest of a sentence that its name begins.

    Args:
        head: The first bytes of the file; 512 are enough.
        size: Size of the whole file in bytes.

    Returns:
        None if no rule fits the bytes; they may be safetensors.
    """
    for magic, what in BYTES:
        if head.startswith(magic):
            return Sentence(what)
    again = Sentence(AGAIN)
    if MARKUP.match(head.removeprefix(b"\xef\xbb\xbf")):
        return Sentence("is a web page: the download met a log-in or an error page. {again}", again)
    if head.startswith(b"PK\x03\x04"):
        if any(name in head for name in (b"data.pkl", b"serialization_id", b"byteorder", b".format_version")):
            return Sentence("is a PyTorch file (a zip with a pickle) {rename}", Sentence(RENAME))
        return Sentence("is a zip archive; unpack it first.")
    if PICKLE.match(head):
        return Sentence("is a PyTorch pickle {rename}", Sentence(RENAME))
    if not head.strip(b"\0"):
        return Sentence(
            "holds only zeros at its start ({size}): the download never finished. {again}",
            size_text(size),
            again,
        )
    if head[:1] in b"{[" and _is_text(head):
        return Sentence("is JSON text, such as a server's error message, not a LoRA. {again}", again)
    if _is_text(head):
        return Sentence("is a text file, not a LoRA. {again}", again)
    if size < 10:
        return Sentence("is too short ({size} bytes) to be a LoRA. {again}", size, again)
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
