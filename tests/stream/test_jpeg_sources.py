"""Slides decoded and assembled by DALI: the host's pixels, the host's errors, the same embeddings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec import Model, tile_embedder
from slide2vec.config import PreprocessingConfig
from slide2vec.errors import BackendError, SlideReadError
from slide2vec.prepare import dali_archive
from slide2vec.readers.probe import probe
from slide2vec.slides import Slide
from slide2vec.stream import SlidePlan, plan_slide
from slide2vec.stream.decode_paths import DeviceTransfer
from slide2vec.stream.tile_sources import TileSource, place_singly

CPU = torch.device("cpu")
NAME = "raw + dali"
#: Per tile of 448 px, in a block of 23 that takes 93 compressed tiles: 136, of which DALI itself makes 45.
MOST_CALLS = 160
#: Embeddings of equal pixels.
MIN_COSINE = 1 - 1e-7

pytestmark = pytest.mark.skipif(
    dali_archive.unavailable() is not None, reason="NVIDIA DALI is not installed (slide2vec[cuda])"
)


def planned(path: Path, spacing_at_level_0: float | None = None, **options: Any) -> SlidePlan:
    given = {"requested_spacing_um": 0.5, "requested_tile_size_px": 224, "tissue_threshold": 0.1, **options}
    slide = Slide(sample_id="s", image_path=path, spacing_at_level_0=spacing_at_level_0)
    return plan_slide(slide, PreprocessingConfig(**given))


def by_dali(plan: SlidePlan) -> SlidePlan:
    found = DeviceTransfer(CPU, True, [NAME]).bind(plan)
    assert found.decode_path == f"{NAME} on the device"
    return found


def empty_tiles(plan: SlidePlan) -> np.ndarray:
    side = plan.tiling.geometry.requested_tile_size_px
    return np.zeros((len(plan.tiling), side, side, 3), np.uint8)


def pixels(plan: SlidePlan) -> np.ndarray:
    """Every tile of a plan, (N, S, S, 3), as the stream's readers place them."""
    tiles = empty_tiles(plan)
    for number, block in enumerate(plan.source.blocks):
        plan.source.place(number, plan.source.fetch(number), [tiles[tile] for tile in block])
    return tiles


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CMU-1-Small-Region.svs", {"requested_spacing_um": 0.998}),  # RGB; reduced by two
        (
            "rationai-CMU-1-small.tiff",
            {"requested_spacing_um": 4.0, "requested_tile_size_px": 56},
        ),  # by a fraction
        ("aperio-jpeg-pyramid.svs", {"requested_spacing_um": 1.0, "requested_tile_size_px": 56}),  # 4:2:0
        ("aperio-jpeg-pyramid.svs", {"requested_spacing_um": 2.0, "requested_tile_size_px": 56}),  # level 1
        ("generic-pyramid.ome.tiff", {"requested_spacing_um": 2.0, "requested_tile_size_px": 64}),
        (
            "camelyon-jpeg.dcm",
            {"spacing_at_level_0": 4.0, "requested_spacing_um": 8.0, "requested_tile_size_px": 32},
        ),
    ],
)
def test_pixels_are_the_hosts(name: str, options: dict[str, Any], real_slide: Callable[[str], Path]) -> None:
    host, plan = planned(real_slide(name), **options), planned(real_slide(name), **options)
    expected, plan = pixels(host), by_dali(plan)
    found = pixels(plan)
    assert len(found) > 3 and plan.source.backend == host.source.backend
    np.testing.assert_array_equal(found, expected)
    single = empty_tiles(plan)
    for tile in (0, len(single) - 1):
        plan.source.read_tile(tile, single[tile])
        np.testing.assert_array_equal(single[tile], found[tile])
    for opened in (host, plan):
        opened.source.close()
    with pytest.raises(SlideReadError, match="closed"):
        plan.source.fetch(0)


@pytest.mark.parametrize(
    ("name", "reason"), [("generic-lzw-pyramid.tiff", "LZW tiles"), ("XYC-jpeg.ome.tiff", "JFIF marker")]
)
def test_slides_that_it_cannot_take_say_why(
    name: str, reason: str, real_slide: Callable[[str], Path]
) -> None:
    plan = planned(real_slide(name), 1.0, requested_spacing_um=2.0, requested_tile_size_px=56)
    assert len(plan.tiling)
    with pytest.raises(BackendError, match=rf"the GPU cannot decode it \(raw \+ dali: .*{reason}"):
        DeviceTransfer(CPU, True, [NAME]).bind(plan)


def cut_short(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) // 2]


def all_zeros(jpeg: bytes) -> bytes:
    return bytes(len(jpeg))


def garbage(jpeg: bytes) -> bytes:
    return np.random.default_rng(0).integers(0, 256, len(jpeg), np.uint8).tobytes()


def garbage_inside(jpeg: bytes) -> bytes:
    """Of which DALI makes pixels."""
    start = len(jpeg) // 2
    noise = np.random.default_rng(0).integers(0, 255, len(jpeg) - 2 - start, np.uint8)
    return jpeg[:start] + noise.tobytes() + jpeg[-2:]


def other_size(jpeg: bytes) -> bytes:
    """Its header says 128 x 128 px."""
    frame = jpeg.find(b"\xff\xc0")
    return jpeg[: frame + 5] + b"\x00\x80\x00\x80" + jpeg[frame + 9 :]


@pytest.mark.parametrize("damage", [cut_short, all_zeros, garbage, garbage_inside, other_size])
def test_damage_is_the_error_of_its_tiles_and_spoils_no_others(
    damage: Callable[[bytes], bytes], real_slide: Callable[[str], Path], tmp_path: Path
) -> None:
    original = real_slide("aperio-jpeg-pyramid.svs")
    options: Any = {"requested_spacing_um": 2.0, "requested_tile_size_px": 56}
    whole = planned(original, **options)
    expected, middle = pixels(whole), len(whole.tiling) // 2
    level = probe(Slide(sample_id="s", image_path=original)).levels[1]
    assert level.tile is not None and whole.tiling.geometry.read_level == 1
    column, row = (int(at[middle]) // 4 // level.tile[0] for at in (whole.tiling.x, whole.tiling.y))
    broken = row * -(-level.width // level.tile[0]) + column
    start, count = int(level.offsets[broken]), int(level.counts[broken])
    data = bytearray(original.read_bytes())
    jpeg = damage(bytes(data[start : start + count]))
    data[start : start + count] = jpeg.ljust(count, b"\0")
    path = tmp_path / "damaged.svs"
    path.write_bytes(data)
    host, plan = planned(path, **options), by_dali(planned(path, **options))
    (number,) = range(len(plan.source.blocks))
    found, bad = {}, {}
    for name, opened in (("host", host), ("dali", plan)):
        found[name] = empty_tiles(opened)
        targets = list(found[name][opened.source.blocks[number]])
        with pytest.raises(SlideReadError, match=r"^slide s: .*damaged"):
            opened.source.place(number, opened.source.fetch(number), targets)
        bad[name] = _messages(opened.source, number, list(found[name]))
    assert bad["dali"] == bad["host"] and 1 <= len(bad["dali"]) < len(expected)
    good = [tile for tile in range(len(expected)) if tile not in bad["dali"]]
    np.testing.assert_array_equal(found["dali"][good], expected[good])
    np.testing.assert_array_equal(found["host"][good], expected[good])


def _messages(source: TileSource, number: int, tiles: list[np.ndarray]) -> dict[int, str]:
    targets = [tiles[tile] for tile in source.blocks[number]]
    return {tile: str(error) for tile, error in place_singly(source, number, targets).items()}


def test_calls_of_python_per_tile(real_slide: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would wait for: counted, since a CPU says little of its time."""
    plan = by_dali(planned(real_slide("aperio-jpeg-pyramid.svs"), requested_spacing_um=0.998))
    (block,) = plan.source.blocks
    side = plan.tiling.geometry.requested_tile_size_px
    targets = list(torch.zeros((len(block), side, side, 3), dtype=torch.uint8))
    plan.source.place(0, plan.source.fetch(0), targets)
    counted = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        plan.source.place(0, plan.source.fetch(0), targets)
    finally:
        sys.setprofile(None)
    assert counted <= MOST_CALLS * len(block)


def test_damage_in_the_entropy_data_of_a_real_file(broken_dir: Path) -> None:
    host = planned(broken_dir / "jpeg_entropy_cucim.svs")
    plan = by_dali(planned(broken_dir / "jpeg_entropy_cucim.svs"))
    messages = []
    for opened in (host, plan):
        with pytest.raises(SlideReadError) as raised:
            pixels(opened)
        messages.append(str(raised.value))
    assert messages[1] == messages[0]


def test_embeddings_of_a_model(real_slide: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: `Model` over the device's stream, here on the CPU."""
    path, config = real_slide("aperio-jpeg-pyramid.svs"), PreprocessingConfig(requested_spacing_um=1.0)
    expected = Model.from_preset("scattering", device="cpu").embed_slide(path, config)
    monkeypatch.setattr(
        tile_embedder, "tile_transfer", lambda device, gpu_decode: DeviceTransfer(device, True, [NAME])
    )
    found = Model.from_preset("scattering", device="cpu").embed_slide(path, config)
    cosine = torch.nn.functional.cosine_similarity(
        found.tile_embeddings.double(), expected.tile_embeddings.double()
    )
    assert found.num_tiles > 0 and cosine.min() >= MIN_COSINE
