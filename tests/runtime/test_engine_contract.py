"""What every engine promises, checked on each that can run here."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "compile"))

from compile_helpers import SIDE, smooth_pixels, tiny_encoder, tiny_recipe

from slide2vec.compile import BuildOptions, EngineStore, build_engine
from slide2vec.compile.builders import unavailable
from slide2vec.compile.export_module import torch_engine
from slide2vec.compile.parity import for_layout
from slide2vec.errors import EngineError
from slide2vec.runtime.base import Engine
from slide2vec.runtime.loading import load_engine

#: Largest difference of a tile's features alone and in a batch, relative to their spread: other
#: kernels, other order of sums; in half precision at most a few of its steps.
ALONE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
COSINE = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999}

#: Of a thread in one run, where the engine releases Python's lock: 6 and more on an idle machine, else 2.
TICKS = 5

RECIPE = tiny_recipe()
Opener = Callable[[], Engine]


def device_of(kind: str) -> torch.device:
    return torch.device("cuda" if kind.endswith("cuda") else "cpu")


CASES = [
    "torch fp32 cpu",
    "compiled fp32 cpu",
    "torch bf16 cpu",
    "openvino fp32 cpu",
    "openvino bf16 cpu",
    *(  # a minute of the C++ compiler
        pytest.param(f"inductor {precision} cpu", marks=pytest.mark.slow) for precision in ("fp32", "bf16")
    ),
    *(
        pytest.param(f"{runtime} {precision} cuda", marks=pytest.mark.gpu)
        for runtime in ("torch", "compiled", "inductor", "tensorrt")
        for precision in ("fp32", "bf16", "fp16")
    ),
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def opener(case: str, short_rounds: None, tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Opens the engine of a case, as often as asked."""
    runtime, precision, _ = case.split()
    device = device_of(case)
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    encoder = tiny_encoder(RECIPE)
    if runtime in ("torch", "compiled"):
        compiled = runtime == "compiled"
        return lambda: torch_engine(encoder, RECIPE, precision, device, feature_dim=128, compiled=compiled)
    if reason := unavailable(runtime, precision, device):
        pytest.skip(reason)
    options = BuildOptions(runtime=runtime, precision=precision, batch_size=4)
    store = EngineStore(tmp_path_factory.mktemp("engines"))
    built = build_engine(encoder, RECIPE, "both", device, options, store=store)
    assert built.record.precision == precision, built.record.steps_down
    return lambda: load_engine(built.directory, device)


@pytest.fixture(scope="module")
def engine(opener: Opener) -> Engine:
    return opener()


def pixels_for(engine: Engine, count: int, seed: int = 0) -> torch.Tensor:
    transform = RECIPE.transform
    pixels = for_layout(smooth_pixels(count, SIDE, seed), (transform.mean, transform.std), engine.layout)
    return pixels.to(engine.device)


def test_attributes(case: str, engine: Engine) -> None:
    runtime, precision, device = case.split()
    runtime = runtime.replace("compiled", "torch")
    assert (engine.runtime, engine.precision, engine.device.type) == (runtime, precision, device)
    assert engine.feature_dim == 128 and engine.layout in ("uint8_nhwc", "float32_nchw")


@pytest.mark.parametrize("count", [9, 1, 2, 3, 4, 5])
def test_any_batch(engine: Engine, count: int) -> None:
    """Also beyond the batch that it was built for (4)."""
    found = engine.run(pixels_for(engine, count))
    assert found.shape == (count, 128) and found.dtype == torch.float32
    assert found.device.type == engine.device.type and found.isfinite().all()


def test_features_are_those_of_the_encoder(engine: Engine) -> None:
    pixels = pixels_for(engine, 6)
    transform = RECIPE.transform
    plain = for_layout(smooth_pixels(6, SIDE), (transform.mean, transform.std), "float32_nchw")
    with torch.inference_mode():
        expected = tiny_encoder(RECIPE)(plain)
    cosine = torch.nn.functional.cosine_similarity(engine.run(pixels).cpu(), expected)
    assert cosine.min() > COSINE[engine.precision]


def test_a_tile_is_the_same_in_any_company(engine: Engine) -> None:
    pixels = pixels_for(engine, 5)
    together = engine.run(pixels)
    alone = torch.cat([engine.run(pixels[index : index + 1]) for index in range(5)])
    difference = (together - alone).abs().max() / together.std()
    assert difference < ALONE[engine.precision]


def test_same_pixels_same_features(engine: Engine) -> None:
    pixels = pixels_for(engine, 4)
    assert torch.equal(engine.run(pixels), engine.run(pixels.clone()))


def test_results_outlive_the_next_run(engine: Engine) -> None:
    first = engine.run(pixels_for(engine, 4, seed=1))
    kept = first.clone()
    for seed in range(2, 6):
        engine.run(pixels_for(engine, 4, seed))
    assert torch.equal(first, kept)


def test_input_is_left_alone(engine: Engine) -> None:
    pixels = pixels_for(engine, 3)
    kept = pixels.clone()
    engine.run(pixels)
    assert torch.equal(pixels, kept)


def test_pixels_that_are_a_view(engine: Engine) -> None:
    """As the preparer's permuted and cropped ones are."""
    pixels = pixels_for(engine, 8)
    assert torch.equal(engine.run(pixels[::2]), engine.run(pixels[::2].contiguous()))


def test_whether_python_runs_meanwhile(engine: Engine) -> None:
    """Readers decode beside it. Nothing makes a thread give up the lock here but calls that release it, so
    that another one ticks several times in a run only where the engine does. On a busy machine an engine that
    does is given a CPU beside the other thread in few runs, and one that does not may lose its own in one of
    the short calls around it that release the lock: hence some runs of the one, and most of the other."""
    pixels = pixels_for(engine, 4)
    if engine.holds_gil:
        assert median(_ticks_in_runs(engine, pixels, seconds=2)) < TICKS
    else:
        with closing(_ticks_in_runs(engine, pixels, seconds=60)) as found:
            assert len(list(islice((ticks for ticks in found if ticks >= TICKS), 5))) == 5


def _ticks_in_runs(engine: Engine, pixels: torch.Tensor, seconds: float) -> Generator[int]:
    """Ticks of a thread in each run, for so long."""
    ticks, over = [0], threading.Event()

    def tick() -> None:
        while not over.is_set():
            time.sleep(2e-5)
            ticks[0] += 1

    thread, before = threading.Thread(target=tick), sys.getswitchinterval()
    engine.run(pixels)
    sys.setswitchinterval(1000)
    thread.start()
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            start = ticks[0]
            engine.run(pixels)
            yield ticks[0] - start
    finally:
        over.set()
        sys.setswitchinterval(before)
        thread.join()


def test_close_twice(opener: Opener) -> None:
    engine = opener()
    pixels = pixels_for(engine, 1)
    engine.run(pixels)
    engine.close()
    engine.close()
    if engine.runtime != "torch":
        with pytest.raises(EngineError, match="closed"):
            engine.run(pixels)
