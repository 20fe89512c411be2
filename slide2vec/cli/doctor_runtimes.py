"""For `slide2vec doctor`: which engines this machine can build and run, and the one command that is missing.

Told from installed packages and what is known of the GPUs; no compiler is imported.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slide2vec.runtime.tensorrt.targets import TARGETS, target_of

__all__ = ["missing_command", "runtimes"]

#: Gives the version of the first installed of some distributions.
Installed = Callable[[Sequence[str]], str | None]

PACKAGES = {
    "tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "openvino": ("openvino",),
}
#: What TensorRT needs beside its package.
NEEDS = (
    "its libraries come from NVIDIA's own index (pypi.nvidia.com, 4 GB); CUDA 13 and driver R590 or newer, "
    "with an older driver: pip install tensorrt-cu12"
)


def runtimes(gpus: Sequence[dict[str, Any]], installed: Installed) -> list[dict[str, Any]]:
    """Each runtime of compiled engines: whether it builds here, whether it runs here, and why not.

    Args:
        gpus: NVIDIA's, each with its "compute_capability" ("8.9").
    """
    return [_as_row(name, *facts) for name, facts in _facts(gpus, installed)]


def _as_row(name: str, builds: bool, runs: bool, note: str) -> dict[str, Any]:
    return {"runtime": name, "builds": builds, "runs": runs, "note": note}


def _facts(
    gpus: Sequence[dict[str, Any]], installed: Installed
) -> Iterator[tuple[str, tuple[bool, bool, str]]]:
    yield "tensorrt-rtx", _rtx(gpus, installed)
    yield "tensorrt", _tensorrt(gpus, installed)
    yield "openvino", _openvino(installed)
    yield "inductor", _inductor(installed)


def _exports(installed: Installed) -> str:
    """Which package is missing to export encoders to ONNX; none, if it is empty."""
    return next((f"{name} is missing" for name in ("onnx", "onnxscript") if installed([name]) is None), "")


def _targets(gpus: Sequence[dict[str, Any]]) -> list[str]:
    return [target_of(*map(int, gpu["compute_capability"].split("."))) for gpu in gpus]


def _rtx(gpus: Sequence[dict[str, Any]], installed: Installed) -> tuple[bool, bool, str]:
    if installed(PACKAGES["tensorrt-rtx"]) is None:
        where = "" if _has_rtx_wheels() else "; there is none for this system"
        return False, False, f'pip install "slide2vec[tensorrt-rtx]"{where}'
    known = [target for target in _targets(gpus) if target in TARGETS]
    problem = _exports(installed)
    if known:
        return not problem, True, problem
    here = f"it does not know this GPU ({', '.join(_targets(gpus))})" if gpus else "there is no NVIDIA GPU"
    return not problem, False, problem or f"builds for {', '.join(TARGETS)}; {here}"


def _has_rtx_wheels() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _tensorrt(gpus: Sequence[dict[str, Any]], installed: Installed) -> tuple[bool, bool, str]:
    there = installed(PACKAGES["tensorrt"]) is not None
    if not there:
        return False, False, f'pip install "slide2vec[tensorrt]"; {NEEDS}'
    if not gpus:
        return False, False, "there is no NVIDIA GPU, on which it builds and runs"
    problem = _exports(installed)
    return not problem, True, problem


def _openvino(installed: Installed) -> tuple[bool, bool, str]:
    if installed(PACKAGES["openvino"]) is None:
        return False, False, 'pip install "slide2vec[openvino]"'
    problem = _exports(installed)
    return not problem, True, problem or "for the CPU"


def _inductor(installed: Installed) -> tuple[bool, bool, str]:
    there = installed(["torch"]) is not None
    compiler = shutil.which("g++") or shutil.which("clang++")
    note = "" if compiler else "a C++ compiler is missing (g++ or clang++)"
    return there and compiler is not None, there, note


def missing_command(gpus: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> str:
    """The one command that gets this machine the engines that suit it: an installation, or a build."""
    builds = {row["runtime"] for row in found if row["builds"]}
    targets = _targets(gpus)
    if any(target in TARGETS for target in targets) and _has_rtx_wheels():
        wanted = ["tensorrt-rtx", "tensorrt"]
    else:
        wanted = ["tensorrt"] if targets else ["openvino"]
    if builds & set(wanted):
        return "slide2vec build-engine --preset NAME"
    return f'pip install "slide2vec[{wanted[0]}]"'
