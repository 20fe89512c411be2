"""Tile archives through DALI: the same pixels as without it, and the same errors."""

from __future__ import annotations

import io
import logging
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from slide2vec.config import FilterConfig
from slide2vec.errors import ExtraMissingError, SlideReadError
from slide2vec.geometry import tile_geometry
from slide2vec.prepare import dali_archive
from slide2vec.prepare.dali_archive import DaliArchive
from slide2vec.tiling import Segmentation, Tiling
from slide2vec.tiling.archives import TileArchive

Pixels = NDArray[np.uint8]

SIDE, COUNT, BLOCK = 32, 43, 4


@pytest.fixture
def dali() -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (slide2vec[cuda])")


def a_tiling(count: int = COUNT) -> Tiling:
    return Tiling(
        sample_id="s",
        image_path=Path("s.tiff"),
        mask_path=None,
        spacing_at_level_0=0.5,
        backend="array",
        requested_backend="auto",
        dimensions=(10_000, 100),
        downsamples=(1.0,),
        geometry=tile_geometry(
            requested_tile_size_px=SIDE, requested_spacing_um=0.5, base_spacing_um=0.5, downsamples=[1.0]
        ),
        x=np.arange(count) * SIDE,
        y=np.zeros(count, np.int64),
        tissue_fractions=np.ones(count, np.float32),
        tissue_threshold=0.1,
        segmentation=Segmentation(
            method="hsv", requested_downsample=64, downsample=64, level=0, spacing_um=0.5
        ),
        filtering=FilterConfig(ref_tile_size=SIDE),
    )


def make_jpegs(count: int = COUNT) -> list[bytes]:
    """Of all the kinds that an archive may hold."""
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"restart_marker_blocks": 1},
    ]
    made = []
    for number in range(count):
        colours = rng.integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image = image.convert("L") if number % 7 == 3 else image
        image.save(buffer, format="JPEG", quality=90, **kinds[number % len(kinds)])
        made.append(buffer.getvalue())
    return made


def make_archive(folder: Path, jpegs: list[bytes]) -> TileArchive:
    """In another order than that of the tiles."""
    path = folder / "s.tiles.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in np.random.default_rng(1).permutation(len(jpegs)):
            info = tarfile.TarInfo(f"./{number:06d}.jpeg")
            info.size = len(jpegs[number])
            info.pax_headers = {"mtime": "1.5"}
            tar.addfile(info, io.BytesIO(jpegs[number]))
    return TileArchive(path, a_tiling(len(jpegs)), block=BLOCK)


def opened(folder: Path, jpegs: list[bytes] | None = None) -> DaliArchive:
    archive = make_archive(folder, make_jpegs() if jpegs is None else jpegs)
    return DaliArchive(archive, tile_size_px=SIDE, threads=2)


def decoded(jpegs: list[bytes]) -> Pixels:
    """By Pillow, the reference."""
    return np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])


def place(source: DaliArchive, number: int, pixels: Pixels) -> bool:
    """Fetch and place a block; whether DALI decoded it."""
    data = source.fetch(number)
    source.place(number, data, [pixels[tile] for tile in source.blocks[number]])
    return isinstance(data, np.ndarray)


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("count", [1, BLOCK, COUNT])
def test_pixels_are_pillows(count: int, tmp_path: Path) -> None:
    jpegs = make_jpegs(count)
    pixels = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    source = opened(tmp_path, jpegs)
    assert source.backend == "archive"
    assert all([place(source, number, pixels) for number in range(len(source.blocks))])
    np.testing.assert_array_equal(pixels, decoded(jpegs))
    pixels[:] = 0
    assert not place(source, 0, pixels)  # for the second time
    np.testing.assert_array_equal(pixels[source.blocks[0]], decoded(jpegs)[source.blocks[0]])
    source.read_tile(count - 1, pixels[0])
    np.testing.assert_array_equal(pixels[0], decoded(jpegs)[-1])
    source.close()


@pytest.mark.usefixtures("dali")
def test_blocks_in_any_order_from_several_threads(tmp_path: Path) -> None:
    jpegs = make_jpegs()
    pixels = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
    source = opened(tmp_path, jpegs)
    order = np.random.default_rng(2).permutation(len(source.blocks)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: place(source, number, pixels), order))
    np.testing.assert_array_equal(pixels, decoded(jpegs))
    source.close()


@pytest.mark.usefixtures("dali")
def test_blocks_that_nobody_asks_for_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_archive, "MOST_KEPT", 3)
    jpegs = make_jpegs()
    pixels = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
    source = opened(tmp_path, jpegs)
    last = len(source.blocks) - 1
    by_dali = [place(source, number, pixels) for number in range(last, -1, -1)]
    assert by_dali == [True] * 3 + [False] * (last - 2)
    np.testing.assert_array_equal(pixels, decoded(jpegs))
    source.close()


def _zeroed(jpeg: bytes) -> bytes:
    """With zeros in the second half of its entropy data."""
    start = (jpeg.index(b"\xff\xda") + len(jpeg)) // 2
    return jpeg[:start] + bytes(len(jpeg) - 2 - start) + jpeg[-2:]


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("damage", ["cut", "bomb", "tables", "text", "inside"])
def test_damage_names_the_tile_and_spoils_no_other(damage: str, tmp_path: Path) -> None:
    jpegs = make_jpegs()
    whole = decoded(jpegs)
    source = opened(tmp_path)
    broken = int(source.blocks[5][1])
    source.close()
    frame = max(jpegs[broken].find(b"\xff\xc0"), jpegs[broken].find(b"\xff\xc2"))
    jpegs[broken] = {
        "cut": jpegs[broken][:-40],
        "bomb": jpegs[broken][: frame + 5] + b"\xea\x60\xea\x60" + jpegs[broken][frame + 9 :],
        "tables": jpegs[broken].replace(b"\xff\xdb", b"\xff\xfe"),  # only decoding shows it
        "text": b"not a picture",
        "inside": _zeroed(jpegs[broken]),  # DALI makes pixels of it
    }[damage]
    source = opened(tmp_path, jpegs)
    pixels = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
    by_dali = []
    for number in range(len(source.blocks)):
        if number != 5:
            by_dali.append(place(source, number, pixels))
            continue
        with pytest.raises(
            SlideReadError, match=rf"^slide s: tile {broken} at level-0 px \({broken * SIDE}, 0\)"
        ):
            place(source, number, pixels)
    assert by_dali == [True] * 5 + [damage == "inside"] * 5
    others = np.concatenate([block for number, block in enumerate(source.blocks) if number != 5])
    np.testing.assert_array_equal(pixels[others], whole[others])
    source.close()


@pytest.mark.usefixtures("dali")
def test_dali_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(dali_archive, "_build", broken)
    source = opened(tmp_path)
    pixels = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
    with caplog.at_level(logging.WARNING):
        assert not any([place(source, number, pixels) for number in range(len(source.blocks))])
    np.testing.assert_array_equal(pixels, decoded(make_jpegs()))
    assert len(caplog.records) == 1 and "no such operator" in caplog.text
    source.close()


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("wrong", [None, 0, -1])
def test_a_device_is_used_where_several_tiles_are_right(
    wrong: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    built, build, decode = [], dali_archive._build, DaliArchive._decoded

    def noted(archive: Any, blocks: Any, *more: Any) -> Any:
        built.append(np.concatenate(blocks))
        return build(archive, blocks, *more)

    def wrong_in_one(self: DaliArchive, pipeline: Any, count: int) -> Any:
        pixels = decode(self, pipeline, count)
        if wrong is not None:
            pixels[wrong] = pixels[wrong].flip(-1)
        return pixels

    monkeypatch.setattr(dali_archive, "_build", noted)
    monkeypatch.setattr(DaliArchive, "_decoded", wrong_in_one)
    source = opened(tmp_path)
    reason = source.use_device(torch.device("cpu"))
    (compared,) = built
    assert len(set(compared.tolist())) == 5 and np.ptp(compared) > COUNT // 2  # all over the slide
    pixels = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
    if wrong is None:
        assert reason is None and isinstance(source.fetch(0), torch.Tensor)
    else:
        assert reason is not None and "grey levels" in reason
        assert not any([place(source, number, pixels) for number in range(len(source.blocks))])
        np.testing.assert_array_equal(pixels, decoded(make_jpegs()))
    source.close()


@pytest.mark.usefixtures("dali")
def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    tasks = []
    for _ in range(4):
        source = opened(tmp_path)
        source.fetch(0)
        source.close()
        source.close()
        with pytest.raises(SlideReadError, match=r"slide s: .* was closed"):
            source.fetch(1)
        tasks.append([len(list(Path("/proc/self", kind).iterdir())) for kind in ("task", "fd")])
    assert tasks[1:] == tasks[1:2] * 3
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.usefixtures("dali")
def test_an_archive_without_tiles(tmp_path: Path) -> None:
    source = opened(tmp_path, [])
    assert source.blocks == ()
    source.close()


def test_without_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_archive, "find_spec", lambda name: None)
    assert "[cuda]" in str(dali_archive.unavailable())
    archive = make_archive(tmp_path, make_jpegs(2))
    with pytest.raises(ExtraMissingError, match=r"\[cuda\]"):
        DaliArchive(archive, tile_size_px=SIDE, threads=1)
    with pytest.raises(SlideReadError, match="closed"):
        archive.fetch(0)
