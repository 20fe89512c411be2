"""Models: several presets that embed the same slides, which are read once for all of them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from slide2vec.aggregate.gather import check_on_error, embed_in_order
from slide2vec.artifacts.places import tell_what_is_not_written
from slide2vec.cohort.kept_tiles import TileScratch, tile_scratch
from slide2vec.cohort.scratch_room import tiles_wanted
from slide2vec.cohort.side_by_side import run_side_by_side
from slide2vec.cohort.sink import MemorySink, aggregated_outcome
from slide2vec.config import ExecutionOptions, MaskSamplingConfig, PreprocessingConfig
from slide2vec.embedded import EmbeddedSlide
from slide2vec.encoders.preset_chain import parts_of, tile_recipe
from slide2vec.errors import ConfigError, EmbedSlidesError
from slide2vec.manifests import SlidesLike, by_class, classes_of, given_slides
from slide2vec.memory import Need, limit_bytes, together
from slide2vec.model import Model
from slide2vec.progress import active_reporter, live_progress, metered
from slide2vec.progress.together import TogetherReporter
from slide2vec.recipes import load_recipe
from slide2vec.runtime import devices_for, is_numbered, pick_device
from slide2vec.scale import in_one_pool
from slide2vec.slides import SlideLike, as_slide
from slide2vec.stream import SlideOutcome
from slide2vec.tile_embedder import batch_bytes

if TYPE_CHECKING:
    import torch

    from slide2vec.scale import WorkerExecutor, WorkerPools
    from slide2vec.slides import Slide
    from slide2vec.stream.shared_slides import Share

__all__ = ["Models", "devices_of_preset", "groups_of_presets", "placed_on"]

logger = logging.getLogger(__name__)


class Models(Mapping[str, Model]):
    """Several models over the same slides, by name. Build it with `Models.from_presets`, or from models.

    Encoders of equal tiles (spacing, size, overlap) share what is read and decoded; others share the opened
    slide and its tissue. Embeddings are those of separate calls, bit by bit.

    Args:
        models: by name; of a sequence, the names are those of the presets.

    Raises:
        ConfigError: there is none, or two have one name.
    """

    def __init__(self, models: Mapping[str, Model] | Sequence[Model]) -> None:
        named = models if isinstance(models, Mapping) else _by_preset(models)
        if not named:
            raise ConfigError("no model was given")
        self._models = dict(named)
        #: Workers that have all of them, and wait for the next call.
        self._pools: WorkerPools = models._pools if isinstance(models, Models) else {}

    def __repr__(self) -> str:
        return f"<Models: {', '.join(map(repr, self._models.values()))}>"

    @classmethod
    def from_presets(
        cls,
        names: Iterable[str],
        *,
        devices: Sequence[str] = (),
        encoders_gb: float | None = None,
        **options: Any,
    ) -> Self:
        """Build several presets. Where they do not fit into memory together, each is loaded to see that it
        can be, and again when its turn comes.

        Args:
            names: of the presets.
            devices: among which encoders are shared out by their work per tile, fed by one reader ("cuda:0",
                "cuda:1"); none: all on one, the option `device`.
            encoders_gb: as in ExecutionOptions.
            options: for each of them, as `Model.from_preset`.

        Raises:
            ConfigError: one is named twice; others as `Model.from_preset`.
        """
        names, models = list(names), list[Model]()
        _check_once(names)  # before any is built
        places = placed_on(names, devices) if devices else dict.fromkeys(names, options.get("device"))
        groups = groups_of_presets(places, ExecutionOptions(encoders_gb=encoders_gb))
        for name in names:
            models.append(Model.from_preset(name, **{**options, "device": places[name]}))
            if len(groups) > 1:
                models[-1].release()
        return cls(models)

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def embed_slide(
        self,
        slide: SlideLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        *,
        annotation: str | None = None,
        spacing_at_level_0: float | None = None,
    ) -> dict[str, EmbeddedSlide]:
        """Embed one slide, or one class of it, with each model; see `Model.embed_slide`.

        Raises:
            SlideError: the slide cannot be embedded with one of them, and why.
        """
        given = classes_of(as_slide(slide, spacing_at_level_0), self._masks(preprocessing), annotation)
        found = {}
        for name, outcomes in self._outcomes(given, preprocessing, execution).items():
            if isinstance(outcomes, Exception):
                raise outcomes
            if (error := outcomes[0].error) is not None:
                raise error
            assert outcomes[0].embedded is not None
            found[name] = outcomes[0].embedded
        return found

    def embed_slides(
        self,
        slides: SlidesLike,
        preprocessing: PreprocessingConfig | None = None,
        execution: ExecutionOptions | None = None,
        *,
        annotations: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> dict[str, list[EmbeddedSlide]]:
        """Embed several slides with each model; for each the slides in input order, as `Model.embed_slides`.

        Args:
            preprocessing: for all of them, with what it leaves open filled in by each preset.
            annotations: as `Model.embed_slides`.
            on_error: "raise" an EmbedSlidesError at the end, which carries the results of all models, by
                name, with None in the place of each failed slide; or "skip" what failed (it is logged).

        Raises:
            EmbedSlidesError: some slides failed with some models, or a model itself broke off.
            ManifestError: a slide is not well given, or two have one sample_id.
        """
        check_on_error(on_error)
        asked = by_class(given_slides(slides), self._masks(preprocessing), annotations)
        results: dict[str, list[EmbeddedSlide]] = {}
        partly: dict[str, Sequence[EmbeddedSlide | None]] = {}
        failed: dict[str, Exception] = {}
        for name, outcomes in self._outcomes(asked, preprocessing, execution).items():
            if isinstance(outcomes, Exception):
                failed |= {f"{slide.sample_id} with {name}": outcomes for slide in asked}
                partly[name] = [None] * len(asked)
                continue
            try:
                partly[name] = results[name] = embed_in_order(asked, outcomes, on_error)
            except EmbedSlidesError as error:
                failed |= {f"{slide} with {name}": why for slide, why in error.failed.items()}
                partly[name] = cast("Sequence[EmbeddedSlide | None]", error.results)
        if failed and (on_error == "raise" or len(results) < len(self)):
            raise EmbedSlidesError.of_several(failed, partly)
        return results

    def resolve_preprocessing(
        self, config: PreprocessingConfig | None = None
    ) -> dict[str, PreprocessingConfig]:
        """Of each model, by name; see `Model.resolve_preprocessing`."""
        found = {}
        for name, model in self.items():
            found[name] = model.resolve_preprocessing(config)  # which may load it, to see what tiles it takes
            if len(_fitting(self, ExecutionOptions())) > 1:
                model.release()
        return found

    def _masks(self, preprocessing: PreprocessingConfig | None) -> MaskSamplingConfig:
        """Of all models, as they have it in common."""
        return next(iter(self.resolve_preprocessing(preprocessing).values())).masks

    def grouped(
        self, configs: Mapping[str, PreprocessingConfig], execution: ExecutionOptions
    ) -> list[list[str]]:
        """Names of models that have the same tiles and tile encoder; of each group those of tiles first.

        Args:
            configs: of each model, resolved.
        """
        groups: dict[str, list[str]] = {}
        for name, model in self.items():
            groups.setdefault(_tiles_key(model, configs[name], execution), []).append(name)
        return [sorted(names, key=lambda name: self[name].level != "tile") for names in groups.values()]

    def in_memory(
        self, configs: Mapping[str, PreprocessingConfig], execution: ExecutionOptions
    ) -> list[list[str]]:
        """Names of those that fit into memory together, in groups that take turns: now, as `prepare` decides.

        Args:
            configs: of each model, resolved.
        """
        return _fitting(
            self, execution, {name: config.requested_tile_size_px for name, config in configs.items()}
        )

    def prepare(
        self, slides: Sequence[Slide], configs: Mapping[str, PreprocessingConfig], execution: ExecutionOptions
    ) -> list[list[str]]:
        """Decide what runs each model (see `Model.decide_engine`), and which of them are in memory together:
        their names, in groups that take turns. Several groups are said in the log, and nothing of them is in
        memory when this returns.

        Args:
            configs: of each model, resolved.
        """
        sizes = {name: config.requested_tile_size_px for name, config in configs.items()}
        groups = self.in_memory(configs, execution)
        for name, model in self.items():
            model.decide_engine(slides, configs[name], execution)
            if len(groups) > 1:
                model.identity(execution, sizes[name])  # known from now on, wherever the weights are
                model.release()
        if len(groups) > 1:
            allowed = f"encoders_gb={execution.encoders_gb:g}" if execution.encoders_gb else "what is free"
            logger.warning(
                "%d encoders take about %s GB of memory, more than %s: they take turns, and each group reads "
                "the slides: %s",
                *(len(self), _gigabytes(self, execution, sizes), allowed),
                "; then ".join(" + ".join(names) for names in groups),
            )
        return groups

    def workers(self, execution: ExecutionOptions) -> WorkerExecutor | None:
        """Who would embed on several devices or machines, with all of the models in each worker; None: this
        process."""
        return in_one_pool({name: model.workers(execution) for name, model in self.items()}, self._pools)

    def take_turns(self, execution: ExecutionOptions, slides: int | None = None) -> bool:
        """Whether the models embed one after the other, each reading the slides for itself: in workers that
        are not the same for all, or a single slide in memory, which workers share out among them. Says so in
        the log.

        Args:
            slides: how many, in memory; None: on disk.
        """
        alone = [model.workers(execution) for model in self.values()]
        if len(self) == 1 or not any(alone) or (slides != 1 and self.workers(execution) is not None):
            return False
        logger.warning(
            "%s embed %s: they take turns, and each reads the slides",
            ", ".join(self),
            "parts of the slide in workers" if all(alone) else "on different devices, some in workers",
        )
        return True

    def devices_here(self, execution: ExecutionOptions) -> tuple[str, ...]:
        """See `Model.devices_here`."""
        found = (device for model in self.values() for device in model.devices_here(execution))
        return tuple(dict.fromkeys(found))

    def _outcomes(
        self,
        slides: Sequence[Slide],
        preprocessing: PreprocessingConfig | None,
        execution: ExecutionOptions | None,
    ) -> dict[str, list[SlideOutcome] | Exception]:
        execution = execution or ExecutionOptions()
        if self.take_turns(execution, len(slides)):
            return {
                name: list(model.iter_slides(slides, preprocessing, execution))
                for name, model in self.items()
            }
        configs = self.resolve_preprocessing(preprocessing)
        tell_what_is_not_written(execution, next(iter(configs.values())))
        found: dict[str, list[SlideOutcome] | Exception] = {}
        turns = self.prepare(slides, configs, execution)
        with (
            live_progress(),
            metered(partial(self.devices_here, execution)),
            tile_scratch(execution, len(turns)) as scratch,
        ):
            wanted = [set().union(*(tiles_wanted(configs[name], slides) for name in turn)) for turn in turns]
            for number, turn in enumerate(turns):
                if scratch is not None:
                    scratch.begin_turn(wanted[number], set().union(*wanted[number + 1 :]))
                found |= self._turn(turn, slides, configs, execution, scratch)
                for name in turn if len(turns) > 1 else ():
                    self[name].release()
        return {name: found[name] for name in self}

    def _turn(
        self,
        turn: Sequence[str],
        slides: Sequence[Slide],
        configs: Mapping[str, PreprocessingConfig],
        execution: ExecutionOptions,
        scratch: TileScratch | None,
    ) -> dict[str, list[SlideOutcome] | Exception]:
        """The outcomes of models that are in memory together."""
        groups = Models({name: self[name] for name in turn}).grouped(configs, execution)
        sample_ids = [slide.sample_id for slide in slides]
        reporter = TogetherReporter(active_reporter(), {names[0]: sample_ids for names in groups})
        reporter.start(turn)
        found: dict[str, list[SlideOutcome] | Exception] = {}
        if (workers := self.workers(execution)) is not None:
            return self._in_workers(workers, groups, slides, configs, execution, reporter, scratch)
        tasks = {
            names[0]: partial(self._embed, names, slides, configs[names[0]], execution) for names in groups
        }
        done = run_side_by_side(tasks, dict.fromkeys(tasks, slides), execution, reporter, scratch)
        for names in groups:
            made = done[names[0]]
            found |= dict.fromkeys(names, made) if isinstance(made, Exception) else made
        return found

    def _in_workers(
        self,
        workers: WorkerExecutor,
        groups: Sequence[Sequence[str]],
        slides: Sequence[Slide],
        configs: Mapping[str, PreprocessingConfig],
        execution: ExecutionOptions,
        reporter: TogetherReporter,
        scratch: TileScratch | None,
    ) -> dict[str, list[SlideOutcome] | Exception]:
        sinks = {
            first: MemorySink(configs[first], execution, inputs=self[first].tile_encoding.recipe_for)
            for first, *_ in groups
        }
        bare = [names[0] for names in groups if len(names) > 1]  # slide encoders differ
        done = workers.embed_together(sinks, dict.fromkeys(sinks, slides), reporter, scratch, bare=bare)
        reporter.end(done)
        found: dict[str, list[SlideOutcome] | Exception] = {}
        for names in groups:
            made = done[names[0]]
            for name in names:
                aggregate = partial(self[name].aggregated, latents=execution.save_latents)
                found[name] = (
                    made
                    if isinstance(made, Exception)
                    else [aggregated_outcome(outcome, aggregate) for outcome in made]
                )
        return found

    def _embed(
        self,
        names: Sequence[str],
        slides: Sequence[Slide],
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        share: Share,
    ) -> dict[str, list[SlideOutcome]]:
        """The outcomes of models that have one tile encoder."""
        found: dict[str, list[SlideOutcome]] = {name: [] for name in names}
        inputs = self[names[0]].tile_encoding.recipe_for
        sink = MemorySink(config, execution, share=share, inputs=inputs)
        with closing(self[names[0]].embed_here(sink, slides)) as outcomes:
            for outcome in outcomes:
                for name in names:
                    aggregate = partial(self[name].aggregated, latents=execution.save_latents)
                    found[name].append(aggregated_outcome(outcome, aggregate))
        return found


def placed_on(names: Sequence[str], devices: Sequence[str]) -> dict[str, str]:
    """A device for each preset: those with the most work per tile first, each to the one with the least."""
    gflops = {name: tile_recipe(load_recipe(name)).gflops for name in names}
    work = dict.fromkeys(devices, 0.0)
    places = {}
    for name in sorted(gflops, key=lambda name: -gflops[name]):
        places[name] = min(work, key=lambda device: work[device])
        work[places[name]] += gflops[name]
    return places


def groups_of_presets(
    places: Mapping[str, str | torch.device | None], execution: ExecutionOptions
) -> list[list[str]]:
    """Presets that fit into the memory of their devices together, by what their recipes say; in groups.

    Args:
        places: the device of each.
    """
    needs: dict[str, Need] = {}
    limits: dict[str, float] = {}
    for name, place in places.items():
        parts, device = [load_recipe(part) for part in parts_of(load_recipe(name))], pick_device(place)
        weights = sum(4e6 * part.params_m for part in parts)
        needs[name] = Need(str(device), weights + batch_bytes(parts[-1], execution, device))
        workers = _sharing(str(device), devices_of_preset(place, execution))
        limits[str(device)] = limit_bytes(str(device), execution.encoders_gb, workers=workers)
    return together(needs, limits)


def devices_of_preset(place: str | torch.device | None, execution: ExecutionOptions) -> tuple[str, ...]:
    """As `Model.devices_here`, of a preset that has not been loaded; each has a worker, if there are several.

    Args:
        place: the device to load it on.

    Raises:
        ConfigError: as `devices_for`.
    """
    return devices_for(
        pick_device(place),
        chosen=is_numbered(place),
        num_gpus=execution.num_gpus,
        devices=execution.devices,
    )


def _sharing(device: str, devices: Sequence[str]) -> int:
    """How many workers share the memory of a device, of those that a run uses."""
    return max(1, devices.count(device))


_Name = TypeVar("_Name", bound=Hashable)


def _fitting(
    models: Mapping[_Name, Model],
    execution: ExecutionOptions,
    sizes: Mapping[_Name, int | None] | None = None,
) -> list[list[_Name]]:
    """Names of models that fit into memory together, in groups.

    Args:
        sizes: of the tiles of each; None = the preset's.
    """
    needs: dict[_Name, Need] = {}
    held: Counter[str] = Counter()
    workers: dict[str, int] = {}
    for name, model in models.items():
        size, device = None if sizes is None else sizes[name], str(model.device)
        needs[name] = Need(device, model.memory_bytes(execution, size))
        held[device] += model.held_bytes
        workers[device] = _sharing(device, model.devices_here(execution))
    limits = {
        name: limit_bytes(name, execution.encoders_gb, taken, workers[name]) for name, taken in held.items()
    }
    return together(needs, limits)


def _gigabytes(models: Models, execution: ExecutionOptions, sizes: Mapping[str, int | None]) -> str:
    """What they take together."""
    return f"{sum(model.memory_bytes(execution, sizes[name]) for name, model in models.items()) / 1e9:.3g}"


def _by_preset(models: Sequence[Model]) -> dict[str, Model]:
    names = [model.name for model in models]
    _check_once(names)
    return dict(zip(names, models, strict=True))


def _check_once(names: Sequence[str]) -> None:
    """Raises ConfigError where one is there twice."""
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"{', '.join(sorted(twice))} was given twice: name it once, or in Python give models as a "
            "mapping, by names of your own"
        )


def _tiles_key(model: Model, config: PreprocessingConfig, execution: ExecutionOptions) -> str:
    """Equal for models whose tiles and tile encoder are the same."""
    while model.upstream is not None:
        model = model.upstream
    identity: Mapping[str, Any] = model.identity(execution, config.requested_tile_size_px)
    return json.dumps([identity, config.model_dump(mode="json")], sort_keys=True, default=str)
