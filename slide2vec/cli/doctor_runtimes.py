"""For `slide2vec doctor`: which engines this machine can build and run, and the one command that is missing.

Told from installed packages and what is known of the GPUs; no compiler is imported.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from slide2vec.choices import RUNTIMES, CompiledRuntime
from slide2vec.runtime.tensorrt.available import TARGETS, target_of

__all__ = ["missing_command", "runtimes"]

#: Gives the version of the first installed of some distributions.
Installed = Callable[[Sequence[str]], str | None]

#: Whether it builds, whether it runs, and what to say of it.
_Able: TypeAlias = tuple[bool, bool, str]
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


def _facts(gpus: Sequence[dict[str, Any]], installed: Installed) -> Iterator[tuple[str, _Able]]:
    for name, runtime in RUNTIMES.items():
        if runtime.package is not None and installed(runtime.package.distributions) is None:
            yield name, (False, False, runtime.install + _beside(name))
        else:
            yield name, _ABLE.get(name, _able)(runtime, gpus, installed)


def _beside(runtime: str) -> str:
    """What to say of a library that is missing, beside the command that installs it."""
    if runtime == "tensorrt":
        return f"; {NEEDS}"
    return "; there is none for this system" if runtime == "tensorrt-rtx" and not _has_rtx_wheels() else ""


def _exports(installed: Installed) -> str:
    """Which package is missing to export encoders to ONNX; none, if it is empty."""
    return next((f"{name} is missing" for name in ("onnx", "onnxscript") if installed([name]) is None), "")


def _targets(gpus: Sequence[dict[str, Any]]) -> list[str]:
    return [target_of(*map(int, gpu["compute_capability"].split("."))) for gpu in gpus]


def _able(runtime: CompiledRuntime, gpus: Sequence[dict[str, Any]], installed: Installed) -> _Able:
    """Of a runtime whose library is there: whether it builds, whether it runs, and what to say of it."""
    if not gpus and "cpu" not in runtime.devices:
        return False, False, "there is no NVIDIA GPU, on which it builds and runs"
    problem = _exports(installed)
    return not problem, True, problem or ("" if gpus and "cuda" in runtime.devices else "for the CPU")


def _rtx(runtime: CompiledRuntime, gpus: Sequence[dict[str, Any]], installed: Installed) -> _Able:
    known = [target for target in _targets(gpus) if target in TARGETS]
    problem = _exports(installed)
    if known:
        return not problem, True, problem
    here = f"it does not know this GPU ({', '.join(_targets(gpus))})" if gpus else "there is no NVIDIA GPU"
    return not problem, False, problem or f"builds for {', '.join(TARGETS)}; {here}"


def _inductor(runtime: CompiledRuntime, gpus: Sequence[dict[str, Any]], installed: Installed) -> _Able:
    there = installed(["torch"]) is not None
    compiler = shutil.which("g++") or shutil.which("clang++")
    note = "" if compiler else "a C++ compiler is missing (g++ or clang++)"
    return there and compiler is not None, there, note


#: Runtimes of which more is to be said than whether their library is there.
_ABLE: Mapping[str, Callable[[CompiledRuntime, Sequence[dict[str, Any]], Installed], _Able]] = {
    "tensorrt-rtx": _rtx,
    "inductor": _inductor,
}


def _has_rtx_wheels() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


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
    return RUNTIMES[wanted[0]].install
