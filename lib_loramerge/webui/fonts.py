"""Fonts for names in every writing: what a chart draws a letter with, and which letters nothing here has."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Families with the letters of Chinese, Japanese and Korean, by system; the first that exists is used.
FAMILIES = (
    *(
        "Noto Sans CJK JP",
        "Noto Sans CJK SC",
        "Noto Sans CJK KR",
        "Noto Sans JP",
        "Noto Sans SC",
        "Noto Sans KR",
    ),
    *(
        "Source Han Sans JP",
        "Source Han Sans",
        "Yu Gothic",
        "Meiryo",
        "MS Gothic",
        "Microsoft YaHei",
        "SimHei",
    ),
    *("Malgun Gothic", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "AppleGothic"),
    *("IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("NanumGothic", "Droid Sans Fallback", "Arial Unicode MS", "Unifont", "Noto Serif CJK JP"),
)
# Files of those families: matplotlib knows only the fonts that were there when it looked last.
_FILES = re.compile(
    "noto(sans|serif).*(cjk|jp|sc|kr)|sourcehan|yugoth|meiryo|msgothic|msyh|simhei|malgun|hiragino|pingfang|"
    "applesdgothic|applegothic|ipa.*g|takao|vl-gothic|wqy|nanumgothic|droidsansfallback|arial ?unicode|"
    "unifont",
    re.IGNORECASE,
)
_lock = threading.Lock()


def families(texts: Iterable[str]) -> list[str]:
    """Families to draw these texts with, the usual one first, each with letters that those before it lack."""
    chosen = list(_usual())
    missing = lacking(texts, chosen)
    for family in _installed() if missing else ():
        rest = lacking(missing, [family])
        if len(rest) < len(missing):
            chosen.append(family)
            missing = rest
    return chosen


def lacking(texts: Iterable[str], among: Iterable[str] | None = None) -> str:
    """Letters of the texts that no font has, each once; these become boxes in a chart.

    Args:
        among: Families; by default the usual one and all of :data:`FAMILIES` that are installed.
    """
    letters = {letter for text in texts for letter in text if letter.isprintable() and not letter.isspace()}
    for family in (*_usual(), *_installed()) if among is None else among:
        letters = {letter for letter in letters if ord(letter) not in _letters(family)}
    return "".join(sorted(letters))


def _usual() -> tuple[str, ...]:
    import matplotlib

    chosen = matplotlib.rcParams["font.sans-serif"]
    return tuple(name for name in chosen if name in _known())[:1] or ("DejaVu Sans",)


def _known() -> set[str]:
    from matplotlib import font_manager

    return {entry.name for entry in font_manager.fontManager.ttflist}


def _installed() -> list[str]:
    """Those of :data:`FAMILIES` that are here, found again where matplotlib's list is older than they are."""
    with _lock:
        found = [name for name in FAMILIES if name in _known()]
        if not found and _look_again():
            found = [name for name in FAMILIES if name in _known()]
        return found


@cache
def _look_again() -> bool:
    """Adds fonts of the system to matplotlib's list, once in a process; whether there were any."""
    from matplotlib import font_manager

    added = False
    for path in sorted(font_manager.findSystemFonts()):
        if _FILES.search(path.replace("\\", "/").rpartition("/")[2]):
            try:
                font_manager.fontManager.addfont(path)
                added = True
            except Exception:  # FreeType raises many kinds for a file that is no font.
                continue
    return added


@cache
def _letters(family: str) -> frozenset[int]:
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    try:
        path = font_manager.fontManager.findfont(
            font_manager.FontProperties(family=[family]), fallback_to_default=False
        )
        return frozenset(FT2Font(path).get_charmap())
    except Exception:  # The file of a font that is gone, or is damaged.
        return frozenset()


def use(figure: Figure) -> None:
    """Makes all texts of a figure use fonts that have their letters."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    chosen = families(text.get_text() for text in texts)
    if len(chosen) > 1:
        for text in texts:
            text.set_fontfamily(chosen)
