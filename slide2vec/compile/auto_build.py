"""engine="auto" before the first slide: an engine that pays within the run is built."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from slide2vec.artifacts.places import encoder_of, owners
from slide2vec.compile.batch_size import batch_size_for
from slide2vec.compile.build import BuildOptions, build_engine
from slide2vec.compile.builders import default_runtime
from slide2vec.compile.engine_choice import ADVICE, find_engine
from slide2vec.compile.engine_key import EngineTarget, cpu_instructions, device_here, library_versions
from slide2vec.compile.export_module import torch_engine
from slide2vec.compile.gain import Gain, expected_gain
from slide2vec.compile.parity import for_layout
from slide2vec.compile.speed import seconds_per_batch
from slide2vec.compile.store import EngineStore
from slide2vec.config import PreprocessingConfig
from slide2vec.encoders.late import AnyEncoder, as_module
from slide2vec.errors import EngineError
from slide2vec.readers import open_slide
from slide2vec.readers.slide_files import bytes_of
from slide2vec.runtime.loading import runtimes_for
from slide2vec.runtime.torch_engine import DTYPES
from slide2vec.slides import Slide
from slide2vec.stream.plan import PlanRequest, plan_together

__all__ = [
    "build_where_it_pays",
    "expected_tiles",
    "gain_of_build",
    "goes_on_in_torch",
    "most_tiles",
    "offer_bf16",
    "runtimes_in",
]

logger = logging.getLogger(__name__)
advice = logging.getLogger(ADVICE)

#: A run that takes less at a speed that every CPU reaches (a ViT-S/14 of 12 GFLOP makes 190 GFLOP/s on two,
#: benchmarks/results/engines-2026-11-25.md) is not worth a look at its slides: no build takes less.
LEAST_S, SLOWEST_GFLOPS_PER_S = 24.0, 50.0
#: Bytes that a pixel of tissue takes in a file at least: a quarter of what scanners write.
LEAST_BYTES_PER_PX = 0.02
#: Slides whose tiles are counted to know about how many all have.
SAMPLED = 3
#: Tiles to time PyTorch with on a CPU, where a small batch is as fast as a large one, and in the end slow.
TIMED_ON_CPU = 2


def build_where_it_pays(
    encoder: AnyEncoder,
    target: EngineTarget,
    precision: str,
    slides: Sequence[Slide],
    config: PreprocessingConfig,
    *,
    output_dir: Path | None = None,
    batch_size: int | None = None,
) -> None:
    """Build an engine into the user's store where a run over these slides ends sooner with it, the build
    included; says so in one line. A build that fails is a warning, and is not tried again with the same
    weights, libraries and machine: runs say so.

    Args:
        slides: of the run.
        config: with requested_spacing_um and requested_tile_size_px resolved.
        output_dir: of the run; embeddings of PyTorch that are there already would have to be made again.
        batch_size: that it is to be built for; None = chosen for the encoder and device.
    """
    recipe = target.recipe
    if not _may_be_built(target, precision):
        return
    if any(_is_short(most(slides, config), recipe.gflops) for most in (most_tiles, most_tiles_by_area)):
        return
    gain = gain_of_build(target, precision)
    if gain is None or (
        output_dir is not None and "torch" in runtimes_in(output_dir, recipe.name, precision)
    ):
        return
    tiles = expected_tiles(slides, config)
    if _is_short(tiles, recipe.gflops):
        return
    module = as_module(encoder)
    speed = _torch_speed(module, target, precision)
    if not gain.pays(tiles, speed):
        return
    store, attempt = EngineStore(), _attempt(target, precision, gain.runtime)
    if store.has_note(attempt):
        advice.info(
            "%s runs in PyTorch: an earlier build of its %s engine failed here, and "
            "`slide2vec build-engine --preset %s --precision %s` tries again",
            *(recipe.name, gain.runtime, recipe.name, precision),
        )
        return
    advice.info("%s", _announced(recipe.name, gain, tiles, speed))
    options = BuildOptions(runtime=gain.runtime, precision=precision, batch_size=batch_size, steps_down=False)
    try:
        build_engine(module, recipe, target.variant, target.device, options, store=store)
    except Exception as error:  # of the exporter, a compiler, a disk that is full: the run goes on without
        if isinstance(error, EngineError):
            store.takes_note(attempt)
        logger.warning("no %s engine of %s was built, PyTorch runs it: %s", gain.runtime, recipe.name, error)


def gain_of_build(target: EngineTarget, precision: str) -> Gain | None:
    """What an engine would bring that a run builds where it pays; None: it builds none."""
    if not _may_be_built(target, precision):
        return None
    try:
        store = EngineStore()
        if find_engine(store, target, precision, runtimes_for(target.device)).matching:
            return None
        return expected_gain(store, target, precision, default_runtime(precision, target.device))
    except EngineError:  # PyTorch runs it, and says why
        return None


def _attempt(target: EngineTarget, precision: str, runtime: str) -> str:
    """A build, as noted in the store: what would make another one of it."""
    what = {
        "encoder": target.recipe.encoder.model_dump(mode="json"),
        "input_size_px": target.recipe.transform.crop,
        "output": target.variant,
        "weights": target.weights(),
        "precision": precision,
        "device": device_here(target.device, runtime),
        "versions": library_versions(runtime),
    }
    return f"failed build {json.dumps(what, sort_keys=True, default=str)}"


def _may_be_built(target: EngineTarget, precision: str) -> bool:
    recipe = target.recipe
    advised = recipe.compile and recipe.engine.advised and precision in DTYPES
    return advised and bool(runtimes_for(target.device))


def _announced(name: str, gain: Gain, tiles: float, speed: float) -> str:
    return (
        f"{name}: building an engine for {gain.runtime} first, which takes about "
        f"{_duration(gain.build_seconds(speed))}; the run's {tiles:,.0f} tiles or so then take about "
        f"{_duration(gain.seconds(tiles, speed))} instead of {_duration(tiles / speed)} in PyTorch "
        "(--no-build-engine or --engine torch does without)"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _is_short(tiles: float, gflops: float) -> bool:
    """Whether so many tiles are never worth a build."""
    return tiles * gflops < LEAST_S * SLOWEST_GFLOPS_PER_S


# how many tiles ------------------------------------------------------------------------------------


def most_tiles(slides: Sequence[Slide], config: PreprocessingConfig) -> float:
    """More tiles than slides can have, from the sizes of their files alone; infinite where tiles come from
    archives, or the size of a file is not known."""
    assert config.requested_tile_size_px is not None
    if config.read_tiles_from is not None:
        return float("inf")
    step = config.requested_tile_size_px * (1 - config.overlap)
    try:
        return sum(bytes_of(slide.image_path) for slide in slides) / (LEAST_BYTES_PER_PX * step**2)
    except OSError:  # a slide that is not there: the others may be many
        return float("inf")


def most_tiles_by_area(slides: Sequence[Slide], config: PreprocessingConfig) -> float:
    """As many tiles as slides have if a few of them, spread evenly, are tissue all over; nothing is decoded.
    Infinite where tiles come from archives."""
    assert config.requested_tile_size_px is not None and config.requested_spacing_um is not None
    if config.read_tiles_from is not None:
        return float("inf")
    step_um = config.requested_tile_size_px * (1 - config.overlap) * config.requested_spacing_um
    counts = []
    for slide in _some(slides):
        try:
            with open_slide(slide, config.backend) as reader:
                spacing_um = slide.spacing_at_level_0 or reader.spacing_um or 0.0  # without one it will fail
                width, height = reader.level_dimensions[0]
        except Exception:  # the run says what is wrong with it
            continue
        counts.append(width * height * (spacing_um / step_um) ** 2)
    return fmean(counts) * len(slides) if counts else 0.0


def _some(slides: Sequence[Slide]) -> Sequence[Slide]:
    return slides[:: max(1, len(slides) // SAMPLED)][:SAMPLED]


def expected_tiles(slides: Sequence[Slide], config: PreprocessingConfig) -> float:
    """About how many tiles slides have: as many each as a few of them, spread evenly, on average. Slides that
    cannot be planned do not count; 0 where none of the few can."""
    counts = []
    for slide in _some(slides):
        try:
            (plan,) = plan_together(slide, [PlanRequest(config)])
        except Exception:  # the run says what is wrong with it
            continue
        if not isinstance(plan, Exception):
            plan.source.close()
            counts.append(len(plan.tiling))
    return fmean(counts) * len(slides) if counts else 0.0


def _torch_speed(encoder: nn.Module, target: EngineTarget, precision: str) -> float:
    """Tiles/s of the encoder in PyTorch on this machine, from a batch or two."""
    recipe, device = target.recipe, target.device
    plain = torch_engine(encoder, recipe, precision, device, feature_dim=recipe.variants[target.variant].dim)
    size = TIMED_ON_CPU if device.type == "cpu" else batch_size_for(recipe.gflops, device)
    side = recipe.transform.crop
    pixels = torch.zeros(size, side, side, 3, dtype=torch.uint8, device=device)
    batch = for_layout(pixels, (recipe.transform.mean, recipe.transform.std), plain.layout)
    plain.run(batch)
    speed = size / seconds_per_batch(plain, batch)
    plain.close()
    return speed


# what is there already -----------------------------------------------------------------------------


def goes_on_in_torch(output_dir: Path, preset: str, precision: str) -> bool:
    """Whether PyTorch alone has made what an output directory holds of a tile encoder: a run that resumes it
    goes on there, whatever engines there are meanwhile, and says so."""
    if runtimes_in(output_dir, preset, precision) != {"torch"}:
        return False
    advice.info(
        "%s goes on in PyTorch, as %s was begun: an engine would have to make all of it anew",
        preset,
        output_dir,
    )
    return True


def runtimes_in(output_dir: Path, preset: str, precision: str) -> set[str]:
    """What has made the embeddings of a tile encoder in a precision that an output directory holds: "torch",
    "openvino", … Those of slides and patients above them tell it, too."""
    encoders = [
        _of_tiles(encoder_of(sidecar)) for owner in owners(output_dir) for sidecar in owner.sidecars.values()
    ]
    return {
        str(encoder.get("runtime"))
        for encoder in encoders
        if (encoder.get("name"), encoder.get("precision")) == (preset, precision)
    }


def _of_tiles(encoder: Mapping[str, Any]) -> Mapping[str, Any]:
    while isinstance(below := encoder.get("below"), Mapping):
        encoder = below
    return encoder


# another precision ---------------------------------------------------------------------------------

#: Of this CPU: it multiplies bf16.
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_offered: list[str] = []


def offer_bf16(target: EngineTarget, precision: str) -> None:
    """Say, once in a process, what bf16 would bring where a CPU that has it runs fp32."""
    offered = (
        _offered or precision != "fp32" or target.device.type != "cpu" or not target.recipe.engine.advised
    )
    if offered or not _BF16 & set(cpu_instructions()):
        return
    _offered.append(target.recipe.name)
    advice.info(
        "%s runs in fp32, and this CPU has bf16: --precision bf16 embedded slides 1.7 times as fast with an "
        "engine, 2.1 times in PyTorch, at a cosine of 0.99997 to fp32 (prost40m, "
        "benchmarks/results/engines-2026-11-25.md)",
        target.recipe.name,
    )
