"""The report of a run holds every slide, whatever became of it, and works in a browser all by itself."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser import Page, open_page
from numpy.typing import NDArray
from typer.testing import CliRunner

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig
from slide2vec.cli import app
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.report import write_report
from slide2vec.report.page import page_of

HOSTILE = "<img src=x onerror=document.title='owned'>&\"'<script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, generated_slide: Callable[..., Path]) -> Path:
    """A slide, one of a name that is markup, one that is gone by now, and one that cannot be read; at two
    sizes of tiles, as by two encoders."""
    folder = tmp_path_factory.mktemp("report")
    made = [generated_slide(folder / f"s{n}.svs", size_px=1536, seed=n, levels=2) for n in range(2)]
    (folder / "broken.svs").write_bytes(b"no slide <b>at all</b>")
    gone = folder / "gone.svs"
    gone.write_bytes(made[1].read_bytes())
    slides = [
        {"sample_id": "a", "image_path": made[0]},
        {"sample_id": HOSTILE, "image_path": made[1]},
        {"sample_id": "gone", "image_path": gone},
        {"sample_id": "broken", "image_path": folder / "broken.svs"},
    ]
    model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    for size in (128, 192):
        config = PreprocessingConfig(
            requested_tile_size_px=size,
            requested_spacing_um=0.5,
            qc={"measure": True} if size == 128 else {},  # type: ignore[arg-type]
        )
        Pipeline(model, config, ExecutionOptions(output_dir=folder / "out", num_gpus=1)).run(slides)
    gone.unlink()
    return folder / "out"


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written beside the run."""
    path = run.parent / "page.html"
    write_report(run, path, picture_px=200)
    return path


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def pixels(source: str) -> NDArray[np.uint8]:
    data = np.frombuffer(base64.b64decode(source.partition(",")[2]), np.uint8)
    return np.asarray(cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)


def test_every_slide_is_there_with_what_became_of_it(run: Path, page: Path) -> None:
    found = data_of(page)
    slides = {slide["id"]: slide for slide in found["slides"]}
    assert list(slides) == ["a", HOSTILE, "gone", "broken"]
    assert found["run"]["states"] == {"finished": 3, "in progress": 0, "to do": 0, "failed": 1}
    assert len(found["run"]["encoders"]) == 2
    first = slides["a"]
    assert first["state"] == "finished" and len(first["encoders"]) == 2 == len(first["tiled"])
    with np.load(run / "tiles/a.coordinates.npz") as arrays:
        tiles, tissue = len(arrays["x"]), float(arrays["tissue_fractions"].mean())
        blur = float(arrays["blur"].mean())
    assert first["tiles"] == tiles and first["tissue"] == pytest.approx(tissue, abs=1e-4)
    assert set(first["qc"]) == {"background", "blur", "bubble", "fold", "pen"}
    assert first["qc"]["blur"] == pytest.approx(blur, abs=1e-4)
    for encoder in first["encoders"]:
        ((name, link),) = encoder["links"]
        assert name == "tile embeddings" and (page.parent / link).is_file() and encoder["dim"] > 0
    assert all((page.parent / link).is_file() for _, link in (*first["links"], *found["run"]["links"]))
    failed = slides["broken"]
    assert failed["state"] == "failed" and failed["pictures"] == []
    assert len(failed["errors"]) == 1 and "broken.svs" in failed["errors"][0]  # both encoders say the same


def test_pictures_show_contour_tiles_and_maps(page: Path) -> None:
    pictures = {slide["id"]: slide["pictures"] for slide in data_of(page)["slides"]}
    kinds = [picture["kind"] for picture in pictures["a"]]
    assert kinds == ["tissue", "tiles", "map", "tiles", "map"]  # the tissue is one
    tissue, tiles, drawn = (pixels(picture["src"]).astype(int) for picture in pictures["a"][:3])
    assert tissue.shape == tiles.shape == drawn.shape == (200, 200, 3)
    stain = np.abs(tissue - tiles).max(-1) < 40
    assert 0.5 < stain.mean() < 1  # lines, and no veil
    assert "%" in pictures["a"][2]["text"]


def test_a_slide_that_is_gone_is_drawn_over_white(page: Path) -> None:
    pictures = next(slide for slide in data_of(page)["slides"] if slide["id"] == "gone")["pictures"]
    assert [picture["kind"] for picture in pictures] == ["tissue", "tiles", "map", "tiles", "map"]
    assert "gone.svs" in pictures[0]["text"] and pictures[0]["src"] == ""
    outlined, drawn = (pixels(picture["src"]).astype(int) for picture in pictures[1:3])
    assert np.median(outlined) > 250
    assert (drawn.max(-1) - drawn.min(-1) > 12).mean() > 0.1


def test_markup_of_others_is_text(page: Path) -> None:
    text = page.read_text()
    assert "<img src=x" not in text and "<b>at all" not in text
    assert HOSTILE in [slide["id"] for slide in data_of(page)["slides"]]


def test_pictures_of_many_are_in_a_folder_beside(run: Path, tmp_path: Path) -> None:
    made = write_report(run, tmp_path / "many.html", picture_px=100, most_inline=3)
    assert made.pictures_dir == tmp_path / "many_files" and made.slides == 4
    sources = [
        picture["src"]
        for slide in data_of(made.path)["slides"]
        for picture in slide["pictures"]
        if picture["src"]
    ]
    assert sources and all((tmp_path / source).is_file() for source in sources)
    assert {Path(source).name for source in sources} == {each.name for each in made.pictures_dir.iterdir()}
    assert all(re.fullmatch(r"many_files/\d{6}-\d+\.jpg", source) for source in sources)
    assert set(made.without_picture) == {"gone"}


def test_command_line(run: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["report", str(run), *arguments])

    done = call("-o", str(tmp_path / "r.html"), "--no-pictures", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["path"] == str(tmp_path / "r.html") and said["slides"] == 4 and said["states"]["failed"] == 1
    assert all(slide["pictures"] == [] for slide in data_of(tmp_path / "r.html")["slides"])
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in run.parent.glob("s?.svs"):
        (moved / path.name).symlink_to(path)
    (moved / "gone.svs").symlink_to(run.parent / "s1.svs")
    done = call("-o", str(tmp_path / "m.html"), "--slides-dir", str(moved), "--picture-px", "64")
    assert done.exit_code == 0 and "not drawn" not in done.stdout and "3 finished, 1 failed" in done.stdout
    with pytest.raises(ConfigError, match=r"\.html"):
        write_report(run, tmp_path / "r.pdf")
    with pytest.raises(ArtifactError, match=r"process_list\.csv"):
        write_report(tmp_path)


def many(count: int) -> str:
    slides = [
        {
            "id": f"slide-{n}", "file": f"/slides/{n}.svs", "href": "", "backend": "tiff", "size": "",
            "state": "failed" if n % 50 == 0 else "finished",
            "tiles": None if n % 50 == 0 else (n * 7919) % 5000,
            "tiled": [], "tissue": (n % 97) / 97, "qc": {"blur": (n % 31) / 100}, "links": [], "encoders": [],
            "errors": [f"slide-{n} is truncated"] if n % 50 == 0 else [],
            "warnings": [f"its tissue is but dust of {n} px"] if n % 10 == 1 else [],
            "pictures": [{"kind": "map", "text": "map", "src": f"r_files/{n:06d}-0.jpg"}],
        }
        for n in range(count)
    ]  # fmt: skip
    states = {"finished": count - count // 50, "failed": count // 50}
    return page_of({"directory": "out", "states": states, "encoders": ["uni"], "links": []}, slides)


def shown(page: Page) -> list[str]:
    return list(page.run("[...document.querySelectorAll('tbody .name')].map((each) => each.textContent)"))


def test_in_a_browser(page: Path) -> None:
    with open_page() as tab:
        tab.size(1280, 900)
        tab.open(page.as_uri())
        assert shown(tab) == ["a", HOSTILE, "gone", "broken"]
        loaded = (
            "[...document.images].filter((each) => !each.closest('details')).map((each) => each.naturalWidth)"
        )
        tab.run("document.querySelectorAll('img').forEach((each) => { each.loading = 'eager'; })")
        tab.run("Promise.all([...document.images].map((each) => each.decode().catch(() => 0)))")
        widths = tab.run(loaded)
        assert len(widths) == 5 + 5 + 4 and min(widths) > 0
        assert tab.run("document.title").startswith("Report of")  # no script of a sample_id has run
        tab.run("document.querySelector('.pictures button').click()")
        assert tab.run("document.querySelector('dialog').open")
        tab.run("document.querySelector('dialog button').click()")
        for width in (1280, 400):
            tab.size(width, 800)
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert tab.run("document.querySelector('td.slide').clientWidth") > 300  # words are not squeezed
        assert tab.problems == []


def test_many_slides_are_sorted_filtered_and_paged(tmp_path: Path) -> None:
    count = 1000
    (tmp_path / "r.html").write_text(many(count))
    (tmp_path / "r_files").mkdir()
    for number in range(count):
        (tmp_path / "r_files" / f"{number:06d}-0.jpg").symlink_to(tmp_path / "one.jpg")
    (tmp_path / "one.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    choose = "((id, value) => {{ const each = document.getElementById(id); each.value = value; \
each.dispatchEvent(new Event(each.type === 'search' ? 'input' : 'change')); }})({0!r}, {1!r})"
    counted = "document.getElementById('count').textContent"
    head = "[...document.querySelectorAll('th')].find((each) => each.textContent === 'Tiles')"
    with open_page() as tab:
        tab.size(1280, 900)
        tab.open((tmp_path / "r.html").as_uri())
        assert tab.run(counted) == "1,000 of 1,000 slides, 1 to 50 shown"
        assert shown(tab) == [f"slide-{n}" for n in range(50)]
        assert tab.run("document.images[1].decode().then(() => document.images[1].naturalWidth)") == 8
        tiles = {f"slide-{n}": (n * 7919) % 5000 for n in range(count) if n % 50}
        ascending = sorted(tiles, key=tiles.__getitem__)
        tab.run(f"{head}.querySelector('button').click()")
        assert shown(tab) == ascending[:50] and tab.run(f"{head}.getAttribute('aria-sort')") == "ascending"
        tab.run(f"{head}.querySelector('button').click()")
        assert shown(tab) == ascending[::-1][:50]
        assert tab.run(f"{head}.getAttribute('aria-sort')") == "descending"
        tab.run(
            "[...document.querySelectorAll('#pages button')].find((e) => e.textContent === 'Last').click()"
        )
        failed = {f"slide-{n}" for n in range(0, count, 50)}
        assert failed == set(shown(tab)[-20:])  # without a number: last
        names = tab.run("[...document.querySelectorAll('#sort option')].map((each) => each.textContent)")
        tab.run(choose.format("sort", str(names.index("Blur"))))
        blurred = {int(name.split("-")[1]) % 31 for name in shown(tab)[:30]}
        tab.run("document.getElementById('order').click()")
        assert blurred | {int(name.split("-")[1]) % 31 for name in shown(tab)[:30]} == {0, 30}
        tab.run(choose.format("sort", "0"))
        tab.run(choose.format("filter", "1"))
        assert tab.run(counted) == "20 of 1,000 slides" and set(shown(tab)) == failed
        assert tab.run("document.querySelectorAll('tr.failed .error').length") == 20
        options = tab.run("[...document.querySelectorAll('#filter option')].map((each) => each.textContent)")
        assert options[2] == "with warnings (100)" and options[-1] == "“its tissue is but dust of … px” (100)"
        tab.run(choose.format("filter", str(len(options) - 1)))
        assert tab.run(counted) == "100 of 1,000 slides, 1 to 50 shown"
        tab.run(choose.format("text", "slide-11 dust"))
        assert sorted(shown(tab)) == ["slide-11", "slide-111"]
        tab.run(choose.format("text", "nothing like it"))
        assert tab.run(counted).startswith("No slide fits") and shown(tab) == []
        assert tab.problems == []


def test_regions_are_called_so(generated_slide: Callable[..., Path], tmp_path: Path) -> None:
    slide = generated_slide(tmp_path / "s.svs", size_px=1536, seed=0, levels=2)
    model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
    config = PreprocessingConfig(
        requested_tile_size_px=64, requested_spacing_um=0.5, region_tile_multiple=2, tissue_threshold=0.5
    )
    Pipeline(model, config, ExecutionOptions(output_dir=tmp_path / "out", num_gpus=1)).run([slide])
    made = write_report(tmp_path / "out", picture_px=100)
    (found,) = data_of(made.path)["slides"]
    assert re.fullmatch(r"\d+ regions of 128 px at 0.5 µm/px .*, each 2 x 2 tiles", found["tiled"][0])
    assert [picture["kind"] for picture in found["pictures"]] == ["tissue", "tiles", "map"]
