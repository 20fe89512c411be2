"""What only a GPU can show: `make gpu-check`. Runs the tests marked gpu, then benchmarks/gpu.py.

Needs slide2vec's base packages (PyTorch, timm, OpenSlide, …) and pytest in the Python that runs it; cuCIM,
nvImageCodec, DALI, TensorRT and Triton are used where they are installed, and reported as not run where not.
Nothing is downloaded: encoders have random weights.

    python tools/gpu_check.py [--no-benchmarks] [--quick] [pytest options]
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Optional part -> the module that is imported for it.
OPTIONAL = {
    "cuCIM (decoding on the GPU)": "cucim",
    "nvImageCodec (the raw road)": "nvidia.nvimgcodec",
    "DALI (preparing, tile archives)": "nvidia.dali",
    "TensorRT (compiled engines)": "tensorrt",
    "TensorRT-RTX (compiled engines)": "tensorrt_rtx_bindings",
    "Triton (fused preparing)": "triton",
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
        print(f"{part}: {'installed' if is_there(module) else 'not run: not installed'}")
    return found


def main() -> int:
    options = sys.argv[1:]
    ours = {"--no-benchmarks", "--quick"}
    missing = list(missing_packages())
    if missing:
        print(
            f"not run: {sys.executable} lacks {', '.join(missing)}. Install them, or run `make setup` first"
        )
        return 1
    has_gpu = describe()
    tests = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "tests"]
    status = subprocess.run([*tests, *(o for o in options if o not in ours)], cwd=ROOT).returncode
    status = 0 if status == NO_TESTS else status
    if not has_gpu:
        print("Nothing could be checked: run this on a machine with an NVIDIA GPU")
    elif "--no-benchmarks" not in options:
        quick = ["--quick"] if "--quick" in options else []
        measured = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *quick], cwd=ROOT).returncode
        status = status or measured
    return status


if __name__ == "__main__":
    sys.exit(main())
