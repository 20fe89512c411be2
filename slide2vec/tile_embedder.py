"""TileEmbedder: one tile encoder on one device, with its engines and the stream of tiles through them."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from slide2vec.aggregate import regrouped
from slide2vec.compile import (
    EngineTarget,
    build_where_it_pays,
    gain_of_build,
    goes_on_in_torch,
    offer_bf16,
    select_engine,
)
from slide2vec.compile.batch_size import batch_size_for, bytes_per_tile, fitting_batch_size
from slide2vec.config import ExecutionOptions, PreprocessingConfig
from slide2vec.encoders.input_size import for_input
from slide2vec.encoders.late import AnyEncoder, LateEncoder, weights_bytes
from slide2vec.errors import EngineError
from slide2vec.prepare import choose_preparer
from slide2vec.progress import active_reporter
from slide2vec.recipes import Recipe
from slide2vec.runtime import resolve_precision
from slide2vec.slides import Slide
from slide2vec.stream import (
    SlideOutcome,
    SlideQueue,
    Stream,
    TileTransfer,
    tile_transfer,
)
from slide2vec.stream.batch_encoder import BatchEncoder
from slide2vec.stream.station_timers import StationTimers

if TYPE_CHECKING:
    from torch import nn

    from slide2vec.cohort.sink import Sink
    from slide2vec.compile.engine_choice import Selected
    from slide2vec.compile.gain import Gain
    from slide2vec.prepare import Preparer
    from slide2vec.runtime import Engine

__all__ = ["TileEmbedder", "batch_bytes"]

#: Bytes in memory per pixel of a tile while it is encoded: 110 to 345 on a CPU in fp32, in batches of 8 or
#: more of prost40m, a ViT-B and a ViT-L of patches of 16 px, a ViT-S of 8 px (lunit), ResNet-50, conchv15.
BYTES_PER_PX = 400
#: What decides a workspace: GPU decoding, preparer, tile size, and the engine's runtime, precision, layout.
_Key: TypeAlias = tuple[object, ...]
#: What decides an engine: the choice, precision, torch_compile, side of the encoder's input.
_Asked: TypeAlias = tuple[str, str, bool, int]


@dataclass
class _Workspace:
    """What a stream works with besides its engine. For one stream at a time, one after the other."""

    transfer: TileTransfer
    preparer: Preparer


def batch_bytes(recipe: Recipe, execution: ExecutionOptions, device: torch.device) -> int:
    """About what a batch of tiles takes on its way through an encoder."""
    size = execution.batch_size or batch_size_for(recipe.gflops, device)
    return size * BYTES_PER_PX * recipe.transform.crop**2


class TileEmbedder:
    """A tile encoder on a device. What it finds out and builds for one call is there for the next: engines,
    where tiles are decoded, what prepares them, how many of them fit.

    Args:
        recipe: of a tile-level preset, as its tiles are prepared.
        variant: name of its output.
        encoder: a late one is built when it is needed.
        precision: that calls use unless ExecutionOptions say otherwise.
        resizes: tiles of any size are resized to the encoder's input, rather than encoded as they are.
    """

    def __init__(
        self,
        recipe: Recipe,
        variant: str,
        encoder: AnyEncoder,
        device: torch.device,
        precision: str,
        *,
        resizes: bool = False,
    ) -> None:
        self.recipe, self.variant, self._late = recipe, variant, LateEncoder.of(encoder)
        self.device, self.precision, self._resizes = device, precision, resizes
        #: The recipe for tiles of other sizes than its own, by size.
        self._recipes: dict[int, Recipe] = {}
        #: Bytes that preparing and encoding a tile take on a GPU, by engine.
        self._bytes_per_tile: dict[int, float] = {}
        self._engines: dict[_Asked, Selected] = {}
        #: Runtime and precision of each engine that there was; they stay, whatever is built meanwhile.
        self._chosen: dict[_Asked, tuple[str, str]] = {}
        #: Output directories whose embeddings PyTorch has begun to make, and in which precision.
        self._goes_on_in_torch: set[tuple[Path | None, str]] = set()
        #: Workspaces that no stream has in use.
        self._idle: dict[_Key, list[_Workspace]] = {}

    @property
    def encoder(self) -> nn.Module:
        """The module, built now if it is not yet; for whoever may change it."""
        return self._late.hand_over()

    @encoder.setter
    def encoder(self, module: nn.Module) -> None:
        self._late = LateEncoder.of(module)

    @cached_property
    def weights_digest(self) -> str:
        """Of the weights' values; not certain before `confirm_weights`."""
        return self._late.digest

    def confirm_weights(self) -> None:
        """See `LateEncoder.confirm`."""
        self._late.confirm()

    def recipe_for(self, tile_size_px: int | None) -> Recipe:
        """The recipe for tiles of a size, which are not resized unless that is asked for; None = its own.

        Raises:
            ConfigError: the backbone does not take such tiles.
        """
        own = (None, self.recipe.tile_size_px, self.recipe.transform.crop)
        if tile_size_px in own or self._resizes:
            return self.recipe
        if tile_size_px not in self._recipes:
            asked = f"requested_tile_size_px={tile_size_px}"
            self._recipes[tile_size_px] = for_input(self.recipe, self._late.module, tile_size_px, asked)
        return self._recipes[tile_size_px]

    def with_encoder(
        self, encoder: nn.Module, name: str, dim: int, tile_size_px: int, *, normalised: bool = False
    ) -> TileEmbedder:
        """One that runs another module over tiles of a size, which are prepared as for its own encoder.

        Args:
            name, dim: of the module's output.
            normalised: engines of it are built for normalised pixels.
        """
        recipe = self.recipe_for(tile_size_px)
        variant = recipe.variants[self.variant].model_copy(update={"dim": dim})
        quiet = recipe.engine.model_copy(
            update={"advised": False} | ({"layout": "float32_nchw"} if normalised else {})
        )
        recipe = recipe.model_copy(
            update={"variants": {name: variant}, "tile_size_px": tile_size_px, "engine": quiet}
        )
        return TileEmbedder(recipe, name, encoder, self.device, self.precision, resizes=True)

    def decide(
        self,
        slides: Sequence[Slide],
        config: PreprocessingConfig,
        execution: ExecutionOptions,
        *,
        alone: bool,
        precision_asked: bool,
    ) -> None:
        """Before anything asks what runs the encoder for a call: have a run that began in PyTorch go on so,
        and build an engine where that pays. What runs the encoder since an earlier call goes on doing that.

        Args:
            config: with requested_spacing_um and requested_tile_size_px resolved.
            alone: this process embeds all of the run.
            precision_asked: nobody is to be offered another one.
        """
        target, precision, asked = self._asked(execution, config.requested_tile_size_px)
        if not precision_asked:
            offer_bf16(target, precision)
        if execution.engine != "auto" or asked in self._chosen:
            return
        name, output_dir = self.recipe.name, execution.output_dir
        if config.resume and output_dir is not None and goes_on_in_torch(output_dir, name, precision):
            self._goes_on_in_torch.add((output_dir, precision))
        elif alone and execution.build_engine == "auto" and not execution.torch_compile:
            build_where_it_pays(
                self._late,
                target,
                precision,
                slides,
                config,
                output_dir=output_dir,
                batch_size=execution.batch_size,
            )

    def gain_of_build(self, execution: ExecutionOptions, tile_size_px: int | None) -> Gain | None:
        """What an engine would bring that `decide` builds where it pays; None where it builds none."""
        if execution.engine != "auto" or execution.build_engine != "auto" or execution.torch_compile:
            return None
        target, precision, _ = self._asked(execution, tile_size_px)
        return gain_of_build(target, precision)

    def select(self, execution: ExecutionOptions, tile_size_px: int | None = None) -> Selected:
        """What runs the encoder: looked for once, and loaded or compiled once.

        Args:
            tile_size_px: side of the tiles; None = the preset's.

        Raises:
            EngineError, ConfigError: the engine asked for cannot be had.
        """
        target, precision, asked = self._asked(execution, tile_size_px)
        if asked not in self._engines:
            chosen = self._chosen.get(asked)
            selected = select_engine(
                asked[0] if chosen is None else chosen[0],
                self._late,
                target,
                precision,
                compiled=execution.torch_compile,
            )
            found = selected.engine.runtime, selected.engine.precision
            if chosen not in (None, found):
                selected.engine.close()
                raise EngineError(
                    f"{self.recipe.name} ran by {' in '.join(chosen or ())}, and now only by "
                    f"{' in '.join(found)}: was its engine removed? Start again"
                )
            self._chosen[asked], self._engines[asked] = found, selected
        elif self._late.is_built and self._engines[asked].engine.runtime == "torch" and not self._on_cuda:
            self._late.module.to(
                self.device
            ).eval()  # callers have it in their hands, too, and may have moved it
        return self._engines[asked]

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def identity(self, execution: ExecutionOptions, tile_size_px: int | None) -> dict[str, Any]:
        """What of its engine and of how tiles are prepared decides an embedding; JSON-ready."""
        recipe, (runtime, precision) = self.recipe_for(tile_size_px), self.runs_in(execution, tile_size_px)
        return {
            "precision": precision,
            "runtime": runtime,
            "input_size_px": recipe.transform.crop,
            "transform": recipe.transform.model_dump(mode="json"),
        }

    def runs_in(self, execution: ExecutionOptions, tile_size_px: int | None = None) -> tuple[str, str]:
        """Runtime and precision of what runs the encoder; raises as `select`."""
        _, _, asked = self._asked(execution, tile_size_px)
        if asked not in self._chosen:
            self.select(execution, tile_size_px)
        return self._chosen[asked]

    def memory_bytes(self, execution: ExecutionOptions, tile_size_px: int | None) -> int:
        """About what it takes on its device: weights, and a batch of tiles on its way through them."""
        recipe = self.recipe if tile_size_px is None else self.recipe_for(tile_size_px)
        return weights_bytes(self._late, recipe) + batch_bytes(recipe, execution, self.device)

    def release(self) -> None:
        """Free the memory of engines and of the encoder; both are there again when they are next needed."""
        while self._engines:
            self._engines.popitem()[1].engine.close()
        self._idle.clear()
        self._bytes_per_tile.clear()
        self._late.release()
        gc.collect()  # modules and what runs them hold on to each other
        if self._on_cuda:
            torch.cuda.empty_cache()

    def _asked(
        self, execution: ExecutionOptions, tile_size_px: int | None
    ) -> tuple[EngineTarget, str, _Asked]:
        """What is to be run, in which precision, and the key under which what runs it is kept."""
        recipe, precision = self.recipe_for(tile_size_px), self._precision(execution)
        target = EngineTarget(recipe, self.variant, self.device, lambda: self.weights_digest)
        goes_on = (execution.output_dir, precision) in self._goes_on_in_torch
        choice = "torch" if execution.engine == "auto" and goes_on else execution.engine
        return target, precision, (choice, precision, execution.torch_compile, recipe.transform.crop)

    def _precision(self, execution: ExecutionOptions) -> str:
        if execution.precision is None:
            return self.precision
        return resolve_precision(execution.precision, self.recipe.precision, self.device)

    def embed_into(
        self, sink: Sink, slides: Iterable[Slide] | SlideQueue
    ) -> Generator[SlideOutcome, None, None]:
        """The stream: plan, read, prepare, encode, collect. Puts each slide into the sink when it is
        complete, and gives what goes back from there. Events go to the active reporter.

        Raises:
            EngineError, ConfigError, ExtraMissingError: what was asked for cannot be had here.
        """
        config, execution, tile_size = sink.config, sink.execution, sink.config.requested_tile_size_px
        assert tile_size is not None
        gflops = self.recipe_for(tile_size).gflops
        with sink.planner() as planner:
            selected = self.select(execution, tile_size)
            engine, budget = selected.engine, execution.budget(self.device.type, gflops)
            if engine.runtime == "torch":
                self._late.begin()  # while the first slides are planned
            with self._workspace(config, engine, tile_size) as workspace:
                wanted = batch_size_for(gflops, self.device)
                size = execution.batch_size or selected.batch_size
                stream = Stream(
                    engine,
                    workspace.preparer,
                    batch_size=size or self._fitting(workspace.preparer, engine, wanted, tile_size),
                    tile_size_px=tile_size,
                    dtype=getattr(torch, execution.feature_dtype(engine.precision)),
                    readers=budget.reading_threads,
                    planners=budget.planning_threads,
                    encoder_threads=budget.encoder_threads,
                    ahead=execution.prefetch_factor,
                    reporter=active_reporter(),
                    transfer=workspace.transfer,
                )
                with closing(stream.run(slides, planner)) as outcomes:
                    for outcome in outcomes:
                        if sink.place is None:  # else the thread that writes does
                            self.confirm_weights()
                        yield from sink.put(regrouped(outcome))
                        del outcome  # the memory of the last slide, while the next one is waited for

    def encoding(self, execution: ExecutionOptions, side_px: int) -> tuple[Engine, BatchEncoder]:
        """An engine, and what normalises batches of ready pictures, (n, side_px, side_px, 3) uint8, and puts
        them through it.

        Raises:
            EngineError, ConfigError: it cannot be had, or the backbone does not take that size.
        """
        selected, recipe = self.select(execution, side_px), self.recipe_for(side_px)
        sizes = {"resize": side_px, "crop": side_px}
        transform, engine = recipe.transform.model_copy(update=sizes), selected.engine
        preparer = choose_preparer("auto", transform, self.device, engine.layout, side_px)
        wanted = batch_size_for(recipe.gflops, self.device)
        size = execution.batch_size or selected.batch_size or self._fitting(preparer, engine, wanted, side_px)
        threads = execution.budget(self.device.type, recipe.gflops).encoder_threads
        return engine, BatchEncoder(engine, preparer, StationTimers(), batch_size=size, threads=threads)

    @contextmanager
    def _workspace(self, config: PreprocessingConfig, engine: Engine, tile_size: int) -> Iterator[_Workspace]:
        """One that is idle, or a new one; kept for the next call unless this one breaks off."""
        how = config.gpu_decode, config.preparer, tile_size, engine.runtime, engine.precision, engine.layout
        idle = self._idle.setdefault(how, [])
        try:
            found = idle.pop()
        except IndexError:
            transform = self.recipe_for(tile_size).transform
            found = _Workspace(
                tile_transfer(self.device, config.gpu_decode),
                choose_preparer(config.preparer, transform, self.device, engine.layout, tile_size),
            )
        yield found
        idle.append(found)

    def _fitting(self, preparer: Preparer, engine: Engine, wanted: int, tile_size: int) -> int:
        """Tiles per forward pass: as many as wanted, or as fit into what is free now."""
        if not self._on_cuda:
            return wanted
        if id(engine) not in self._bytes_per_tile:
            self._bytes_per_tile[id(engine)] = bytes_per_tile(engine, preparer, wanted, tile_size)
        return fitting_batch_size(self.device, wanted, self._bytes_per_tile[id(engine)])
