"""A run to look at, and its server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.viewer import ViewerServer, viewer_server

HOSTILE = "<img src=x onerror=document.title='owned'>&\"'<script>"


@pytest.fixture(scope="session")
def viewed(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> Path:
    """The output of a run: two slides, one of a name that is markup, one that is gone, one that fails."""
    folder = tmp_path_factory.mktemp("viewed")
    made = [generated_slide(folder / f"s{n}.svs", size_px=1536, seed=n, levels=2) for n in range(2)]
    gone = folder / "gone.svs"
    gone.write_bytes(made[1].read_bytes())
    (folder / "broken.svs").write_bytes(b"no slide")
    slides = [
        {"sample_id": "a", "image_path": made[0]},
        {"sample_id": HOSTILE, "image_path": made[1]},
        {"sample_id": "gone", "image_path": gone},
        {"sample_id": "broken", "image_path": folder / "broken.svs"},
    ]
    model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    config = PreprocessingConfig(requested_tile_size_px=96, requested_spacing_um=0.5)
    Pipeline(model, config, ExecutionOptions(output_dir=folder / "out", num_gpus=1)).run(slides)
    gone.unlink()
    return folder / "out"


@pytest.fixture(scope="session")
def server(viewed: Path) -> Iterator[ViewerServer]:
    """Of that run, answering."""
    with viewer_server(viewed) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield made
        made.shutdown()
        thread.join()
