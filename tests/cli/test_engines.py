"""`slide2vec build-engine`, `engines` and `bench`, and that runs use what was built."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forked import CONTEXT

from slide2vec.artifacts import load_embeddings
from slide2vec.compile import EngineStore
from slide2vec.runtime.openvino_engine import capabilities

pytestmark = pytest.mark.usefixtures("short_rounds")

#: A vision transformer of timm's own tests: a second to compile.
PRESET = "timm:test_vit"
BUILD = ("build-engine", "--preset", PRESET, "--weights", "random")


@pytest.fixture(scope="module")
def built(short_rounds: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one engine, built from the command line."""
    from typer.testing import CliRunner

    from slide2vec.cli import app

    folder = tmp_path_factory.mktemp("engines")
    done = CliRunner().invoke(app, [*BUILD, "--engines", str(folder)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return folder


def test_build_prints_speed_size_and_parity(built: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "130")
    done = run(*BUILD, "--engines", built)
    assert done.exit_code == 0 and "is there already" in done.stderr
    (engine,) = EngineStore(built)
    row = next(line for line in done.stdout.splitlines() if engine.name in line)
    assert (
        f"{engine.record.speed['engine']:,.1f}" in row and f"{engine.record.parity['min_cosine']:.6f}" in row
    )
    assert str(built) in done.stdout
    assert "licence of timm:test_vit" in done.stderr


def test_list_show_verify_remove(built: Path, run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(built, store)
    (engine,) = EngineStore(store)
    listed = json.loads(run("engines", "list", "--engines", store, "--json").stdout)
    assert [each["name"] for each in listed] == [engine.name]
    shown = " ".join(run("engines", "show", engine.name[:20], "--engines", store).stdout.split())
    assert "runs in openvino, fp32" in shown and "cosine" in shown and "batches 1 to 8 tiles" in shown
    good = run("engines", "verify", "--engines", store)
    assert good.exit_code == 0 and f"{engine.name}: good" in good.stdout
    (engine.directory / "encoder.bin").write_bytes(b"other")
    bad = run("engines", "verify", "--engines", store)
    assert bad.exit_code == 1 and "encoder.bin has changed" in bad.stderr
    assert run("engines", "remove", engine.name, "--engines", store).exit_code == 0
    assert "No engines in" in run("engines", "list", "--engines", store).stdout
    assert run("engines", "show", engine.name, "--engines", store).exit_code == 1


def test_runs_use_the_engine(
    built: Path, run, small_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, with the same embeddings; those of another runtime go beside them, and it is said."""
    (engine,) = EngineStore(built)  # too small to be a measure: it shall have been fast
    fast = replace(engine.record, speed={"engine": 200.0, "torch": 100.0})
    (engine.directory / "engine.json").write_text(fast.as_json())
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(built))
    command = ("embed", small_slide, "--preset", PRESET, "--weights", "random", "--spacing", "0.25")
    auto = run(*command, "-o", tmp_path / "auto")
    assert auto.exit_code == 0, auto.output
    assert "openvino, fp32 on cpu" in auto.stdout
    plain = run(*command, "-o", tmp_path / "torch", "--engine", "torch")
    assert "PyTorch, fp32 on cpu" in plain.stdout
    first, second = (
        load_embeddings(next((tmp_path / d / "tile_embeddings").glob("*.pt"))) for d in ("auto", "torch")
    )
    assert len(first) > 3
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    meta = json.loads(next((tmp_path / "auto" / "tile_embeddings").glob("*.json")).read_text())
    assert meta["compatibility"]["encoder"]["runtime"] == "openvino"
    again = run(*command, "-o", tmp_path / "auto", "--json")
    assert json.loads(again.stdout)["resumed"] == 1
    other = run(*command, "-o", tmp_path / "auto", "--engine", "torch")
    assert other.exit_code == 0 and "encoders/timm-test_vit-torch" in other.stderr
    beside = next((tmp_path / "auto/encoders/timm-test_vit-torch/tile_embeddings").glob("*.pt"))
    assert torch.equal(load_embeddings(beside), second)


def test_advice_where_there_is_none(
    run, small_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per machine: the next process does not repeat it, and for another precision it is said again."""
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(tmp_path / "engines"))
    command = ("embed", small_slide, "--preset", PRESET, "--weights", "random", "--spacing", "0.25")
    shown = []
    for number, precision in enumerate(("fp32", "fp32", "bf16")):
        monkeypatch.setattr("slide2vec.compile.engine_choice._suggested", set())  # as in another process
        done = run(*command, "-o", tmp_path / str(number), "--precision", precision)
        assert done.exit_code == 0
        advice = f"`slide2vec build-engine --preset {PRESET} --precision {precision}`"
        shown.append(advice in " ".join(done.stderr.split()))
    assert shown == [True, False, True]


def test_engine_that_is_not_there(run, small_slide: Path, tmp_path: Path) -> None:
    done = run(
        "embed", small_slide, "--preset", PRESET, "--weights", "random", "--spacing", "0.25", "-o", tmp_path,
        "--engine", "openvino",
    )  # fmt: skip
    assert done.exit_code == 1 and "no openvino engine of timm:test_vit" in done.stderr
    assert "--runtime openvino" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of --preset NAME, --segmenter NAME and --all"),
        (("--preset", "virchow2", "--all"), "one of --preset NAME, --segmenter NAME and --all"),
        (("--preset", "virchow3"), "Did you mean virchow"),
        (("--preset", "rudolfv2"), "rudolfv2 cannot be compiled: its architecture is code of its repository"),
        (
            ("--preset", PRESET, "--weights", "random", "--runtime", "tensorrt"),
            "tensorrt has no engines for cpu",
        ),
    ],
)
def test_errors(run, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = run("build-engine", *arguments, "--device", "cpu")
    assert done.exit_code == 1 and message in " ".join(done.stderr.split())


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("tensorrt_rtx_bindings"), reason="TensorRT-RTX is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_engine_for_gpus_that_are_elsewhere(run, tmp_path: Path) -> None:
    """Built by TensorRT-RTX here, and not used before it is proven there."""
    options = ("--runtime", "tensorrt-rtx", "--precision", "fp16", "--target", "SM120,sm89")
    done = run(*BUILD, *options, "--engines", tmp_path)
    assert done.exit_code == 0 and done.stderr.count("Building engine …") == 1
    assert "unproven" in done.stdout and "not yet proven" in done.stderr
    assert run(*BUILD, *options, "--engines", tmp_path).exit_code == 0
    (engine,) = json.loads(run("engines", "list", "--json", "--engines", tmp_path).stdout)
    assert engine["parity"] == {} and engine["identity"]["device"]["targets"] == ["sm89", "sm120"]
    assert "unproven" in run("engines", "list", "--engines", tmp_path).stdout
    shown = run("engines", "show", engine["name"], "--engines", tmp_path).stdout
    assert "not yet proven" in shown and "cuda, sm89, sm120" in shown
    done = run("engines", "verify", "--engines", tmp_path)
    assert done.exit_code == 1 and "files are as they were built; not yet proven" in done.stderr
    for target, said in (("sm90", "not for sm90: TensorRT does"), ("sm75,sm89", "not for sm75 (RTX 20, T4")):
        done = run(*BUILD, "--precision", "bf16", "--runtime", "tensorrt-rtx", "--target", target)
        assert done.exit_code == 1 and said in " ".join(done.stderr.split())


@pytest.mark.slow
def test_all_goes_on_after_failures(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets whose weights are not there are named at the end; the others are built."""
    module = sys.modules["slide2vec.cli.build_engine"]  # the name is that of its function, too
    monkeypatch.setattr(module, "_compilable", lambda: ["uni", PRESET])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from slide2vec.model import Model

    original = Model.from_preset.__func__  # type: ignore[attr-defined]

    def offline(cls, name, **options):  # type: ignore[no-untyped-def]
        return original(cls, name, **{**options, "weights": "random" if name == PRESET else None})

    monkeypatch.setattr(Model, "from_preset", classmethod(offline))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    done = run("build-engine", "--all", "--engines", tmp_path / "store")
    assert done.exit_code == 1
    assert "uni:" in done.stderr and [e.record.preset for e in EngineStore(tmp_path / "store")] == [PRESET]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_bench(built: Path, run, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    if start == "forkserver":  # else as for users: every contender imports PyTorch
        monkeypatch.setattr("slide2vec.compile.bench.get_context", lambda method: CONTEXT)
    options = ["--preset", PRESET, "--weights", "random", "--engines", built, "--rounds", "1"]
    options += ["--runtime", "openvino", "--batch-size", "2", "--precision", "fp32", "--precision", "bf16"]
    done = run("bench", *options, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    kinds = {(row["runtime"], row["precision"]) for row in rows}
    expected = {("torch", "fp32"), ("torch", "bf16"), ("openvino", "fp32")}
    assert kinds == expected | ({("openvino", "bf16")} if "BF16" in capabilities() else set())
    for row in rows:
        assert row["tiles_per_s"] > 0 and row["min_cosine"] > 0.99 and row["peak_mb"] > 100
        assert row["ms_per_batch"] == pytest.approx(2000 / row["tiles_per_s"], rel=0.01)
    assert rows[0]["times_torch_fp32"] == 1
    wrong = run("bench", "--preset", PRESET, "--runtime", "onnx")
    assert wrong.exit_code == 1 and "--runtime onnx: it is one of" in wrong.stderr
