"""`slide2vec plan`, for real."""

from __future__ import annotations

import csv
import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from slide2vec.cpus import job_cpus
from slide2vec.estimate import Trial

ONE = ("--spacing", "2", "--tile-size", "64", "--allow-non-recommended-settings", "--device", "cpu")


def test_a_stated_speed_gives_hours_and_price(run, small_slide: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.csv"
    options = ("-p", "scattering,prost40m", "--speed", "2", "--speed", "0.5", "--price", "3/h", "-o", path)
    result = run("plan", small_slide, *ONE, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    tiles = found["tiles"]["scattering"]
    assert tiles == found["tiles"]["prost40m"] > 5
    here = found["machines"][0]
    assert here["machine"] == "this machine" and here["kwh"] is None
    assert here["hours"] * 3600 == pytest.approx(tiles / 2 + tiles / 0.5)
    assert here["price"] == pytest.approx(3 * here["hours"])
    with path.open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["tiles_scattering"] == line["tiles_prost40m"] == str(tiles) and not line["error"]
    embedded = run("embed", small_slide, "-p", "scattering", *ONE, "-o", tmp_path / "out", "--json")
    assert json.loads(embedded.stdout)["slides"][0]["num_tiles"] == tiles


def test_tiles_that_a_slide_encoder_takes_over_are_encoded_once(run, small_slide: Path) -> None:
    options = ("--speed", "2", "--speed", "0.5", "--device", "cpu", "--json")
    found = json.loads(run("plan", small_slide, "-p", "virchow,prism", *options).stdout)
    hours = {each["machine"]: each["hours"] for each in found["machines"]}
    tiles = found["tiles"]["prism"]
    assert tiles == found["tiles"]["virchow"] and hours["this machine"] * 3600 == pytest.approx(tiles / 2)
    one = json.loads(run("plan", small_slide, "-p", "virchow", "--no-trial", "--json").stdout)
    assert {each["machine"]: each["hours"] for each in one["machines"]}["RTX 4090"] == hours["RTX 4090"] > 0
    other = json.loads(
        run("plan", small_slide, "-p", "virchow2,prism2", *options).stdout
    )  # of another output
    count = other["tiles"]["prism2"]
    assert other["machines"][0]["hours"] * 3600 == pytest.approx(count / 2 + count / 0.5, rel=0.01)


def test_without_weights_it_says_what_known_gpus_take(run, small_slide: Path) -> None:
    result = run("plan", small_slide, "-p", "virchow2", "--no-trial")
    assert result.exit_code == 0, result.output
    assert "RTX 4090" in result.stdout and "this machine" not in result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "RTX 4090 timm's published inference benchmark, ViT-H/14 at 224 px," in lines
    assert "on takes tiles/s in all kWh" in lines  # no price was asked for


def test_small_figures_are_not_nothing(run, small_slide: Path) -> None:
    options = ("--speed", "0.2", "--price", "0.01/h", "--device", "cpu")
    rows = run("plan", small_slide, "-p", "virchow2", *options).stdout.splitlines()
    here = next(row for row in rows if row.startswith("this machine"))
    gpu = next(row for row in rows if row.startswith("RTX 4090"))
    assert " 0.2 " in here and "< 0.01" in gpu and "< 1 s" in gpu and " 0 " not in f"{here} {gpu}"


def test_that_nothing_tells_how_long_it_takes_is_said(run, small_slide: Path) -> None:
    result = run(
        "plan", small_slide, "-p", "scattering", "--no-trial", "--price", "2/h"
    )  # too small for GPUs
    assert result.exit_code == 0, result.output
    assert "--speed says it" in " ".join(result.stdout.split()) and "takes  tiles/s" not in result.stdout


def test_loading_counts_and_finding_tissue_does_not(
    run, small_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("slide2vec.cli.plan")
    times = iter([100.0, 117.0])  # at the start; models are loaded
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(module, "_tried", lambda *args: {"scattering": Trial(2.0, start_s=1.0)})
    result = run("plan", small_slide, "-p", "scattering", *ONE, "--json")
    content = json.loads(result.stdout)
    assert content["start_s"] == {"scattering": 1 + 17}
    (here,) = content["machines"]  # an encoder so small says nothing of known GPUs
    assert here["hours"] * 3600 == pytest.approx(18 + content["tiles"]["scattering"] / 2)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(33.4, "33 s"), (119, "119 s"), (121, "2 min"), (3540, "59 min"), (3600, "1.0 h"), (7.25e6, "2,014 h")],
)
def test_times_are_in_units_that_can_be_read(seconds: float, said: str) -> None:
    assert import_module("slide2vec.cli.plan_output")._duration(seconds / 3600) == said


def test_encoders_that_take_turns_are_said(run, small_slide: Path) -> None:
    options = ("-p", "virchow2,uni2,lunit", "--no-trial", "--device", "cpu", "--encoders-gb", "3")
    result = run("plan", small_slide, *options)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert ", in 2 groups that take turns: for virchow2 + lunit, then for uni2" in said
    found = json.loads(run("plan", small_slide, *options, "--json").stdout)
    assert found["groups"] == [["virchow2", "lunit"], ["uni2"]]
    one = json.loads(run("plan", small_slide, "-p", "virchow2,uni2", "--no-trial", "--json").stdout)
    assert len(one["groups"]) == 1 and "scratch" not in one and "scratch_bytes" not in one["slides"][0]


def test_what_waits_in_the_scratch_is_told(run, small_slide: Path, tmp_path: Path) -> None:
    """Of two slides, one fits into the scratch."""
    for name in ("one", "two"):
        shutil.copyfile(small_slide, tmp_path / f"{name}.svs")
    slides, path = tmp_path / "slides.csv", tmp_path / "plan.csv"
    slides.write_text(f"sample_id,image_path\none,{tmp_path}/one.svs\ntwo,{tmp_path}/two.svs\n")
    options = [*ONE, "-p", "virchow2,uni2", "--encoders-gb", "0.01"]
    options += ["--scratch-dir", tmp_path / "scratch", "--scratch-gb", 0.0002]
    result = run("plan", slides, *options, "--speed", "10", "--speed", "5", "-o", path, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    tiles = plan["slides"][0]["tiles"]["uni2"]
    assert 100_000 < tiles * 3 * 64**2 == plan["scratch"]["bytes"] < plan["scratch"]["limit_bytes"] == 200_000
    assert plan["scratch"]["folder"] == str(tmp_path / "scratch")
    assert plan["groups"] == [["virchow2"], ["uni2"]]
    assert (plan["scratch"]["from_scratch"], plan["scratch"]["decoded_again"]) == (1, 1)
    one, two = plan["slides"]
    assert (one["from_scratch"], one["decoded_again"]) == (1, 0)
    assert (two["from_scratch"], two["decoded_again"]) == (0, 1)
    assert one["scratch_bytes"] and not two["scratch_bytes"] and two["read_bytes"] == 2 * one["read_bytes"]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    keys = ("read_bytes", "scratch_bytes", "from_scratch", "decoded_again")
    assert [[line[key] for key in keys] for line in lines] == [
        [str(each[key]) for key in keys] for each in plan["slides"]
    ]
    # tiles that are not decoded again: what that takes here was not tried, but is known
    saved = tiles * (748e-6 - 33e-6 - 50e-6) * (64 / 224) ** 2 / job_cpus()
    assert plan["scratch"]["saved_s"] == pytest.approx(saved)
    hours = plan["machines"][0]["hours"]
    assert hours * 3600 == pytest.approx(2 * tiles / 10 + 2 * tiles / 5 - saved)
    said = run("plan", slides, *options, "--no-trial").stdout
    assert "1 from the scratch, 1 decoded again: two" in " ".join(said.split())


def _slides(folder: Path, count: int, small_slide: Path) -> Path:
    """A manifest of the small slide, so many times."""
    for number in range(count):
        shutil.copyfile(small_slide, folder / f"s{number}.svs")
    manifest = folder / "slides.csv"
    rows = (f"s{number},{folder}/s{number}.svs\n" for number in range(count))
    manifest.write_text("sample_id,image_path\n" + "".join(rows))
    return manifest


def test_workers_divide_the_memory_and_the_slides(run, small_slide: Path, tmp_path: Path) -> None:
    """Two encoders fit into 5 GB, and take turns in two workers, of which one gets two slides."""
    slides, path = _slides(tmp_path, 3, small_slide), tmp_path / "plan.csv"
    options = [*ONE, "-p", "virchow2,lunit", "--encoders-gb", "5", "--scratch-dir", tmp_path / "scratch"]
    options += ["--speed", "10", "--speed", "5", "--price", "1/h"]
    one = json.loads(run("plan", slides, *options, "--json").stdout)
    assert one["devices"] == ["cpu"] and one["groups"] == [["virchow2", "lunit"]] and "scratch" not in one
    options += ["--devices", "cpu,cpu"]
    result = run("plan", slides, *options, "-o", path, "--json")
    assert result.exit_code == 0, result.output
    two = json.loads(result.stdout)
    assert two["devices"] == ["cpu", "cpu"] and two["groups"] == [["virchow2"], ["lunit"]]
    assert (two["scratch"]["from_scratch"], two["scratch"]["decoded_again"]) == (3, 0)
    tiles = two["slides"][0]["tiles"]["lunit"]
    alone, here = one["machines"][0], two["machines"][0]
    assert alone["hours"] * 3600 == pytest.approx(3 * tiles / 10 + 3 * tiles / 5)
    # the speeds are of both workers: one of them does two of three slides
    assert here["hours"] * 3600 + two["scratch"]["saved_s"] == pytest.approx(4 * tiles / 10 + 4 * tiles / 5)
    assert here["source"] == "speeds as given, of 2 workers together" and here["price"] == here["hours"]
    with path.open(newline="") as file:
        assert [line["from_scratch"] for line in csv.DictReader(file)] == ["1"] * 3
    said = " ".join(run("plan", slides, *options).stdout.split())
    assert (
        "workers 2: cpu, cpu" in said and "in 2 groups that take turns: for virchow2, then for lunit" in said
    )


def test_devices_that_are_not_there_are_refused_as_by_the_run(run, small_slide: Path, tmp_path: Path) -> None:
    options = ("-p", "scattering", *ONE, "--devices", "cpu,cuda:7", "--weights", "random")
    planned = run("plan", small_slide, *options, "--no-trial")
    ran = run("run", "-m", _slides(tmp_path, 1, small_slide), *options, "-o", tmp_path / "out")
    assert planned.exit_code == ran.exit_code == 1
    (message,) = [line for line in ran.output.splitlines() if line.startswith("error")]
    assert "cuda:7" in message and message in planned.output.splitlines()


@pytest.mark.parametrize("below", ["", "sub/folder"])
def test_a_scratch_that_the_run_refuses_is_refused(
    run, small_slide: Path, tmp_path: Path, below: str
) -> None:
    slides, taken = _slides(tmp_path, 1, small_slide), tmp_path / "a file"
    taken.touch()
    options = ["-p", "scattering,prost40m", *ONE, "--tile-size", "70", "--encoders-gb", "0.01"]
    options += ["--weights", "random", "--scratch-dir", taken / below]
    planned = run("plan", slides, *options, "--speed", "1", "--speed", "1")
    ran = run("run", "-m", slides, *options, "-o", tmp_path / "out")
    assert planned.exit_code == ran.exit_code == 1 and not planned.stdout
    (message,) = [line for line in ran.output.splitlines() if line.startswith("error")]
    assert "a file" in message and "cannot be written to" in message
    assert message in planned.output.splitlines()
    none = run("plan", slides, *options, "--scratch-gb", "0", "--no-trial")
    assert none.exit_code == 0 and "none: each group decodes" in none.stdout


def test_a_plan_leaves_no_scratch_behind(run, small_slide: Path, tmp_path: Path) -> None:
    options = ["-p", "virchow2,uni2", *ONE, "--encoders-gb", "0.01", "--no-trial"]
    result = run("plan", small_slide, *options, "--scratch-dir", tmp_path / "a/b", "--json")
    assert json.loads(result.stdout)["scratch"]["folder"] == str(tmp_path / "a/b")
    assert list(tmp_path.iterdir()) == []


def test_bad_slides_are_listed(run, small_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    result = run("plan", small_slide, tmp_path / "bad.svs", "-p", "virchow2", "--no-trial")
    assert result.exit_code == 1 and "1 of 2 slides cannot be planned" in result.stdout
    # The slide is named once.
    assert "\nbad " in result.stdout and "slide bad:" not in result.stdout


def test_missing_weights_are_found_before_the_tissue_is(
    run, small_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = run("plan", small_slide, "-p", "virchow2", "--device", "cpu")
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "the weights of preset virchow2" in said
    assert "--weights random tries the speed, --speed says it, --no-trial leaves it open" in said
    assert "finding the tissue" not in said


def test_a_preset_that_is_named_twice_is_refused_at_once(run, small_slide: Path) -> None:
    result = run("plan", small_slide, "-p", "scattering,uni2,scattering", "--no-trial")
    assert result.exit_code == 1 and "preset scattering was given twice: name it once" in result.output
    assert "finding the tissue" not in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--price", "cheap"), "--price cheap is no price of an hour"),
        (("--price", "-1/h"), "no price of an hour"),
        (("--speed", "1", "--speed", "2"), "--speed was given 2 times, and the encoders are 1"),
        (("--speed", "0"), "--speed must be above 0 tiles/s, and is 0"),
    ],
)
def test_wrong_options_are_told(run, small_slide: Path, options: tuple[str, ...], message: str) -> None:
    result = run("plan", small_slide, "-p", "virchow2", *options)
    assert result.exit_code == 1 and message in " ".join(result.output.split())
    assert "finding the tissue" not in result.output
