"""A LoRA of what one checkpoint is more than another."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from .. import dialects
from ..delta import parallel_map, raise_if
from ..errors import IncompatibleError, RecipeError, Sentence, joined
from ..files import check_target, write_file
from ..merge import Progress
from ..metadata import build_metadata
from ..recipe import LoraInput, MergeRecipe
from ..recipe.stored import VERSION
from .advising import Survey
from .apart import left_out, reasons
from .baking import hash_of, legacy_hash
from .differing import ExtractSettings, Found, Pair, measure, stored_as
from .extracted import ExtractReport, error_of, report_of
from .fitting import fit, foreseen_bytes, lay_aside
from .numbers import FLOAT8_LARGEST
from .outcome import shortened
from .predicting import predicts_v
from .reading import Checkpoint
from .rewriting import check_room
from .tensors import OneRank, Spill, complete_groups, read_vectors, spill_file, write_layer, write_vectors

WORKERS = 2
_RULES = ("rank", "conv_rank", "retain", "size", "max_rank", "parts", "vectors", "dtype")
"""Settings that a LoRA keeps: with the two checkpoints they make it again."""


def extract(
    tuned: Path,
    base: Path,
    output: Path | None,
    settings: ExtractSettings,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> ExtractReport:
    """Write the LoRA that makes ``tuned`` of ``base``, as far as its rank holds it.

    Args:
        output: None writes nothing and tells all the same, and of all other ranks as well: ``advice``.
        progress: Told of the bytes that were read of both, and that were hashed.

    Raises:
        LoraMergeError: Anything a user can cause; nothing was written then.
    """
    start = time.perf_counter()
    if output is not None:
        check_target(output, overwrite)
    with opened_pair(tuned, base, settings) as pair:
        if output is not None:
            pair.refuse_inputs(output)
        names = pair.layers()
        folder = None if output is None else output.parent
        if output is not None:
            check_room(output, foreseen_bytes(pair, names)[1])
        with spill_file(folder) as spilled:
            shelf, tensors = Spill(spilled), Spill(None if output is None else spilled)
            sized = settings.size is not None
            found = _all_layers(
                pair, names, shelf if sized else tensors, progress, cancel, advised=output is None
            )
            _refuse_equal(pair, found)
            vectors = read_vectors(pair, found)
            texts = _text_bytes(pair, output)
            if sized:
                fit(pair, found, vectors, texts, shelf, tensors, lambda: raise_if(cancel))
            complete_groups(pair, found, tensors)
            skipped, warnings = write_vectors(pair, found, vectors, tensors)
            if not len(tensors) and output is not None:
                raise IncompatibleError(
                    "Nothing of the difference of {tuned} and {base} can be in a LoRA. Choose other parts.",
                    tuned.name,
                    base.name,
                )
            written = None
            if output is not None:
                metadata = _metadata(pair, output, found, _hashes(pair, progress, cancel))
                one_rank = dialects.needs_one_rank(pair.identity, settings.dialect)
                written = write_file(
                    output,
                    OneRank(tensors) if one_rank else tensors,
                    metadata,
                    overwrite=overwrite,
                    stop=lambda: raise_if(cancel),
                    before_rename=pair.check_unchanged,
                )
        if written is not None:
            report = report_of(pair, output, written.size, found, start)
        else:
            pair.check_unchanged()
            survey = Survey(pair, found, vectors, texts)
            size = survey.size_bytes() if len(tensors) else None
            report = report_of(pair, None, size, found, start, survey.advice())
        return replace(
            report,
            skipped=shortened([*left_out(pair), *pair.skipped, *skipped]),
            warnings=[*report.warnings, *warnings],
        )


@contextmanager
def opened_pair(tuned: Path, base: Path, settings: ExtractSettings) -> Iterator[Pair]:
    """Two checkpoints of one base model, open.

    Raises:
        LoraMergeError: They are none, or not of one base model.
    """
    if os.path.exists(tuned) and os.path.exists(base) and os.path.samefile(tuned, base):
        raise RecipeError(
            "{tuned} and {base} are the same file, so there is nothing to extract.", tuned.name, base.name
        )
    with (
        Checkpoint(tuned, role="a fine-tuned checkpoint") as first,
        Checkpoint(base, role="its base") as second,
    ):
        if first.architecture.id != second.architecture.id:
            raise IncompatibleError(
                "{tuned} is {model}, {base} is {other_model}. Choose the base that it was trained from.",
                tuned.name,
                first.architecture.label,
                base.name,
                second.architecture.label,
            )
        yield Pair(first, second, settings)


def _all_layers(
    pair: Pair,
    names: Sequence[str],
    spill: Spill,
    progress: Callable[[Progress], None] | None,
    cancel: Callable[[], bool] | None,
    *,
    advised: bool,
) -> list[Found]:
    """What both differ by; the tensors, or what becomes them when the sizes of all are known, on the disk."""
    begin, found, read = time.perf_counter(), [], 0
    total = sum(map(pair.stored_bytes, names))
    one = partial(measure, pair, advised=advised)
    work = parallel_map(one, names, workers=WORKERS, cancel=cancel)
    for layer in work:
        lay_aside(layer, spill)
        write_layer(pair, layer, spill)
        layer.stored = layer.whole = None
        found.append(layer)
        read += pair.stored_bytes(layer.name)
        if progress is not None:
            spent = time.perf_counter() - begin
            eta = spent / read * (total - read) if len(found) > 8 and read else None
            progress(Progress("extract", read, total, layer.name, eta))
    return found


def _refuse_equal(pair: Pair, found: Sequence[Found]) -> None:
    if any(layer.trained for layer in found):
        return
    unequal = [x.name for x in found if x.exact > 0 and len(pair.base.shape(pair.identity, x.name)) > 1]
    dtypes = sorted({stored_as(c, name)[0] for c in (pair.tuned, pair.base) for name in unequal})
    how = " against ".join(_WORDS.get(name, name) for name in dtypes)
    differ = Sentence("differ only by rounding ({dtype})", how) if unequal else Sentence("are equal")
    names, float8 = (pair.tuned.path.name, pair.base.path.name), FLOAT8_LARGEST.keys() & {*dtypes}
    if float8:  # What was baked in may be less than its steps.
        same = Sentence(
            "{tuned} and {base} cannot be told apart: their matrices {how}. A change that is smaller than "
            "the steps of {dtype} does not show in it: take the checkpoints in a finer precision, if there "
            "are such.",
            *names,
            differ,
            " + ".join(_WORDS[name] for name in sorted(float8)),
        )
    else:
        same = Sentence(
            "{tuned} and {base} hold the same model: their matrices {how}. There is nothing to extract.",
            *names,
            differ,
        )
    raise IncompatibleError(joined(" ", [same, *reasons(pair)]))


_WORDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8 e4m3",
    "F8_E5M2": "float8 e5m2",
}


def _hashes(
    pair: Pair, progress: Callable[[Progress], None] | None, cancel: Callable[[], bool] | None
) -> dict[str, str | None]:
    settings = pair.settings

    def sha256(checkpoint: Checkpoint, known: str) -> str | None:
        if not settings.hashed or len(checkpoint.files) != 1:
            return None
        return known or hash_of(checkpoint.files[0], progress, lambda: raise_if(cancel))

    return {
        "tuned": sha256(pair.tuned, settings.tuned_sha256),
        "base": sha256(pair.base, settings.base_sha256),
    }


def _text_bytes(pair: Pair, output: Path | None) -> int:
    """Bytes that the metadata take at most, padding included."""
    hashes = dict.fromkeys(("tuned", "base"), "0" * 64)
    texts = _metadata(pair, output or Path("x" * 32), [], hashes)
    return len(json.dumps(texts, ensure_ascii=False).encode()) + 512


def _metadata(
    pair: Pair, output: Path, found: Sequence[Found], hashes: Mapping[str, str | None]
) -> dict[str, str]:
    settings = pair.settings
    conv = {layer.name for layer in found if layer.rank and pair.has_kernel(layer.name)}
    linear = [layer for layer in found if layer.rank and layer.name not in conv]
    texts = build_metadata(
        name=output.stem,
        architecture=pair.base.architecture,
        sources=[],
        recipe=MergeRecipe(inputs=(LoraInput("extracted"),)),
        ranks=[layer.rank for layer in linear],
        alphas=[layer.alpha for layer in linear],
        conv_ranks=[layer.rank for layer in found if layer.name in conv],
        conv_alphas=[layer.alpha for layer in found if layer.name in conv],
    )
    texts.pop("loramerge_recipe", None)
    if predicts_v(pair.tuned):
        texts["modelspec.prediction_type"] = "v"
    texts["ss_sd_model_name"] = pair.base.path.name
    if len(pair.base.files) == 1:
        texts["ss_sd_model_hash"] = legacy_hash(pair.base.files[0])
    if hashes["base"] is not None:
        texts["ss_new_sd_model_hash"] = hashes["base"]
    facts = {
        "tuned": {"name": pair.tuned.path.name, "sha256": hashes["tuned"]},
        "base": {"name": pair.base.path.name, "sha256": hashes["base"]},
        **{name: getattr(settings, name) for name in _RULES},
        "error": error_of(found),
        "version": VERSION,
    }
    texts["loramerge_extract"] = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    return texts
