"""What a run over a cohort makes of each slide, and the first of it: its coordinates.

Every slide's files are published the moment it is complete: coordinates, features, sidecar, in this
order, each whole or not at all. A slide counts as finished when its sidecar says so; the process list
is for people and other tools.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from slide2vec.artifacts.places import Kind, Place
from slide2vec.cohort.embedder import Encoder
from slide2vec.cohort.identity import CompletedArtifacts
from slide2vec.cohort.record_events import Recorder
from slide2vec.cohort.recorder import remark
from slide2vec.cohort.results import FailedSlide, Stage
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ConfigError, OutputError
from slide2vec.files import atomic_path, is_remote, remove
from slide2vec.recipes import Level
from slide2vec.slides import Slide
from slide2vec.stream import Planner, SlidePlan
from slide2vec.stream.plan import check_archives_here
from slide2vec.stream.shared_slides import Share
from slide2vec.stream.slide_identity import Identities, SlideIdentity
from slide2vec.tiling import Tiling, write_coordinates
from slide2vec.tiling.coordinates import as_hs2p_backend, coordinate_paths
from slide2vec.tiling.previous_files import ARCHIVE, record_source, recorded_qc

__all__ = ["Cohort", "PlannedSlide"]

#: What may be wrong with the path of one file, while others can be written.
_OF_ONE_FILE = frozenset(
    {
        *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ELOOP),
        *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EINVAL),
    }
)


@dataclass(frozen=True)
class PlannedSlide:
    """What is known of a slide whose coordinates are published; `compatibility` by kind of artifact."""

    tiles: int
    coordinates: tuple[Path | None, Path]
    files: SlideIdentity
    compatibility: Mapping[Kind, Mapping[str, Any]]


class Cohort:
    """A run into an output directory; also the part of one that a worker process embeds.

    Args:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        encoder: None where slides are only tiled.
        tilings: of slides whose tiles are known, by sample_id; may grow meanwhile.
        place: where files go; None = as of the first encoder in the output directory.
        identities: what files of slides are, as far as others have looked at them; may grow meanwhile.

    Attributes:
        recorder: takes note of what becomes of slides; set by whoever opens the output directory.
        identities: of the encoder of each kind of artifact.
        wanted: what is made of each slide; what is made of patients comes on top.
        planned: slides under way, by sample_id.
        files: what the files of slides are, looked at once.
        share: the part in slides that other encoders read, too; None where it is alone.
    """

    recorder: Recorder
    share: Share | None = None

    def __init__(
        self,
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        encoder: Encoder | None = None,
        tilings: Mapping[str, Tiling] | None = None,
        place: Place | None = None,
        identities: dict[str, SlideIdentity] | None = None,
    ) -> None:
        if execution.output_dir is None:
            raise ConfigError("a run on disk needs ExecutionOptions(output_dir=…)")
        check_archives_here(config, execution.output_dir)
        self.config, self.execution, self.encoder = config, execution, encoder
        root, name = execution.output_dir, "" if encoder is None else encoder.name
        self.place = place or Place(root, name, root, root)
        self.tilings: Mapping[str, Tiling] = {} if tilings is None else tilings
        self.identities = _identities_of(encoder, config, execution)
        self.wanted = self._wanted_kinds()
        self.files = Identities(config, identities)
        self.completed = CompletedArtifacts(
            config,
            execution,
            self.identities,
            self.tilings,
            self.files,
            self.place,
            latents=execution.save_latents and encoder is not None and encoder.has_latents,
        )
        self.planned: dict[str, PlannedSlide] = {}

    def with_place(self, place: Place, config: PreprocessingConfig) -> Cohort:
        """The same with these folders, and a configuration that takes over what earlier runs have decided."""
        return Cohort(config, self.execution, self.encoder, self.tilings, place)

    @property
    def level(self) -> Level:
        """Of the model."""
        return self.encoder.level if self.encoder else "tile"

    @property
    def kind(self) -> Kind:
        """What the run makes."""
        return "hierarchical" if "hierarchical" in self.identities else self.level

    @property
    def tiles_kind(self) -> Kind:
        """Of the artifacts that hold embeddings of tiles."""
        return "hierarchical" if self.config.hierarchical else "tile"

    def _wanted_kinds(self) -> tuple[Kind, ...]:
        if self.level == "tile":
            return (self.kind,)
        wanted: list[Kind] = ["tile"] if self.execution.save_tile_embeddings else []
        if self.level == "slide" or self.execution.save_slide_embeddings:
            wanted.append("slide")
        return tuple(wanted)

    def columns(self) -> dict[str, Any]:
        """What the process list says of every slide from the start."""
        columns: dict[str, Any] = {"requested_backend": as_hs2p_backend(self.config.backend)}
        if self.encoder is not None:
            columns |= {
                "feature_status": "tbp",
                "encoder_name": self.place.name,
                "output_variant": self.encoder.variant,
                "feature_kind": self.kind,
                "aggregation_status": None if self.level == "tile" else "tbp",
            }
        return columns

    def planner(self) -> Planner:
        """What plans slides and publishes their coordinates; a file that cannot be written is an OutputError
        of the slide."""
        return Planner(
            self.config,
            self.execution,
            self.place.tiling,
            tilings=self.tilings,
            identities=self.files,
            planned=self._publish_plan,
            share=self.share,
        )

    def _publish_plan(self, plan: SlidePlan) -> None:
        name, tiles, files = plan.slide.sample_id, len(plan.tiling), plan.identity
        assert files is not None
        files.check(plan.slide)
        identities = self.completed.compatibilities(plan.slide, files, plan.given) if self.encoder else {}
        pictures = {"mask": plan.mask_preview_path, "tiling": plan.tiling_preview_path}
        if plan.coordinates_dir is None:
            for kind, drawn in pictures.items():
                if drawn is None:  # what is there is of other tiles
                    remove(self._preview_path(kind, name))
            npz, meta = self.write_coordinates(plan.tiling, files)
        else:
            arrays, meta = coordinate_paths(plan.coordinates_dir, name)
            npz = arrays if tiles else None
            if plan.coordinates_dir == self.place.tiling / "tiles":
                pictures = {kind: drawn or self._preview(kind, name) for kind, drawn in pictures.items()}
        self.planned[name] = PlannedSlide(tiles, (npz, meta), files, identities)
        self.recorder.note(
            name,
            backend=as_hs2p_backend(plan.source.backend),
            tiling_status="success",
            num_tiles=tiles,
            coordinates_npz_path=npz,
            coordinates_meta_path=meta,
            tiles_tar_path=plan.tiles_tar_path,
            mask_preview_path=pictures["mask"],
            tiling_preview_path=pictures["tiling"],
            error=remark(tiles, [asdict(bad) for bad in plan.skipped], plan.tiling.remarks),
        )

    def write_coordinates(self, tiling: Tiling, files: SlideIdentity) -> tuple[Path | None, Path]:
        """Coordinate files of a slide, and before their metadata what its files were.

        Raises:
            OutputError: one cannot be written.
        """
        folder, remarks = self.place.tiling / "tiles", list(tiling.recorded.remarks)
        qc = recorded_qc(tiling.recorded.qc)
        # Metadata mean that all is there: a process that is killed must leave neither coordinates of an
        # unknown state of the slide, nor its record beside coordinates of another state.
        remove(coordinate_paths(folder, tiling.sample_id)[1])
        entered: dict[str, Any] = {"coordinates": files.content, "remarks": remarks or None, "qc": qc}
        # `image` is that of the archive then, which is not to be compared with the slide's
        entered["tiles_from"] = None if self.config.read_tiles_from is None else ARCHIVE
        entered["segmenter"] = tiling.recorded.segmentation.checkpoint
        masks = None if tiling.strategy is None else self.config.masks.identity(tiling.sample_id)
        record_source(folder, tiling.sample_id, {**entered, "masks": masks})
        return write_coordinates(folder, tiling.recorded)

    def identity_of_failed(self, slide: Slide) -> Mapping[str, Any] | None:
        """Of the embedding that a failed slide would have had, for its patient; None where its files cannot
        be read."""
        if self.kind != "patient":
            return None
        if (planned := self.planned.get(slide.sample_id)) is not None:
            return planned.compatibility.get("slide")
        found = self.completed.look(slide, anew=False)
        return None if found is None else found.get("slide")

    def tiled(self, plan: SlidePlan) -> None:
        """A slide that is only tiled is complete."""
        skipped = [asdict(bad) for bad in plan.skipped]
        metadata = {"num_tiles": len(plan.tiling), "skipped_tiles": skipped, "remarks": plan.tiling.remarks}
        self.tiles_done(plan.slide.sample_id, metadata)

    def tiles_done(self, sample_id: str, metadata: Mapping[str, Any]) -> None:
        """See `Recorder`."""
        self.planned.pop(sample_id, None)
        self.files.forget(sample_id)
        self.recorder.tiles_done(sample_id, metadata)

    def describe(self, sample_id: str, recorded: Mapping[str, Any]) -> None:
        """Note what a sidecar says of a slide that was planned by an earlier run."""
        backend = recorded.get("backend")
        names = ("coordinates_npz_path", "coordinates_meta_path", "tiles_tar_path")
        self.recorder.note(
            sample_id,
            tiling_status="success",
            mask_preview_path=self._preview("mask", sample_id),
            tiling_preview_path=self._preview("tiling", sample_id),
            backend=None if backend is None else as_hs2p_backend(backend),
            **{name: recorded.get(name) for name in names},
        )

    def _preview(self, kind: str, sample_id: str) -> Path | None:
        path = self._preview_path(kind, sample_id)
        return path if path.is_file() else None

    def _preview_path(self, kind: str, sample_id: str) -> Path:
        return self.place.tiling / "preview" / kind / f"{sample_id}.jpg"

    def is_of_the_run(self, error: OutputError) -> bool:
        """Whether nothing can be written there any more; else one slide's or patient's file is in the way (a
        folder in its place, say)."""
        if error.errno not in _OF_ONE_FILE:
            return True
        folder = self.place.root if error.filename is None else Path(error.filename).parent
        trial = (self.place.root if is_remote(self.place.root) else folder) / f".{uuid4().hex}.trial"
        try:
            if not is_remote(self.place.root) and not self.place.root.is_dir():
                return True
            with atomic_path(trial) as temporary:
                temporary.touch()
            remove(trial)
        except OutputError:
            return True
        return False

    def fail(self, slide: Slide, error: Exception, stage: Stage) -> None:
        """Enter a slide's failure.

        Raises:
            OutputError: the failure is the run's: a file cannot be written.
        """
        if isinstance(error, OutputError) and self.is_of_the_run(error):
            raise error
        self.planned.pop(slide.sample_id, None)
        self.files.forget(slide.sample_id)
        text = "".join(traceback.format_exception(error))
        _forget_frames(error)
        self.recorder.fail(FailedSlide(slide.sample_id, slide.image_path, stage, error), text)


def _identities_of(
    encoder: Encoder | None, config: PreprocessingConfig, execution: ExecutionOptions
) -> dict[Kind, dict[str, Any]]:
    """What identifies the encoder of each kind of artifact."""
    found: dict[Kind, dict[str, Any]] = {}
    while encoder is not None:
        hierarchical = encoder.level == "tile" and config.hierarchical
        kind: Kind = "hierarchical" if hierarchical else encoder.level
        found[kind] = encoder.identity(execution, config.requested_tile_size_px)
        encoder = encoder.upstream
    return found


def _forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error, which hold pixels, and of what caused it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
