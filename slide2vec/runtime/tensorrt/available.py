"""Whether TensorRT or TensorRT-RTX can be used on this machine, and why not."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from slide2vec.choices import RUNTIMES
from slide2vec.errors import EngineError, ExtraMissingError
from slide2vec.runtime.tensorrt.library import MODULES, TITLES, Library
from slide2vec.runtime.tensorrt.targets import target_of, unsuited

if TYPE_CHECKING:
    import torch

__all__ = ["is_installed", "load_tensorrt", "not_loading", "require", "unavailable"]

#: The first release whose parser knows ONNX's Attention operator (TensorRT), or that was tried.
OLDEST = {"tensorrt": (10, 14), "tensorrt-rtx": (1, 7)}
SYSTEMS = {"tensorrt": "Linux", "tensorrt-rtx": "Linux on x86-64"}


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
