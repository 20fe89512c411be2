"""The device's stream, run on the CPU: its decode paths give the host's pixels, and the right one is
taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stream_helpers import PlanBy, StandInDecoder

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import BackendError, ConfigError, SlideReadError
from slide2vec.prepare import dali_archive
from slide2vec.prepare.gather_tiles import gather_by_torch
from slide2vec.progress import RunFinished
from slide2vec.readers import decoders
from slide2vec.readers.jpeg_tiles import JpegTileReader
from slide2vec.slides import Slide
from slide2vec.stream import SlidePlan, Stream, decode_paths, plan_slide
from slide2vec.stream.decode_paths import DecodePath, DeviceTransfer, jpeg_path, tile_transfer
from slide2vec.stream.transfer import HostTransfer, TileTransfer
from slide2vec.tiling.archives import write_archive

CPU = torch.device("cpu")
#: What the project promises of embeddings, whatever the decode path (the slide is reduced by 4.008 here).
MIN_COSINE = 0.9999
NVIMGCODEC = pytest.mark.skipif(
    decoders.nvimgcodec_unavailable() is not None, reason="nvImageCodec is not installed"
)


def planned(path: Path, **options: Any) -> SlidePlan:
    config = PreprocessingConfig(
        **{"requested_spacing_um": 0.5, "requested_tile_size_px": 224, "tissue_threshold": 0.1, **options}
    )
    return plan_slide(Slide(sample_id="s", image_path=path), config)


def pixels(plan: SlidePlan) -> np.ndarray:
    """Every tile of a plan, (N, S, S, 3), as the stream's readers place them."""
    side = plan.tiling.geometry.requested_tile_size_px
    tiles = np.zeros((len(plan.tiling), side, side, 3), np.uint8)
    for number, block in enumerate(plan.source.blocks):
        plan.source.place(number, plan.source.fetch(number), [tiles[tile] for tile in block])
    return tiles


def singly(plan: SlidePlan) -> np.ndarray:
    side = plan.tiling.geometry.requested_tile_size_px
    tiles = np.zeros((len(plan.tiling), side, side, 3), np.uint8)
    for tile, target in enumerate(tiles):
        plan.source.read_tile(tile, target)
    return tiles


@NVIMGCODEC
@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("CMU-1-Small-Region.svs", 0.5),  # RGB components without a marker
        ("CMU-1-Small-Region.svs", 0.998),  # reduced by two
        ("CMU-1-Small-Region.svs", 0.75),  # by a fraction
        ("aperio-jpeg-pyramid.svs", 2.0),
        ("generic-jpeg-bigtiff-pyramid.tiff", 0.5),
    ],
)
def test_assembled_tiles_give_the_hosts_pixels(
    name: str, spacing: float, real_slide: Callable[[str], Path]
) -> None:
    path = real_slide(name)
    options = {"requested_spacing_um": spacing, "requested_tile_size_px": 112}
    host = planned(path, **options)
    plan = DeviceTransfer(CPU).bind(planned(path, **options))
    assert plan.decode_path == "raw + nvimgcodec on the device" and plan.source.backend == host.source.backend
    expected, found = pixels(host), pixels(plan)
    assert len(found) > 3
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(singly(plan), found)
    for opened in (host, plan):
        opened.source.close()
    with pytest.raises(SlideReadError, match="closed"):
        plan.source.fetch(0)


@pytest.mark.parametrize("gpu_decode", [False, "auto"])
@pytest.mark.parametrize("name", ["generic-lzw-pyramid.tiff", "CMU-1-Small-Region.webp.tiff"])
def test_uploading_gives_the_hosts_pixels(
    gpu_decode: Any, name: str, real_slide: Callable[[str], Path]
) -> None:
    path = real_slide(name)
    options = {"requested_spacing_um": 4.0, "requested_tile_size_px": 56}
    if "webp" in name:
        pytest.importorskip("pyvips")
        options = {"requested_spacing_um": 0.5}
    plans = []
    for _ in range(2):
        slide = Slide(sample_id="s", image_path=path, spacing_at_level_0=0.499 if "webp" in name else None)
        config = PreprocessingConfig(**{"requested_tile_size_px": 224, "tissue_threshold": 0.1, **options})
        plans.append(plan_slide(slide, config))
    plan = DeviceTransfer(CPU, gpu_decode).bind(plans[1])
    assert plan.decode_path == f"{plans[0].source.backend}, uploaded"
    expected = pixels(plans[0])
    np.testing.assert_array_equal(pixels(plan), expected)
    np.testing.assert_array_equal(singly(plan), expected)


class Wrong(StandInDecoder):
    """Takes RGB for YCbCr, as cuCIM does on a GPU."""

    def decode(self, jpegs: Any, form: Any) -> Any:
        return super().decode([jpeg.replace(b"Adobe\x00\x64", b"Adobx\x00\x64") for jpeg in jpegs], form)


class Breaks(StandInDecoder):
    def decode(self, *_: Any) -> Any:
        raise RuntimeError("no hardware for it")


@pytest.mark.parametrize(("decoder", "reason"), [(Wrong, "differ by"), (Breaks, "no hardware for it")])
def test_a_decode_path_with_wrong_pixels_is_left(
    decoder: Any,
    reason: str,
    reference_slide: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened: list[JpegTileReader] = []

    path = jpeg_path(decoder(), gather_by_torch)

    def open_jpegs(probe: Any) -> JpegTileReader:
        opened.append(path.open(probe))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(decode_paths, "DECODE_PATHS", {"bad": lambda device: path._replace(open=open_jpegs)})
    with caplog.at_level(logging.WARNING, logger=decode_paths.__name__):
        plan = DeviceTransfer(CPU, "auto", ["bad"]).bind(planned(reference_slide))
    assert plan.decode_path is not None and plan.decode_path.endswith(", uploaded")
    assert "slide s: decoded on the CPU" in caplog.text and reason in caplog.text
    np.testing.assert_array_equal(pixels(plan), pixels(planned(reference_slide)))
    with pytest.raises(SlideReadError, match="closed"):
        opened[0].read_region((0, 0), 0, (10, 10))
    with pytest.raises(BackendError, match=f"slide s: gpu_decode=True.*{reason}.*gpu_decode='auto'"):
        DeviceTransfer(CPU, True, ["bad"]).bind(planned(reference_slide))


def test_a_reason_is_a_warning_once(
    reference_slide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the slides are called and wherever they lie: the next ones are lines of the log."""

    def refuse(probe: Any) -> Any:
        raise BackendError(f"slide {probe.name}: {probe.path} cannot be opened")

    monkeypatch.setattr(decode_paths, "DECODE_PATHS", {"bad": lambda device: DecodePath(refuse)})
    transfer = DeviceTransfer(CPU, "auto", ["bad"])
    config = PreprocessingConfig(requested_spacing_um=2.0, requested_tile_size_px=56, tissue_threshold=0.1)
    with caplog.at_level(logging.INFO, logger=decode_paths.__name__):
        for name in ("first", "second"):
            path = tmp_path / name / "slide.svs"
            path.parent.mkdir()
            path.symlink_to(reference_slide)
            plan = transfer.bind(plan_slide(Slide(sample_id=name, image_path=path), config))
            plan.source.close()
    found = [
        (record.levelname, f"slide {name}: " in record.message)
        for name, record in zip(("first", "second"), caplog.records, strict=True)
    ]
    assert found == [("WARNING", True), ("INFO", True)]


def test_the_second_decode_path_is_tried(reference_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_paths(monkeypatch, bad=Wrong, good=StandInDecoder)
    plan = DeviceTransfer(CPU, "auto", ["bad", "good"]).bind(planned(reference_slide))
    assert plan.decode_path == "good on the device"


def with_paths(monkeypatch: pytest.MonkeyPatch, **decoders: Callable[[], Any]) -> None:
    """Have decode paths of these decoders, by name."""

    def made(decoder: Callable[[], Any]) -> Callable[[torch.device], DecodePath]:
        return lambda device: jpeg_path(decoder(), gather_by_torch)

    paths = {name: made(decoder) for name, decoder in decoders.items()}
    monkeypatch.setattr(decode_paths, "DECODE_PATHS", paths)


def test_what_decides_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(tile_transfer(CPU, "auto"), HostTransfer) and isinstance(
        tile_transfer(CPU, False), HostTransfer
    )
    with pytest.raises(ConfigError, match="gpu_decode=True needs an NVIDIA GPU"):
        tile_transfer(CPU, True)
    for module in (decoders, dali_archive):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gpu_decode=True: nvImageCodec is not .*DALI is not .*'auto'"):
        DeviceTransfer(CPU, True)


def run_through(given: TileTransfer, plans: dict[str, Callable[[], SlidePlan]]) -> tuple[dict[str, Any], Any]:
    events: list[Any] = []

    class Engine:
        runtime, device, precision, feature_dim = "test", CPU, "fp32", 3
        layout = "float32_nchw"

        def run(self, tiles: torch.Tensor) -> torch.Tensor:
            return tiles.float().mean(dim=(1, 2))

        def close(self) -> None:
            pass

    class Plain:
        def prepare(self, tiles: torch.Tensor) -> torch.Tensor:
            return tiles

    class Reporter:
        def emit(self, event: Any) -> None:
            events.append(event)

        def close(self) -> None:
            pass

    stream = Stream(
        Engine(),  # type: ignore[arg-type]
        Plain(),
        batch_size=7,
        tile_size_px=224,
        readers=3,
        planners=2,
        ahead=2,
        reporter=Reporter(),
        transfer=given,
    )
    slides = [Slide(sample_id=name, image_path=Path("x")) for name in plans]
    outcomes = {
        o.slide.sample_id: o for o in stream.run(slides, PlanBy(lambda slide: plans[slide.sample_id]()))
    }
    return outcomes, next(event.summary for event in events if isinstance(event, RunFinished))


@NVIMGCODEC
def test_a_stream_over_several_decode_paths(
    real_slide: Callable[[str], Path], tmp_path: Path, tiffs_with_damage: Callable[[Path], Path]
) -> None:
    """One that is decoded on the device, one that is uploaded, one that is damaged."""
    jpeg, lzw = real_slide("CMU-1-Small-Region.svs"), real_slide("generic-lzw-pyramid.tiff")
    damaged = tiffs_with_damage(tmp_path)
    plans = {
        "jpeg": lambda: planned(jpeg),
        "lzw": lambda: planned(lzw, requested_spacing_um=2.0),
        "damaged": lambda: planned(damaged),
    }
    expected, host = run_through(HostTransfer(), plans)
    found, summary = run_through(DeviceTransfer(CPU), plans)
    for name in ("jpeg", "lzw"):
        assert torch.equal(found[name].embedded.tile_embeddings, expected[name].embedded.tile_embeddings)
        assert found[name].backend == expected[name].backend
    assert isinstance(found["damaged"].error, SlideReadError)
    assert summary.roads["raw + nvimgcodec on the device"] >= 1
    assert "read by raw + nvimgcodec on the device (" in str(summary)
    assert set(host.roads) == {expected["jpeg"].backend, expected["lzw"].backend}


@pytest.fixture
def tiffs_with_damage(reference_slide: Path) -> Callable[[Path], Path]:
    """A copy of the reference slide with a compressed tile overwritten that its tiles need."""

    def write(folder: Path) -> Path:
        from slide2vec.readers.probe import probe

        plan = planned(reference_slide)
        level = probe(Slide(sample_id="s", image_path=reference_slide)).levels[0]
        assert level.tile is not None
        x, y = int(plan.tiling.x[-1]) // level.tile[0], int(plan.tiling.y[-1]) // level.tile[1]
        number = y * -(-level.width // level.tile[0]) + x
        plan.source.close()
        data = bytearray(reference_slide.read_bytes())
        start, size = int(level.offsets[number]), int(level.counts[number])
        data[start : start + size] = bytes(size)
        path = folder / "damaged.svs"
        path.write_bytes(data)
        return path

    return write


def test_archives_are_uploaded_or_decoded_on_the_device(
    reference_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (slide2vec[cuda])")
    from slide2vec.stream import tile_sources

    plan = planned(reference_slide)
    tiles = pixels(plan)
    blocks = ((block, tiles[block]) for block in plan.source.blocks)
    path = write_archive(tmp_path, plan.tiling, blocks)
    expected = pixels(SlidePlan(plan.slide, tile_sources.open_archive(path, plan.tiling), plan.tiling))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # open_archive then takes DALI
    for gpu_decode, decode_path in (("auto", "archive, dali on the device"), (False, "archive, uploaded")):
        archive = SlidePlan(plan.slide, tile_sources.open_archive(path, plan.tiling), plan.tiling)
        adopted = DeviceTransfer(CPU, gpu_decode).bind(archive)  # type: ignore[arg-type]
        assert adopted.decode_path == decode_path
        np.testing.assert_array_equal(pixels(adopted), expected)
        assert adopted.decoded_by() == {decode_path: len(expected)}
        np.testing.assert_array_equal(singly(adopted), expected)
        adopted.source.close()
    archive = SlidePlan(plan.slide, tile_sources.open_archive(path, plan.tiling), plan.tiling)
    adopted = DeviceTransfer(CPU).bind(archive)
    assert adopted.decode_path == "archive, dali on the device"
    archive.source._works = False  # type: ignore[attr-defined]  # as after a failure of DALI
    np.testing.assert_array_equal(pixels(adopted), expected)
    assert adopted.decoded_by() == {"archive, uploaded": len(expected)}
    adopted.source.close()


@NVIMGCODEC
def test_embeddings_of_a_model_do_not_depend_on_the_transfer(
    reference_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: `Model` over the device's stream, here on the CPU."""
    from slide2vec import Model, tile_embedder

    scattering = Model.from_preset("scattering", device="cpu")
    config = PreprocessingConfig(requested_spacing_um=2.0)
    expected = scattering.embed_slide(reference_slide, config)
    scattering = Model.from_preset("scattering", device="cpu")  # which keeps no feed of another call yet
    monkeypatch.setattr(
        tile_embedder, "tile_transfer", lambda device, gpu_decode: DeviceTransfer(device, True)
    )
    found = scattering.embed_slide(reference_slide, config)
    cosine = torch.nn.functional.cosine_similarity(found.tile_embeddings, expected.tile_embeddings)
    assert found.num_tiles > 0 and cosine.min() >= MIN_COSINE
