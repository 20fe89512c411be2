"""Runtimes and precisions against each other, on this machine, in turns."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from slide2vec.compile.export_module import torch_engine
from slide2vec.compile.parity import MeanStd, for_layout
from slide2vec.compile.speed import seconds_per_batch, warm
from slide2vec.encoders import build_encoder
from slide2vec.errors import EngineError
from slide2vec.recipes import load_recipe
from slide2vec.runtime import pick_device
from slide2vec.runtime.base import Engine
from slide2vec.runtime.loading import load_engine

__all__ = ["Contender", "Measured", "measure", "peak_mb", "speedups"]

#: How long a process may take to load its engine.
START_S = 600


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One that takes part: an engine's folder, or a preset in PyTorch.

    Attributes:
        directory: of an engine; None = PyTorch.
        preset, variant, weights, seed: of the encoder that PyTorch runs.
        device: it runs on.
        compiled: by `torch.compile`.
    """

    runtime: str
    precision: str
    preset: str
    variant: str
    weights: str | None
    seed: int
    device: str
    directory: Path | None = None
    compiled: bool = False

    @property
    def name(self) -> str:
        """Runtime and precision."""
        return f"{self.runtime}{' compiled' if self.compiled else ''} {self.precision}"

    def open(self) -> Engine:
        """The engine, loaded."""
        device = pick_device(self.device)
        if self.directory is not None:
            return load_engine(self.directory, device)
        recipe = load_recipe(self.preset)
        variant = recipe.variants[self.variant]
        encoder: nn.Module = build_encoder(recipe, variant, self.weights, self.seed)
        return torch_engine(
            encoder, recipe, self.precision, device, feature_dim=variant.dim, compiled=self.compiled
        )


@dataclass
class Measured:
    """What a contender did.

    Attributes:
        seconds: batch size -> seconds per batch, one value per round.
        min_cosine: to PyTorch in fp32, over the tiles.
        start_s: from the start of its process to the first features.
        peak_mb: most memory its process had.
    """

    contender: Contender
    seconds: dict[int, list[float]] = field(default_factory=dict)
    min_cosine: float = float("nan")
    start_s: float = 0.0
    peak_mb: float = 0.0

    def tiles_per_s(self, batch_size: int) -> float:
        """The median over the rounds."""
        return batch_size / statistics.median(self.seconds[batch_size])


def measure(
    contenders: Sequence[Contender],
    mean_std: MeanStd,
    pixels: Tensor,
    batch_sizes: Sequence[int],
    rounds: int = 3,
    threads: int | None = None,
) -> list[Measured]:
    """Run contenders in turns, each in a process of its own, only one at a time.

    Args:
        contenders: the first one is the reference of the cosines: PyTorch in fp32.
        pixels: (N, H, W, 3) uint8, repeated to fill batches.
        threads: of PyTorch on a CPU; None = its default.

    Raises:
        EngineError: a contender could not start or broke off, and why.
    """
    with ExitStack() as stack:
        found, workers, features = [], [], []
        for contender in contenders:
            start = time.perf_counter()
            worker = stack.enter_context(_worker(contender, mean_std, pixels, threads))
            features.append(_asked(worker, contender, "features", 0))
            found.append(Measured(contender, start_s=time.perf_counter() - start))
            workers.append(worker)
        for each, own in zip(found, features, strict=True):
            each.min_cosine = nn.functional.cosine_similarity(own, features[0], dim=-1).min().item()
        for _ in range(rounds):
            for size in batch_sizes:
                for each, worker in zip(found, workers, strict=True):
                    seconds = _asked(worker, each.contender, "time", size)
                    each.seconds.setdefault(size, []).append(seconds)
        for each, worker in zip(found, workers, strict=True):
            each.peak_mb = _asked(worker, each.contender, "memory", 0)
        return found


_Connection: TypeAlias = "Connection[Any, Any]"


@contextmanager
def _worker(
    contender: Contender, mean_std: MeanStd, pixels: Tensor, threads: int | None
) -> Iterator[_Connection]:
    """A process that holds a contender and does what it is asked."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs, contender, mean_std, pixels.numpy(), threads), daemon=True
    )
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(5)
        if process.is_alive():
            process.kill()


def _asked(worker: _Connection, contender: Contender, what: str, size: int) -> Any:
    try:
        worker.send((what, size))
        if not worker.poll(START_S):
            raise EngineError(f"{contender.name} did not answer within {START_S} s")
        answer = worker.recv()
    except (EOFError, OSError) as error:
        raise EngineError(f"{contender.name}: its process has ended (out of memory?)") from error
    if isinstance(answer, Exception):
        raise EngineError(f"{contender.name}: {answer}") from answer
    return torch.from_numpy(answer) if what == "features" else answer


def _serve(
    asked: _Connection, contender: Contender, mean_std: MeanStd, pixels: Any, threads: int | None
) -> None:
    """In the process of a contender: answer until nobody asks any more."""
    if threads:
        torch.set_num_threads(threads)
    tiles = torch.from_numpy(pixels)
    engine: Engine | None = None
    batches: dict[int, Tensor] = {}
    while True:
        try:
            what, size = asked.recv()
        except EOFError:
            return
        try:
            engine = engine or contender.open()
            asked.send(_answer(engine, mean_std, tiles, batches, what, size))
        except Exception as error:  # it is the other side's to deal with
            asked.send(EngineError(str(error)))


def _answer(
    engine: Engine, mean_std: MeanStd, tiles: Tensor, batches: dict[int, Tensor], what: str, size: int
) -> Any:
    if what == "features":
        return engine.run(for_layout(tiles.to(engine.device), mean_std, engine.layout)).cpu().numpy()
    if what == "memory":
        return peak_mb()
    if size not in batches:
        chosen = tiles[torch.arange(size) % len(tiles)].to(engine.device)
        batches[size] = for_layout(chosen, mean_std, engine.layout)
        warm(engine, batches[size])
    return seconds_per_batch(engine, batches[size])


def peak_mb() -> float:
    """Most memory this process had; ru_maxrss would be that of the parent, if that had more."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speedups(found: Sequence[Measured], batch_size: int) -> Mapping[str, float]:
    """Of each contender over the first, taken round by round: the median."""
    first = found[0].seconds[batch_size]
    return {
        each.contender.name: statistics.median(
            a / b for a, b in zip(first, each.seconds[batch_size], strict=True)
        )
        for each in found
    }
