"""Audits of runs: a sound one agrees, and every fault that is put into one is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from torch.nn import functional

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.artifacts.reading import load_embeddings
from slide2vec.audit import audit_run, verify_certificate, write_certificate
from slide2vec.audit.second_reader import NoSecondReader, area_average, second_readers
from slide2vec.errors import ArtifactError, ConfigError, PresetError
from slide2vec.prepare.torch_preparer import TorchPreparer
from slide2vec.slides import Slide
from slide2vec.synthetic import write_synthetic_slide

#: A ViT of 0.04 GFLOPs, of any weights.
PRESET, TILE_PX = "timm:test_vit", 160
TILING = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=TILE_PX, overlap=0.75)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    sizes = {"a": 2048, "b": 1536}
    return [
        write_synthetic_slide(folder / f"{name}.svs", size_px=size, seed=seed)
        for seed, (name, size) in enumerate(sizes.items())
    ]


def embed(slides: list[Path], output: Path, seed: int = 0, tiling: PreprocessingConfig = TILING) -> None:
    model = Model.from_preset(PRESET, weights="random", seed=seed, device="cpu")
    execution = ExecutionOptions(output_dir=output, engine="torch", batch_size=32)
    Pipeline(model, tiling, execution).run(slides)


@pytest.fixture(scope="module")
def sound(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sound")
    embed(slides, output)
    return output


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(sound, tmp_path / "run")


def audited(run: Path, **more: Any) -> dict[str, Any]:
    return audit_run(run, device="cpu", **{"sample": 0.02, **more})


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for each in found["encoders"] for row in each["slides"]}


@pytest.mark.slow
def test_sound_tiles_agree(sound: Path) -> None:
    """Every tile of two slides, about 500: equal pixels, so hardly a difference."""
    found = audited(sound, sample=1)
    assert found["verdict"] == "agrees" and found["slides"] == {"agrees": 2}
    assert found["tiles_compared"] >= 500
    for row in rows_of(found).values():
        assert row["reader"] == "openslide" and row["compared"] == row["tiles"]
        assert row["cosine"]["min"] > 1 - 1e-6 and row["shift"]["median"] < 1e-3


def test_the_sample_is_a_part_that_the_seed_decides(sound: Path) -> None:
    first, again, other = (rows_of(audited(sound, seed=seed))["a"] for seed in (1, 1, 2))
    assert first["compared"] == -(-first["tiles"] // 50)
    assert first["worst"] == again["worst"] != other["worst"]
    assert rows_of(audited(sound, sample=1e-6))["b"]["compared"] == 4
    for wrong in (0, 1.01):
        with pytest.raises(ConfigError, match="sample"):
            audited(sound, sample=wrong)


# faults: of the production code while it embeds, or of what it wrote --------------------------------


def prepared(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in what reaches the encoder: (B, 3, S, S), normalised."""

    def break_it(patch: pytest.MonkeyPatch) -> None:
        sound = TorchPreparer.prepare
        patch.setattr(TorchPreparer, "prepare", lambda self, tiles: change(sound(self, tiles)))

    return break_it


def other_mean_std(pixels: torch.Tensor) -> torch.Tensor:
    """ImageNet's mean and std in place of 0.5 and 0.5."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels * 0.5 + 0.5 - mean) / std


def next_level(pixels: torch.Tensor) -> torch.Tensor:
    """As if read from a level of twice the spacing, and enlarged."""
    half = functional.avg_pool2d(pixels, 2)
    return functional.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(prepared(other_mean_std), id="mean and std"),
        pytest.param(prepared(lambda pixels: pixels.flip(1)), id="BGR"),
        pytest.param(prepared(next_level), id="next level"),
        pytest.param(prepared(lambda pixels: pixels.roll(1, -1)), id="a pixel to the right"),
        pytest.param(prepared(lambda pixels: pixels.transpose(-1, -2)), id="transposed"),
    ],
)
def test_wrong_pixels_are_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    slides: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        fault(patch)
        embed(slides[1:], tmp_path)
    found = audited(tmp_path)
    assert found["verdict"] == "differs", rows_of(found)["b"]


def test_another_checkpoint_is_found(run: Path, slides: list[Path], tmp_path: Path) -> None:
    """Of which the sidecar says nothing, and of which it does."""
    embed(slides[1:], tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other/tile_embeddings/b.pt", run / "tile_embeddings/b.pt")
    found = rows_of(audited(run))
    assert found["a"]["verdict"] == "agrees" and found["b"]["verdict"] == "differs"
    assert "cosine" in found["b"]["why"]
    shutil.copy(tmp_path / "other/tile_embeddings/b.meta.json", run / "tile_embeddings/b.meta.json")
    assert "random:1" in rows_of(audited(run))["b"]["why"]


def shuffled(values: torch.Tensor) -> torch.Tensor:
    return values[torch.from_numpy(np.random.default_rng(0).permutation(len(values)))]


def overflowed(values: torch.Tensor) -> torch.Tensor:
    """As half precision does where activations pass 65,504."""
    values = values.clone()
    values[len(values) // 2] = float("inf")
    return values


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (shuffled, "cosine|distance"),
        (lambda values: values.roll(1, 0), "cosine|distance"),
        (overflowed, "1 of .* embeddings hold NaN or infinities"),
        (lambda values: values[:-1], "embeddings for .* tiles"),
        (lambda values: values + 0.02 * values.std(0) * torch.randn_like(values).sign(), "distance"),
        (lambda values: values[:, :-1], "numbers"),
    ],
)
def test_wrong_rows_are_found(run: Path, fault: Callable[[torch.Tensor], torch.Tensor], why: str) -> None:
    path = run / "tile_embeddings/b.pt"
    torch.manual_seed(0)
    torch.save(fault(load_embeddings(path)).contiguous(), path)
    found = rows_of(audited(run))["b"]
    assert found["verdict"] == "differs"
    assert re.search(why, found["why"])


def test_wrong_coordinates_are_found(run: Path) -> None:
    """A tile's place moved by a pixel of the grid, and tiles that do not cover what was asked for."""
    path = run / "tiles/b.coordinates.npz"
    with np.load(path) as kept:
        arrays = dict(kept)
    arrays["x"] = arrays["x"] + 8
    np.savez(path, **arrays)
    assert rows_of(audited(run))["b"]["verdict"] == "differs"
    meta = run / "tiles/a.coordinates.meta.json"
    content = json.loads(meta.read_text())
    content["slide"]["base_spacing_um"] *= 2
    meta.write_text(json.dumps(content))
    assert "µm wide" in rows_of(audited(run))["a"]["why"]


# what cannot be audited -----------------------------------------------------------------------------


def test_a_slide_that_is_gone_is_counted_and_named(run: Path, slides: list[Path], tmp_path: Path) -> None:
    sidecar = run / "tile_embeddings/b.meta.json"
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**content, "image_path": "/gone/b.svs"}))
    found = audited(run)
    assert found["verdict"] == "agrees" and found["slides"] == {"agrees": 1, "not audited": 1}
    assert "/gone/b.svs does not exist" in rows_of(found)["b"]["why"]
    again = audit_run(str(run), slides_dir=str(slides[0].parent), sample=0.02, device="cpu")
    assert again["slides"] == {"agrees": 2}
    with pytest.raises(ArtifactError, match="no embeddings"):
        audited(tmp_path / "nothing")


def test_the_second_reader_is_another_than_the_first(slides: list[Path]) -> None:
    """And tifffile gives OpenSlide's pixels, on every level, over the edge, too."""
    slide = Slide(sample_id="b", image_path=slides[1])
    openings = [next(second_readers(slide, backend)) for backend in ("tiff", "openslide")]
    with closing(openings[0]()) as one, closing(openings[1]()) as two:
        assert (one.name, two.name) == ("openslide", "tifffile")
        assert one.dimensions == two.dimensions
        for level, (width, height) in enumerate(one.dimensions):
            downsample = one.dimensions[0][0] / width
            assert one.level_of(downsample) == two.level_of(downsample) == level
            for x, y in ((0, 0), (width // 2, height // 3), (width - 50, height - 70)):
                first, second = (each.read(x, y, level, downsample, 120) for each in (one, two))
                assert first.shape == second.shape == (120, 120, 3)
                assert np.abs(first.astype(int) - second).max() <= 1
        with pytest.raises(NoSecondReader, match="no level 3 times smaller"):
            two.level_of(3.0)


def test_no_second_reader(tmp_path: Path) -> None:
    (tmp_path / "no.svs").write_bytes(b"no slide")
    slide = Slide(sample_id="no", image_path=tmp_path / "no.svs")
    for opening, name in zip(second_readers(slide, "tiff"), ("openslide", "tifffile"), strict=True):
        with pytest.raises(NoSecondReader, match=f"{name}: "):
            opening()


def test_openslide_is_no_witness_where_it_interpolates(tmp_path: Path) -> None:
    """Its pixels on a level of uneven downsample are between those of the file: tifffile is asked."""
    folder, path = tmp_path / "slides", tmp_path / "slides" / "a.tiff"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (601, 602, 3), np.uint8)
    with tifffile.TiffWriter(path) as file:
        options = {"photometric": "rgb", "tile": (64, 64), "compression": "deflate"}
        file.write(pixels, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **options)
        file.write(pixels[:600:2, :602:2], subfiletype=1, **options)
    [opening, _] = second_readers(Slide(sample_id="a", image_path=path), "tiff")
    with closing(opening()) as reader, pytest.raises(NoSecondReader, match=r"interpolates on a level 2\.00"):
        reader.level_of(2.0)
    embed(
        [path],
        tmp_path / "run",
        tiling=PreprocessingConfig(
            requested_spacing_um=1.0, requested_tile_size_px=TILE_PX, filtering={"a_t": 0}
        ),
    )
    found = audited(tmp_path / "run")
    assert rows_of(found)["a"]["reader"] == "tifffile" and found["verdict"] == "agrees"


@pytest.mark.parametrize(("side", "size"), [(64, 32), (89, 45), (32, 32), (5, 3)])
def test_area_average(side: int, size: int) -> None:
    """As many small cells as make both sides even, averaged by reshaping."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    if side % size == 0:
        ratio = side // size
        expected = pixels.reshape(size, ratio, size, ratio, 3).mean((1, 3))
    elif side < 10:
        fine = pixels.repeat(size, 0).repeat(size, 1).astype(float)
        expected = fine.reshape(size, side, size, side, 3).mean((1, 3))
    else:
        fine_rows = pixels.repeat(size, 0).reshape(size, side, side, 3).astype(float).mean(1)
        expected = fine_rows.repeat(size, 1).reshape(size, size, side, 3).mean(2)
    np.testing.assert_array_equal(area_average(pixels, size), np.floor(expected + 0.5 + 1e-9))


# the certificate ------------------------------------------------------------------------------------


def test_one_changed_byte_is_found(run: Path) -> None:
    certificate = run / "audit.json"
    write_certificate(certificate, audited(run))
    assert verify_certificate(certificate) == []
    files = [path for path in run.rglob("*") if path.parent.name in ("tiles", "tile_embeddings")]
    named = {name for row in rows_of(json.loads(certificate.read_text())).values() for name in row["files"]}
    assert len(named) == 8 and all((run / name) in files for name in named)
    for name in sorted(named):
        before = (run / name).read_bytes()
        (run / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        (problem,) = verify_certificate(certificate)
        assert name in problem and "SHA-256" in problem
        (run / name).write_bytes(before)
    text = certificate.read_text()
    certificate.write_text(text.replace('"verdict": "agrees"', '"verdict": "Agrees"', 1))
    assert "changed after it was written" in verify_certificate(certificate)[0]
    certificate.write_text(text)
    (run / "tile_embeddings/b.pt").unlink()
    assert "is missing" in verify_certificate(certificate)[0]
    certificate.write_text("{}")
    with pytest.raises(ArtifactError, match="no certificate"):
        verify_certificate(certificate)


def test_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from slide2vec.cli import app

    call = CliRunner().invoke
    done = call(app, ["audit", str(run), "--sample", "5%", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "agrees" in done.stdout and "openslide" in done.stdout
    assert call(app, ["audit", str(run), "--verify"]).exit_code == 0
    path = run / "tile_embeddings/b.pt"
    torch.save(shuffled(load_embeddings(path)), path)
    assert call(app, ["audit", str(run), "--verify"]).exit_code == 1
    done = call(app, ["audit", str(run), "--json", "--device", "cpu"])
    assert done.exit_code == 1 and json.loads(done.stdout)["slides"] == {"agrees": 1, "differs": 1}
    assert isinstance(call(app, ["audit", str(run), "--sample", "half"]).exception, ConfigError | SystemExit)


def test_sidecars_by_other_hands_stop_nothing(run: Path) -> None:
    """The first one unreadable, and one without what is needed; no other slide's verdict changes."""
    first = run / "tile_embeddings/a.meta.json"
    before = first.read_text()
    for damaged in ("{", json.dumps({**json.loads(before), "image_path": None})):
        first.write_text(damaged)
        found = audited(run)
        assert found["slides"] == {"differs": 1, "agrees": 1}
        assert "cannot be read" in rows_of(found)["a"]["why"]
    for sidecar in (run / "tile_embeddings").glob("*.meta.json"):
        sidecar.write_text("{")
    with pytest.raises(ArtifactError, match="no embeddings of tiles with a sidecar that can be read"):
        audited(run)


def test_an_encoder_that_cannot_be_built_is_not_audited_the_others_are(run: Path) -> None:
    gone = run / "encoders/gone/tile_embeddings"
    shutil.copytree(run / "tile_embeddings", gone)
    for sidecar in gone.glob("*.meta.json"):
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "encoder_name": "gone"}))
    found = audited(run)
    assert found["slides"] == {"agrees": 2, "not audited": 2} and found["verdict"] == "not audited"
    first, second = found["encoders"]
    assert (first["verdict"], second["verdict"], second["encoder"]) == ("agrees", "not audited", "gone")
    assert all("gone" in row["why"] for row in second["slides"])
    with pytest.raises(PresetError, match="gone"):
        audited(run, encoder="gone")


def test_tiles_of_an_archive_are_not_the_slides(run: Path) -> None:
    sidecar = run / "tile_embeddings/b.meta.json"
    content = json.loads(sidecar.read_text())
    content["compatibility"]["tiles_from"] = "jpeg"
    sidecar.write_text(json.dumps(content))
    row = rows_of(audited(run))["b"]
    assert row["verdict"] == "not audited" and "JPEGs of them" in row["why"]
