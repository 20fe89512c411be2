"""What a run over a cohort gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from slide2vec.artifacts import (
    HierarchicalEmbeddingArtifact,
    PatientEmbeddingArtifact,
    SlideEmbeddingArtifact,
    TileEmbeddingArtifact,
    load_stored,
)
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.files import as_path
from slide2vec.frames import SlideFrame, anndata_of, spatialdata_of
from slide2vec.progress import RunSummary, in_turn, of_encoders

if TYPE_CHECKING:
    import anndata
    import pandas
    import spatialdata

__all__ = ["Artifact", "FailedPatient", "FailedSlide", "RunResult", "Stage"]

Artifact: TypeAlias = (
    TileEmbeddingArtifact | HierarchicalEmbeddingArtifact | SlideEmbeddingArtifact | PatientEmbeddingArtifact
)

#: "patch_tokens": the slide is embedded, and has no patch tokens (`ExecutionOptions.save_patch_tokens`).
Stage: TypeAlias = Literal["tiling", "embedding", "aggregation", "patch_tokens"]


@dataclass(frozen=True)
class FailedSlide:
    """A slide that could not be tiled or embedded, or whose tiles could not be aggregated, and why."""

    sample_id: str
    image_path: Path
    stage: Stage
    error: Exception


@dataclass(frozen=True)
class FailedPatient:
    """A patient who could not be embedded, and why."""

    patient_id: str
    error: Exception


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The artifacts of a run, in the order of its slides, those finished by earlier runs included.

    Attributes:
        tile_artifacts, hierarchical_artifacts, slide_artifacts, patient_artifacts: by what they embed.
        process_list_path: the table of all slides.
        failed: slides that failed; the others are complete.
        failed_patients: patients without an embedding because a slide of theirs, or their own
            aggregation, failed.
        without_tissue: sample_ids of slides with 0 tiles. Here and below, a slide that is sampled by class is
            called "tumor/a": each of its classes counts as a slide.
        skipped_tiles: sample_id -> tiles left out because they could not be decoded.
        remarks: sample_id -> what is implausible about its tissue and tiles, in sentences.
        resumed: slides that an earlier run had finished with the same settings.
        recomputed: what differed -> slides that an earlier run had finished otherwise.
        summary: speed and bottleneck; None when nothing was left to do.
        encoders: of a run with several encoders, the result of each, by name; the fields above are then those
            of all of them, one encoder after the other.
    """

    tile_artifacts: list[TileEmbeddingArtifact] = field(default_factory=list)
    hierarchical_artifacts: list[HierarchicalEmbeddingArtifact] = field(default_factory=list)
    slide_artifacts: list[SlideEmbeddingArtifact] = field(default_factory=list)
    patient_artifacts: list[PatientEmbeddingArtifact] = field(default_factory=list)
    process_list_path: Path
    failed: tuple[FailedSlide, ...] = ()
    failed_patients: tuple[FailedPatient, ...] = ()
    without_tissue: tuple[str, ...] = ()
    skipped_tiles: Mapping[str, int] = field(default_factory=dict)
    remarks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    resumed: int = 0
    recomputed: Mapping[str, int] = field(default_factory=dict)
    summary: RunSummary | None = None
    encoders: Mapping[str, RunResult] = field(default_factory=dict)

    @classmethod
    def of_several(
        cls,
        encoders: Mapping[str, RunResult],
        whole: RunSummary | None = None,
        readings: Sequence[Sequence[str]] = (),
    ) -> RunResult:
        """The results of several encoders of one run as one.

        Args:
            whole: the summary of their common run, for its time, energy and scratch; None: each ran alone.
            readings: names of those that read the slides together, one group after the other.
        """
        results = list(encoders.values())
        recomputed: Counter[str] = Counter()
        for result in results:
            recomputed.update(result.recomputed)
        by_name = {name: each.summary for name, each in encoders.items() if each.summary is not None}
        summaries = list(by_name.values())
        summary = in_turn(summaries) if summaries else None
        if summary is not None:
            roads: Counter[str] = Counter()
            for names in readings or [list(by_name)]:  # those of one reading have the same slides
                of_them = (by_name[name].roads for name in names if name in by_name)
                roads.update(max(of_them, key=lambda each: sum(each.values()), default={}))
            billed = whole or summary
            busy = of_encoders(by_name, billed.seconds)
            summary = replace(
                summary,
                stations=busy.stations,
                bottleneck=busy.bottleneck,
                roads=dict(roads),
                seconds=billed.seconds,
                watt_hours=billed.watt_hours,
                measured_by=billed.measured_by,
                readings=tuple(" + ".join(names) for names in readings),
                from_scratch=billed.from_scratch,
                decoded_again=billed.decoded_again,
                scratch_bytes=billed.scratch_bytes,
            )
        return cls(
            tile_artifacts=[each for result in results for each in result.tile_artifacts],
            hierarchical_artifacts=[each for result in results for each in result.hierarchical_artifacts],
            slide_artifacts=[each for result in results for each in result.slide_artifacts],
            patient_artifacts=[each for result in results for each in result.patient_artifacts],
            process_list_path=results[0].process_list_path,
            failed=tuple(each for result in results for each in result.failed),
            failed_patients=tuple(each for result in results for each in result.failed_patients),
            without_tissue=tuple(dict.fromkeys(name for result in results for name in result.without_tissue)),
            skipped_tiles={name: n for result in results for name, n in result.skipped_tiles.items()},
            remarks={name: said for result in results for name, said in result.remarks.items()},
            resumed=sum(result.resumed for result in results),
            recomputed=dict(recomputed),
            summary=summary,
            encoders=dict(encoders),
        )

    def to_anndata(self, sample_ids: Sequence[str] | None = None) -> anndata.AnnData:
        """The tiles of the run's slides as one AnnData, read from the artifacts, all in memory at once.
        `EmbeddedSlide.to_anndata` says what is in it; `uns["slides"]` has a row for each slide.

        Args:
            sample_ids: only of these slides ("tumor/a" of a class); None = of all.

        Raises:
            ArtifactError: the run has no tile embeddings, or none of a slide that is asked for, or they
                cannot be read.
            ConfigError: the run has several encoders: ask `result.encoders[name]`.
            ExtraMissingError: anndata is not installed (extra `anndata`).
        """
        return anndata_of(self._frames(sample_ids))

    def to_spatialdata(self, sample_ids: Sequence[str] | None = None) -> spatialdata.SpatialData:
        """The tiles of the run's slides as one SpatialData: `shapes["<sample_id>_tiles"]`, squares in level-0
        px, each in a coordinate system called as the slide, and a table "embeddings", as of `to_anndata`.

        Args:
            sample_ids: as for `to_anndata`.

        Raises:
            ArtifactError, ConfigError: as `to_anndata`.
            ExtraMissingError: spatialdata is not installed (extra `spatialdata`).
        """
        return spatialdata_of(self._frames(sample_ids))

    def _frames(self, sample_ids: Sequence[str] | None) -> list[SlideFrame]:
        if len(self.encoders) > 1:
            raise ConfigError(
                f"the run has embeddings of {', '.join(self.encoders)}: take one, result.encoders[name]"
            )
        there = {artifact.name: artifact for artifact in self.tile_artifacts}
        if not there:
            raise ArtifactError(
                "the run has no tile embeddings; models of slides write them with save_tile_embeddings=True"
            )
        if unknown := [name for name in sample_ids or () if name not in there]:
            raise ArtifactError(f"the run has no tile embeddings of {', '.join(unknown)}")
        return [_frame(there[name]) for name in (there if sample_ids is None else sample_ids)]

    def with_failed(self, errors: Mapping[str, Exception], stage: Stage) -> RunResult:
        """The result of a run some of whose slides failed at what came after their embeddings.

        Args:
            errors: by name of the slide.
        """
        paths = {each.name: as_path(each.metadata["image_path"]) for each in self.tile_artifacts}
        failed = [FailedSlide(name, paths[name], stage, error) for name, error in errors.items()]
        summary = self.summary
        if summary is not None:
            summary = replace(summary, failed=summary.failed + len(failed))
        return replace(self, failed=(*self.failed, *failed), summary=summary)

    def to_frame(self) -> pandas.DataFrame:
        """A row for each artifact, for each failure, and for each slide without tissue that has no artifact.

        Columns: level ("tile", "region", "slide" or "patient"), sample_id (of patients: missing), patient_id
        (of patients), status ("done", "failed" or "no tissue"), num_tiles, skipped_tiles and feature_dim
        (Int64), path (of the features file), stage and error (of failures), remarks. What does not apply is
        missing (pandas.NA or None). With several encoders there is a first column more, encoder.
        """
        import pandas

        if self.encoders:
            frames = {name: result.to_frame() for name, result in self.encoders.items()}
            whole = pandas.concat(frames, names=["encoder"]).reset_index("encoder")
            return whole.reset_index(drop=True)
        whole = dict.fromkeys(("num_tiles", "skipped_tiles", "feature_dim"), "Int64")
        frame = pandas.DataFrame([*self._done(), *self._not_done()], columns=list(_COLUMNS), dtype=object)
        return frame.astype(whole)

    def __repr__(self) -> str:
        return f"RunResult({self._in_words()}; process_list_path={str(self.process_list_path)!r})"

    def _repr_html_(self) -> str:
        """What notebooks show: failures first, and of a long run its beginning."""
        rows = [("", row) for row in (*self._not_done(), *self._done())]
        if self.encoders:
            by_encoder = self.encoders.items()
            rows = [(name, row) for name, result in by_encoder for row in result._not_done()]
            rows += [(name, row) for name, result in by_encoder for row in result._done()]
        return _html(self, rows)

    def _in_words(self) -> str:
        """Counts of what is not zero."""
        counts = {
            "tile": len(self.tile_artifacts),
            "region": len(self.hierarchical_artifacts),
            "slide": len(self.slide_artifacts),
            "patient": len(self.patient_artifacts),
        }
        said = [f"{count:,} {level} artifact{'s' * (count != 1)}" for level, count in counts.items() if count]
        counts = {
            "failed": len(self.failed) + len(self.failed_patients),
            "without tissue": len(self.without_tissue),
            "with remarks": len(self.remarks),
            "from an earlier run": self.resumed,
        }
        return ", ".join([*(said or ["no artifacts"]), *(f"{n:,} {what}" for what, n in counts.items() if n)])

    def _done(self) -> Iterator[dict[str, Any]]:
        levels: Mapping[str, Sequence[Artifact]] = {
            "tile": self.tile_artifacts,
            "region": self.hierarchical_artifacts,
            "slide": self.slide_artifacts,
            "patient": self.patient_artifacts,
        }
        for level, artifacts in levels.items():
            for artifact in artifacts:
                sample_id = getattr(artifact, "name", None)
                yield self._of_slide(sample_id) | {
                    "level": level,
                    "sample_id": sample_id,
                    "patient_id": getattr(artifact, "patient_id", None),
                    "status": "done",
                    "num_tiles": _tiles(artifact),
                    "feature_dim": artifact.feature_dim,
                    "path": str(artifact.path),
                }

    def _not_done(self) -> Iterator[dict[str, Any]]:
        there = {artifact.name for artifact in self.tile_artifacts}
        there |= {artifact.name for artifact in self.hierarchical_artifacts}
        for sample_id in self.without_tissue:
            if sample_id not in there:
                row = {"level": "tile", "sample_id": sample_id, "status": "no tissue", "num_tiles": 0}
                yield self._of_slide(sample_id) | row
        for slide in self.failed:
            level = "slide" if slide.stage == "aggregation" else "tile"
            yield self._of_slide(slide.sample_id) | {
                "level": level,
                "sample_id": slide.sample_id,
                "status": "failed",
                "stage": slide.stage,
                "error": str(slide.error),
            }
        for patient in self.failed_patients:
            yield {
                "level": "patient",
                "patient_id": patient.patient_id,
                "status": "failed",
                "stage": "aggregation",
                "error": str(patient.error),
            }

    def _of_slide(self, sample_id: str | None) -> dict[str, Any]:
        if sample_id is None:
            return {}
        remarks = self.remarks.get(sample_id)
        skipped = self.skipped_tiles.get(sample_id, 0)
        return {"skipped_tiles": skipped, "remarks": " ".join(remarks) if remarks else None}


_COLUMNS = (
    *("level", "sample_id", "patient_id", "status", "num_tiles", "skipped_tiles", "feature_dim"),
    *("path", "stage", "error", "remarks"),
)


def _tiles(artifact: Artifact) -> int | None:
    if isinstance(artifact, HierarchicalEmbeddingArtifact):
        return artifact.num_regions * artifact.tiles_per_region
    return getattr(artifact, "num_tiles", None)


#: Rows of a run that notebooks show.
_MOST_ROWS = 20


def _html(result: RunResult, rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Names and errors are other people's text: all of it is escaped."""
    columns = ["encoder"] * bool(result.encoders) + [
        "of",
        "level",
        "status",
        "tiles",
        "file, or what is wrong",
    ]
    head = "".join(f'<th style="text-align:left">{each}</th>' for each in columns)
    body = "".join(map(_html_row, rows[:_MOST_ROWS], [bool(result.encoders)] * len(rows)))
    more = f"… and {len(rows) - _MOST_ROWS:,} more: see to_frame()<br>" if len(rows) > _MOST_ROWS else ""
    return (
        f"<b>{escape(result._in_words())}</b><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>{more}<code>{escape(str(result.process_list_path))}</code>"
    )


def _html_row(row: tuple[str, dict[str, Any]], several: bool) -> str:
    encoder, values = row
    tiles = values.get("num_tiles")
    what = [values.get("path") or values.get("error") or "", values.get("remarks") or ""]
    if skipped := values.get("skipped_tiles"):
        what.append(f"{skipped:,} tiles left out that cannot be decoded")
    cells = [
        *([encoder] if several else ()),
        values.get("sample_id") or values.get("patient_id") or "",
        *(values["level"], values["status"], "" if tiles is None else f"{tiles:,}"),
        "; ".join(filter(None, what)),
    ]
    colour = ' style="color:#c62828"' if values["status"] == "failed" else ""
    return (
        f"<tr{colour}>"
        + "".join(f'<td style="text-align:left">{escape(str(c))}</td>' for c in cells)
        + "</tr>"
    )


def _frame(artifact: TileEmbeddingArtifact) -> SlideFrame:
    """Raises ArtifactError where the run has no coordinates of the slide any more."""
    stored = load_stored(artifact)
    if stored.coords is None or stored.tile_size_lv0 is None:
        raise ArtifactError(f"slide {artifact.name}: the run has no coordinates of its tiles")
    kept = ("image_path", "annotation", "requested_spacing_um", "requested_tile_size_px", "encoder_name")
    fractions = stored.tissue_fractions
    return SlideFrame(
        sample_id=artifact.name,
        features=stored.features.float().numpy(),
        x=stored.coords[:, 0],
        y=stored.coords[:, 1],
        tile_size_lv0=stored.tile_size_lv0,
        columns={} if fractions is None else {"tissue_fraction": fractions},
        about={name: stored.metadata.get(name) for name in kept},
    )
