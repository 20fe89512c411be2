"""The example package of docs/examples, installed into a folder of its own, adds one of each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

SOURCE = Path(__file__).parents[1] / "docs" / "examples" / "slide2vec-example"

#: Where it is installed: a run from the command line, and what becomes of its files.
USE = """
import json, sys
import numpy as np
from pathlib import Path
from slide2vec import Model, list_encoder_provider_diagnostics, list_models
from slide2vec.artifacts import load_coords, load_embeddings
from slide2vec.cli import main
from slide2vec.readers import backends

assert "example-colours" in list_models("tile") and not list_encoder_provider_diagnostics()
assert backends()["ppm"] is None
slide, out = sys.argv[1:]
def run(*more):
    sys.argv = ["slide2vec", "embed", slide, "-o", out, "--preset", "example-colours", *more]
    sys.argv += ["--format", "npy", "--segmentation-method", "darker", "--device", "cpu"]
    sys.argv += ["--spacing-at-level-0", "0.5"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code
run()
(path,) = Path(out).rglob("*.npy")
written = path.stat().st_mtime_ns
run("--resume")
assert path.stat().st_mtime_ns == written
sidecar = json.loads(path.with_suffix(".meta.json").read_text())
features, coords = load_embeddings(path).tolist(), load_coords(path).tolist()
print(json.dumps([features, coords, sidecar["backend"], sidecar["format"]]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as an installer puts it there: the content of its wheel."""
    folder = tmp_path_factory.mktemp("installed")
    copied = shutil.copytree(SOURCE, folder / "source")  # it is built in place
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=copied, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "target")
    return folder / "target"


def test_one_of_each(installed: Path, tmp_path: Path, generated_slide: Callable[..., Path]) -> None:
    pixels = tifffile.imread(generated_slide(tmp_path / "a.svs", size_px=512, seed=0, levels=1))[..., :3]
    pixels[:160, :256] = 0  # a mark, which is no tissue
    height, width, _ = pixels.shape
    slide = tmp_path / "a.ppm"
    slide.write_bytes(b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes())
    done = subprocess.run(
        [sys.executable, "-c", USE, str(slide), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    features, coords, backend, file_format = json.loads(done.stdout.splitlines()[-1])
    assert (backend, file_format) == ("ppm", "npy") and len(features) == len(coords) > 5
    pixels = np.pad(pixels, ((0, 64), (0, 64), (0, 0)), constant_values=255)  # white around the slide
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for found, (x, y) in zip(features, coords, strict=True):
        tile = (pixels[y : y + 64, x : x + 64] / 255 - mean) / std
        np.testing.assert_allclose(found, [*tile.mean((0, 1)), *tile.std((0, 1))], atol=1e-4)
        assert not (x + 64 <= 256 and y + 64 <= 160)
