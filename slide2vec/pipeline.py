"""Pipeline: a model over a cohort, onto disk, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from slide2vec.cohort import EncoderRun, RunResult, embed_cohort, embed_cohort_together, tile_cohort
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.errors import ConfigError, EmbedSlidesError, ManifestError
from slide2vec.files import as_path
from slide2vec.images import check_patch_tokens
from slide2vec.manifests import SlidesLike, by_class, given_slides, read_manifest
from slide2vec.model import Model
from slide2vec.models import Models
from slide2vec.settings import RunSettings, settings_as_yaml, versions
from slide2vec.slides import IdFrom, Slide
from slide2vec.tiling.previous_files import recorded_slides

if TYPE_CHECKING:
    from slide2vec.cohort.run import OnPersisted

__all__ = ["Pipeline"]


class Pipeline:
    """Embeds cohorts into `execution.output_dir`.

    Every slide's files are published the moment it is complete, and a slide that fails is recorded and
    does not stop the others. With `PreprocessingConfig(resume=True)` what an earlier run finished with
    the same settings is kept.

    Args:
        model: from `Model.from_preset`; or several, as `Models`, a sequence or a mapping by name: slides are
            then read once for all of them, and each writes what it would write in a run of its own.
        preprocessing: tiling and reading; None = the preset's spacing and tile size.
        execution: its output_dir is needed.

    Raises:
        ConfigError: there is no output_dir.
    """

    def __init__(
        self,
        model: Model | Models | Sequence[Model] | Mapping[str, Model],
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
    ) -> None:
        if execution is None or execution.output_dir is None:
            raise ConfigError("Pipeline writes files: give ExecutionOptions(output_dir=…)")
        several = Models([model]) if isinstance(model, Model) else Models(model)
        if execution.save_patch_tokens and [each.level for each in several.values()] != ["tile"]:
            raise ConfigError("save_patch_tokens=True is for a run of one tile-level preset")
        self.models, self.execution = several, execution
        self._configs = several.resolve_preprocessing(preprocessing)

    def run(
        self,
        slides: SlidesLike | None = None,
        manifest_path: str | os.PathLike[str] | None = None,
        *,
        slides_dir: str | os.PathLike[str] | None = None,
        id_from: IdFrom = "name",
        tiling_only: bool = False,
        on_slide_persisted: OnPersisted | None = None,
    ) -> RunResult:
        """Embed the slides of a manifest, or those given.

        Args:
            slides: paths, mappings or Slides; or a pandas.DataFrame with the columns of a manifest.
            manifest_path: CSV (a path or URL) with sample_id and image_path, optionally mask_path,
                spacing_at_level_0 and patient_id; see `slide2vec.manifests.read_manifest`.
            slides_dir, id_from: of the manifest or the DataFrame, likewise.
            tiling_only: write coordinates (and previews, archives) and embed nothing.
            on_slide_persisted: called with each new artifact, in a thread of the run.

        Raises:
            ManifestError: the manifest is malformed, with its line, or the DataFrame, with its row; or both
                or neither were given; or a slide of a patient-level model has no patient_id.
            OutputLockedError: another run writes into the output directory.
            OutputError: a file cannot be written; what is finished stays.
        """
        if (slides is None) == (manifest_path is None):
            raise ManifestError("Pipeline.run takes either slides or manifest_path")
        if manifest_path is not None:
            todo = read_manifest(manifest_path, slides_dir=slides_dir, id_from=id_from)
        else:
            assert slides is not None
            todo = given_slides(slides, slides_dir=slides_dir, id_from=id_from)
        self._check_patients(todo, "the slides" if manifest_path is None else f"manifest {manifest_path}")
        todo = by_class(todo, self.preprocessing.masks)
        settings = partial(
            self._settings, manifest_path=manifest_path, slides_dir=slides_dir, id_from=id_from
        )
        if tiling_only:
            return tile_cohort(
                todo, self._config_of_tiles(), self.execution, settings=partial(settings, self.model)
            )
        return self._embed(todo, self._configs, settings, on_slide_persisted)

    def run_with_coordinates(
        self,
        coordinates_dir: str | os.PathLike[str],
        *,
        slides: SlidesLike | None = None,
        on_slide_persisted: OnPersisted | None = None,
    ) -> RunResult:
        """Embed the tiles of HS2P coordinate files; nothing is segmented or tiled.

        Args:
            coordinates_dir: holds <sample_id>.coordinates.{npz,meta.json}, itself or in `tiles/`.
            slides: None = all that have coordinate files there, at the paths recorded in them. Patient-level
                models need them, for their patient_id.
            on_slide_persisted: called with each new artifact, in a thread of the run.

        Raises:
            ManifestError: there are no coordinate files.
            OutputLockedError, OutputError: as `run`.
        """
        directory = as_path(coordinates_dir)
        todo: list[Slide] = recorded_slides(directory) if slides is None else given_slides(slides)
        self._check_patients(todo, f"{directory}" if slides is None else "the slides")
        configs = {
            name: config.updated(read_coordinates_from=directory) for name, config in self._configs.items()
        }
        return self._embed(todo, configs, self._settings, on_slide_persisted)

    @property
    def model(self) -> Model:
        """The model; the first of several."""
        return next(iter(self.models.values()))

    @property
    def preprocessing(self) -> PreprocessingConfig:
        """With the spacing and tile size of the model; of the first of several."""
        return next(iter(self._configs.values()))

    def _config_of_tiles(self) -> PreprocessingConfig:
        """The configuration where slides are only tiled.

        Raises:
            ConfigError: the models have different tiles.
        """
        if any(config != self.preprocessing for config in self._configs.values()):
            raise ConfigError(
                f"tiling_only=True: {', '.join(self.models)} have tiles of different sizes or spacings: give "
                "requested_tile_size_px and requested_spacing_um, or tile for one of them"
            )
        return self.preprocessing

    def _embed(
        self,
        slides: Sequence[Slide],
        configs: Mapping[str, PreprocessingConfig],
        settings: Callable[[Model, PreprocessingConfig], str],
        on_slide_persisted: OnPersisted | None,
    ) -> RunResult:
        if self.execution.save_patch_tokens:
            check_patch_tokens(self.model, self.preprocessing, self.execution)
        if len(self.models) == 1 or self.models.take_turns(self.execution):
            for name, model in self.models.items():
                model.decide_engine(slides, configs[name], self.execution)
            alone = {
                name: embed_cohort(
                    model,
                    slides,
                    configs[name],
                    self.execution,
                    settings=partial(settings, model),
                    on_slide_persisted=on_slide_persisted,
                )
                for name, model in self.models.items()
            }
            if self.execution.save_patch_tokens:
                alone[self.model.name] = self._with_patch_tokens(alone[self.model.name])
            if len(alone) == 1:
                return next(iter(alone.values()))
            readings = [[name] for name, result in alone.items() if result.summary is not None]
            return RunResult.of_several(alone, readings=readings)
        groups = self.models.prepare(slides, configs, self.execution)
        workers = self.models.workers(self.execution)
        runs: dict[str, EncoderRun] = {}
        for names in self.models.grouped(configs, self.execution):
            for name, after in zip(names, ("", *names), strict=False):
                model = self.models[name]
                runs[name] = EncoderRun(model, configs[name], partial(settings, model), after)
        return embed_cohort_together(
            {name: runs[name] for name in self.models},
            slides,
            self.execution,
            groups=groups,
            in_workers=None if workers is None else workers.embed_together,
            on_slide_persisted=on_slide_persisted,
        )

    def _with_patch_tokens(self, result: RunResult) -> RunResult:
        """Write the patch tokens of a run's slides; those that have none have failed."""
        try:
            self.model.save_patch_tokens(result.tile_artifacts, execution=self.execution)
        except EmbedSlidesError as error:
            return result.with_failed(error.failed, "patch_tokens")
        return result

    def _check_patients(self, slides: Sequence[Slide], where: str) -> None:
        """Raises ManifestError where slides of a patient-level model have no patient_id."""
        of_patients = [name for name, model in self.models.items() if model.level == "patient"]
        if not of_patients:
            return
        without = [slide.sample_id for slide in slides if slide.patient_id is None]
        if without:
            more = f" and {len(without) - 5} more" if len(without) > 5 else ""
            raise ManifestError(
                f"{where}: preset {of_patients[0]} embeds patients, and {len(without)} slides have no "
                f"patient_id ({', '.join(without[:5])}{more}): fill the column patient_id"
            )

    def _settings(
        self,
        model: Model,
        config: PreprocessingConfig,
        manifest_path: str | os.PathLike[str] | None = None,
        slides_dir: str | os.PathLike[str] | None = None,
        id_from: IdFrom = "name",
    ) -> str:
        """The run as a configuration file that repeats it."""
        settings = RunSettings(
            manifest_path=None if manifest_path is None else as_path(manifest_path),
            slides_dir=None if slides_dir is None else as_path(slides_dir),
            id_from=id_from,
            preset=model.recipe.reference,
            preprocessing=config,
            execution=self.execution,
            **model.origin,
        )
        return settings_as_yaml(settings, {"versions": versions()})
