"""Hierarchical extraction: which regions, which tiles in them, and that grouping changes no embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import torch
from torch import Tensor

from slide2vec import EmbeddedSlide, ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.aggregate.regions import regrouped
from slide2vec.artifacts import find_hierarchical_artifact, load_coords, load_embeddings
from slide2vec.config import FilterConfig
from slide2vec.errors import ConfigError, SlideReadError
from slide2vec.geometry import TileGeometry, region_geometry, subtile_geometry, tile_geometry
from slide2vec.slides import Slide, as_slide
from slide2vec.stream import SlideOutcome
from slide2vec.stream.tile_sources import SlideSource
from slide2vec.tiling import Tiling, load_coordinates, write_coordinates
from slide2vec.tiling.types import Segmentation, expand_regions

PREPROCESSING = PreprocessingConfig(requested_tile_size_px=64, requested_spacing_um=0.5)
REGIONS = PREPROCESSING.updated(region_tile_multiple=3)
#: The same arithmetic in batches of another composition: no difference is expected but of rounding.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def embedded(tile_model: Model, slides: list[Path]) -> EmbeddedSlide:
    return tile_model.embed_slide(slides[2], REGIONS)


def test_shapes_and_order(embedded: EmbeddedSlide) -> None:
    found = embedded
    regions = len(found.x)
    assert regions > 3 and found.tile_embeddings.shape == (regions, 9, 195)
    assert found.x.shape == found.y.shape == (regions,) and found.num_tiles == 9 * regions
    assert found.tile_x is not None and found.tile_y is not None
    assert found.tile_size_lv0 == 128  # 64 px at 0.5 µm/px of a slide of 0.25
    for k in range(9):
        assert np.array_equal(found.tile_x[:, k], found.x + 128 * (k % 3))
        assert np.array_equal(found.tile_y[:, k], found.y + 128 * (k // 3))


def test_the_same_tiles_flat_have_the_same_embeddings(
    tile_model: Model, slides: list[Path], embedded: EmbeddedSlide, tmp_path: Path
) -> None:
    """Their coordinates, as far as they are on the slide, as those of a flat run, in another order, without
    supertiles."""
    execution = ExecutionOptions(output_dir=tmp_path, batch_size=5)
    tile_model.embed_tiles([slides[2]], preprocessing=PREPROCESSING, execution=execution)
    tiling = load_coordinates(tmp_path / "tiles", "s2")
    assert embedded.tile_x is not None and embedded.tile_y is not None
    x, y = embedded.tile_x.ravel(), embedded.tile_y.ravel()
    order = np.lexsort((y, x))
    order = order[(x[order] < tiling.dimensions[0]) & (y[order] < tiling.dimensions[1])]
    assert 0 < len(order) < len(x)
    flat = replace(tiling, x=x[order], y=y[order], tissue_fractions=np.ones(len(order), np.float32))
    write_coordinates(tmp_path / "flat", flat)
    config = PREPROCESSING.updated(read_coordinates_from=tmp_path / "flat", use_supertiles=False)
    found = tile_model.embed_slide(slides[2], config).tile_embeddings
    expected = embedded.tile_embeddings.reshape(len(x), -1)[order]
    assert torch.allclose(found, expected, atol=ROUNDING, rtol=0)


def test_pixels_are_openslides_and_white_beyond_the_edge(
    tile_model: Model, slides: list[Path], embedded: EmbeddedSlide
) -> None:
    assert embedded.tile_x is not None and embedded.tile_y is not None
    with openslide.OpenSlide(slides[2]) as slide:
        size = slide.dimensions[0]
        outside = np.argwhere(embedded.tile_x >= size)
        inside = np.argwhere((embedded.tile_x + 128 <= size) & (embedded.tile_y + 128 <= size))
        assert len(outside) and len(inside)
        for region, k in [*inside[::7], *outside[:3]]:
            place = int(embedded.tile_x[region, k]), int(embedded.tile_y[region, k])
            pixels = np.full((128, 128, 3), 255, np.uint8)
            read = np.asarray(slide.read_region(place, 0, (128, 128)))
            pixels[read[..., 3] > 0] = read[read[..., 3] > 0][:, :3]
            expected = _encoded(tile_model, pixels)
            #: cuCIM and OpenSlide decode JPEG within one grey level of 255 of each other.
            assert torch.allclose(embedded.tile_embeddings[region, k], expected, atol=1.5 / 255)


def _encoded(model: Model, pixels: np.ndarray) -> Tensor:
    """Area averaging to 64 px, nothing else but scaling, the encoder."""
    import cv2

    small = torch.from_numpy(cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA)).permute(2, 0, 1)
    return model.encoder(small[None].float() / 255)[0]


def test_regions_are_hs2ps_tiles_of_that_size(tile_model: Model, slides: list[Path], tmp_path: Path) -> None:
    """On a level of the requested spacing nothing is rounded: a tiling of tiles as large as regions
    (compared with hs2p itself in tests/tiling) has the same origins."""
    filtering = {"ref_tile_size": 64}
    regions = tile_model.embed_slide(slides[1], REGIONS.updated(filtering=filtering))
    large = PREPROCESSING.updated(requested_tile_size_px=192, filtering=filtering)
    tiles = tile_model.embed_slide(slides[1], large)
    assert np.array_equal(regions.x, tiles.x) and np.array_equal(regions.y, tiles.y)


@pytest.mark.parametrize("spacing", [0.5, 0.6, 0.77, 1.0, 1.9])
@pytest.mark.parametrize("multiple", [2, 6])
def test_geometry_is_tile_first(spacing: float, multiple: int) -> None:
    tile = tile_geometry(
        requested_tile_size_px=224,
        requested_spacing_um=spacing,
        base_spacing_um=0.2528,
        downsamples=[1.0, 4.0003],
    )
    region = region_geometry(tile, multiple)
    assert region.requested_tile_size_px == 224 * multiple
    assert region.read_tile_size_px == tile.read_tile_size_px * multiple
    assert region.tile_size_lv0 == region.step_px_lv0 == tile.tile_size_lv0 * multiple
    assert subtile_geometry(region, multiple) == tile


def a_tiling(geometry: TileGeometry, x: list[int], y: list[int]) -> Tiling:
    return Tiling(
        sample_id="s",
        image_path=Path("s.svs"),
        mask_path=None,
        spacing_at_level_0=None,
        backend="tiff",
        requested_backend="auto",
        dimensions=(900, 700),
        downsamples=(1.0,),
        geometry=geometry,
        x=np.array(x),
        y=np.array(y),
        tissue_fractions=np.linspace(0, 1, len(x), dtype=np.float32),
        tissue_threshold=0.0,
        segmentation=Segmentation(
            method="hsv", requested_downsample=64, downsample=64, level=0, spacing_um=1.0
        ),
        filtering=FilterConfig(),
    )


def test_tiles_are_regrouped_region_by_region_and_row_by_row() -> None:
    """Two regions of 3 x 3 tiles of 10 px: every number in its place."""
    tile = tile_geometry(
        requested_tile_size_px=10, requested_spacing_um=0.5, base_spacing_um=0.5, downsamples=[1.0]
    )
    tiling = expand_regions(a_tiling(region_geometry(tile, 3), [0, 30], [5, 65]), 3)
    columns, rows = [0, 10, 20] * 3, [0, 0, 0, 10, 10, 10, 20, 20, 20]
    x, y = [columns, [30 + x for x in columns]], [[5 + y for y in rows], [65 + y for y in rows]]
    assert tiling.x.reshape(2, 9).tolist() == x and tiling.y.reshape(2, 9).tolist() == y
    assert tiling.tissue_fractions.tolist() == [0] * 9 + [1] * 9
    features = torch.arange(72.0).reshape(18, 4)
    flat = EmbeddedSlide(
        sample_id="s",
        tile_embeddings=features,
        slide_embedding=None,
        x=tiling.x,
        y=tiling.y,
        tile_size_lv0=10,
        image_path=Path("s.svs"),
        mask_path=None,
        num_tiles=18,
    )
    outcome = SlideOutcome(slide=as_slide("s.svs"), embedded=flat, tiling=tiling)
    made = regrouped(outcome).embedded
    assert made is not None and made.tile_x is not None and made.tile_y is not None
    assert made.tile_embeddings.shape == (2, 9, 4)
    assert torch.equal(made.tile_embeddings[1, 2], features[11])
    assert made.x.tolist() == [0, 30] and made.y.tolist() == [5, 65]
    assert made.tile_x.tolist() == x and made.tile_y.tolist() == y
    for other in (
        replace(outcome, tiling=replace(tiling, regions=None)),
        replace(outcome, embedded=None),
        replace(outcome, tiling=None),
    ):
        assert regrouped(other) is other


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"region_tile_multiple": 1}, "region_tile_multiple"),
        ({"requested_region_size_px": 200}, "requested_region_size_px=200"),
        ({"requested_region_size_px": 64}, "requested_region_size_px=64"),
        ({"requested_region_size_px": 192, "region_tile_multiple": 2}, "times 2"),
        ({"region_tile_multiple": 2, "overlap": 0.25}, "side by side"),
    ],
)
def test_what_makes_no_regions_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        PREPROCESSING.updated(**changes)


def test_region_size_alone_is_checked_against_the_presets_tiles(tile_model: Model) -> None:
    resolved = tile_model.resolve_preprocessing(PreprocessingConfig(requested_region_size_px=448))
    assert (resolved.region_tile_multiple, resolved.requested_tile_size_px) == (2, 224)
    with pytest.raises(ConfigError, match="requested_region_size_px=500"):
        tile_model.resolve_preprocessing(PreprocessingConfig(requested_region_size_px=500))


def test_regions_need_a_tile_level_preset(slide_model: Model) -> None:
    with pytest.raises(ConfigError, match="moozy-slide is slide-level"):
        slide_model.resolve_preprocessing(PreprocessingConfig(region_tile_multiple=2))


# on disk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["pt", "npz", "safetensors", "h5"])
def test_artifacts(
    tile_model: Model, slides: list[Path], embedded: EmbeddedSlide, tmp_path: Path, file_format: Any
) -> None:
    execution = ExecutionOptions(output_dir=tmp_path, output_format=file_format)
    result = Pipeline(tile_model, REGIONS, execution).run(slides)
    assert not result.tile_artifacts and not (tmp_path / "tile_embeddings").exists()
    artifact = result.hierarchical_artifacts[2]
    assert find_hierarchical_artifact(tmp_path, "s2") == artifact
    assert artifact.path == tmp_path / f"hierarchical_embeddings/s2.{file_format}"
    values = load_embeddings(artifact.path)
    assert torch.allclose(values, embedded.tile_embeddings, atol=ROUNDING, rtol=0)
    assert (artifact.num_regions, artifact.tiles_per_region) == values.shape[:2]
    meta = artifact.metadata
    assert (meta["region_tile_multiple"], meta["subtile_order"]) == (3, "row_major")
    assert (meta["requested_region_size_px"], meta["read_region_size_px"]) == (
        192,
        meta["read_tile_size_px"] * 3,
    )
    assert meta["tile_size_lv0"] == 128
    regions = load_coordinates(tmp_path / "tiles", "s2")
    assert np.array_equal(regions.x, embedded.x) and regions.geometry.requested_tile_size_px == 192
    coords = load_coords(artifact.path)
    if file_format in ("h5", "safetensors"):
        assert coords is not None and np.array_equal(coords, np.stack([embedded.x, embedded.y], 1))
    row = result.process_list_path.read_text().splitlines()[3]
    assert ",hierarchical," in row and f",{embedded.num_tiles}," in row


def test_resume_compares_regions(tile_model: Model, slides: list[Path], tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        return Pipeline(tile_model, REGIONS.updated(**changes), ExecutionOptions(output_dir=tmp_path)).run(
            slides
        )

    first = run()
    again = run(resume=True)
    assert (again.resumed, again.hierarchical_artifacts) == (3, first.hierarchical_artifacts)
    assert "no tissue" not in again.process_list_path.read_text()
    other = run(resume=True, region_tile_multiple=2)
    assert (other.resumed, other.recomputed) == (0, {})  # other regions go beside the first
    assert all(artifact.path.is_file() for artifact in first.hierarchical_artifacts)
    flat = run(resume=True, region_tile_multiple=None)
    assert flat.resumed == 0 and len(flat.tile_artifacts) == 3


def test_run_with_coordinates_and_tile_archives(
    tile_model: Model, slides: list[Path], tmp_path: Path
) -> None:
    def run(config: PreprocessingConfig, name: str) -> Pipeline:
        return Pipeline(tile_model, config, ExecutionOptions(output_dir=tmp_path / name))

    first = run(REGIONS.updated(save_tiles=True), "first").run(slides)
    expected = [load_embeddings(a.path) for a in first.hierarchical_artifacts]
    again = run(REGIONS, "again").run_with_coordinates(tmp_path / "first")
    for artifact, values in zip(again.hierarchical_artifacts, expected, strict=True):
        assert torch.allclose(load_embeddings(artifact.path), values, atol=ROUNDING, rtol=0)
    archived = run(REGIONS.updated(read_tiles_from=tmp_path / "first"), "archived").run(slides)
    for artifact, values in zip(archived.hierarchical_artifacts, expected, strict=True):
        found = load_embeddings(artifact.path)
        assert torch.nn.functional.cosine_similarity(found, values, dim=-1).min() > 0.999  # JPEG, quality 90
    (wrong,) = run(PREPROCESSING, "wrong").run_with_coordinates(tmp_path / "first", slides=slides[:1]).failed
    assert "tile size in px 192; 64 is needed" in str(wrong.error)


def test_a_region_with_a_bad_tile_is_left_out_whole(
    tile_model: Model, slides: list[Path], embedded: EmbeddedSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embedded.tile_x is not None and embedded.tile_y is not None
    bad = (int(embedded.tile_x[1, 4]), int(embedded.tile_y[1, 4]))
    read = SlideSource.read_tile

    def corrupt(self: SlideSource, number: int) -> Any:
        raise SlideReadError("corrupt")

    def read_tile(self: SlideSource, tile: int, target: Any) -> None:
        if (int(self.tiling.x[tile]), int(self.tiling.y[tile])) == bad:
            raise SlideReadError("corrupt")
        read(self, tile, target)

    monkeypatch.setattr(SlideSource, "fetch", corrupt)
    monkeypatch.setattr(SlideSource, "read_tile", read_tile)
    with pytest.raises(SlideReadError, match=str(bad[0])):
        tile_model.embed_slide(slides[2], REGIONS)
    (outcome,) = tile_model.iter_slides([slides[2]], REGIONS.updated(on_bad_tile="skip"))
    found = outcome.embedded
    assert found is not None and [(tile.x, tile.y) for tile in outcome.skipped] == [bad]
    kept = [region for region in range(len(embedded.x)) if region != 1]
    assert np.array_equal(found.x, embedded.x[kept]) and found.num_tiles == 9 * len(kept)
    assert torch.allclose(found.tile_embeddings, embedded.tile_embeddings[kept], atol=ROUNDING, rtol=0)


def test_slide_without_tissue(tile_model: Model, blank_slide: Path, tmp_path: Path) -> None:
    found = tile_model.embed_slide(blank_slide, REGIONS)
    assert found.tile_embeddings.shape == (0, 9, 195) and found.x.shape == (0,)
    execution = ExecutionOptions(output_dir=tmp_path)
    result = Pipeline(tile_model, REGIONS, execution).run([blank_slide])
    assert result.without_tissue == ("blank",) and result.hierarchical_artifacts[0].num_regions == 0


def test_the_documents_example(real_slide: Callable[[str], Path]) -> None:
    """As written, but for the preset, whose weights are gated and large."""
    model = Model.from_preset("scattering", device="cpu")
    preprocessing = PreprocessingConfig(
        requested_spacing_um=0.5,
        requested_tile_size_px=224,
        region_tile_multiple=6,  # 6x6 tiles per region
    )
    slide = Slide(sample_id="a", image_path=real_slide("CMU-1-Small-Region.svs"))
    embedded = model.embed_slide(slide, preprocessing=preprocessing)
    assert embedded.tile_embeddings.shape == (len(embedded.x), 36, model.feature_dim) and len(embedded.x) >= 2


def test_the_picture_shows_regions(tile_model: Model, slides: list[Path], tmp_path: Path) -> None:
    config = REGIONS.updated(preview={"save_tiling_preview": True, "downsample": 1})
    Pipeline(tile_model, config, ExecutionOptions(output_dir=tmp_path)).run([slides[0]])
    import cv2

    picture = cv2.imread(str(tmp_path / "preview/tiling/s0.jpg"))
    x, y = _first_region(tmp_path)
    line = picture[y + 80 : y + 280, x].astype(int).sum(1)
    between = picture[y + 80 : y + 120, x + 128].astype(int).sum(1)  # where a tile ends within the region
    assert line.max() < between.min()


def _first_region(folder: Path) -> tuple[int, int]:
    meta = json.loads((folder / "hierarchical_embeddings/s0.meta.json").read_text())
    with np.load(meta["coordinates_npz_path"]) as arrays:
        return int(arrays["x"][0]), int(arrays["y"][0])
