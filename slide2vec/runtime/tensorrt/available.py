"""Whether TensorRT or TensorRT-RTX can be used on this machine, and why not; what the latter compiles for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from slide2vec.choices import RUNTIMES
from slide2vec.errors import EngineError, ExtraMissingError
from slide2vec.runtime.tensorrt.library import MODULES, TITLES, Library

if TYPE_CHECKING:
    import torch

__all__ = [
    "TARGETS",
    "is_installed",
    "load_tensorrt",
    "not_loading",
    "require",
    "target_of",
    "unavailable",
    "unsuited",
]

#: The first release whose parser knows ONNX's Attention operator (TensorRT), or that was tried.
OLDEST = {"tensorrt": (10, 14), "tensorrt-rtx": (1, 7)}
SYSTEMS = {"tensorrt": "Linux", "tensorrt-rtx": "Linux on x86-64"}
#: Compute capability -> what has it (`tensorrt_rtx_bindings.ComputeCapability` of 1.7).
TARGETS = {
    "sm75": "RTX 20, T4, Quadro RTX",
    "sm80": "A100, A30",
    "sm86": "RTX 30, RTX A2000 to A6000, A10, A40",
    "sm89": "RTX 40, RTX Ada, L4, L40, L40S",
    "sm120": "RTX 50, RTX PRO Blackwell",
    "sm121": "GB10",
}
#: Precision -> the first that it is compiled for. TensorRT-RTX 1.7.1 itself refuses earlier ones: on sm75 it
#: has no products in fp32 and no bf16, before sm89 no fp8.
FIRST = {"fp32": "sm80", "bf16": "sm80", "fp8": "sm89"}


def _install(runtime: str) -> str:
    return f"{RUNTIMES[runtime].install} ({SYSTEMS[runtime]})"


def is_installed(runtime: str) -> bool:
    """Whether a library is there; it is not imported."""
    return find_spec(MODULES[runtime]) is not None


def unavailable(
    runtime: str = "tensorrt", precision: str = "fp32", device: torch.device | None = None
) -> str | None:
    """Why engines cannot be used with PyTorch on a CUDA device, None when they can.

    Args:
        runtime: "tensorrt" or "tensorrt-rtx".
        precision: that the GPU has to compute in; TensorRT-RTX is choosy.
        device: None = the current one.
    """
    title = TITLES[runtime]
    if not is_installed(runtime):
        return f"{title} is not installed: {_install(runtime)}"
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"{title} needs an NVIDIA GPU, and PyTorch sees none; see `slide2vec doctor`"
    unsuitable = None
    if runtime == "tensorrt-rtx":
        unsuitable = unsuited(target_of(*torch.cuda.get_device_capability(device)), precision)
    return unsuitable or not_loading(runtime)


def not_loading(runtime: str) -> str | None:
    """Why a library cannot be imported, or is too old; None when it is ready, GPU or not."""
    try:
        load_tensorrt(runtime)
    except (EngineError, ExtraMissingError) as error:
        return str(error)
    return None


def require(runtime: str = "tensorrt", device: torch.device | None = None) -> None:
    """Raises:
    ExtraMissingError: the library is not installed.
    EngineError: it cannot be used here. Without a GPU its own errors say nothing, or it crashes.
    """
    if reason := unavailable(runtime, device=device):
        raise (EngineError if is_installed(runtime) else ExtraMissingError)(reason)


def load_tensorrt(runtime: str = "tensorrt") -> None:
    """Import a library, and see that it is new enough.

    Raises:
        ExtraMissingError: it is not installed.
        EngineError: it is too old, or its libraries do not load.
    """
    title = TITLES[runtime]
    if not is_installed(runtime):
        raise ExtraMissingError(f"{title} is not installed: {_install(runtime)}")
    try:
        found = Library(runtime).installed
    except (ImportError, OSError) as error:
        raise EngineError(f"{title} is installed, but does not load: {error}") from error
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST[runtime]:
        oldest = ".".join(map(str, OLDEST[runtime]))
        raise EngineError(f"{title} {found} is too old: {oldest} or newer is needed ({_install(runtime)})")


def target_of(major: int, minor: int) -> str:
    """The name of a compute capability, whether TensorRT-RTX knows it or not."""
    return f"sm{major}{minor}"


def unsuited(target: str, precision: str) -> str | None:
    """Why TensorRT-RTX builds nothing for a target in a precision, None when it does."""
    if target not in TARGETS:
        known = ", ".join(TARGETS)
        return f"TensorRT-RTX compiles for {known}, not for {target}: TensorRT does (--runtime tensorrt)"
    first = FIRST.get(precision)
    if first is not None and int(target[2:]) < int(first[2:]):
        return (
            f"TensorRT-RTX compiles {precision} for {first} and newer, not for {target} ({TARGETS[target]})"
        )
    return None
