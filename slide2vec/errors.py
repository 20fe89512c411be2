"""What can go wrong, one class per kind. Every class also inherits the builtin that callers expect."""

from __future__ import annotations

import difflib
import linecache
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

__all__ = [
    "ArtifactError",
    "BackendError",
    "ConfigError",
    "Contradiction",
    "EmbedImagesError",
    "EmbedPatientsError",
    "EmbedSlidesError",
    "EngineError",
    "ExtraMissingError",
    "GatedWeightsError",
    "ImageError",
    "ManifestError",
    "MaskError",
    "ModelLevelError",
    "NotFiniteError",
    "NothingToEmbedError",
    "OutputError",
    "OutputLockedError",
    "PatientError",
    "PresetError",
    "Slide2VecError",
    "SlideError",
    "SlideOpenError",
    "SlideReadError",
    "SpacingError",
    "TilingError",
    "UnsupportedError",
    "WeightsError",
    "WorkerLostError",
    "as_slide_error",
    "did_you_mean",
    "nearest_names",
    "why_of",
]


class Slide2VecError(Exception):
    """Base of every error raised on purpose by slide2vec.

    Its message says what to do, so that a notebook shows that and the caller's line; `%debug` has all frames.
    """

    def _render_traceback_(self) -> list[str]:
        """Asked for by IPython, in place of the frames in between."""
        callers: list[str] = []
        for frame, number in traceback.walk_tb(self.__traceback__):
            if str(frame.f_globals.get("__name__")).startswith("slide2vec."):
                break
            callers.append(f"line {number}: {linecache.getline(frame.f_code.co_filename, number).strip()}")
        return [*callers[-1:], f"{type(self).__name__}: {self}"]


class ConfigError(Slide2VecError, ValueError):
    """A configuration field has an unknown name or a value that is not allowed."""


class ManifestError(Slide2VecError, ValueError):
    """A manifest or a slide mapping is incomplete, duplicated or malformed."""


class PresetError(Slide2VecError, ValueError):
    """A preset or an output variant does not exist, or a recipe file is malformed."""


class ModelLevelError(Slide2VecError, ValueError):
    """A method was called on a model of another level (a patient method on a tile model, say)."""


class UnsupportedError(Slide2VecError, NotImplementedError):
    """An encoder has no such output (attention maps, text); the message says why."""


class WeightsError(Slide2VecError, RuntimeError):
    """Weights could not be found, read or matched to the encoder."""


class GatedWeightsError(WeightsError):
    """The weights are in a gated repository and access was not granted (yet)."""


class ExtraMissingError(Slide2VecError, ImportError):
    """An optional package is needed and not installed; the message names the pip extra."""


class EngineError(Slide2VecError, RuntimeError):
    """An engine cannot be built, found, read or run; the message says why and what can be done."""


class BackendError(Slide2VecError, RuntimeError):
    """A reading back end cannot be used for this slide; the message says which can."""


class Contradiction(BackendError):
    """A second decoder gives other pixels for a tile than the reading back end."""


class SlideError(Slide2VecError, RuntimeError):
    """Something is wrong with one slide. Base of the per-slide errors."""


class SlideOpenError(SlideError):
    """A slide is missing, truncated, or in a format that no back end reads."""


class SlideReadError(SlideError):
    """Pixels of an opened slide cannot be decoded (a corrupt tile, a truncated file)."""


class SpacingError(SlideError, ValueError):
    """A slide's spacing is missing or implausible, or finer pixels are asked for than it has."""


class MaskError(SlideError, ValueError):
    """A tissue mask is missing, unreadable or empty."""


class TilingError(SlideError, ValueError):
    """A coordinate file cannot be read or does not belong to the slide and settings at hand."""


class ImageError(Slide2VecError, RuntimeError):
    """A ready image cannot be read, decoded or embedded; the message names it."""


class NotFiniteError(SlideError, ArithmeticError):
    """Embeddings hold NaN or infinities; the message names the first tile, the precision and the remedy."""


class WorkerLostError(SlideError):
    """The processes that had a slide in hand died, twice: of it, perhaps, or of a lack of memory."""


class NothingToEmbedError(SlideError, ValueError):
    """A slide encoder was given no tiles, or a patient encoder no slides."""


class ArtifactError(Slide2VecError, ValueError):
    """An embedding file, its sidecar or a process list cannot be read or is incomplete."""


class PatientError(Slide2VecError, RuntimeError):
    """A patient cannot be embedded: slides of theirs failed, or the patient encoder did."""


class OutputError(Slide2VecError, OSError):
    """A file of a run cannot be written (a full disk, say); what is complete stays."""

    @classmethod
    def of(cls, path: object, cause: OSError) -> OutputError:
        made = cls(f"{path} cannot be written: {cause.strerror or cause}")
        made.errno, made.filename = cause.errno, str(path)
        return made

    def __str__(self) -> str:
        return str(self.args[0])  # not errno and file name over again

    def __reduce__(self) -> tuple[Any, ...]:
        """With errno and file name, which OSError drops where they are no arguments."""
        return _output_error, (type(self), str(self), self.errno, self.filename)


def _output_error(kind: type[OutputError], message: str, number: int | None, filename: Any) -> OutputError:
    made = kind(message)
    made.errno, made.filename = number, filename
    return made


class OutputLockedError(Slide2VecError, RuntimeError):
    """Another run writes into the same output directory."""


class EmbedSlidesError(ExceptionGroup[Exception], Slide2VecError):
    """Some slides of a call failed; the others are finished and in `results`.

    Attributes:
        results: what `embed_slides` would have returned, in input order, with None in the
            place of each failed slide; of several models such a list for each, by name.
        failed: sample_id -> its error; of several models "<sample_id> with <model>".
    """

    results: Sequence[Any] | Mapping[str, Sequence[Any]]
    failed: Mapping[str, Exception]
    what = "slides"

    @classmethod
    def of(cls, failed: Mapping[str, Exception], results: Sequence[Any]) -> Self:
        names = ", ".join(failed)
        done = sum(result is not None for result in results)
        message = (
            f"{len(failed)} of {len(results)} {cls.what} failed ({names}); the {done} embedded ones are in "
            '.results (or pass on_error="skip")'
        )
        group = cls(message, list(failed.values()))
        group.results, group.failed = results, failed
        return group

    @classmethod
    def of_several(cls, failed: Mapping[str, Exception], results: Mapping[str, Sequence[Any]]) -> Self:
        """Of several models: `results` and the keys of `failed` ("<sample_id> with <model>") name them."""
        message = (
            f"{len(failed)} embeddings failed ({', '.join(failed)}); the others are in .results, by model"
        )
        group = cls(message, list(failed.values()))
        group.results, group.failed = results, failed
        return group

    def derive(self, excs: Sequence[Exception]) -> Self:  # type: ignore[override]
        group = type(self)(self.message, list(excs))
        group.results, group.failed = self.results, self.failed
        return group


class EmbedImagesError(EmbedSlidesError):
    """Some images of a call failed; `results` has the files of the others, None in the place of each."""

    what = "images"


class EmbedPatientsError(EmbedSlidesError):
    """Some patients of a call failed; the others are in `results`, None in the place of each failed one.

    `failed` has patient_id -> its PatientError, whose cause is the error of its first failed slide.
    """

    what = "patients"


def as_slide_error(error: BaseException, sample_id: str, doing: str) -> Exception:
    """One of ours as it is; any other as the cause of a SlideError that names the slide.

    Args:
        doing: what was being done, such as "finding its tiles".
    """
    if isinstance(error, Slide2VecError):
        return error
    what = " ".join(str(error).split())
    slide_error = SlideError(
        f"slide {sample_id}: {doing} failed: {type(error).__name__}{f': {what}' if what else ''}; its file "
        "is damaged perhaps: copy it again from its source"
    )
    slide_error.__cause__ = error
    return slide_error


def why_of(error: Exception) -> str:
    """What the system says of a file, without its number and the file, which is named beside it."""
    return getattr(error, "strerror", None) or str(error)


def nearest_names(
    name: str, allowed: Iterable[str], count: int = 3, *, aliases: Mapping[str, str] | None = None
) -> str:
    """A sentence that names what `name` may have meant: "Did you mean a, b or c?", else all names.

    Args:
        aliases: what others call some of the names -> the name, which is told of in their place.
    """
    names, others = set(allowed), aliases or {}
    close = difflib.get_close_matches(name.lower(), sorted(names | set(others)), n=2 * count, cutoff=0.5)
    meant = list(dict.fromkeys(others.get(each, each) for each in close))
    return did_you_mean(meant[:count]) if meant else f"Allowed: {', '.join(sorted(names))}."


def did_you_mean(names: Sequence[str]) -> str:
    """The question, with one name or more."""
    *most, last = names
    return f"Did you mean {', '.join(most)} or {last}?" if most else f"Did you mean {last}?"
