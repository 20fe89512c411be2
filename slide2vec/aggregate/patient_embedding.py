"""From the slides of a patient to their embedding, by a patient encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from slide2vec.aggregate.gather import SlideModel, check_on_error, collect_outcomes
from slide2vec.artifacts.finite import remedy
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.cpus import Budget
from slide2vec.embedded import EmbeddedPatient
from slide2vec.errors import (
    EmbedPatientsError,
    ManifestError,
    ModelLevelError,
    PatientError,
    Slide2VecError,
)
from slide2vec.manifests import SlidesLike, given_slides
from slide2vec.recipes import Level
from slide2vec.runtime.device import torch_threads
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome

__all__ = ["embed_patient", "embed_patients", "patient_embedding", "require_patient_level"]

logger = logging.getLogger(__name__)


def patient_embedding(
    slides: Mapping[str, Tensor], encoder: nn.Module, device: torch.device, *, preset: str
) -> Tensor:
    """(D,) float32 from slide embeddings (D,) by sample_id.

    Raises:
        PatientError: the encoder failed.
    """
    try:
        with torch.inference_mode(), torch_threads(Budget.of(device.type).encoder_threads):
            stacked = torch.stack([embedding.float() for embedding in slides.values()])
            found: Tensor = encoder(stacked.to(device))
            made = found.float().cpu()
    except Slide2VecError:
        raise
    except Exception as error:
        raise PatientError(
            f"the patient encoder {preset} failed on the slides {', '.join(slides)}: {error}"
        ) from error
    for name, embedding in slides.items():
        if not embedding.isfinite().all():
            raise PatientError(
                f"the embedding of slide {name} holds NaN or infinities: embed it again in bf16 or fp32"
            )
    if not made.isfinite().all():
        raise PatientError(
            f"the patient encoder {preset} gives NaN or infinities for the slides {', '.join(slides)}; "
            f"PyTorch computed them in fp32: {remedy('fp32')}"
        )
    return made


class PatientModel(SlideModel, Protocol):
    """A model, as far as the calls for patients need it."""

    @property
    def name(self) -> str: ...

    @property
    def level(self) -> Level: ...

    def patient_embedding(self, slides: Mapping[str, Tensor]) -> Tensor: ...


def embed_patient(
    self: PatientModel,
    slides: SlidesLike,
    patient_id: str | None = None,
    *,
    preprocessing: PreprocessingConfig | None = None,
    execution: ExecutionOptions | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> EmbeddedPatient:
    """Embed one patient from all their slides.

    Args:
        slides: as for `embed_slides`.
        patient_id: None = that of the slides, else the sample_id of the first.
        on_error: "raise" when a slide fails, or "skip" it and embed the patient from the others.

    Raises:
        ModelLevelError: a ValueError, on a model that is not patient-level.
        ManifestError: a ValueError: slides name different patients, or two have one sample_id.
        PatientError: slides failed.
    """
    require_patient_level(self, "embed_patient")
    theirs = one_patient(given_slides(slides), patient_id)
    outcomes = self.iter_slides(theirs, preprocessing, execution)
    return embed_one(theirs, outcomes, self.patient_embedding, on_error)


def embed_patients(
    self: PatientModel,
    slides: SlidesLike,
    patient_id_map: Mapping[str, str] | None = None,
    *,
    preprocessing: PreprocessingConfig | None = None,
    execution: ExecutionOptions | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[EmbeddedPatient]:
    """Embed several patients, each from all their slides; one result each, in order of first appearance.

    Args:
        slides: as for `embed_slides`; their patient_id counts, and without one their sample_id.
        patient_id_map: sample_id -> patient_id, which counts over that of the slides.
        on_error: "raise" an EmbedPatientsError at the end when slides failed, which carries the other
            patients; or "skip" these slides, and the patients who have no other.

    Raises:
        ModelLevelError: a ValueError, on a model that is not patient-level.
        ManifestError: a ValueError: two slides have one sample_id, or the map names others.
        EmbedPatientsError: some patients failed.
    """
    require_patient_level(self, "embed_patients")
    asked = group_slides(given_slides(slides), patient_id_map)
    outcomes = self.iter_slides(asked, preprocessing, execution)
    return embed_groups(asked, outcomes, self.patient_embedding, on_error)


def require_patient_level(model: PatientModel, method: str) -> None:
    """Raises ModelLevelError for a model of anything but patients."""
    if model.level != "patient":
        raise ModelLevelError(
            f"{method} needs a patient-level preset; {model.name} is {model.level}-level: use embed_slide(s)"
        )


def one_patient(slides: Sequence[Slide], patient_id: str | None) -> list[Slide]:
    """The slides of one patient, with their patient_id: the one given, else the slides' own, else the
    sample_id of the first.

    Raises:
        ManifestError: there are none, or they name different patients.
    """
    if not slides:
        raise ManifestError("embed_patient needs at least one slide")
    named = dict.fromkeys(slide.patient_id for slide in slides if slide.patient_id is not None)
    if patient_id is None and len(named) > 1:
        raise ManifestError(
            f"embed_patient: the slides name different patients ({', '.join(map(str, named))}): give "
            "patient_id to take them for one, or call embed_patients"
        )
    theirs = patient_id or next(iter(named), slides[0].sample_id)
    return [replace(slide, patient_id=theirs) for slide in slides]


def group_slides(slides: Sequence[Slide], patient_id_map: Mapping[str, str] | None) -> list[Slide]:
    """Slides with their patient_id: that of the map, else their own, else their sample_id.

    Raises:
        ManifestError: the map names slides that are not there.
    """
    given = patient_id_map or {}
    unknown = sorted(given.keys() - {slide.sample_id for slide in slides})
    if unknown:
        raise ManifestError(f"patient_id_map names slides that are not given: {', '.join(unknown[:5])}")
    return [
        replace(slide, patient_id=given.get(slide.sample_id) or slide.patient_id or slide.sample_id)
        for slide in slides
    ]


def embed_one(
    slides: Sequence[Slide],
    outcomes: Iterable[SlideOutcome],
    embed: Callable[[Mapping[str, Tensor]], Tensor],
    on_error: Literal["raise", "skip"],
) -> EmbeddedPatient:
    """The patient whose slides they are.

    Raises:
        PatientError: "raise" and a slide failed, or all have, or the encoder has.
    """
    check_on_error(on_error)
    found = {outcome.slide.sample_id: outcome for outcome in map(_light, outcomes)}
    in_order = [found[slide.sample_id] for slide in slides]
    return _patient(str(slides[0].patient_id), in_order, embed, on_error)


def embed_groups(
    slides: Sequence[Slide],
    outcomes: Iterable[SlideOutcome],
    embed: Callable[[Mapping[str, Tensor]], Tensor],
    on_error: Literal["raise", "skip"],
) -> list[EmbeddedPatient]:
    """Patients in order of first appearance, from slides with patient_id and their outcomes.

    Args:
        on_error: "skip" embeds a patient from the slides that are well, and leaves out those who have none.

    Raises:
        EmbedPatientsError: "raise", and a slide or the encoder failed; or the run itself broke off after
            some slides were complete.
    """
    check_on_error(on_error)
    found, broken = collect_outcomes(slides, map(_light, outcomes))
    if broken:  # no patient is embedded from the slides that happened to be complete
        on_error = "raise"
    results: list[EmbeddedPatient | None] = []
    failed: dict[str, Exception] = {}
    for patient_id in dict.fromkeys(str(slide.patient_id) for slide in slides):
        theirs = [found[slide.sample_id] for slide in slides if slide.patient_id == patient_id]
        try:
            results.append(_patient(patient_id, theirs, embed, on_error))
        except PatientError as error:
            results.append(None)
            failed[patient_id] = error
    if failed and on_error == "raise":
        raise EmbedPatientsError.of(failed, results)
    for problem in failed.values():
        logger.error("%s", problem)
    return [result for result in results if result is not None]


def _light(outcome: SlideOutcome) -> SlideOutcome:
    """Without its tiles, which are not needed any more."""
    if outcome.embedded is None:
        return outcome
    embedded = outcome.embedded
    none = embedded.tile_embeddings[:0].clone()
    return replace(outcome, tiling=None, embedded=replace(embedded, tile_embeddings=none, latents=None))


def _patient(
    patient_id: str,
    outcomes: Sequence[SlideOutcome],
    embed: Callable[[Mapping[str, Tensor]], Tensor],
    on_error: Literal["raise", "skip"],
) -> EmbeddedPatient:
    failed = {outcome.slide.sample_id: outcome.error for outcome in outcomes if outcome.error is not None}
    good = [outcome.embedded for outcome in outcomes if outcome.embedded is not None]
    if failed and (on_error == "raise" or not good):
        raise PatientError(
            f"patient {patient_id}: {len(failed)} of {len(outcomes)} slides failed ({', '.join(failed)}): "
            f"{next(iter(failed.values()))}"
        ) from next(iter(failed.values()))
    for name, cause in failed.items():
        logger.error("patient %s: slide %s left out: %s", patient_id, name, cause)
    embeddings = {
        slide.sample_id: slide.slide_embedding for slide in good if slide.slide_embedding is not None
    }
    try:
        made = embed(embeddings) if embeddings else None
    except Slide2VecError as problem:
        raise PatientError(f"patient {patient_id}: {problem}") from problem
    return EmbeddedPatient(patient_id=patient_id, patient_embedding=made, slide_embeddings=embeddings)
