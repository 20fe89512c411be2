"""What an engine costs and brings on this machine: whether it is worth its build within a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from slide2vec.compile.engine_key import EngineTarget, device_here
from slide2vec.compile.proof import is_to_be_proven, proof_on, proven
from slide2vec.compile.store import StoredEngine
from slide2vec.errors import Slide2VecError
from slide2vec.recipes import Recipe, load_recipe
from slide2vec.runtime.record import EngineRecord

__all__ = ["Gain", "expected_gain"]

#: An engine is built where it saves so many times what the build takes: both are estimates.
WORTH = 1.5
#: Times PyTorch's speed in the same precision, from slides to embeddings, by runtime and precision: ViT-S/14
#: on 2 CPUs with AVX-512 (benchmarks/results/engines-2026-11-25.md, "End to end"). AOTInductor brings little
#: there, and NVIDIA's runtimes were not measured yet.
MEASURED = {("openvino", "fp32"): 2.1, ("openvino", "bf16"): 1.7}
#: Seconds of a build that do not depend on the encoder: imports, tiles to compare on, rounds of timing.
FIXED_S = 12.0
#: What else it takes, in the time of tiles that PyTorch encodes: on a CPU 16 for the reference, as many at
#: four batch sizes to compare, five batches of 8 of each to measure the speed, with an engine twice as fast.
TILES = 110
#: An engine's figures say something of encoders with up to so many times more or less work per tile.
_SIMILAR = 4.0


@dataclass(frozen=True)
class Gain:
    """An engine that could be built.

    Attributes:
        times: PyTorch's speed in the same precision.
        build_s: seconds that the build takes, from engines that were built here; None = none was.
    """

    runtime: str
    times: float
    build_s: float | None = None

    def build_seconds(self, torch_tiles_per_s: float) -> float:
        """Of the build; as recorded, else by how fast PyTorch encodes here."""
        return self.build_s if self.build_s is not None else FIXED_S + TILES / torch_tiles_per_s

    def seconds(self, tiles: float, torch_tiles_per_s: float) -> float:
        """Of encoding tiles with the engine."""
        return tiles / (torch_tiles_per_s * self.times)

    def pays(self, tiles: float, torch_tiles_per_s: float) -> bool:
        """Whether building it before the first slide shortens a run, with a margin (`WORTH`)."""
        saved = tiles / torch_tiles_per_s - self.seconds(tiles, torch_tiles_per_s)
        return saved > WORTH * self.build_seconds(torch_tiles_per_s)


def expected_gain(
    engines: Iterable[StoredEngine], target: EngineTarget, precision: str, runtime: str
) -> Gain | None:
    """What an engine would bring: as that of the most similar encoder that was built on this machine, else as
    measured elsewhere (`MEASURED`); None where neither is known.

    Args:
        engines: of the store.
    """
    most_similar, least = None, _SIMILAR
    for engine in engines:
        if (engine.record.runtime, engine.record.precision) != (runtime, precision):
            continue
        record = _measured_here(engine, target.device)
        work = 0.0 if record is None else _times_the_work(target.recipe, record.preset)
        if record is not None and work > 0 and max(work, 1 / work) <= least:
            most_similar, least = (record, work), max(work, 1 / work)
    if most_similar is None:
        known = MEASURED.get((runtime, precision))
        return None if known is None else Gain(runtime, known)
    record, work = most_similar
    build_s = FIXED_S + max(0.0, record.build_seconds - FIXED_S) * work
    return Gain(runtime, record.speed["engine"] / record.speed["torch"], build_s)


def _measured_here(engine: StoredEngine, device: torch.device) -> EngineRecord | None:
    """The record of an engine whose speed was measured on such a device; else None."""
    record = engine.record
    if is_to_be_proven(record):
        proof = proof_on(engine, device)
        if proof is None or proof.problem:
            return None
        record = proven(engine, proof).record
    elif record.identity.get("device") != device_here(device, record.runtime):
        return None
    return record if record.speed else None


def _times_the_work(recipe: Recipe, other: str) -> float:
    """How much more work an encoder has per tile than that of another preset; 0 where it is not known."""
    if recipe.name == other:
        return 1.0
    if other.startswith(("timm:", "hf-hub:")):  # would be built to find out
        return 0.0
    try:
        return recipe.gflops / load_recipe(other).gflops
    except (Slide2VecError, ZeroDivisionError):
        return 0.0
