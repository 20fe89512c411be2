"""Whole slides through the GPU's stream: embeddings, memory, synchronisation, the device that is used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slide2vec import ExecutionOptions, Model, PreprocessingConfig
from slide2vec.stream.batch_encoder import BatchEncoder
from slide2vec.stream.station_timers import StationTimers

pytestmark = pytest.mark.gpu

#: Smallest cosine to the CPU's fp32 embedding that the project allows per precision.
MIN_COSINE = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999}
#: Bytes that the device's allocated memory may differ by between two runs: statistics, no tensors of ours.
FLAT_BYTES = 4 << 20


def model(preset: str, device: torch.device | str, **options: Any) -> Model:
    options = {"weights": "random", "allow_non_recommended_settings": True, **options}
    return Model.from_preset(preset, device=device, **options)


@pytest.mark.parametrize("gpu_decode", ["auto", False])
@pytest.mark.parametrize(
    ("preset", "precision"),
    [("scattering", "fp32"), ("prost40m", "fp32"), ("prost40m", "bf16"), ("prost40m", "fp16")],
)
def test_embeddings_equal_the_cpu(
    slide: Path, device: torch.device, preset: str, precision: str, gpu_decode: Any
) -> None:
    config = PreprocessingConfig(requested_spacing_um=1.0)
    expected = model(preset, "cpu").embed_slide(slide, config)
    found = model(preset, device, precision=precision).embed_slide(
        slide, config.updated(gpu_decode=gpu_decode), ExecutionOptions(output_dtype="fp32")
    )
    cosine = torch.nn.functional.cosine_similarity(found.tile_embeddings, expected.tile_embeddings)
    assert found.num_tiles > 0 and cosine.min() >= MIN_COSINE[precision]


@pytest.fixture
def vit(cuda: torch.device) -> Model:
    return model("prost40m", cuda, precision="bf16")


def embed(vit: Model, slide: Path, count: int, **execution: Any) -> int:
    slides = [{"sample_id": str(number), "image_path": slide} for number in range(count)]
    outcomes = vit.iter_slides(
        slides, PreprocessingConfig(requested_spacing_um=1.0), ExecutionOptions(**execution)
    )
    return sum(outcome.embedded.num_tiles for outcome in outcomes if outcome.embedded)


def test_memory_is_flat_over_20_slides(vit: Model, slide: Path, cuda: torch.device) -> None:
    peaks = []
    for count in (2, 20):
        torch.cuda.synchronize(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        assert embed(vit, slide, count, batch_size=32) > 0
        peaks.append((torch.cuda.memory_allocated(cuda), torch.cuda.max_memory_allocated(cuda)))
    assert peaks[1][0] - peaks[0][0] <= FLAT_BYTES
    # twenty slides keep the queues full, two may not: a batch or two of tiles more, no more
    assert peaks[1][1] <= 1.25 * peaks[0][1] + 64 * 2**20


@pytest.fixture
def little_memory(cuda: torch.device) -> Iterator[None]:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (1.5 * 2**30) / total), cuda)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, cuda)


class Hungry:
    """An engine that takes 256 MB a tile."""

    runtime, precision, feature_dim, layout = "test", "fp32", 3, "float32_nchw"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, pixels: torch.Tensor) -> torch.Tensor:
        torch.empty(len(pixels) << 28, dtype=torch.uint8, device=self.device)
        return pixels.float().mean(dim=(1, 2))

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("little_memory")
def test_memory_that_runs_out_halves_the_batch(cuda: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    engine: Any = Hungry(cuda)
    preparer: Any = SimpleNamespace(prepare=lambda tiles: tiles)
    work = BatchEncoder(engine, preparer, StationTimers(), batch_size=16)
    tiles = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8, device=cuda)
    torch.cuda.synchronize(cuda)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            in_flight = work.submit(tiles, [])
            in_flight.done.synchronize()
            assert torch.allclose(in_flight.features, tiles.float().mean(dim=(1, 2)).cpu(), atol=1e-3)
            work.release(in_flight)
    assert work.most == 4 and "do not fit into the memory" in caplog.text


def test_features_are_not_read_too_early(cuda: torch.device) -> None:
    """More batches than the output ring has buffers, slow ones, each collected when its event has come."""
    matrix = torch.randn(4096, 4096, device=cuda)

    class Slow(Hungry):
        def run(self, pixels: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                matrix @ matrix
            return pixels.float().mean(dim=(1, 2))

    engine: Any = Slow(cuda)
    preparer: Any = SimpleNamespace(prepare=lambda tiles: tiles)
    work = BatchEncoder(engine, preparer, StationTimers(), batch_size=4)
    given = [torch.full((4, 8, 8, 3), value, dtype=torch.uint8, device=cuda) for value in range(50)]
    torch.cuda.synchronize(cuda)
    flight = []
    for value, tiles in enumerate(given):
        flight.append((value, work.submit(tiles, [])))
        if len(flight) == 2:
            number, in_flight = flight.pop(0)
            in_flight.done.synchronize()
            assert (in_flight.features == number).all()
            work.release(in_flight)


def test_nothing_is_waited_for_in_the_loop(vit: Model, slide: Path) -> None:
    """The host waits for events only: the calls that wait for a whole stream do not grow with the batches."""
    counts = []
    for batch_size in (64, 4):
        embed(vit, slide, 3, batch_size=batch_size)  # the size has its CUDA graph, whose capture waits
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            outcomes = vit.iter_slides(
                [slide],
                PreprocessingConfig(requested_spacing_um=0.5, gpu_decode=False),
                ExecutionOptions(batch_size=batch_size),
            )
            tiles = sum(outcome.embedded.num_tiles for outcome in outcomes if outcome.embedded)
        waits = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"}
        counts.append(sum(row.count for row in profile.key_averages() if row.key in waits))
    more_batches = tiles / 4 - tiles / 64
    assert counts[1] - counts[0] <= 0.1 * more_batches


def test_one_device_is_used(slide: Path, cuda: torch.device) -> None:
    """cuCIM would open a context on every GPU that it sees."""
    if torch.cuda.device_count() < 2:
        pytest.skip("not run: one GPU only")
    script = f"""
import subprocess, os, torch
from slide2vec import Model, PreprocessingConfig
model = Model.from_preset("scattering", device="cuda:1")
model.embed_slide({str(slide)!r}, PreprocessingConfig(requested_spacing_um=1.0))
query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
rows = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
print(len({{row.split(",")[1] for row in rows if row.split(",")[0] == str(os.getpid())}}))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout.split()[-1]) <= 1
