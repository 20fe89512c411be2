"""Model: a preset with its weights on a device, ready to embed slides."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import torch

from slide2vec.aggregate import (
    Aggregator,
    aggregate_stored,
    embed_groups,
    embed_in_order,
    embed_one,
    embed_or_raise,
    group_slides,
    one_patient,
    patient_embedding,
    with_slide_embedding,
)
from slide2vec.attention_maps import attention_of_batch, attention_of_slide
from slide2vec.cohort import embed_tiles
from slide2vec.cohort.sink import MemorySink
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.embedded import EmbeddedPatient, EmbeddedSlide, SlideAttention
from slide2vec.encoders.given_module import register_module
from slide2vec.encoders.late import AnyEncoder, as_module, handed_over, held_bytes, release, weights_bytes
from slide2vec.encoders.preset_chain import PartsWeights, load_parts, loader_of, tile_recipe
from slide2vec.encoders.registered import code_identity, refuse_overlap
from slide2vec.encoders.text import TextSide, load_text_side
from slide2vec.encoders.weights import weights_digest
from slide2vec.errors import ConfigError, ModelLevelError
from slide2vec.images import (
    DenseImageOptions,
    DenseOptions,
    ImageLike,
    SlideRegions,
    dense_identity_differences,
    embed_images,
    embed_images_dense,
    embed_regions_dense,
    pooled_identity_differences,
    prepare_dense_encoder,
    save_patch_tokens,
)
from slide2vec.manifests import SlidesLike, by_class, classes_of, given_slides
from slide2vec.progress import RunStarted, active_reporter, live_progress, metered
from slide2vec.recipes import Recipe, load_recipe
from slide2vec.runtime import devices_for, is_numbered, pick_device, resolve_precision
from slide2vec.scale import workers_for
from slide2vec.slides import Slide, SlideLike, as_slide
from slide2vec.stream import SlideOutcome, SlideQueue
from slide2vec.stream.plan import check_archives_here
from slide2vec.tile_embedder import TileEmbedder

if TYPE_CHECKING:
    from torch import nn

    from slide2vec.artifacts import (
        DenseImageArtifact,
        DenseRegionArtifact,
        ImageEmbeddingArtifact,
        PatientEmbeddingArtifact,
        SlideEmbeddingArtifact,
        TileEmbeddingArtifact,
        TileFeaturesLike,
    )
    from slide2vec.cohort.run import OnPersisted
    from slide2vec.cohort.sink import Sink
    from slide2vec.compile.gain import Gain
    from slide2vec.images import DenseEncodeKit, PatchTokensArtifact
    from slide2vec.scale import WorkerExecutor, WorkerPools
    from slide2vec.tiling import Tiling

__all__ = ["Model"]


class Model:
    """A preset ready to run. Build it with `Model.from_preset`.

    Attributes:
        recipe: what the preset is.
        variant: name of its output.
        device: where the encoder runs.
        precision: that calls use unless ExecutionOptions say otherwise.
    """

    def __init__(
        self,
        recipe: Recipe,
        variant: str,
        encoder: AnyEncoder,
        *,
        device: torch.device,
        precision: str,
        weights: str,
        origin: Mapping[str, Any] | None = None,
        upstream: Model | None = None,
        loader: Callable[..., Model] | None = None,
        precision_asked: bool = True,
    ) -> None:
        self.recipe, self.variant, self.device, self.precision = recipe, variant, device, precision
        self._encoder, self._weights = encoder, weights
        #: The model whose embeddings it takes: of tiles for slide-level presets, of slides for
        #: patient-level ones; None for tile-level ones.
        self.upstream = upstream
        #: Builds it anew in another process, as `loader(device=…)`; and workers that have.
        self._loader = loader
        #: Whether the precision is what somebody asked for, rather than what there is by default.
        self._precision_asked = precision_asked
        self._pools: WorkerPools = {}
        #: What `from_preset` was given besides the name, resolved; kept with a run's settings.
        self.origin: Mapping[str, Any] = origin or {}
        #: Of the tiles at the bottom, whatever it embeds itself.
        self._tile_embedder: TileEmbedder
        if upstream is not None:
            self._tile_embedder = upstream._tile_embedder
        else:
            resizes = self.origin.get("input_size_px") is not None
            self._tile_embedder = TileEmbedder(recipe, variant, encoder, device, precision, resizes=resizes)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        weights: PartsWeights = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        output_variant: str | None = None,
        precision: str | None = None,
        input_size_px: int | None = None,
        allow_non_recommended_settings: bool = False,
        trust_remote_code: bool = False,
    ) -> Self:
        """Build a preset's encoder and load its weights.

        Args:
            name: of the preset; `slide2vec models` lists them. Or any model of timm: "timm:resnet50",
                "hf-hub:<owner>/<repo>"; its spacing is then for the caller to say.
            weights: None = the Hugging Face hub at the recipe's revision; a local file or directory;
                or "random": initialised from `seed`, to try the pipeline (the embeddings mean nothing).
                For presets of several parts None or "random" is for all of them, and a mapping says it of
                each: {"lunit": "lunit.pth", "moozy-slide": "moozy.pt", "moozy": "moozy.pt"}.
            device: "cuda", "cuda:1", "mps" or "cpu"; None = the first of these that is there.
            output_variant: which output of the preset's own encoder; None = the preset's default.
            precision: "fp32", "bf16" or "fp16"; None = the preset's on CUDA, fp32 elsewhere.
            input_size_px: side of the encoder's input, to which tiles of any size are resized, with the
                recipe's interpolation (antialiased). It may be another one than the encoder was trained on
                where its backbone takes that: a multiple of its patch. None = tiles are encoded as they are.
            allow_non_recommended_settings: warn, instead of refusing, when a spacing or a tile size is
                asked for that the preset was not trained on. Tiles of another size are then encoded at
                exactly that size where the backbone takes it, and refused where it does not.
            trust_remote_code: let a preset that needs it run the Python code of its repository.

        Raises:
            PresetError: unknown preset or variant (a ValueError that gives the nearest names), or the
                preset runs code of its repository and trust_remote_code is not given.
            WeightsError: the weights cannot be had or do not fit; GatedWeightsError: access is missing.
            ConfigError: no such device or precision here, or the backbone does not take the input size.
        """
        recipe, chosen = load_recipe(name), pick_device(device)
        options = {
            "weights": weights,
            "seed": seed,
            "output_variant": output_variant,
            "precision": precision,
            "input_size_px": input_size_px,
            "allow_non_recommended_settings": allow_non_recommended_settings,
            "trust_remote_code": trust_remote_code,
        }
        resolved = resolve_precision(precision, tile_recipe(recipe).precision, chosen)
        where = "cuda" if chosen.type == "cuda" and not is_numbered(device) else str(chosen)
        model: Self | None = None
        for part in load_parts(recipe, options):
            model = cls(
                part.recipe,
                part.variant,
                part.encoder,
                device=chosen,
                precision=resolved,
                weights=part.weights,
                upstream=model,
                loader=loader_of(part, cls.from_preset),
                origin={**part.origin, "device": where},
                precision_asked=precision is not None,
            )
        assert model is not None
        return model

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        name: str,
        *,
        device: str | torch.device | None = None,
        precision: str | None = None,
        **described: Any,
    ) -> Self:
        """Build a model of a module of PyTorch, which is a preset of that name from then on.

        Args:
            module: (B, 3, H, W) float -> (B, D) float, with its weights.
            device, precision: as of `from_preset`.
            described: tile_size_px, mean and std or transform, spacing_um, and the other arguments of
                `slide2vec.encoders.register_module`.

        Raises:
            PresetError: a ValueError: the module or what is said of it does not fit; see there.
        """
        return cls.from_preset(register_module(module, name, **described), device=device, precision=precision)

    @property
    def name(self) -> str:
        """Name of the preset."""
        return self.recipe.name

    @property
    def level(self) -> Literal["tile", "slide", "patient"]:
        """What the preset embeds."""
        return self.recipe.level

    @property
    def feature_dim(self) -> int:
        """D, the dimension of an embedding."""
        return self.recipe.variants[self.variant].dim

    @property
    def encoder(self) -> nn.Module:
        """The module: normalised pixels (B, 3, H, W) float32 -> features (B, D)."""
        return handed_over(self._encoder)

    @property
    def _on_device(self) -> nn.Module:
        """The encoder of slides or patients, where it runs."""
        return as_module(self._encoder).to(self.device)

    @property
    def has_latents(self) -> bool:
        """Whether its slide encoder has latents beside its embedding."""
        return self.recipe.has_latents or (self.upstream is not None and self.upstream.has_latents)

    @property
    def tile_encoding(self) -> TileEmbedder:
        """What encodes tiles, and ready images."""
        return self._tile_embedder

    @property
    def _tile_model(self) -> Model:
        """The model of tiles at its bottom: itself, for tile-level presets."""
        return self if self.upstream is None else self.upstream._tile_model

    def identity(
        self, execution: ExecutionOptions | None = None, tile_size_px: int | None = None
    ) -> dict[str, Any]:
        """What decides an embedding, besides the slide and its tiling; JSON-ready.

        Args:
            tile_size_px: side of the tiles; None = the preset's.
        """
        execution = execution or ExecutionOptions()
        own = {
            "name": self.name,
            "level": self.level,
            "output_variant": self.variant,
            "weights": self._weights_digest,
            "weights_source": self._weights,
        } | code_identity(self._encoder)
        if self.upstream is not None:
            return {**own, "below": self.upstream.identity(execution, tile_size_px)}
        return own | self._tile_embedder.identity(execution, tile_size_px)

    def engine_in_words(self, execution: ExecutionOptions | None = None) -> str:
        """What runs the encoder: "PyTorch, fp32 on cpu", "openvino, bf16 on cpu"."""
        runtime, precision = self._tile_embedder.runs_in(execution or ExecutionOptions())
        return f"{'PyTorch' if runtime == 'torch' else runtime}, {precision} on {self.device}"

    @cached_property
    def _weights_digest(self) -> str:
        """What the weights are, wherever they came from."""
        if self.recipe.weights is None or self._weights.startswith("random:"):
            return self._weights
        return (
            self._tile_embedder.weights_digest
            if self.upstream is None
            else weights_digest(as_module(self._encoder))
        )

    def confirm_weights(self) -> None:
        """Wait until the weights of tiles are certainly what `identity` says; raises WeightsError else."""
        self._tile_embedder.confirm_weights()

    @overload
    def embed_slide(
        self,
        slide: SlideLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        *,
        annotation: str | None = None,
        spacing_at_level_0: float | None = None,
    ) -> EmbeddedSlide: ...
    @overload
    def embed_slide(
        self,
        slide: SlideLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        *,
        annotation: list[str],
        spacing_at_level_0: float | None = None,
    ) -> list[EmbeddedSlide]: ...
    def embed_slide(
        self,
        slide: SlideLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        *,
        annotation: str | list[str] | None = None,
        spacing_at_level_0: float | None = None,
    ) -> EmbeddedSlide | list[EmbeddedSlide]:
        """Embed one slide.

        Args:
            slide: a path, a mapping (image_path, and optionally sample_id, mask_path,
                spacing_at_level_0, patient_id) or a Slide.
            preprocessing: tiling and reading; None = the preset's spacing and tile size.
            execution: batch size, precision, threads, output directory.
            annotation: which class, where `preprocessing.masks` samples several; of a list, an EmbeddedSlide
                for each, in its order.
            spacing_at_level_0: µm/px, where the file's own is missing or wrong.

        Raises:
            SlideError: the slide cannot be embedded, and why.
            ConfigError: the class is not sampled, or several are and none is named.
        """
        masks = self.resolve_preprocessing(preprocessing).masks
        asked = classes_of(as_slide(slide, spacing_at_level_0), masks, annotation)
        found = embed_or_raise(asked, self.iter_slides(asked, preprocessing, execution))
        return found if isinstance(annotation, list) else found[0]

    def embed_slides(
        self,
        slides: SlidesLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        *,
        annotations: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[EmbeddedSlide]:
        """Embed several slides, packed into common batches; results in input order.

        A slide without tissue is there with (0, D) embeddings. A slide that fails never stops the
        others. Where `preprocessing.masks` samples several classes, a slide has one result for each, one
        after the other, in the order of `masks.min_coverage`; `EmbeddedSlide.annotation` says which.

        Args:
            slides: as for `embed_slide`; or a pandas.DataFrame with the columns of a manifest.
            annotations: only these classes, in this order; None = all that are sampled.
            on_error: "raise" an EmbedSlidesError after all slides are complete, which carries the
                results of the good ones; or "skip" the failed ones (they are logged).

        Raises:
            EmbedSlidesError: some slides failed, or the run itself broke off after some were finished.
            ManifestError: a slide is not well given, or two have one sample_id.
        """
        asked = by_class(given_slides(slides), self.resolve_preprocessing(preprocessing).masks, annotations)
        return embed_in_order(asked, self.iter_slides(asked, preprocessing, execution), on_error)

    def iter_slides(
        self,
        slides: SlidesLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
    ) -> Generator[SlideOutcome, None, None]:
        """Embed slides one after the other and yield each the moment it is complete or has failed.

        Nothing is kept: use it for cohorts that do not fit in memory. Closing the iterator stops
        the run.
        """
        execution = execution or ExecutionOptions()
        config = self.resolve_preprocessing(preprocessing)
        if not config.on_the_fly or config.save_tiles:
            _require_output_dir(execution, "on_the_fly=False" if not config.on_the_fly else "save_tiles=True")
        check_archives_here(config, execution.output_dir)
        todo = by_class(given_slides(slides), config.masks)
        self.decide_engine(todo, config, execution)
        sink = MemorySink(config, execution, partial(self.aggregated, latents=execution.save_latents))
        with (
            live_progress(),
            metered(partial(self.devices_here, execution)),
            closing(self.embed_into(sink, todo)) as outcomes,
        ):
            yield from outcomes

    def embed_into(self, sink: Sink, slides: Sequence[Slide]) -> Generator[SlideOutcome, None, None]:
        """Embed slides, here or in workers, and put each into the sink when it is complete; yields what goes
        back from there.

        Raises:
            ConfigError: there are not so many devices, or workers cannot load the model.
        """
        workers = self._workers(sink.execution)
        if workers is not None:
            return workers.embed_into(sink, slides)
        active_reporter().emit(RunStarted(len(slides), self.name))
        return self.embed_here(sink, slides)

    def in_workers(self, execution: ExecutionOptions) -> bool:
        """Whether workers would embed, on several devices or machines, rather than this process."""
        return self._workers(execution) is not None

    def devices_here(self, execution: ExecutionOptions) -> tuple[str, ...]:
        """Devices of this machine that a run uses, "cuda:1" or "cpu"; none where a cluster does it."""
        if execution.executor == "ray":
            return ()
        chosen = is_numbered(self.origin.get("device", "cuda:0"))
        return devices_for(self.device, chosen=chosen, num_gpus=execution.num_gpus, devices=execution.devices)

    def decide_engine(
        self, slides: Sequence[Slide], config: PreprocessingConfig, execution: ExecutionOptions
    ) -> None:
        """Build an engine for these slides where that pays (`ExecutionOptions.build_engine`). Called before
        anything asks for the identity of a run.

        Args:
            config: of `resolve_preprocessing`.
        """
        self._tile_embedder.decide(
            slides,
            config,
            execution,
            alone=execution.shard is None and not self.in_workers(execution),
            precision_asked=self._precision_asked or execution.precision is not None,
        )

    def memory_bytes(self, execution: ExecutionOptions, tile_size_px: int | None = None) -> int:
        """About what its encoders take on their device: weights, and a batch of tiles; see `TileEmbedder`."""
        if self.upstream is None:
            return self._tile_embedder.memory_bytes(execution, tile_size_px)
        below = self.upstream.memory_bytes(execution, tile_size_px)
        return below + weights_bytes(self._encoder, self.recipe)

    @property
    def held_bytes(self) -> int:
        """Of its encoders' weights that are in memory now."""
        below = 0 if self.upstream is None else self.upstream.held_bytes
        return below + held_bytes(self._encoder)

    def release(self) -> None:
        """Free the memory of its encoders, which are loaded anew when they are next needed."""
        release(self._encoder)
        if self.upstream is None:
            self._tile_embedder.release()
        else:
            self.upstream.release()

    def gain_of_build(self, config: PreprocessingConfig, execution: ExecutionOptions) -> Gain | None:
        """What an engine would bring that `decide_engine` builds where it pays; None where it builds none."""
        return self._tile_embedder.gain_of_build(execution, config.requested_tile_size_px)

    def _workers(self, execution: ExecutionOptions) -> WorkerExecutor | None:
        chosen = is_numbered(self.origin.get("device", "cuda:0"))
        return workers_for(self, self._loader, self.device, execution, self._pools, chosen=chosen)

    def embed_here(
        self, sink: Sink, slides: Iterable[Slide] | SlideQueue
    ) -> Generator[SlideOutcome, None, None]:
        """As `embed_into`, on the model's own device, in this process."""
        return self._tile_embedder.embed_into(sink, slides)

    def aggregated(self, embedded: EmbeddedSlide, *, latents: bool = False) -> EmbeddedSlide:
        """The slide with its slide_embedding, where the preset has a slide encoder and the slide tiles.

        Raises:
            SlideError: the slide encoder failed.
        """
        if self.upstream is None:
            return embedded
        if self.level == "patient":
            return self.upstream.aggregated(embedded, latents=latents)
        return with_slide_embedding(embedded, self._on_device, self.device, preset=self.name, latents=latents)

    def patient_embedding(self, slides: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(D,) float32 of a patient from their slide embeddings (D,), by sample_id.

        Raises:
            ModelLevelError: the preset is none of patients.
            PatientError: the patient encoder failed.
        """
        self._require_patient_level("patient_embedding")
        return patient_embedding(slides, self._on_device, self.device, preset=self.name)

    def resolve_preprocessing(self, config: PreprocessingConfig | None = None) -> PreprocessingConfig:
        """The configuration with the preset's spacing and tile size filled in.

        Raises:
            ConfigError: it asks for something that this version does not do, or that the preset was
                not trained on; or for tiles that its backbone does not take; or it lacks the
                spacing of a model that is no preset.
        """
        config = config or PreprocessingConfig()
        if config.hierarchical and self.level != "tile":
            raise ConfigError(
                f"preset {self.name} is {self.level}-level and takes all tiles of a slide: regions "
                f"(region_tile_multiple, requested_region_size_px) are for tile-level presets, such as "
                f"{self._tile_model.name}"
            )
        if self.level == "patient" and config.masks.by_class and config.masks.output_mode != "merged":
            raise ConfigError(
                f"preset {self.name} embeds patients from one bag of tiles per slide, and masks samples one "
                f"per class ({', '.join(config.masks.classes)}): say output_mode='merged', or sample tissue"
            )
        refuse_overlap(self._encoder, config.overlap)
        spacing, tile_size = self.recipe.tiles(config.requested_spacing_um, config.requested_tile_size_px)
        allowed = bool(self.origin.get("allow_non_recommended_settings"))
        self.recipe.check_recommended(spacing, tile_size, allowed=allowed)
        self._tile_embedder.recipe_for(tile_size)
        return config.resolved(spacing, tile_size)

    def embed_tiles(
        self,
        slides: SlidesLike,
        tiling_results: Sequence[Tiling] | Mapping[str, Tiling] | None = None,
        *,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        on_slide_persisted: OnPersisted | None = None,
    ) -> list[TileEmbeddingArtifact]:
        """Embed the tiles of slides onto disk, each slide's files the moment it is complete.

        Models of slides and patients embed tiles with their tile encoder; `aggregate_tiles` goes on.

        Args:
            tiling_results: the slides' tiles, in their order or by sample_id (from
                `slide2vec.tiling.load_coordinates`, say); None = find them.
            execution: its output_dir is where files go.
            on_slide_persisted: called with each new artifact, in a thread of the run.

        Returns:
            An artifact per slide, in input order (HierarchicalEmbeddingArtifact with regions).

        Raises:
            EmbedSlidesError: some slides failed; the artifacts of the others are in `.results`.
            ManifestError: slides and tilings do not match.
            OutputError, OutputLockedError: the output directory cannot be written to.
        """
        todo, config = given_slides(slides), self.resolve_preprocessing(preprocessing)
        execution = _require_output_dir(execution, "embed_tiles")
        self.decide_engine(todo, config, execution)
        made = embed_tiles(self._tile_model, todo, config, execution, tiling_results, on_slide_persisted)
        if execution.save_patch_tokens:
            save_patch_tokens(self._tile_model, made, execution)
        return cast("list[TileEmbeddingArtifact]", made)

    def save_patch_tokens(
        self,
        tile_artifacts: Iterable[TileEmbeddingArtifact],
        *,
        execution: ExecutionOptions | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[PatchTokensArtifact]:
        """Write the patch tokens of every tile of slides that `embed_tiles` or a Pipeline has embedded:
        `patch_tokens/<sample_id>.npy`, (N, d, rows, columns) float16, in the order of their tiles. The slides
        are read, and the tiles encoded, once more; memory does not grow with their number.

        Raises:
            EmbedSlidesError: some slides failed, or (`on_error="skip"`) are left out.
            ConfigError, UnsupportedError: the encoder has no patch tokens of such tiles.
        """
        return save_patch_tokens(self._tile_model, tile_artifacts, execution, on_error)

    def aggregate_tiles(
        self,
        tile_artifacts: Iterable[TileFeaturesLike],
        *,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        aggregator: Aggregator | None = None,
        patient_id_map: Mapping[str, str] | None = None,
    ) -> list[SlideEmbeddingArtifact] | list[PatientEmbeddingArtifact]:
        """Slide (or patient) embeddings from tile embeddings that are on disk, without reading a slide.

        Args:
            tile_artifacts: of `embed_tiles` or `Pipeline.run`; or what other tools wrote: paths, or
                `TileFeatures` that say where coordinates are and how large tiles are.
            preprocessing: not needed; accepted for symmetry.
            execution: its output_dir is where `slide_embeddings/` or `patient_embeddings/` goes.
            aggregator: instead of a slide encoder, for embeddings of any tile preset: "mean" or "max" over
                the tiles, or "top_tissue", the mean of the tiles with the most tissue.
            patient_id_map: sample_id -> patient_id, for patient-level models; else `TileFeatures` say it,
                else every slide is a patient of its own.

        Returns:
            An artifact per slide, in input order; of patient-level models one per patient, in order of
            first appearance.

        Raises:
            ModelLevelError: a tile-level model and no aggregator.
            ArtifactError: tile embeddings cannot be read or are not of the preset's tile encoder, or there
                are none (a slide without tissue).
            SlideError, PatientError: an encoder failed.
        """
        execution = _require_output_dir(execution, "aggregate_tiles")
        return aggregate_stored(self, tile_artifacts, execution, aggregator, patient_id_map)

    def embed_images(
        self,
        images: Iterable[ImageLike],
        *,
        execution: ExecutionOptions | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[ImageEmbeddingArtifact]:
        """Embed ready images onto disk, each with the transform that the encoder was published with, to
        `image_embeddings/<sample_id>`; in input order. What an earlier call did in the same way stays.

        Args:
            images: `ImageSpec`s, paths, or mappings with the fields of ImageSpec; on disk or in memory.
            execution: its output_dir is where files go.
            on_error: "raise" an EmbedImagesError when all others are there, or "skip" failed images.

        Raises:
            EmbedImagesError: some images cannot be read, or have no finite embedding.
            ConfigError: a ValueError: an earlier embedding of a sample_id was made in another way, or of
                another image (see `ExecutionOptions.on_image_mismatch`).
            ManifestError: a ValueError: ids are not unique, or there is a spacing, which means nothing here.
            ModelLevelError: a ValueError: the preset is not tile-level.
        """
        return embed_images(self, images, execution, on_error)

    def embed_regions_dense(
        self,
        regions: Iterable[SlideRegions],
        *,
        dense: DenseOptions,
        execution: ExecutionOptions | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[DenseRegionArtifact]:
        """Write a grid of patch tokens (d, rows, columns) of each region of slides, to
        `dense_embeddings/[<class>/]<sample_id>/<x>_<y>.pt`; in input order. What an earlier call did in the
        same way stays.

        Raises:
            EmbedImagesError: some regions cannot be read; the others are there. See `embed_images`.
            ConfigError: a ValueError: the encoder does not take such regions or windows.
            UnsupportedError: a NotImplementedError: it has no such tokens.
            ManifestError, ModelLevelError: ValueErrors, as for `embed_images`.
        """
        return embed_regions_dense(self, regions, dense, execution, on_error)

    def embed_images_dense(
        self,
        images: Iterable[ImageLike],
        *,
        dense: DenseImageOptions,
        execution: ExecutionOptions | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[DenseImageArtifact]:
        """As `embed_regions_dense`, of whole ready images, to `dense_image_embeddings/<sample_id>.pt`. They
        are normalised, never cropped or enlarged; PNG, JPEG and pixels in memory need a spacing."""
        return embed_images_dense(self, images, dense, execution, on_error)

    def prepare_dense_encoder(
        self, *, dense: DenseOptions | DenseImageOptions, execution: ExecutionOptions | None = None
    ) -> DenseEncodeKit:
        """Dense features of pictures in memory, batch by batch; nothing is written. What `dense` says of
        reading (spacing, tolerance, backend) is ignored; errors are as for `embed_regions_dense`."""
        return prepare_dense_encoder(self, dense, execution)

    def pooled_identity_differences(
        self,
        recorded: Mapping[str, Any],
        *,
        preprocessing: PreprocessingConfig | None,
        execution: ExecutionOptions | None = None,
        encoded_pixels: bool = True,
    ) -> dict[str, tuple[Any, Any]]:
        """Where the `compatibility` of a sidecar of tiles, slides or (preprocessing=None) ready images
        differs from what would be made now: {field: (recorded, current)}, `MISSING_FIELD` for one that is
        not recorded.
        What is of a single slide (its file, its spacing) is left out; the transform, too, where nothing was
        encoded (encoded_pixels=False)."""
        return pooled_identity_differences(self, recorded, preprocessing, execution, encoded_pixels)

    def dense_identity_differences(
        self,
        recorded: Mapping[str, Any],
        *,
        dense: DenseOptions | DenseImageOptions,
        execution: ExecutionOptions | None = None,
    ) -> dict[str, tuple[Any, Any]]:
        """As `pooled_identity_differences`, of sidecars of dense features. Raises what making them would."""
        return dense_identity_differences(self, recorded, dense, execution)

    def attention_maps(
        self,
        slide: SlideLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        *,
        at: Sequence[tuple[int, int]] | None = None,
        blocks: Sequence[int] = (-1,),
        include_registers: bool = False,
        mean_heads: bool = True,
    ) -> SlideAttention:
        """Attention maps of a slide's tiles, with their embeddings from the same pass; on the model's device.

        Args:
            slide, preprocessing, execution: as for `embed_slide`; larger tiles, where the backbone takes
                them, are asked for as `requested_tile_size_px`.
            at: (x, y) of the tiles wanted, level-0 px of their top-left corners; None = all that hold
                tissue. A map of 16 x 16 patches takes 1 KB of memory per tile and channel.
            blocks, include_registers, mean_heads: see `encode_tiles_attention`.

        Raises:
            UnsupportedError, ConfigError: as of `encode_tiles_attention`.
            SlideError: the slide cannot be embedded, or a place is not on it.
        """
        config, asked = self._tile_model.resolve_preprocessing(preprocessing), as_slide(slide)
        return attention_of_slide(
            self._tile_embedder,
            asked,
            config,
            execution or ExecutionOptions(),
            at,
            blocks=blocks,
            include_registers=include_registers,
            mean_heads=mean_heads,
        )

    def encode_tiles_attention(
        self,
        batch: torch.Tensor,
        *,
        blocks: Sequence[int] = (-1,),
        include_registers: bool = False,
        mean_heads: bool = False,
    ) -> torch.Tensor:
        """Attention of the class token to the patches of normalised tiles: (B, 3, H, W) -> (B, K, h, w).

        See `slide2vec.encoders.attention.encode_tiles_attention`, also for the errors.
        """
        asked = {"blocks": blocks, "include_registers": include_registers, "mean_heads": mean_heads}
        return attention_of_batch(self._tile_embedder, batch, **asked)

    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts into the space of the embeddings (of tiles; titan's of slides), for presets with a text
        side.

        Returns:
            (N, D) float32, on the CPU, in the order of the texts; to be compared by their cosine.

        Raises:
            UnsupportedError: a NotImplementedError: the preset has no text side, or its space is that of
                another output variant; says which.
            WeightsError: the weights have no text side, or there is no tokeniser beside them.
            ConfigError: a text is empty or too long. ExtraMissingError: the extra [text] is not installed.
        """
        return self._text_side.embed(texts)

    @cached_property
    def _text_side(self) -> TextSide:
        weights, seed = self.origin.get("weights"), self.origin.get("seed", 0)
        return load_text_side(self.recipe, self.variant, weights, seed).to(self.device)

    def embed_patient(
        self,
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
        self._require_patient_level("embed_patient")
        theirs = one_patient(given_slides(slides), patient_id)
        outcomes = self.iter_slides(theirs, preprocessing, execution)
        return embed_one(theirs, outcomes, self.patient_embedding, on_error)

    def embed_patients(
        self,
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
        self._require_patient_level("embed_patients")
        asked = group_slides(given_slides(slides), patient_id_map)
        outcomes = self.iter_slides(asked, preprocessing, execution)
        return embed_groups(asked, outcomes, self.patient_embedding, on_error)

    def _require_patient_level(self, method: str) -> None:
        if self.level != "patient":
            raise ModelLevelError(
                f"{method} needs a patient-level preset; {self.name} is {self.level}-level: use "
                "embed_slide(s)"
            )


def _require_output_dir(execution: ExecutionOptions | None, what: str) -> ExecutionOptions:
    if execution is None or execution.output_dir is None:
        raise ConfigError(f"{what} writes files: give ExecutionOptions(output_dir=…)")
    return execution
