"""A disk that fills up: one clear error, nothing lost, and the run goes on from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.artifacts import find_tile_artifact, load_embeddings

PREPROCESSING = PreprocessingConfig(requested_tile_size_px=128, tissue_threshold=0.1, resume=True)

FORMATS = ("pt", "npz", "safetensors", "h5")
#: Runs over a manifest in each of the formats and prints the errors, with nothing but `limit` bytes a file to
#: write.
SCRIPT = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_disk_full import PREPROCESSING
from slide2vec import ExecutionOptions, Model, Pipeline
manifest, output_dir, limit, *formats = sys.argv[1:]
model = Model.from_preset("scattering", device="cpu")
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
errors = []
for file_format in formats:
    execution = ExecutionOptions(output_dir=Path(output_dir) / file_format, output_format=file_format)
    try:
        Pipeline(model, PREPROCESSING, execution).run(manifest_path=manifest)
    except OSError as error:
        errors.append([type(error).__name__, str(error)])
print(json.dumps(errors))
"""


def limited(*command: str) -> list[tuple[str, str]]:
    """The types and the texts of the errors."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [(name, text) for name, text in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def whole(model: Model, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """With room enough."""
    execution = ExecutionOptions(output_dir=tmp_path_factory.mktemp("whole"))
    return Pipeline(model, PREPROCESSING, execution).run(manifest_path=manifest)


def check(model: Model, manifest: Path, output_dir: Path, file_format: str, whole: RunResult) -> None:
    """What is there is whole, and with room again the run ends like any other."""
    complete = [name for n in range(6) if find_tile_artifact(output_dir, name := f"s{n}")]
    execution = ExecutionOptions(output_dir=output_dir, output_format=file_format)
    result = Pipeline(model, PREPROCESSING, execution).run(manifest_path=manifest)
    assert not result.failed, result.failed
    assert result.resumed == len(complete) < 6
    assert len(result.tile_artifacts) == len(whole.tile_artifacts) == 6
    for one, two in zip(result.tile_artifacts, whole.tile_artifacts, strict=True):
        assert load_embeddings(one.path).equal(load_embeddings(two.path))
    assert not list(output_dir.rglob(".*.partial"))


@pytest.mark.slow
def test_limited_file_size(model: Model, manifest: Path, whole: RunResult, tmp_path: Path) -> None:
    limit = 19_800  # bytes: 24 tiles' embeddings are just below
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    errors = limited(sys.executable, "-c", script, str(manifest), str(tmp_path), str(limit), *FORMATS)
    for file_format, (name, text) in zip(FORMATS, errors, strict=True):
        assert name == "OutputError"
        assert "File too large" in text and f".{file_format} cannot be written" in text
        assert "of 6 slides are complete" in text and "resume" in text
        check(model, manifest, tmp_path / file_format, file_format, whole)


def test_small_disk(model: Model, manifest: Path, whole: RunResult, tmp_path: Path) -> None:
    """A file system of 130 kB in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    tmpfs = f"mount -t tmpfs -o size=130k,mode=777 none {disk}"
    if shutil.which("unshare") is None or subprocess.run([*mount, tmpfs], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    script, kept = tmp_path / "script.py", tmp_path / "kept"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    steps = f'{tmpfs}; "$0" {script} {manifest} {disk} 0 pt; cp -r {disk}/pt {kept}'
    ((name, text),) = limited(*mount, steps, sys.executable)
    assert name == "OutputError" and "No space left on device" in text and "slides are complete" in text
    check(model, manifest, kept, "pt", whole)
