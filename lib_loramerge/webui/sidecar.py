"""What the WebUI keeps beside a LoRA: ``<name>.json`` (user metadata) and ``<name>.png`` (preview).

Both are the WebUI's own: its LoRA cards show the picture and the notes, and put the activation text and
the preferred weight into the prompt. File contents are untrusted: whatever cannot be understood is empty.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import OutputError

if TYPE_CHECKING:
    from .host import Host

PREVIEW_SUFFIXES = (
    ".png",
    ".preview.png",
    ".jpg",
    ".preview.jpg",
    ".jpeg",
    ".preview.jpeg",
    ".webp",
    ".preview.webp",
)
MAX_JSON_BYTES = 4 << 20
MAX_PREVIEW_BYTES = 64 << 20
MAX_PREVIEW_PIXELS = 100_000_000
THUMBNAIL = 96
_FORMATS = ("PNG", "JPEG", "WEBP")


class UserMetadata(NamedTuple):
    """The fields of the WebUI's ``<name>.json``, under the names its editor shows."""

    activation_text: str = ""
    preferred_weight: float = 0.0
    negative_text: str = ""
    notes: str = ""
    description: str = ""
    sd_version: str = ""

    @property
    def empty(self) -> bool:
        return self == UserMetadata()


# Field of ours -> key of the WebUI.
_KEYS = {
    "activation_text": "activation text",
    "preferred_weight": "preferred weight",
    "negative_text": "negative text",
    "notes": "notes",
    "description": "description",
    "sd_version": "sd version",
}


def read(lora: Path) -> UserMetadata:
    """The user metadata of a LoRA file; empty when there is none or it is broken."""
    stored = _read_json(lora.with_suffix(".json"))
    fields: dict[str, str | float] = {}
    for field, key in _KEYS.items():
        value = stored.get(key)
        if field == "preferred_weight":
            fields[field] = _number(value)
        elif isinstance(value, str):
            fields[field] = value
    return UserMetadata(**fields)  # type: ignore[arg-type]


def union(loras: Sequence[Path]) -> UserMetadata:
    """What a merge of several LoRAs could say: each activation word once, in the order of the inputs."""
    entries = [read(path) for path in loras]
    return UserMetadata(
        activation_text=_joined(entry.activation_text for entry in entries),
        negative_text=_joined(entry.negative_text for entry in entries),
    )


def preview_of(lora: Path) -> Path | None:
    """The preview picture of a LoRA, found as the WebUI finds it; None when it has none."""
    stem = str(lora.with_suffix(""))
    for suffix in PREVIEW_SUFFIXES:
        candidate = Path(stem + suffix)
        if candidate.is_file():
            return candidate
    return None


def shown_preview(lora: Path, host: Host, side: int = THUMBNAIL) -> str:
    """The WebUI's own picture of a LoRA, small; where others see the page, of the LoRA folders alone."""
    preview = preview_of(lora)
    if preview is None or (host.restricted() and not host.inside(preview)):
        return ""
    return thumbnail(preview, side)


def thumbnail(picture: Path, side: int = THUMBNAIL) -> str:
    """A small copy of a picture as a ``data:`` address; empty for what is no picture or is too large.

    Args:
        side: Pixels of the longer side at most.
    """
    try:
        status = picture.stat()
    except OSError:
        return ""
    return _thumbnail(picture, side, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)  # a few kB each
def _thumbnail(picture: Path, side: int, size: int, _changed: int) -> str:
    if size > MAX_PREVIEW_BYTES:
        return ""
    try:
        from PIL import Image

        with Image.open(picture, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PREVIEW_PIXELS:
                return ""
            image.draft("RGB", (2 * side, 2 * side))
            image.thumbnail((side, side))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="JPEG", quality=80)
    except Exception:  # Pillow raises many kinds for a damaged or hostile picture.
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def taken(lora: Path, data: UserMetadata | None, preview: Path | None) -> list[Path]:
    """Files beside ``lora`` that :func:`write` would have to replace."""
    wanted = [_json_path(lora)] if data is not None and not data.empty else []
    wanted += [_png_path(lora)] if preview is not None else []
    return [path for path in wanted if path.exists()]


def write(lora: Path, data: UserMetadata | None, preview: Path | None, overwrite: bool = False) -> list[Path]:
    """Writes ``<name>.json`` and ``<name>.png`` beside a merged file.

    Keys of an existing ``<name>.json`` that are not ours stay as they are.

    Returns:
        The files written.

    Raises:
        OutputError: A file exists already and ``overwrite`` is off, or it cannot be written.
    """
    existing = taken(lora, data, preview)
    if existing and not overwrite:
        raise OutputError(
            "{file} exists already and was left as it is; allow overwriting to replace it.", existing[0].name
        )
    written = []
    if data is not None and not data.empty:
        path = _json_path(lora)
        content = {**_read_json(path), **{key: getattr(data, field) for field, key in _KEYS.items()}}
        text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
        _replace(path, text.encode("utf-8", "replace"))
        written.append(path)
    if preview is not None:
        path = _png_path(lora)
        _replace(path, _png_bytes(preview))
        written.append(path)
    return written


def _json_path(lora: Path) -> Path:
    return lora.with_suffix(".json")


def _png_path(lora: Path) -> Path:
    return lora.with_suffix(".png")


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return {}
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return 0.0


def _joined(texts: Iterable[str]) -> str:
    words: dict[str, None] = {}
    for text in texts:
        for word in text.split(","):
            if word.strip():
                words.setdefault(word.strip())
    return ", ".join(words)


def _png_bytes(preview: Path) -> bytes:
    """The picture as PNG; a PNG is copied as it is."""
    try:
        if preview.stat().st_size > MAX_PREVIEW_BYTES:
            raise OutputError(
                "The preview {file} is larger than {most} MiB and was not copied.",
                preview.name,
                MAX_PREVIEW_BYTES >> 20,
            )
        content = preview.read_bytes()
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return content
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            buffer = io.BytesIO()
            image.convert("RGBA" if "A" in image.getbands() else "RGB").save(buffer, format="PNG")
    except OutputError:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged or hostile picture.
        raise OutputError(
            "The preview {file} is not a picture that can be read, so it was not copied.", preview.name
        ) from error
    return buffer.getvalue()


def _replace(path: Path, content: bytes) -> None:
    from ..files.place import write_whole  # Not at the WebUI's start, see extension.py.

    try:
        write_whole(path, content)
    except OutputError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise OutputError(
            "{file} could not be written beside the merged LoRA: {reason}.", path.name, reason
        ) from error
