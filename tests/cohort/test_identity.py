"""What is certified is what was read: the files of a slide are looked at once, before they are read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig, RunResult
from slide2vec.artifacts import load_embeddings
from slide2vec.cohort.context import Cohort
from slide2vec.cohort.identity import compatibility, difference
from slide2vec.cohort.record_events import ForwardingRecorder
from slide2vec.cohort.sink import MemorySink
from slide2vec.cohort.slide_writer import SlideWriter
from slide2vec.config import FilterConfig
from slide2vec.errors import EmbedSlidesError, OutputError
from slide2vec.geometry import tile_geometry
from slide2vec.readers import fingerprint as fingerprints
from slide2vec.readers.fingerprint import FileIdentity, fingerprint, same_content
from slide2vec.scale.messages import ALONE, Known, Task
from slide2vec.slides import Slide, as_slide
from slide2vec.stream.slide_identity import Identities
from slide2vec.tiling.types import Segmentation, Tiling

CONFIG = PreprocessingConfig(
    requested_spacing_um=0.5, requested_tile_size_px=96, filtering={"a_t": 0}, resume=True
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> list[Path]:
    folder = tmp_path_factory.mktemp("originals")
    return [generated_slide(folder / f"{n}.svs", size_px=768, seed=n, levels=1) for n in range(3)]


@pytest.fixture
def slides(originals: list[Path], tmp_path: Path) -> list[Path]:
    (tmp_path / "slides").mkdir()
    return [Path(shutil.copy(path, tmp_path / "slides" / path.name)) for path in originals[:2]]


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each file whose content is digested."""
    names: list[str] = []
    digest = fingerprints._of_file

    def counted(path: Path, how: Any) -> dict[str, Any]:
        names.append(path.name)
        return digest(path, how)

    monkeypatch.setattr(fingerprints, "_of_file", counted)
    return names


Run = Callable[..., RunResult]


@pytest.fixture
def run(model: Model, slides: list[Path], tmp_path: Path) -> Run:
    def run(given: Any = None, **options: Any) -> RunResult:
        config = CONFIG.updated(**options)
        execution = ExecutionOptions(output_dir=tmp_path / "out")
        return Pipeline(model, config, execution).run(given or slides)

    return run


def as_main_recorded(path: Path) -> dict[str, Any]:
    """What version 0.1.0 before this rule wrote of a file: a copy of its code."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.blake2b(file.read(65_536), digest_size=16)
        file.seek(max(0, size - 65_536))
        digest.update(file.read(65_536))
    return {"size_bytes": size, "digest": digest.hexdigest()}


def test_single_files_are_recorded_as_before(slides: list[Path]) -> None:
    assert fingerprint(slides[0]) == as_main_recorded(slides[0])


@pytest.mark.parametrize("how", ["ends", "whole"])
def test_one_look_per_slide_and_run(run: Run, looked_at: list[str], how: str) -> None:
    assert not run(fingerprint=how).failed
    assert sorted(looked_at) == ["0.svs", "1.svs"]
    looked_at.clear()
    assert run(fingerprint=how).resumed == 2 and sorted(looked_at) == ["0.svs", "1.svs"]
    looked_at.clear()
    again = run(fingerprint=how, on_the_fly=False)
    assert again.recomputed == {"tiles_from": 2}
    assert sorted(looked_at) == ["0.svs", "1.svs"]  # the look of resume serves the plan


def test_a_worker_takes_what_resume_has_seen(
    model: Model, slides: list[Path], tmp_path: Path, looked_at: list[str]
) -> None:
    slide = as_slide(slides[0])
    seen = Identities(CONFIG).of(slide)
    task = pickle.loads(pickle.dumps(Task(slide, {ALONE: Known(identity=seen)})))
    looked_at.clear()
    config, execution = model.resolve_preprocessing(CONFIG), ExecutionOptions(output_dir=tmp_path / "out")
    worker = Cohort(config, execution, model, identities={slide.sample_id: task.known[ALONE].identity})
    worker.recorder = ForwardingRecorder(lambda entry: None)
    worker.planner().plan(slide).source.close()
    assert not looked_at
    replace_with(slides[0], slides[1])
    worker.planner().plan(slide).source.close()
    assert looked_at == ["0.svs"]  # it has changed since


def before_publishing(monkeypatch: pytest.MonkeyPatch, then: Callable[[str], None]) -> None:
    publish = SlideWriter.outcome

    def late(self: SlideWriter, outcome: Any) -> Iterator[Any]:
        then(outcome.slide.sample_id)
        yield from publish(self, outcome)

    monkeypatch.setattr(SlideWriter, "outcome", late)


def replace_with(path: Path, other: Path) -> None:
    """As an upload does it: another file under the name, of the same time and, padded, the same size."""
    was = path.stat()
    path.unlink()
    path.write_bytes(other.read_bytes().ljust(was.st_size, b"\0")[: was.st_size])
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def test_a_slide_that_is_replaced_while_it_is_read_fails(
    run: Run, slides: list[Path], originals: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(name: str) -> None:
        if name == "0":
            replace_with(slides[0], originals[2])

    with monkeypatch.context() as patch:
        before_publishing(patch, swap)
        result = run()
    assert [item.sample_id for item in result.failed] == ["0"]
    assert "changed while it was read" in str(result.failed[0].error)
    assert [artifact.sample_id for artifact in result.tile_artifacts] == ["1"]
    again = run()
    assert not again.failed and again.resumed == 1
    recorded = again.tile_artifacts[0].metadata["compatibility"]["image"]
    assert recorded == as_main_recorded(slides[0])


@pytest.mark.parametrize("what", ["replaced", "gone"])
def test_a_slide_that_changes_fails_in_memory_too(
    model: Model, slides: list[Path], originals: list[Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    put = MemorySink.put

    def late(self: MemorySink, outcome: Any) -> Iterator[Any]:
        if outcome.slide.sample_id == "0":
            replace_with(slides[0], originals[2]) if what == "replaced" else slides[0].unlink()
        yield from put(self, outcome)

    monkeypatch.setattr(MemorySink, "put", late)
    with pytest.raises(EmbedSlidesError) as caught:
        model.embed_slides(slides, CONFIG)
    assert list(caught.value.failed) == ["0"]
    assert "slide 0: " in (text := str(caught.value.failed["0"])) and "changed while it was read" in text
    assert [each.sample_id for each in caught.value.results if each is not None] == ["1"]


def test_a_slide_that_is_gone_when_it_is_written_fails_alone(
    run: Run, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_publishing(patch, lambda name: slides[0].unlink(missing_ok=True))
        result = run()
    assert [item.sample_id for item in result.failed] == ["0"]
    assert f"changed while it was read: {slides[0]} is gone" in str(result.failed[0].error)
    again = run()
    assert again.resumed == 1 and "there is no file" in str(again.failed[0].error)


def test_a_slide_that_is_only_touched_is_the_same(
    run: Run, slides: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_publishing(patch, lambda name: slides[0].touch())
        assert not run().failed


def test_a_mask_that_is_replaced_while_it_is_read_fails_its_slide(
    run: Run, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2
    import numpy as np

    mask = tmp_path / "mask.png"
    cv2.imwrite(str(mask), np.ones((768, 768), np.uint8))
    given = [{"image_path": slides[0], "mask_path": mask}, {"image_path": slides[1]}]

    def clear(name: str) -> None:
        if name == "0":
            cv2.imwrite(str(mask), np.zeros((768, 768), np.uint8))

    before_publishing(monkeypatch, clear)
    result = run(given)
    assert [item.sample_id for item in result.failed] == ["0"] and str(mask) in str(result.failed[0].error)


# what earlier versions wrote --------------------------------------------------------------------------


def as_main_wrote(out: Path, slides: list[Path]) -> None:
    """Take out of a run what version 0.1.0 did not write before this rule."""
    for path in slides:
        (out / "tiles" / f"{path.stem}.source.json").unlink()
        sidecar = out / "tile_embeddings" / f"{path.stem}.meta.json"
        content = json.loads(sidecar.read_text())
        content["compatibility"]["image"] = as_main_recorded(path)
        content["compatibility"]["mask"] = None
        del content["compatibility"]["reading"]
        sidecar.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def test_embeddings_of_the_transform_of_images_are_computed_anew_and_named(
    run: Run, slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resized and cropped before they were encoded, as 0.1.0 did with some presets."""
    run()
    as_main_wrote(tmp_path / "out", slides)
    sidecar = tmp_path / "out" / "tile_embeddings" / f"{slides[0].stem}.meta.json"
    content = json.loads(sidecar.read_text())
    content["compatibility"]["encoder"]["transform"]["resize"] += 24
    sidecar.write_text(json.dumps(content))
    again = run()
    assert again.resumed == 1 and again.recomputed == {"encoder transform": 1}
    assert "encoder transform" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_that_earlier_versions_wrote_is_computed_anew_and_named(
    run: Run, slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    run()
    as_main_wrote(tmp_path / "out", slides)
    path = tmp_path / "out" / "tile_embeddings" / f"{slides[0].stem}.pt"
    right = load_embeddings(path)
    wrong = right.clone()
    wrong[3, 5] = value
    torch.save(wrong, path)
    sidecar = path.with_name(f"{slides[0].stem}.meta.json")
    recorded = {**json.loads(sidecar.read_text()), "file_size_bytes": path.stat().st_size}
    sidecar.write_text(json.dumps(recorded))
    again = run()
    assert again.resumed == 1
    assert again.recomputed == {"embedding: an earlier version wrote NaN or infinities": 1}
    assert f"{slides[0].stem} is embedded anew: {path} holds NaN" in caplog.text
    assert torch.equal(load_embeddings(path), right)


def test_features_of_this_version_are_not_read_on_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.delattr("slide2vec.cohort.misread_embeddings.load_embeddings")
    assert run().resumed == 2


def test_artifacts_of_before_are_kept(run: Run, slides: list[Path], tmp_path: Path) -> None:
    run()
    as_main_wrote(tmp_path / "out", slides)
    assert run().resumed == 2
    assert run(fingerprint="whole").resumed == 2  # ends are compared with ends


def test_coordinates_of_before_are_kept_by_the_clock_and_it_is_said_once(
    run: Run, slides: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run()
    as_main_wrote(tmp_path / "out", slides)
    for sidecar in (tmp_path / "out" / "tile_embeddings").glob("*.meta.json"):
        sidecar.unlink()
    with caplog.at_level(logging.WARNING, "slide2vec"):
        assert not run().failed
    assert [r.getMessage() for r in caplog.records].count(
        next(r.getMessage() for r in caplog.records if "by the files' times" in r.getMessage())
    ) == 1


def in_zstd(path: Path) -> Path:
    """A slide as libvips read it black: ZSTD tiles."""
    import tifffile

    made = path.with_suffix(".tiff")
    with tifffile.TiffFile(path) as file:
        tifffile.imwrite(
            made,
            file.pages[0].asarray(),
            tile=(256, 256),
            photometric="rgb",
            compression="zstd",
            resolution=(40_000, 40_000),
            resolutionunit="CENTIMETER",
        )
    return made


@pytest.mark.parametrize(("backend", "recomputed"), [("vips", True), ("openslide", False)])
def test_what_earlier_versions_read_wrongly_is_embedded_anew(
    run: Run,
    slides: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    recomputed: bool,
) -> None:
    given = [in_zstd(slides[0]), slides[1]]
    run(given)
    as_main_wrote(tmp_path / "out", given)
    for name in ("tile_embeddings/{}.meta.json", "tiles/{}.coordinates.meta.json"):
        path = tmp_path / "out" / name.format("0")
        content = json.loads(path.read_text())
        content.get("provenance", content)["backend"] = backend
        path.write_text(json.dumps(content))
    npz = tmp_path / "out/tiles/0.coordinates.npz"
    before = npz.stat().st_ino
    with caplog.at_level(logging.WARNING, "slide2vec"):
        result = run(given)
    assert result.resumed == 2 - recomputed
    assert (npz.stat().st_ino != before) == recomputed  # where tissue is was seen in those pixels, too
    why = "earlier versions read ZSTD tiles with vips, which gives black or white for them"
    assert result.recomputed == ({f"reading: {why}": 1} if recomputed else {})
    assert (f"slide 0 is embedded anew: {why}" in caplog.text) == recomputed
    assert run(given).resumed == 2


# tiles of earlier runs --------------------------------------------------------------------------------


def test_tiles_of_a_slide_that_was_replaced_are_found_anew(
    run: Run, model: Model, slides: list[Path], originals: list[Path], tmp_path: Path
) -> None:
    """Equal size and an older time: the clock says nothing."""
    first = run()
    was = slides[0].stat()
    slides[0].unlink()
    slides[0].write_bytes(originals[2].read_bytes().ljust(was.st_size, b"\0")[: was.st_size])
    os.utime(slides[0], (1, 1))
    expected = model.embed_slide(slides[0], CONFIG.updated(resume=False))
    again = run()
    assert again.recomputed == {"image": 1}
    made = again.tile_artifacts[0]
    assert made.num_tiles == expected.num_tiles
    assert torch.allclose(load_embeddings(made.path), expected.tile_embeddings, atol=1e-5)
    assert first.tile_artifacts[1] == again.tile_artifacts[1]


def test_the_source_record(run: Run, slides: list[Path], tmp_path: Path) -> None:
    run(save_tiles=True)
    recorded = json.loads((tmp_path / "out" / "tiles" / "0.source.json").read_text())
    files = {"image": fingerprint(slides[0]), "mask": None}
    recorded.pop("remarks", None)  # which others make
    assert recorded == {"schema_version": 1, "coordinates": files, "tiles_tar": files}


def test_a_kill_leaves_no_coordinates_without_their_source(
    run: Run, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever metadata are there, the record of the slide is, too, and says nothing of earlier tiles."""
    tiles = tmp_path / "out" / "tiles"
    tiles.mkdir(parents=True)
    (tiles / "0.source.json").write_text('{"schema_version": 1, "coordinates": {}, "remarks": ["old"]}')
    seen: list[bool] = []

    def killed(folder: Path, tiling: Tiling) -> Any:
        record = json.loads((folder / f"{tiling.sample_id}.source.json").read_text())
        assert record["coordinates"] == {"image": fingerprint(tiling.image_path), "mask": None}
        assert record.get("remarks") == (list(tiling.recorded.remarks) or None)
        seen.append((folder / f"{tiling.sample_id}.coordinates.meta.json").exists())
        raise OutputError("the process is killed here")

    with monkeypatch.context() as patched:
        patched.setattr("slide2vec.cohort.context.write_coordinates", killed)
        with pytest.raises(OutputError):
            run([slides[0]])
    assert seen == [False]
    assert run([slides[0]]).tile_artifacts[0].num_tiles > 0
    assert (tiles / "0.coordinates.meta.json").is_file()


def test_an_archive_of_a_slide_that_was_replaced_is_written_anew(
    run: Run, slides: list[Path], originals: list[Path], tmp_path: Path
) -> None:
    run(on_the_fly=False)
    was = slides[0].stat()
    slides[0].unlink()
    slides[0].write_bytes(originals[2].read_bytes().ljust(was.st_size, b"\0")[: was.st_size])
    os.utime(slides[0], (1, 1))
    old = (tmp_path / "out" / "tiles" / "0.tiles.tar").read_bytes()
    run()  # new coordinates, the old archive
    assert (tmp_path / "out" / "tiles" / "0.tiles.tar").read_bytes() == old
    assert not run(on_the_fly=False).failed
    assert (tmp_path / "out" / "tiles" / "0.tiles.tar").read_bytes() != old


# slides of several files, and whole digests -----------------------------------------------------------


def test_companions_are_part_of_a_slide(tmp_path: Path) -> None:
    slide, folder = tmp_path / "a.mrxs", tmp_path / "a"
    folder.mkdir()
    slide.write_bytes(b"index")
    (folder / "Data0000.dat").write_bytes(b"tiles")
    (folder / "Slidedat.ini").write_bytes(b"about")
    taken = FileIdentity.of(slide)
    assert taken.content["companions"]["files"] == 2 and taken.change() is None
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (slide, folder):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, moved / path.name)
    assert fingerprint(moved / "a.mrxs") == taken.content
    (folder / "Data0000.dat").write_bytes(b"other")
    assert taken.change() == "it holds something else now"
    now = {"image": fingerprint(slide)}
    assert difference({"image": dict(taken.content)}, now) == "image companions"
    assert difference({"image": as_main_recorded(slide)}, now) == "image companions"


def test_whole_digests_see_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "slide"
    path.write_bytes(bytes(300_000))
    ends, whole = fingerprint(path), fingerprint(path, "whole")
    with path.open("r+b") as file:
        file.seek(150_000)
        file.write(b"damage")
    assert fingerprint(path) == ends
    assert not same_content(whole, fingerprint(path, "whole"))
    assert same_content(whole, fingerprint(path)) and same_content(ends, whole)


# what decides a slide's embeddings, with plain values ---------------------------------------------------

SLIDE = as_slide({"image_path": "a.svs", "spacing_at_level_0": 0.5})
ENCODER = {
    **{"name": "tiny", "precision": "fp32", "weights": "w", "weights_source": "here"},
    "below": {"name": "under", "weights": "v", "weights_source": "there"},
}
FILES = {"image": {"size_bytes": 3, "digest": "a"}, "mask": {"size_bytes": 2, "digest": "b"}}
TILING = Tiling(
    sample_id="a",
    image_path=Path("a.svs"),
    mask_path=None,
    spacing_at_level_0=None,
    backend="tiff",
    requested_backend="auto",
    dimensions=(800, 600),
    downsamples=(1.0, 2.0),
    geometry=tile_geometry(
        requested_tile_size_px=96, requested_spacing_um=0.5, base_spacing_um=0.25, downsamples=[1.0, 2.0]
    ),
    x=np.array([0, 192]),
    y=np.array([0, 0]),
    tissue_fractions=np.ones(2, np.float32),
    tissue_threshold=0.1,
    segmentation=Segmentation(method="hsv", requested_downsample=64, downsample=64, level=1, spacing_um=1.0),
    filtering=FilterConfig(),
)


def made_of(
    slide: Slide = SLIDE,
    encoder: dict[str, Any] = ENCODER,
    files: dict[str, Any] = FILES,
    given: Tiling | None = None,
    **options: Any,
) -> dict[str, Any]:
    return compatibility(slide, CONFIG.updated(**options), encoder, files, given)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        *(({name: value}, f"geometry {name}") for name, value in {
            "overlap": 0.25, "tolerance": 0.01, "tissue_threshold": 0.5, "requested_spacing_um": 1.0,
            "requested_tile_size_px": 64, "segmentation": {"method": "otsu"}, "filtering": {"a_t": 1},
            "region_tile_multiple": 2,
        }.items()),
        ({"slide": replace(SLIDE, spacing_at_level_0=0.25)}, "geometry spacing_at_level_0"),
        ({"encoder": {**ENCODER, "precision": "bf16"}}, "encoder precision"),
        ({"encoder": {**ENCODER, "below": {**ENCODER["below"], "weights": "u"}}}, "encoder below weights"),
        ({"files": {**FILES, "image": {**FILES["image"], "digest": "z"}}}, "image"),
        ({"files": {**FILES, "mask": {**FILES["mask"], "digest": "z"}}}, "mask"),
        ({"files": {**FILES, "mask": None}}, "mask"),
        ({"on_the_fly": False}, "tiles_from"),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_other_embeddings(changes: dict[str, Any], told: str) -> None:
    assert difference(made_of(), made_of(**changes)) == told


@pytest.mark.parametrize("weights", [None, "digest"])
def test_what_makes_tissue_by_a_network(monkeypatch: pytest.MonkeyPatch, weights: str | None) -> None:
    """The weights count where a network finds the tissue; without one, all is recorded as it always was."""
    monkeypatch.setattr("slide2vec.cohort.identity.checkpoint_of", lambda segmentation: weights)
    found_by = {} if weights is None else {"segmenter": weights}
    masked = replace(SLIDE, mask_path=Path("a.png"))
    assert made_of()["geometry"] == {**made_of(masked)["geometry"], **found_by}
    assert "segmenter" not in made_of(masked)["geometry"]


def test_what_makes_another_selection_by_quality() -> None:
    measured = made_of(qc={"measure": True})
    assert measured["geometry"]["qc"]["measure"] is True and "qc" not in made_of()["geometry"]
    assert difference(made_of(), measured) == "geometry qc"


MASKS = {
    "pixel_mapping": {"background": 0, "tumor": (1, 3), "stroma": 2},
    "min_coverage": {"tumor": 0.3, "stroma": 0.2},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"masks": {}},
        {"masks": {**MASKS, "min_coverage": {"tumor": 0.3}}},
        {"masks": {**MASKS, "strategy": "independent"}},
        {"masks": {**MASKS, "pixel_mapping": {"background": 0, "stroma": 2, "tumor": (1, 3)}}},
        {"masks": {**MASKS, "pixel_mapping": {"background": 0, "tumor": (1, 4), "stroma": 2}}},
        {"slide": replace(SLIDE, sample_id="stroma/a", annotation="stroma")},
    ],
    ids=str,
)
def test_what_makes_other_tiles_of_masks(changes: dict[str, Any]) -> None:
    tumor = replace(SLIDE, sample_id="tumor/a", annotation="tumor")
    made, other = made_of(tumor, masks=MASKS), made_of(**{"slide": tumor, "masks": MASKS, **changes})
    assert difference(made, other) == "geometry masks"


@pytest.mark.parametrize(
    "changes",
    [
        *({"backend": "openslide"}, {"use_supertiles": False}, {"resume": False}, {"save_tiles": True}),
        {"slide": as_slide({"image_path": "elsewhere/a.svs", "spacing_at_level_0": 0.5})},
        {"encoder": {**ENCODER, "weights_source": "", "below": {**ENCODER["below"], "weights_source": ""}}},
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_the_same_embeddings(changes: dict[str, Any]) -> None:
    assert difference(made_of(), made_of(**changes)) is None


def test_made_of_what_is_recorded_as_it_was() -> None:
    """Of given tiles a digest: one of another length or order would have everything embedded again."""
    assert made_of()["tiles_from"] == "slide" and made_of(on_the_fly=False)["tiles_from"] == "jpeg"
    assert made_of(read_tiles_from=Path("archives"))["tiles_from"] == "archive"
    sizes = hashlib.blake2b(b"1 96 192", digest_size=16)
    sizes.update(np.array([0, 192, 0, 0], np.int64).tobytes())
    assert made_of(given=TILING)["geometry"]["coordinates"] == sizes.hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        *(replace(TILING, geometry=replace(TILING.geometry, **{name: getattr(TILING.geometry, name) + 1}))
          for name in ("read_level", "read_tile_size_px", "tile_size_lv0")),
        *(replace(TILING, **{name: np.array([0, 96])}) for name in "xy"),
        replace(TILING, x=TILING.y, y=TILING.x),
    ],
)  # fmt: skip
def test_given_tiles_are_those_of_a_level_at_their_places(changed: Tiling) -> None:
    assert difference(made_of(given=TILING), made_of(given=changed)) == "geometry coordinates"
    assert difference(made_of(given=TILING), made_of(given=replace(TILING, backend="openslide"))) is None
    assert difference(made_of(given=TILING), made_of(given=TILING, overlap=0.25)) is None
    assert difference(made_of(), made_of(given=TILING)) is not None


@pytest.mark.parametrize("size", [10, 65_536, 100_000, 300_000])
@pytest.mark.parametrize("place", [0, -1])
def test_both_ends_of_a_file_count(size: int, place: int, tmp_path: Path) -> None:
    path = tmp_path / "slide"
    path.write_bytes(bytes(size))
    before = fingerprint(path)
    content = bytearray(size)
    content[place] = 1
    path.write_bytes(content)
    assert difference({"image": before}, {"image": fingerprint(path)}) == "image"
    path.write_bytes(bytes(size + 1))
    assert not same_content(before, fingerprint(path))


def test_a_mask_is_looked_at_where_it_decides_the_tiles(tmp_path: Path) -> None:
    for name in ("a.svs", "a.png"):
        (tmp_path / name).write_bytes(name.encode())
    slide = as_slide({"image_path": tmp_path / "a.svs", "mask_path": tmp_path / "a.png"})
    files = Identities(CONFIG)
    seen = files.of(slide).content
    assert seen == {"image": fingerprint(slide.image_path), "mask": fingerprint(tmp_path / "a.png")}
    (tmp_path / "a.png").write_bytes(b"another")
    assert difference(seen, files.of(slide).content) == "mask"
    assert files.of(slide, masked=False).content == {**seen, "mask": None}
