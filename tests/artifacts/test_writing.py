"""What is in the files, read with the formats' own libraries; and that half a file never counts."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from artifact_helpers import ENCODER, FORMATS, a_tiling, embedded, write
from safetensors import safe_open
from safetensors.torch import load_file

from slide2vec.artifacts import (
    find_tile_artifact,
    formats,
    load_embeddings,
    write_json,
    write_slide_embedding,
    write_tile_embeddings,
)
from slide2vec.errors import ArtifactError, ConfigError, ManifestError, OutputError
from slide2vec.files import atomic_path

TILING = a_tiling()
VALUES = embedded(TILING).tile_embeddings
COORDS = np.stack([TILING.x, TILING.y], axis=1)
#: Of a file, in a process that may not write larger ones; each format's file has more.
LIMIT_BYTES = 40_000


def test_pt_is_one_bare_tensor(tmp_path: Path) -> None:
    path = write(tmp_path).path
    assert path == tmp_path / "tile_embeddings" / "s.pt"
    assert torch.equal(torch.load(path, weights_only=True), VALUES)


def test_pt_of_a_view_holds_the_view_only(tmp_path: Path) -> None:
    rows = torch.zeros(100_000, 5)[: len(TILING)]
    slide = replace(embedded(TILING), tile_embeddings=rows)
    assert write_tile_embeddings(tmp_path, slide, TILING, encoder=ENCODER).path.stat().st_size < 5_000


def test_npz(tmp_path: Path) -> None:
    with np.load(write(tmp_path, file_format="npz").path) as found:
        assert sorted(found) == ["features", "tile_index"]
        assert np.array_equal(found["features"], VALUES.numpy())
        assert found["tile_index"].dtype == np.int64
        assert found["tile_index"].tolist() == list(range(len(TILING)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    slide = embedded(TILING, dtype=dtype)
    path = write_tile_embeddings(tmp_path, slide, TILING, encoder=ENCODER, file_format="safetensors").path
    found = load_file(path)
    assert sorted(found) == ["coords", "features"]
    assert found["features"].dtype == dtype and torch.equal(found["features"], slide.tile_embeddings)
    assert found["coords"].dtype == torch.int64 and np.array_equal(found["coords"].numpy(), COORDS)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["sample_id"] == "s" and metadata["encoder_name"] == "enc"
    assert metadata["requested_spacing_um"] == "0.5" and metadata["tile_size_lv0"] == "512"


def test_h5_has_the_datasets_and_attributes_of_trident_and_clam(tmp_path: Path) -> None:
    tiling = a_tiling(base_spacing_um=0.25, spacing_um=1.0, size_px=256, overlap=0.25)
    with h5py.File(write(tmp_path, tiling, file_format="h5").path) as file:
        assert sorted(file) == ["coords", "features"] and not file.attrs
        assert np.array_equal(file["features"][()], embedded(tiling).tile_embeddings.numpy())
        assert np.array_equal(file["coords"][()], np.stack([tiling.x, tiling.y], axis=1))
        assert file["coords"].dtype == np.int64
        assert dict(file["features"].attrs) == {"name": "s", "encoder": "enc"}
        assert dict(file["coords"].attrs) == {
            "name": "s",
            "patch_size": 256,
            "patch_size_level0": 1024,
            "level0_magnification": 40,
            "target_magnification": 10,
            "overlap": 64,
            "level0_width": 90_000,
            "level0_height": 70_000,
            "patch_level": 1,
            "downsample": 4.0,
            "spacing_um": 1.0,
            "base_spacing_um": 0.25,
            "tile_size_lv0": 1024,
        }


@pytest.mark.parametrize("base", [0.12, 0.2276, 0.2528, 0.46, 0.499])
@pytest.mark.parametrize("size", [224, 256, 518])
def test_trident_computes_our_tile_size_from_the_h5_attributes(
    base: float, size: int, tmp_path: Path
) -> None:
    tiling = a_tiling(base_spacing_um=base, size_px=size)
    with h5py.File(write(tmp_path, tiling, file_format="h5").path) as file:
        metadata = dict(file["coords"].attrs)
    # As trident/wsi_objects/WSIPatcher.py does: spacings 10 / magnification, then their ratio.
    source, target = 10 / metadata["level0_magnification"], 10 / metadata["target_magnification"]
    assert round(metadata["patch_size"] * (target / source)) == tiling.geometry.tile_size_lv0
    # As CLAM's dataset_h5.py reads: patch_size pixels of patch_level. Absent where that is no tile.
    resized = tiling.geometry.read_tile_size_px != size
    assert ("patch_level" in metadata) != resized
    if not resized:
        assert metadata["patch_size"] == tiling.geometry.read_tile_size_px


def test_sidecar_has_the_fields_of_the_contract(tmp_path: Path) -> None:
    bad = {"x": np.int64(3), "y": 4, "error": "damaged"}
    compatibility = {"encoder": {"weights": "none"}, "geometry": [1, 2.5, None]}
    artifact = write(
        tmp_path,
        compatibility=compatibility,
        coordinates=(Path("tiles/s.npz"), Path("tiles/s.json")),
        tiles_tar_path=Path("tiles/s.tar"),
        skipped_tiles=[bad],
    )
    text = artifact.metadata_path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert artifact.metadata == {
        "schema_version": 2,
        "artifact_type": "tile_embeddings",
        "format": "pt",
        "sample_id": "s",
        "annotation": None,
        "feature_dim": 5,
        "feature_dtype": "fp32",
        "file_size_bytes": artifact.path.stat().st_size,
        "encoder_name": "enc",
        "encoder_level": "tile",
        "encoder_input_size_px": 224,
        "num_tiles": 12,
        "image_path": "slides/s.svs",
        "mask_path": None,
        "backend": "openslide",
        "tile_size_lv0": 512,
        "read_tile_size_px": 512,
        "requested_tile_size_px": 256,
        "requested_spacing_um": 0.5,
        "coordinates_npz_path": "tiles/s.npz",
        "coordinates_meta_path": "tiles/s.json",
        "tiles_tar_path": "tiles/s.tar",
        "skipped_tiles": [{"x": 3, "y": 4, "error": "damaged"}],
        "compatibility": compatibility,
    }


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_slide_without_tiles(file_format: str, tmp_path: Path) -> None:
    artifact = write(tmp_path, a_tiling(0), file_format=file_format)
    assert load_embeddings(artifact.path).shape == (0, 5)
    assert find_tile_artifact(tmp_path, "s") == artifact and artifact.num_tiles == 0


@pytest.mark.parametrize("file_format", FORMATS)
def test_slide_embedding_and_latents(file_format: str, tmp_path: Path) -> None:
    embedding, latents = torch.arange(4.0), torch.arange(6.0).reshape(2, 3)
    artifact = write_slide_embedding(
        tmp_path,
        "s",
        embedding,
        file_format=file_format,  # type: ignore[arg-type]
        encoder=ENCODER,
        metadata={"num_tiles": 7},
        compatibility={"a": 1},
        latents=latents,
    )
    assert artifact.path == tmp_path / "slide_embeddings" / f"s.{file_format}"
    assert artifact.latent_path == tmp_path / "slide_latents" / f"s.{file_format}"
    assert torch.equal(load_embeddings(artifact.path), embedding)
    assert torch.equal(load_embeddings(artifact.latent_path), latents)
    found = artifact.metadata
    assert (found["artifact_type"], found["num_tiles"], found["feature_dim"]) == ("slide_embeddings", 7, 4)
    assert found["file_size_bytes"] == artifact.path.stat().st_size and found["compatibility"] == {"a": 1}
    if file_format == "npz":
        with np.load(artifact.latent_path) as arrays:
            assert sorted(arrays) == ["latents"]


def test_latents_of_before_do_not_outlive_a_new_embedding(tmp_path: Path) -> None:
    write_slide_embedding(tmp_path, "s", torch.ones(4), encoder=ENCODER, latents=torch.ones(2, 3))
    again = write_slide_embedding(tmp_path, "s", torch.zeros(4), encoder=ENCODER, file_format="npz")
    assert again.latent_path is None and not list((tmp_path / "slide_latents").iterdir())
    assert sorted(path.name for path in again.path.parent.iterdir()) == ["s.meta.json", "s.npz"]


def test_one_artifact_per_slide(tmp_path: Path) -> None:
    other = write(tmp_path, a_tiling(sample_id="s.x"))
    for file_format in (*FORMATS, "pt"):
        artifact = write(tmp_path, file_format=file_format)
        assert sorted(path.name for path in artifact.path.parent.iterdir()) == sorted(
            ["s.meta.json", f"s.{file_format}", "s.x.meta.json", "s.x.pt"]
        )
        assert find_tile_artifact(tmp_path, "s") == artifact
    assert find_tile_artifact(tmp_path, "s.x") == other


_WRITE_ALL = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from artifact_helpers import FORMATS, write
for file_format in FORMATS:
    write(Path(sys.argv[1]) / file_format, file_format=file_format)
"""


def in_a_process(code: str, *arguments: object) -> str:
    """Runs code in another Python with the same import path; its stdout."""
    command = [sys.executable, "-c", code.replace("{path!r}", repr(sys.path)), *map(str, arguments)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    in_a_process(_WRITE_ALL, tmp_path / "there")
    for file_format in FORMATS:
        write(tmp_path / "here" / file_format, file_format=file_format)
        for name in (f"s.{file_format}", "s.meta.json"):
            here, there = (
                hashlib.sha256((tmp_path / where / file_format / "tile_embeddings" / name).read_bytes())
                for where in ("here", "there")
            )
            assert here.digest() == there.digest(), name


_WRITE_TOO_MUCH = """
import json, resource, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
from artifact_helpers import FORMATS, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
for file_format in FORMATS:
    write(folder / file_format)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for file_format in FORMATS:
    try:
        write(folder / file_format, dim=2000, file_format=file_format)
    except OSError as error:
        print(json.dumps([type(error).__name__, error.errno, error.filename, str(error)]))
"""


def test_a_full_disk_is_an_oserror_with_the_path_in_every_format(tmp_path: Path) -> None:
    lines = in_a_process(_WRITE_TOO_MUCH, tmp_path, LIMIT_BYTES).splitlines()
    assert len(lines) == len(FORMATS)
    for file_format, line in zip(FORMATS, lines, strict=True):
        folder = tmp_path / file_format
        kind, number, filename, text = json.loads(line)
        assert kind == "OutputError" and os.strerror(number) == "File too large"
        assert filename == str(folder / "tile_embeddings" / f"s.{file_format}") and filename in text
        # What was there is as complete as before, and nothing else is left.
        assert sorted(path.name for path in (folder / "tile_embeddings").iterdir()) == ["s.meta.json", "s.pt"]
        assert find_tile_artifact(folder, "s") is not None


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_a_file_is_written_through_is_closed(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left open, its destructor fails on the closed file, which Python 3.13 prints for each file of a run."""
    made = []
    plain = formats._RecordingFile.__init__

    def kept(self, file):  # type: ignore[no-untyped-def]
        made.append(self)
        plain(self, file)

    monkeypatch.setattr(formats._RecordingFile, "__init__", kept)
    write(tmp_path, file_format=file_format)
    assert made and all(file.closed for file in made)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/tile_embeddings/s\.pt"):
        write(tmp_path / "file")
    with pytest.raises(OSError, match=r"file/a\.json"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("new_format", FORMATS)
def test_a_process_killed_at_any_step_leaves_a_whole_artifact_or_none(
    new_format: str, tmp_path: Path
) -> None:
    """Killed before each rename and removal in turn; the sidecar found is of the features beside it."""
    seen = []
    for step in range(20):
        folder = tmp_path / str(step)
        write(folder, seed=1, compatibility={"seed": 1})
        died = _killed_at(step, folder, new_format)
        artifact = find_tile_artifact(folder, "s")
        if artifact is None:
            seen.append(0)
        else:
            seed = artifact.metadata["compatibility"]["seed"]
            assert torch.equal(load_embeddings(artifact.path), embedded(TILING, seed=seed).tile_embeddings)
            seen.append(seed)
        if not died:
            break
    assert seen[0] == 1 and seen[-1] == 2 and 0 in seen and seen == sorted(seen, key=[1, 0, 2].index)


def _killed_at(step: int, folder: Path, file_format: str) -> bool:
    """Writes in a child process that dies at the `step`th change of names; whether it died."""
    child = os.fork()
    if child == 0:
        left = iter(range(step))

        def dying(change):  # type: ignore[no-untyped-def]
            def run(*arguments, **options):  # type: ignore[no-untyped-def]
                if next(left, None) is None:
                    os._exit(9)
                return change(*arguments, **options)

            return run

        try:
            Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)  # type: ignore[method-assign]
            write(folder, seed=2, compatibility={"seed": 2}, file_format=file_format)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("second, half")
        raise RuntimeError
    assert path.read_text() == "first"
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("sample_id", ["../s", "a/b/c", "", ".."])
def test_a_name_that_leads_elsewhere_is_refused(sample_id: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError):
        write(tmp_path / "out", a_tiling(sample_id=sample_id))
    with pytest.raises(ManifestError):
        write_slide_embedding(tmp_path / "out", sample_id, torch.ones(3), encoder=ENCODER)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    slide = embedded(TILING)
    fewer = replace(slide, x=slide.x[1:], y=slide.y[1:])
    with pytest.raises(ArtifactError, match=r"slide s: .*\(12, 5\).* 11 tiles"):
        write_tile_embeddings(tmp_path, fewer, TILING, encoder=ENCODER)
    with pytest.raises(ConfigError, match="'csv'; allowed: pt"):
        write_tile_embeddings(tmp_path, slide, TILING, encoder=ENCODER, file_format="csv")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"slide s: its embedding is a vector, got shape \(1, 4\)"):
        write_slide_embedding(tmp_path, "s", torch.ones(1, 4), encoder=ENCODER)
    half = embedded(TILING, dtype=torch.bfloat16)
    with pytest.raises(ArtifactError, match=r"slide s: torch\.bfloat16 cannot be stored as npz or h5"):
        write_tile_embeddings(tmp_path, half, TILING, encoder=ENCODER, file_format="h5")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
