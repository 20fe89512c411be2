"""Artefacts and focus of tiles: measured on pictures whose truth is known, written, read, and acted upon."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from test_auto_tissue import generated
from tiling_helpers import ArrayReader, a_slide, settings
from typer.testing import CliRunner

from slide2vec.cli import app
from slide2vec.config import PreprocessingConfig, QualityConfig
from slide2vec.errors import ConfigError, TilingError
from slide2vec.readers import open_slide
from slide2vec.slides import as_slide
from slide2vec.synthetic.thumbnails import make_thumbnail
from slide2vec.tiling import Tiling, load_coordinates, tile_slide, write_coordinates
from slide2vec.tiling.previews import draw_tiles
from slide2vec.tiling.previous_settings import differences, previous_tiles, with_previous_options
from slide2vec.tiling.tile_quality import CLASSICAL, artefact_maps, blurred_share
from slide2vec.tiling.types import expand_regions

TILE_PX = 16


def shares(where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of tiles of 16 px, (rows, columns)."""
    height, width = (side // TILE_PX * TILE_PX for side in where.shape)
    tiles = where[:height, :width].reshape(height // TILE_PX, TILE_PX, width // TILE_PX, TILE_PX)
    return tiles.mean((1, 3))


def tiled(picture: NDArray[np.uint8], spacing_um: float = 8.0, **changes) -> Tiling:
    asked = {
        "requested_spacing_um": spacing_um,
        "requested_tile_size_px": TILE_PX,
        "segmentation": {"method": "hsv", "downsample": 1},
        **changes,
    }
    return tile_slide(ArrayReader([picture]), a_slide(), spacing_um, settings(**asked))[0]


def test_what_is_out_of_focus_is_told_from_what_is_in_focus(reference_slide: Path) -> None:
    with open_slide(as_slide(reference_slide)) as reader:
        picture = reader.read_region((800, 900), 0, (1026, 1026))
    tissue = np.ones((64, 64), bool)

    def blurred(sigma_um: float) -> float:
        soft = cv2.GaussianBlur(picture, (0, 0), sigma_um / 0.499) if sigma_um else picture
        return blurred_share(cv2.resize(soft, (512, 512), interpolation=cv2.INTER_AREA), tissue, 1.0)

    assert blurred(0) <= 0.05 and blurred(0.7) <= 0.05
    assert all(blurred(sigma_um) >= 0.9 for sigma_um in (3, 5, 10, 20))


def test_focus_is_that_of_tissue_alone() -> None:
    glass = np.full((128, 128, 3), (236, 222, 214), np.uint8)
    assert blurred_share(glass, np.zeros((16, 16), bool), 1.0) == 0
    assert blurred_share(glass, np.ones((16, 16), bool), 1.0) == 1
    assert blurred_share(glass[:5, :5], np.ones((1, 1), bool), 1.0) == 0


@pytest.mark.parametrize(("case", "name", "least_found"), [("pen", "pen", 0.9), ("folds", "fold", 0.35)])
def test_where_artefacts_are(case: str, name: str, least_found: float) -> None:
    slide = make_thumbnail("folds", 101) if case == "folds" else generated(case)
    truth, found = shares(slide.marks[name]) > 0.15, shares(artefact_maps(slide.pixels, 8.0)[name]) > 0.15
    assert truth.sum() >= 20 and (truth & found).sum() >= least_found * truth.sum()
    assert (found & ~truth).sum() <= 0.1 * found.sum()


def test_bubbles_are_found_by_their_rims_and_fibres_are_none() -> None:
    picture = np.full((400, 600, 3), 238, np.uint8)
    cv2.ellipse(picture, (180, 200), (110, 95), 20, 0, 360, (150, 150, 150), 5, cv2.LINE_AA)
    cv2.line(picture, (20, 120), (420, 250), (190, 190, 190), 3, cv2.LINE_AA)
    cv2.ellipse(picture, (480, 250), (90, 60), 0, 0, 110, (190, 190, 190), 3, cv2.LINE_AA)
    truth = np.zeros((400, 600), np.uint8)
    cv2.ellipse(truth, (180, 200), (110, 95), 20, 0, 360, 1, -1)
    found = artefact_maps(picture, 8.0)["bubble"]
    assert (found & (truth > 0)).sum() > 0.95 * (found | (truth > 0)).sum()


def test_background_is_what_is_neither_tissue_nor_pen() -> None:
    slide = generated("he")
    found = artefact_maps(slide.pixels, 8.0)
    assert (found["background"] == slide.tissue)[~slide.ignored].mean() < 0.05
    assert not found["pen"].any() and not found["bubble"].any()


def test_off_changes_nothing_and_measuring_no_tile() -> None:
    picture = generated("pen").pixels
    off, on = tiled(picture), tiled(picture, qc={"measure": True})
    assert off.artefacts == {} and set(on.artefacts) == set(CLASSICAL)
    assert np.array_equal(off.x, on.x) and np.array_equal(off.y, on.y)
    for share in on.artefacts.values():
        assert (
            share.shape == (len(on),) and share.dtype == np.float32 and 0 <= share.min() <= share.max() <= 1
        )


def test_tiles_beyond_a_limit_are_left_out() -> None:
    picture = generated("pen").pixels
    measured, limited = (tiled(picture, qc=qc) for qc in ({"measure": True}, {"max_pen": 0.1}))
    kept = measured.artefacts["pen"] <= 0.1
    assert 0 < kept.sum() < len(kept)
    assert np.array_equal(limited.x, measured.x[kept]) and np.array_equal(limited.y, measured.y[kept])
    assert np.array_equal(limited.artefacts["background"], measured.artefacts["background"][kept])


def test_regions_have_the_shares_of_the_region() -> None:
    measured = tiled(generated("pen").pixels, qc={"measure": True})
    tiles = expand_regions(measured, 2)
    assert np.array_equal(tiles.artefacts["pen"], measured.artefacts["pen"].repeat(4))
    assert len(tiles.without([0]).artefacts["pen"]) == len(tiles) - 4


def test_coordinate_files_keep_what_was_measured(tmp_path: Path) -> None:
    measured = tiled(generated("pen").pixels, qc={"measure": True})
    arrays, metadata = write_coordinates(tmp_path, measured)
    with np.load(arrays) as found:
        assert set(found.files) == {"tile_index", "x", "y", "tissue_fractions", *CLASSICAL}
        damaged = {**found, "blur": found["blur"][:-1]}
    loaded = load_coordinates(tmp_path, "s")
    for name in CLASSICAL:
        assert np.array_equal(loaded.artefacts[name], measured.artefacts[name])
    np.savez_compressed(arrays, **damaged)
    with pytest.raises(TilingError, match=r"blur in .* is not a share from 0 to 1 of each of"):
        load_coordinates(tmp_path, "s")
    hs2p = pytest.importorskip("hs2p.artifacts", reason="hs2p is not installed")
    write_coordinates(tmp_path, measured)
    assert np.array_equal(hs2p.load_tiling_result(arrays, metadata).x, measured.x)


def test_previews_colour_tiles_under_pen() -> None:
    slide = generated("pen")
    measured = tiled(slide.pixels, qc={"measure": True})
    drawn = draw_tiles(slide.pixels, measured)
    orange = (drawn == (240, 140, 0)).all(-1)
    assert orange.any() and not (draw_tiles(slide.pixels, tiled(slide.pixels)) == (240, 140, 0)).all(-1).any()


def test_tiles_that_are_given_are_not_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qc measures tiles that are looked for"):
        PreprocessingConfig(qc={"max_pen": 0.1}, read_coordinates_from=tmp_path)
    with pytest.raises(ConfigError, match=r"QualityConfig.max_pen"):
        QualityConfig(max_pen=1.5)


def test_a_run_records_its_limits_and_goes_by_them_when_it_goes_on(
    reference_slide: Path, tmp_path: Path
) -> None:
    def run(*more: str) -> str:
        asked = ["--spacing", "0.5", "--tile-size", "256", "--min-piece", "0"]
        done = CliRunner().invoke(app, ["tile", str(reference_slide), "-o", str(tmp_path), *asked, *more])
        return f"{done.exit_code} {done.output}"

    record = tmp_path / "tiles" / f"{reference_slide.stem}.source.json"
    assert run("--qc", "background=0.5,blur=1").startswith("0")
    limits = json.loads(record.read_text())["qc"]
    assert limits["max_background"] == 0.5 and limits["max_pen"] is None
    tiling = load_coordinates(tmp_path / "tiles", reference_slide.stem)
    assert len(tiling) > 5 and tiling.artefacts["background"].max() <= 0.5
    slide, config = as_slide(reference_slide), PreprocessingConfig(resume=True)
    found = previous_tiles(tmp_path / "tiles", [slide], config)
    assert with_previous_options([slide], config, found)[1].qc == QualityConfig(**limits)
    asked = PreprocessingConfig(qc={"max_background": 0.4})
    assert differences(found[slide.sample_id], slide, asked)["qc_max_background"] == (0.5, 0.4)
    made = record.stat().st_mtime_ns
    assert run("--qc", "background=0.5,blur=1").startswith("0") and record.stat().st_mtime_ns == made
    assert "qc.max_background 0.5, not None" in run()  # replaced, and said so
    assert "qc" not in json.loads(record.read_text())
    assert load_coordinates(tmp_path / "tiles", reference_slide.stem).artefacts == {}
    assert "is not measure, nor shares" in run("--qc", "background=much")
