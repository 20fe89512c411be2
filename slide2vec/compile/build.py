"""Build an engine: export, compile, compare with the encoder, publish."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slide2vec.choices import RUNTIMES
from slide2vec.compile.batch_size import batch_size_for
from slide2vec.compile.builders import (
    BuildJob,
    Built,
    Progress,
    builder_of,
    default_runtime,
    unavailable,
)
from slide2vec.compile.comparison_tiles import tissue_pixels
from slide2vec.compile.engine_key import EngineTarget, identity, library_versions, target_here
from slide2vec.compile.parity import Parity, batch_sizes, compare, reference_features, write_reference
from slide2vec.compile.plan_builder import not_for_targets
from slide2vec.compile.proof import is_to_be_proven, state, write_proof
from slide2vec.compile.speed import beside_torch
from slide2vec.compile.store import EngineStore, StoredEngine, engine_name
from slide2vec.compile.tensorrt import default_targets
from slide2vec.encoders.weights import weights_digest
from slide2vec.errors import ConfigError, EngineError
from slide2vec.recipes import Recipe
from slide2vec.runtime.base import BatchProfile, Engine, Layout
from slide2vec.runtime.loading import load_engine
from slide2vec.runtime.record import RECORD_NAME, EngineRecord, key_of
from slide2vec.runtime.tensorrt.available import TARGETS, unsuited

__all__ = ["BuildOptions", "build_engine", "check_possible"]

logger = logging.getLogger(__name__)

#: What is tried when a precision is not close enough to the encoder.
STEPS_DOWN = {
    "fp8": ("fp8", "fp16", "bf16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "bf16": ("bf16", "fp32"),
}
#: Tiles that an engine is compared on.
TILES = 16
#: Bytes that a build takes in the store, by bytes of the encoder's weights.
ROOM = 2.2


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to build.

    Attributes:
        runtime: "tensorrt", "tensorrt-rtx", "openvino" or "inductor"; None = the best that there is for the
            device.
        precision: "fp32", "bf16", "fp16" or "fp8"; None = the preset's on CUDA, fp32 on a CPU.
        batch_size: tiles that it is built for; None = chosen for the encoder and device.
        layout: of the pixels it takes; None = the recipe's.
        opset: of the ONNX; None = the best that works.
        slide: whose tissue it is compared on (and calibrated with); None = a generated slide.
        keep_onnx: keep the ONNX file beside it.
        force: build it although it is there.
        steps_down: take the next higher precision where one is not close enough; else that is an error.
        workspace_bytes, optimization_level, hardware_compatibility: TensorRT's.
        targets: compute capabilities that TensorRT-RTX builds for ("sm89", …), with or without a GPU here; by
            default the GPU's own, and without one all that it knows and the precision allows.
    """

    runtime: str | None = None
    precision: str | None = None
    batch_size: int | None = None
    layout: Layout | None = None
    opset: int | None = None
    slide: Path | None = None
    keep_onnx: bool = False
    force: bool = False
    steps_down: bool = True
    workspace_bytes: int | None = None
    optimization_level: int = 3
    hardware_compatibility: str = "none"
    targets: tuple[str, ...] = ()


def build_engine(
    encoder: nn.Module,
    recipe: Recipe,
    variant: str,
    device: torch.device,
    options: BuildOptions | None = None,
    *,
    store: EngineStore | None = None,
    progress: Progress = lambda what, step, steps: None,
) -> StoredEngine:
    """Compile an encoder for a device, compare it with the encoder, and publish it in the store.

    Where a precision is not close enough to the encoder in fp32, the next of fp8, fp16, bf16, fp32 is
    tried; the record says so. An engine that is there already is returned as it is.

    Args:
        encoder: of `build_encoder`, with its weights.
        variant: name of its output.
        progress: called with what is being done, step, and steps (0 = not known).

    Raises:
        EngineError: the preset cannot be compiled, no runtime can build here, the compiler failed, or no
            precision is close enough to the encoder.
        SlideError: the slide cannot be read.
        OutputError: the store cannot be written to.
    """
    options = options or BuildOptions()
    _check_compilable(recipe)
    plan = _Plan.of(recipe, device, options)
    encoder = encoder.cpu()
    target = EngineTarget(recipe, variant, plan.device, cache(lambda: weights_digest(encoder)))
    store = store or EngineStore()
    weights = sum(value.nbytes for value in encoder.state_dict().values())
    with store.building(plan.name(target), round(ROOM * weights)) as folder:
        there = _there(store, target, plan)
        if there is not None and not options.force:
            logger.warning("engine %s is there already", there.name)
            return there
        return _Build(encoder, target, plan, options, store, folder, progress, device).run()


def check_possible(recipe: Recipe, device: torch.device, options: BuildOptions) -> None:
    """Raise EngineError or ConfigError where a build cannot succeed, before anything slow."""
    _check_compilable(recipe)
    _Plan.of(recipe, device, options)


def _check_compilable(recipe: Recipe) -> None:
    """Raise EngineError where a preset cannot be compiled, with the reason."""
    if recipe.compile:
        return
    tiles = f"; the encoder of its tiles, {recipe.tile_encoder.preset}, can" if recipe.tile_encoder else ""
    raise EngineError(f"preset {recipe.name} cannot be compiled: {recipe.compile_note}{tiles}")


@dataclass(frozen=True)
class _Plan:
    """The options, resolved.

    Attributes:
        device: that the engine is for; without a GPU here an engine of TensorRT-RTX is for one all the same.
        targets: of TensorRT-RTX, sorted.
        runs_here: whether it can be compared with the encoder on this machine.
    """

    runtime: str
    precision: str
    layout: Layout
    profile: BatchProfile
    opset: int | None
    device: torch.device
    targets: tuple[str, ...]
    runs_here: bool

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device, options: BuildOptions) -> _Plan:
        chosen = options.runtime or ("tensorrt-rtx" if options.targets else None)
        if chosen is not None and chosen not in RUNTIMES:
            raise ConfigError(f"runtime={chosen!r} is not one of {', '.join(RUNTIMES)}")
        on_gpu = device.type == "cuda" or chosen == "tensorrt-rtx"
        precision = options.precision or (recipe.precision if on_gpu else "fp32")
        runtime = chosen or default_runtime(precision, device)
        targets = _targets(runtime, precision, device, options)
        reason = not_for_targets(precision, targets) if targets else unavailable(runtime, precision, device)
        if reason is not None:
            raise EngineError(f"no {runtime} engine in {precision} can be built here: {reason}")
        meant = torch.device("cuda") if targets and device.type != "cuda" else device
        size = options.batch_size or batch_size_for(recipe.gflops, meant)
        return cls(
            runtime,
            precision,
            options.layout or recipe.engine.layout,
            BatchProfile(1, size, size),
            options.opset,
            meant,
            targets,
            not targets or (device.type == "cuda" and target_here(device) in targets),
        )

    def identity(self, target: EngineTarget, precision: str | None = None) -> dict[str, Any]:
        """Of the engine, weights included; in a lower precision when given."""
        made = identity(
            target,
            runtime=self.runtime,
            precision=precision or self.precision,
            layout=self.layout,
            profile=self.profile,
            opset=self.opset,
            targets=self.targets,
        )
        return {**made, "weights": target.weights()}

    def name(self, target: EngineTarget) -> str:
        """Of the engine's folder, as asked for."""
        key = key_of(self.identity(target))
        return engine_name(target.recipe.name, target.variant, self.runtime, self.precision, key)


def _targets(runtime: str, precision: str, device: torch.device, options: BuildOptions) -> tuple[str, ...]:
    """Compute capabilities that an engine is built for; none but for TensorRT-RTX."""
    if runtime != "tensorrt-rtx":
        if options.targets:
            raise ConfigError(f"targets are TensorRT-RTX's: {runtime} builds for the device at hand")
        return ()
    if options.hardware_compatibility != "none":
        raise ConfigError(
            f"hardware_compatibility={options.hardware_compatibility} is TensorRT's; TensorRT-RTX has targets"
        )
    if options.targets:
        return tuple(target for target in TARGETS if target in options.targets) + tuple(
            target
            for target in options.targets
            if target not in TARGETS  # to be refused in words
        )
    return (target_here(device),) if device.type == "cuda" else default_targets(precision)


def _there(store: EngineStore, target: EngineTarget, plan: _Plan) -> StoredEngine | None:
    """The very engine that is asked for."""
    for engine in store:
        record = engine.record
        asked = plan.precision in (record.precision, record.asked_precision)
        if asked and record.identity == plan.identity(target, record.precision):
            return engine
    return None


class _Build:
    """One engine on its way into the store."""

    def __init__(
        self,
        encoder: nn.Module,
        target: EngineTarget,
        plan: _Plan,
        options: BuildOptions,
        store: EngineStore,
        folder: Path,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.device = device
        self.encoder, self.target, self.plan, self.options = encoder, target, plan, options
        self.store, self.folder, self.progress = store, folder, progress
        self.recipe = target.recipe
        self.dim = self.recipe.variants[target.variant].dim
        self.mean_std = (self.recipe.transform.mean, self.recipe.transform.std)
        self.started = time.perf_counter()

    def run(self) -> StoredEngine:
        """Try the precisions in turn until one is close enough."""
        self.progress("cutting tissue tiles", 0, 0)
        known = pixels, reference = self._known_tiles()
        if self.options.slide is not None:
            pixels = tissue_pixels(self.recipe, TILES, self.options.slide)
            reference = self._reference(pixels)
        failed: list[dict[str, str]] = []
        for precision in self._precisions():
            try:
                record = self._built_in(precision, pixels, reference, failed)
                write_reference(self.folder, *known, self.recipe.engine.threshold(precision))
                return self._published(record)
            except EngineError as error:
                failed.append({"precision": precision, "reason": str(error)})
                logger.warning(
                    "%s engine of %s in %s: %s", self.plan.runtime, self.recipe.name, precision, error
                )
                _empty(self.folder)
        tried = "; ".join(f"{each['precision']}: {each['reason']}" for each in failed)
        raise EngineError(f"no {self.plan.runtime} engine of {self.recipe.name} could be built ({tried})")

    def _published(self, record: EngineRecord) -> StoredEngine:
        """In the store; one that is to be proven on every kind of GPU is proven on this one."""
        if not is_to_be_proven(record):
            return self.store.publish(self.folder, record)
        made = self.store.publish(self.folder, replace(record, parity={}, speed={}))
        if record.parity:
            sizes = tuple(record.parity["batch_sizes"])
            parity = Parity(**{**record.parity, "batch_sizes": sizes})
            write_proof(made, self.device, parity, record.speed)
        else:
            logger.info("engine %s could not be compared here: %s", made.name, state(made))
        return made

    def _known_tiles(self) -> tuple[Tensor, Tensor]:
        """Tiles of a generated slide and their features in fp32: what the engine is verified with later."""
        pixels = tissue_pixels(self.recipe, TILES)
        return pixels, self._reference(pixels)

    def _reference(self, pixels: Tensor) -> Tensor:
        self.progress("reference in PyTorch, fp32", 0, 0)
        found = reference_features(self.encoder, self.mean_std, pixels, self.device, self.dim)
        self.encoder.cpu()
        return found

    def _precisions(self) -> Iterator[str]:
        asked = self.plan.precision
        for precision in STEPS_DOWN.get(asked, (asked,)) if self.options.steps_down else (asked,):
            targets, runtime = self.plan.targets, self.plan.runtime
            if any(unsuited(target, precision) for target in targets):
                continue
            if targets or unavailable(runtime, precision, self.device) is None:
                yield precision

    def _built_in(
        self, precision: str, pixels: Tensor, reference: Tensor, failed: list[dict[str, str]]
    ) -> EngineRecord:
        """Build in one precision and compare.

        Raises:
            EngineError: it cannot be built, or is not close enough.
        """
        built = builder_of(self.plan.runtime).build(self._job(precision, pixels))
        record = self._record(precision, built, failed)
        if not self.plan.runs_here:
            return replace(record, build_seconds=self._seconds())
        (self.folder / RECORD_NAME).write_text(record.as_json(), encoding="utf-8")  # to be loaded by
        engine = load_engine(self.folder, self.device)
        try:
            self.progress("comparing with PyTorch", 0, 0)
            least = self.recipe.engine.threshold(precision)
            sizes = batch_sizes(self.plan.profile)
            parity = compare(engine, self.mean_std, pixels, reference, sizes, least)
            if problem := parity.problem():
                raise EngineError(problem)
            speed = self._speed(engine, pixels)
        finally:
            engine.close()
        compared = {**asdict(parity), "batch_sizes": list(parity.batch_sizes)}
        return replace(record, parity=compared, speed=speed, build_seconds=self._seconds())

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.started, 1)

    def _job(self, precision: str, pixels: Tensor) -> BuildJob:
        return BuildJob(
            encoder=self.encoder,
            recipe=self.recipe,
            folder=self.folder,
            device=self.target.device,
            runtime=self.plan.runtime,
            precision=precision,
            layout=self.plan.layout,
            profile=self.plan.profile,
            opset=self.plan.opset,
            calibration=pixels,
            progress=self.progress,
            keep_onnx=self.options.keep_onnx,
            workspace_bytes=self.options.workspace_bytes,
            optimization_level=self.options.optimization_level,
            hardware_compatibility=self.options.hardware_compatibility,
            timing_cache=self.store.root / "tensorrt-timing.cache",
            targets=self.plan.targets,
        )

    def _record(self, precision: str, built: Built, failed: list[dict[str, str]]) -> EngineRecord:
        made = self.plan.identity(self.target, precision)
        licence = self.recipe.licence
        return EngineRecord(
            key=key_of(made),
            identity=made,
            preset=self.recipe.name,
            variant=self.target.variant,
            runtime=self.plan.runtime,
            precision=precision,
            asked_precision=self.plan.precision,
            layout=self.plan.layout,
            input_size_px=self.recipe.transform.crop,
            feature_dim=self.dim,
            profile=self.plan.profile,
            file=built.file,
            opset=built.opset,
            parity={},
            licence=f"{licence.name}: {licence.terms} ({licence.url})",
            versions=library_versions(self.plan.runtime),
            built_at=datetime.now(UTC).isoformat(timespec="seconds"),
            build_seconds=0.0,
            steps_down=failed,
            left_out=list(built.left_out),
        )

    def _speed(self, engine: Engine, pixels: Tensor) -> dict[str, float]:
        """Tiles/s of the engine and, in the same minute, of PyTorch in the same precision."""
        self.progress("measuring", 0, 0)
        return beside_torch(engine, self.encoder, self.recipe, pixels, self.plan.profile.opt)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
