"""`slide2vec doctor`, on this machine and on ones that lack everything."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from slide2vec.choices import learned_methods
from slide2vec.cli import doctor as doctor_module  # the command; its module is in sys.modules
from slide2vec.cli import doctor_runtimes
from slide2vec.recipes import Recipe, load_recipe, segmenter_recipe
from slide2vec.version import PROJECT

MODULE = sys.modules["slide2vec.cli.doctor"]
EXTRAS = {"cucim", "cuda", "deploy", "models", "openvino", "ray", "tensorrt", "tensorrt-rtx", "vips"}


def test_json(run) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["machine"]["cpus_for_this_job"] >= 1 and found["machine"]["memory_gb"] > 0
    assert found["backends"]["openslide"] is None
    assert set(found["weights"]) >= {"virchow2", "prost40m"} and "scattering" not in found["weights"]


def test_text_fits(run) -> None:
    text = run("doctor").stdout
    assert "Optional parts" in text and "Hugging Face" in text and "TensorRT" in text
    commands = ("To add them: ", "To run on NVIDIA GPUs", "Next: ")  # whole, to be copied
    assert max(len(line) for line in text.splitlines() if not line.startswith(commands)) <= 80


def test_extras_exist() -> None:
    """The advice must work: every extra named is one that this package has."""
    assert {part.extra for part in MODULE._PACKAGES} == EXTRAS
    assert set(metadata.metadata("slide2vec").get_all("Provides-Extra") or ()) >= EXTRAS


def test_parts_are_packages_of_their_extras() -> None:
    """And installing the extra brings the part."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for part in MODULE._PACKAGES:
        asked = project["optional-dependencies"][part.extra]
        assert any(name.startswith(part.distributions) for name in asked), part.name


def test_nothing_installed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "missing, extra [tensorrt]" in result.stdout
    lines = result.stdout.splitlines()
    (command,) = (line for line in lines if line.startswith("To add them: "))
    assert command.endswith('[cucim,models,openvino,ray,vips]"')
    (command,) = (line for line in lines if line.startswith("To run on NVIDIA GPUs, of which none is here: "))
    assert command.endswith('[cuda,tensorrt,tensorrt-rtx]"')
    assert PROJECT in result.stdout
    assert "torch cannot be imported" in result.stdout
    assert "huggingface-hub cannot be imported" in result.stdout


def test_gpu_that_torch_cannot_use(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.95'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = json.loads(run("doctor", "--json").stdout)
    assert found["gpus"]["driver"] == ["NVIDIA H200, 143771 MiB, 580.95"]
    assert "cannot use it" in found["gpus"]["problem"]
    assert "of which none is here" not in run("doctor").stdout


def test_gpus_are_listed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    card = SimpleNamespace(name="NVIDIA H200", total_memory=150e9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert run("doctor").stdout.count("NVIDIA H200, 150 GB") == 2


def test_cached_weights_are_found(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    encoder, network = cached(tmp_path, load_recipe("prost40m")), cached(tmp_path, segmenter_recipe("hest"))
    found = json.loads(run("doctor", "--json").stdout)
    assert found["weights"]["prost40m"] == encoder and found["weights"]["virchow2"] is None
    assert found["segmenters"]["hest"] == network and found["segmenters"]["grandqc"] is None
    assert list(found["segmenters"]) == list(learned_methods())
    rows = {row["name"]: row["path"] for row in json.loads(run("models", "--segmenters", "--json").stdout)}
    assert rows == found["segmenters"]


def cached(cache: Path, recipe: Recipe) -> str:
    """An empty file where the hub keeps a recipe's weights."""
    source = recipe.weights
    assert source is not None and source.revision is not None
    of_repo = cache / f"models--{source.repo.replace('/', '--')}"
    (of_repo / "refs").mkdir(parents=True)
    (of_repo / "refs" / source.revision).write_text(source.revision)
    path = of_repo / "snapshots" / source.revision / source.files[0]
    path.parent.mkdir(parents=True)
    path.touch()
    return str(path)


ALL = {"tensorrt-rtx-cu13-bindings", "tensorrt", "openvino", "onnx", "onnxscript", "torch"}


@pytest.mark.parametrize(
    ("capabilities", "there", "builds", "runs", "command"),
    [
        ((), ALL, {"tensorrt-rtx", "openvino"}, {"openvino"}, "slide2vec build-engine"),
        ((), {"torch"}, set(), set(), "[openvino]"),
        (("8.9",), ALL, {"tensorrt-rtx", "tensorrt", "openvino"}, None, "slide2vec build-engine"),
        (
            ("8.9",),
            ALL - {"onnx"},
            set(),
            {"tensorrt-rtx", "tensorrt", "openvino"},
            "[tensorrt-rtx]",
        ),
        (("12.0",), {"torch", "onnx", "onnxscript"}, set(), set(), "[tensorrt-rtx]"),
        (
            ("8.6",),
            ALL - {"tensorrt-rtx-cu13-bindings"},
            {"tensorrt", "openvino"},
            None,
            "slide2vec build-engine",
        ),
        (("9.0",), ALL - {"tensorrt"}, {"tensorrt-rtx", "openvino"}, {"openvino"}, "[tensorrt]"),
        (("9.0",), ALL, {"tensorrt-rtx", "tensorrt", "openvino"}, {"tensorrt", "openvino"}, "build-engine"),
    ],
)
def test_which_engines_are_built_and_run_here(
    capabilities: tuple[str, ...],
    there: set[str],
    builds: set[str],
    runs: set[str] | None,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A login node, laptops, a workstation, an H100; with everything installed, and not."""
    monkeypatch.setattr("shutil.which", lambda name: None)  # no C++ compiler
    monkeypatch.setattr(doctor_runtimes, "_has_rtx_wheels", lambda: True)
    gpus = [{"compute_capability": each} for each in capabilities]
    found = doctor_runtimes.runtimes(gpus, lambda names: next((n for n in names if n in there), None))
    assert {row["runtime"] for row in found if row["builds"]} == builds
    able = {row["runtime"] for row in found if row["runs"]} - {"inductor"}  # PyTorch's own
    assert able == (builds if runs is None else runs)
    assert all(row["note"] for row in found if not row["builds"])
    assert command in doctor_runtimes.missing_command(gpus, found)


def test_what_tensorrt_needs_is_said() -> None:
    found = {row["runtime"]: row["note"] for row in doctor_runtimes.runtimes([], lambda names: None)}
    for word in ("pypi.nvidia.com", "CUDA 13", "R590", "tensorrt-cu12", "[tensorrt]"):
        assert word in found["tensorrt"]
    assert "[tensorrt-rtx]" in found["tensorrt-rtx"]


def test_doctor_is_the_command() -> None:
    assert doctor_module is MODULE.doctor


def test_engines_are_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDE2VEC_ENGINES", str(tmp_path))
    assert json.loads(run("doctor", "--json").stdout)["engines"] == {"folder": str(tmp_path), "names": []}
    assert "slide2vec build-engine --preset NAME" in " ".join(run("doctor").stdout.split())
