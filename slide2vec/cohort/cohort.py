"""The books of a run over a cohort: what is to be done, what became of it, and the files it makes.

Every slide's files are published the moment it is complete: coordinates, features, sidecar, in this
order, each whole or not at all. A slide counts as finished when its sidecar says so; the process list
is for people and other tools.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from slide2vec.artifacts import TileEmbeddingArtifact, find_tile_artifact, write_tile_embeddings
from slide2vec.cohort.identity import compatibility, difference
from slide2vec.cohort.lock import output_lock
from slide2vec.cohort.process_list import ProcessList, read_process_list
from slide2vec.cohort.results import FailedSlide, RunResult
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ArtifactError, ConfigError, OutputError, TilingError
from slide2vec.files import atomic_path, remove_partial
from slide2vec.progress import RunSummary
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome, SlidePlan, coordinates_dir, plan_slide
from slide2vec.tiling import Tiling, load_coordinates, write_coordinates
from slide2vec.tiling.coordinates import coordinate_paths

__all__ = ["Cohort", "Encoder"]

logger = logging.getLogger(__name__)

#: Threads that look at the files of finished slides, on network storage perhaps.
_LOOKERS = 16
_FOLDERS = ("", "tiles", "tile_embeddings", "preview/mask", "preview/tiling")


@dataclass(frozen=True)
class _Planned:
    """What is known of a slide whose coordinates are published."""

    tiles: int
    coordinates: tuple[Path | None, Path]
    compatibility: Mapping[str, Any]


class Encoder(Protocol):
    """What is recorded of the model."""

    @property
    def name(self) -> str: ...

    variant: str

    def identity(self, execution: ExecutionOptions | None = None) -> dict[str, Any]: ...


class Cohort:
    """A run into an output directory, which it holds while its context lasts.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        encoder: None where slides are only tiled.
        tilings: of slides whose tiles are known, by sample_id.
        settings: text to keep as config.yaml.

    Raises:
        OutputLockedError: another run writes there.
        OutputError: a file cannot be written.
    """

    def __init__(
        self,
        slides: Sequence[Slide],
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        encoder: Encoder | None = None,
        tilings: Mapping[str, Tiling] | None = None,
        settings: str | None = None,
    ) -> None:
        if execution.output_dir is None:
            raise ConfigError("a run on disk needs ExecutionOptions(output_dir=…)")
        self.slides, self.config, self.execution = slides, config, execution
        self.output_dir = execution.output_dir
        self._encoder, self._tilings, self._settings = encoder, tilings or {}, settings
        self._identity = encoder.identity(execution) if encoder else {}
        self._planned: dict[str, _Planned] = {}
        self._artifacts: dict[str, TileEmbeddingArtifact] = {}
        self._failed: dict[str, FailedSlide] = {}
        self._empty: set[str] = set()
        self._skipped: dict[str, int] = {}
        self._recomputed: Counter[str] = Counter()
        self._resumed = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(output_lock(self.output_dir))
            for folder in _FOLDERS:
                remove_partial(self.output_dir / folder)
            if self._settings is not None:
                with atomic_path(self.output_dir / "config.yaml") as temporary:
                    temporary.write_text(self._settings, encoding="utf-8")
            path = self.output_dir / "process_list.csv"
            self._list = stack.enter_context(ProcessList(path, self._rows(path)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _rows(self, path: Path) -> Iterable[dict[str, Any]]:
        """A row per slide, then those that the process list has of other slides."""
        previous = _previous_rows(path)
        for slide in self.slides:
            row = {
                "sample_id": slide.sample_id,
                "image_path": slide.image_path,
                "mask_path": slide.mask_path,
                "requested_backend": self.config.backend,
                "spacing_at_level_0": slide.spacing_at_level_0,
            }
            if self._encoder:
                row |= {
                    "feature_status": "tbp",
                    "encoder_name": self._encoder.name,
                    "output_variant": self._encoder.variant,
                    "feature_kind": "tile",
                }
            yield row
            previous.pop(slide.sample_id, None)
        yield from previous.values()

    # what is to be done ------------------------------------------------------------------------

    def pending(self) -> list[Slide]:
        """The slides that are not finished; all of them, unless the run resumes another."""
        if self._encoder is None:
            return list(self.slides)
        if not self.config.resume:
            self._warn_of_finished()
            return list(self.slides)
        with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="resume") as pool:
            found = list(pool.map(self._finished, self.slides))
        todo = []
        for slide, artifact in zip(self.slides, found, strict=True):
            if isinstance(artifact, TileEmbeddingArtifact):
                self._keep(artifact)
            else:
                todo.append(slide)
                self._recomputed.update([artifact] if artifact else [])
        for reason, count in self._recomputed.items():
            logger.warning("%d slides were finished with another %s: they are embedded anew", count, reason)
        return todo

    def _warn_of_finished(self) -> None:
        folder = self.output_dir / "tile_embeddings"
        there = sum((folder / f"{slide.sample_id}.meta.json").exists() for slide in self.slides)
        if there:
            logger.warning(
                "%d slides are finished in %s and are embedded anew: resume keeps those that agree",
                *(there, self.output_dir),
            )

    def _finished(self, slide: Slide) -> TileEmbeddingArtifact | str | None:
        """The artifact of a finished slide; else what differs from the one that is there, None for none."""
        artifact = find_tile_artifact(self.output_dir, slide.sample_id)
        if artifact is None:
            return None
        try:
            recorded = artifact.metadata
            asked = self._compatibility(slide)
        except (OSError, ArtifactError, TilingError):
            return None
        if artifact.format != self.execution.output_format:
            return "output_format"
        if recorded.get("feature_dtype") != self.execution.feature_dtype(self._identity["precision"]):
            return "output_dtype"
        if recorded.get("skipped_tiles") and self.config.on_bad_tile == "fail":
            return "on_bad_tile"
        return difference(recorded.get("compatibility"), asked) or artifact

    def _compatibility(self, slide: Slide) -> dict[str, Any]:
        return compatibility(slide, self.config, self._identity, self._given(slide))

    def _given(self, slide: Slide) -> Tiling | None:
        kept = coordinates_dir(slide, self.config)
        if slide.sample_id in self._tilings or kept is None:
            return self._tilings.get(slide.sample_id)
        return load_coordinates(kept, slide.sample_id)

    def _keep(self, artifact: TileEmbeddingArtifact) -> None:
        recorded = artifact.metadata
        self._resumed += 1
        self._record(artifact, recorded.get("skipped_tiles") or ())
        self._list.update(
            artifact.sample_id,
            backend=recorded.get("backend"),
            coordinates_npz_path=recorded.get("coordinates_npz_path"),
            coordinates_meta_path=recorded.get("coordinates_meta_path"),
            tiles_tar_path=recorded.get("tiles_tar_path"),
            mask_preview_path=self._preview("mask", artifact.sample_id),
            tiling_preview_path=self._preview("tiling", artifact.sample_id),
        )

    def _preview(self, kind: str, sample_id: str) -> Path | None:
        path = self.output_dir / "preview" / kind / f"{sample_id}.jpg"
        return path if path.is_file() else None

    def _record(self, artifact: TileEmbeddingArtifact, skipped: Sequence[Mapping[str, Any]]) -> None:
        """A slide is complete."""
        name = artifact.sample_id
        self._artifacts[name] = artifact
        if not artifact.num_tiles:
            self._empty.add(name)
        if skipped:
            self._skipped[name] = len(skipped)
        self._list.update(
            name,
            tiling_status="success",
            num_tiles=artifact.num_tiles,
            feature_status="success",
            feature_path=artifact.path,
            error=_remark(artifact.num_tiles, skipped),
        )

    # what becomes of it ------------------------------------------------------------------------

    def plan(self, slide: Slide) -> SlidePlan:
        """Plan a slide and publish its coordinates. Called in threads.

        Raises:
            SlideError: the slide cannot be tiled.
            OutputError: a file cannot be written.
        """
        plan = plan_slide(slide, self.config, self.output_dir, self._tilings.get(slide.sample_id))
        try:
            self._publish_plan(plan)
        except BaseException:
            plan.source.close()
            raise
        return plan

    def _publish_plan(self, plan: SlidePlan) -> None:
        name = plan.slide.sample_id
        identity = self._compatibility(plan.slide) if self._encoder else {}
        if plan.coordinates_dir is None:
            npz, meta = write_coordinates(self.output_dir / "tiles", plan.tiling)
        else:
            arrays, meta = coordinate_paths(plan.coordinates_dir, name)
            npz = arrays if len(plan.tiling) else None
        self._planned[name] = _Planned(len(plan.tiling), (npz, meta), identity)
        self._list.update(
            name,
            backend=plan.source.backend,
            tiling_status="success",
            num_tiles=len(plan.tiling),
            coordinates_npz_path=npz,
            coordinates_meta_path=meta,
            tiles_tar_path=plan.tiles_tar_path,
            mask_preview_path=plan.mask_preview_path,
            tiling_preview_path=plan.tiling_preview_path,
            error=_remark(len(plan.tiling), [asdict(bad) for bad in plan.skipped]),
        )

    def tiled(self, plan: SlidePlan) -> None:
        """A slide that is only tiled is complete."""
        name = plan.slide.sample_id
        del self._planned[name]
        if not len(plan.tiling):
            self._empty.add(name)
        if plan.skipped:
            self._skipped[name] = len(plan.skipped)

    def publish(self, outcome: SlideOutcome) -> TileEmbeddingArtifact | None:
        """Write the files of a slide that is through, or record why it failed.

        Raises:
            OutputError: a file cannot be written.
        """
        name = outcome.slide.sample_id
        planned = self._planned.pop(name, None)
        if outcome.error is not None:
            self.fail(outcome.slide, outcome.error, planned=planned is not None)
            return None
        assert outcome.embedded is not None and outcome.tiling is not None and planned is not None
        coordinates = planned.coordinates
        if len(outcome.tiling) < planned.tiles:
            coordinates = npz, meta = write_coordinates(self.output_dir / "tiles", outcome.tiling)
            self._list.update(name, coordinates_npz_path=npz, coordinates_meta_path=meta)
        artifact = write_tile_embeddings(
            self.output_dir,
            outcome.embedded,
            outcome.tiling,
            file_format=self.execution.output_format,
            encoder=self._identity,
            compatibility=planned.compatibility,
            coordinates=coordinates,
            tiles_tar_path=outcome.tiles_tar_path,
            skipped_tiles=[asdict(bad) for bad in outcome.skipped],
        )
        self._record(artifact, [asdict(bad) for bad in outcome.skipped])
        return artifact

    def fail(self, slide: Slide, error: Exception, *, planned: bool) -> None:
        """Record a slide's failure.

        Raises:
            OutputError: the failure is the run's: a file cannot be written.
        """
        if isinstance(error, OutputError):
            raise error
        text = "".join(traceback.format_exception(error))
        _forget_frames(error)
        stage = "embedding" if planned else "tiling"
        failed = FailedSlide(slide.sample_id, slide.image_path, "embedding" if planned else "tiling", error)
        self._failed[slide.sample_id] = failed
        status = {"feature_status": "error"} if self._encoder else {}
        self._list.update(
            slide.sample_id,
            tiling_status="success" if stage == "embedding" else "failed",
            error=str(error) or type(error).__name__,
            traceback=text,
            **status,
        )

    def result(self, summary: RunSummary | None) -> RunResult:
        """What the run gave, in the order of its slides."""
        names = [slide.sample_id for slide in self.slides]
        return RunResult(
            tile_artifacts=[self._artifacts[name] for name in names if name in self._artifacts],
            process_list_path=self._list.path,
            failed=tuple(self._failed[name] for name in names if name in self._failed),
            without_tissue=tuple(name for name in names if name in self._empty),
            skipped_tiles={name: self._skipped[name] for name in names if name in self._skipped},
            resumed=self._resumed,
            recomputed=dict(self._recomputed),
            summary=summary,
        )

    @property
    def complete(self) -> int:
        """Slides whose embeddings are on disk."""
        return len(self._artifacts)


def _previous_rows(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        return {row["sample_id"]: dict(row) for row in read_process_list(path)}
    except ArtifactError as error:
        logger.warning("%s; a new one is begun", error)
        return {}


def _remark(tiles: int, skipped: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of a slide that did not fail."""
    if skipped:
        where = ", ".join(f"({bad['x']}, {bad['y']})" for bad in skipped)
        return f"{len(skipped)} tiles could not be decoded and were left out, at level-0 px {where}"
    return None if tiles else "no tissue: 0 tiles"


def _forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error, which hold pixels, and of what caused it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
