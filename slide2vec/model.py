"""Model: a preset with its weights on a device, ready to embed slides."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

import torch

import slide2vec.attention_maps as attention
from slide2vec import aggregate, images
from slide2vec.aggregate import patient_embedding, require_patient_level, with_slide_embedding
from slide2vec.artifacts.places import tell_what_is_not_written, with_output_dir
from slide2vec.cohort import embed_tiles
from slide2vec.cohort.sink import MemorySink
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.encoders.given_module import register_module
from slide2vec.encoders.late import AnyEncoder, as_module, handed_over, held_bytes, release, weights_bytes
from slide2vec.encoders.preset_chain import PartsWeights, load_parts, loader_of, tile_recipe
from slide2vec.encoders.registered import code_identity, refuse_overlap
from slide2vec.encoders.text import TextSide, load_text_side
from slide2vec.encoders.weights import weights_digest
from slide2vec.errors import ConfigError
from slide2vec.manifests import SlidesLike, by_class, given_slides
from slide2vec.progress import RunStarted, active_reporter, live_progress, metered
from slide2vec.recipes import Recipe, load_recipe
from slide2vec.runtime import devices_for, is_numbered, pick_device, resolve_precision
from slide2vec.scale import workers_for
from slide2vec.slides import Slide
from slide2vec.stream import SlideOutcome, SlideQueue
from slide2vec.stream.plan import check_archives_here
from slide2vec.tile_embedder import TileEmbedder

if TYPE_CHECKING:
    from torch import nn

    from slide2vec.artifacts import TileEmbeddingArtifact
    from slide2vec.cohort.run import OnPersisted
    from slide2vec.cohort.sink import Sink
    from slide2vec.compile.gain import Gain
    from slide2vec.scale import WorkerExecutor, WorkerPools
    from slide2vec.tiling import Tiling

__all__ = ["Model"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _method(function: _Function) -> _Function:
    """A function of another room as a method of Model, which help(), tracebacks and pickle show as such."""
    function.__module__, function.__qualname__ = __name__, f"Model.{function.__name__}"
    function.__annotations__.pop("self", None)
    return function


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
        self.loader = loader
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

    def __repr__(self) -> str:
        kind = f"{self.level}-level, {self.feature_dim} features"
        return f"<Model {self.name} ({self.variant}): {kind}, {self.precision} on {self.device}>"

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
    def tile_model(self) -> Model:
        """The model of tiles at its bottom: itself, for tile-level presets."""
        return self if self.upstream is None else self.upstream.tile_model

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
            with_output_dir(execution, "on_the_fly=False" if not config.on_the_fly else "save_tiles=True")
        tell_what_is_not_written(execution, config)
        check_archives_here(config, execution.output_dir)
        todo = by_class(given_slides(slides), config.masks)
        self.decide_engine(todo, config, execution)
        aggregate = partial(self.aggregated, latents=execution.save_latents)
        sink = MemorySink(config, execution, aggregate, inputs=self.tile_encoding.recipe_for)
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
        workers = self.workers(sink.execution)
        if workers is not None:
            return workers.embed_into(sink, slides)
        active_reporter().emit(RunStarted(len(slides), self.name))
        return self.embed_here(sink, slides)

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
            alone=execution.shard is None and self.workers(execution) is None,
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
        alone = self.workers(execution) is None
        return self._tile_embedder.gain_of_build(execution, config.requested_tile_size_px) if alone else None

    def workers(self, execution: ExecutionOptions) -> WorkerExecutor | None:
        """Who would embed on several devices or machines; None: this process."""
        chosen = is_numbered(self.origin.get("device", "cuda:0"))
        return workers_for(self, self.loader, self.device, execution, self._pools, chosen=chosen)

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
        require_patient_level(self, "patient_embedding")
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
                f"{self.tile_model.name}"
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
        execution, _ = with_output_dir(execution, "embed_tiles")
        self.decide_engine(todo, config, execution)
        made = embed_tiles(self.tile_model, todo, config, execution, tiling_results, on_slide_persisted)
        tiles = cast("list[TileEmbeddingArtifact]", made)
        if execution.save_patch_tokens:
            self.save_patch_tokens(tiles, execution=execution)
        return tiles

    # Each is written in the room that does the work, for what it needs of a model.
    embed_slide = _method(aggregate.embed_slide)
    embed_slides = _method(aggregate.embed_slides)
    save_patch_tokens = _method(images.save_patch_tokens)
    aggregate_tiles = _method(aggregate.aggregate_tiles)
    embed_patient = _method(aggregate.embed_patient)
    embed_patients = _method(aggregate.embed_patients)
    embed_images = _method(images.embed_images)
    embed_images_dense = _method(images.embed_images_dense)
    embed_regions_dense = _method(images.embed_regions_dense)
    prepare_dense_encoder = _method(images.prepare_dense_encoder)
    dense_identity_differences = _method(images.dense_identity_differences)
    pooled_identity_differences = _method(images.pooled_identity_differences)
    attention_maps = _method(attention.attention_maps)
    encode_tiles_attention = _method(attention.encode_tiles_attention)

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
