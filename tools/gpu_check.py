"""What only a GPU can show: `make gpu-check`. Runs the tests marked gpu, then benchmarks/gpu.py.

Needs slide2vec's base packages (PyTorch, timm, OpenSlide, …) and pytest in the Python that runs it; cuCIM,
nvImageCodec, DALI, TensorRT and Triton are used where they are installed, and reported as not run where not.
Nothing is downloaded: encoders have random weights. See docs/gpu.md.

    python tools/gpu_check.py [--no-benchmarks] [--quick] [--only stream|engines|tensorrt] [pytest options]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The files with tests marked gpu. They are named: other tests need packages that a GPU machine may lack.
TESTS = {
    "stream": ("tests/gpu",),
    "engines": ("tests/runtime/test_engine_contract.py",),
    "tensorrt": ("tests/runtime/test_tensorrt_gpu.py", "tests/compile/test_rtx_gpu.py"),
}
#: Optional part -> the module that is imported for it.
OPTIONAL = {
    "cuCIM (decoding on the GPU)": "cucim",
    "nvImageCodec (decoding on the GPU)": "nvidia.nvimgcodec",
    "DALI (decoding, preparing, tile archives)": "nvidia.dali",
    "TensorRT (compiled engines)": "tensorrt",
    "TensorRT-RTX (compiled engines)": "tensorrt_rtx_bindings",
    "Triton (fused cutting and preparing)": "triton",
}
#: pytest's exit status where no test was selected.
NO_TESTS = 5


def missing_packages() -> Iterator[str]:
    """Base packages, and pytest, that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], "pytest"]:
        name = requirement.split(">")[0].split(";")[0].strip()
        names = (name, "opencv-python", "opencv-contrib-python") if name.startswith("opencv") else (name,)
        if not any(map(_is_installed, names)):
            yield name


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def describe() -> bool:
    """Say what is here; whether that includes a GPU."""
    import torch

    found = torch.cuda.is_available()
    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}")
    print(f"GPU: {torch.cuda.get_device_name() if found else 'not run: PyTorch sees no CUDA device'}")
    for part, module in OPTIONAL.items():
        print(f"{part}: {'installed' if is_there(module) else 'not run: not installed'}", flush=True)
    return found


def pytest_command(which: str | None, options: list[str]) -> list[str]:
    """pytest over the files of one kind of tests, or of all."""
    files = [file for kind, named in TESTS.items() if which in (None, kind) for file in named]
    return [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", *files, *options]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--no-benchmarks", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small benchmarks")
    parser.add_argument("--only", choices=TESTS, help="tests of one kind")
    given, options = parser.parse_known_args()
    missing = list(missing_packages())
    if missing:
        print(
            f"not run: {sys.executable} lacks {', '.join(missing)}. Install them, or run `make setup` first"
        )
        return 1
    has_gpu = describe()
    status = subprocess.run(pytest_command(given.only, options), cwd=ROOT).returncode
    status = 0 if status == NO_TESTS else status
    if not has_gpu:
        print("Nothing could be checked: run this on a machine with an NVIDIA GPU")
    elif not given.no_benchmarks:
        quick = ["--quick"] if given.quick else []
        measured = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *quick], cwd=ROOT).returncode
        status = status or measured
    return status


if __name__ == "__main__":
    sys.exit(main())
