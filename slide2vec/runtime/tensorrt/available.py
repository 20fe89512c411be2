"""Whether TensorRT can be used on this machine, and why not."""

from __future__ import annotations

from importlib.util import find_spec

from slide2vec.errors import EngineError, ExtraMissingError

__all__ = ["load_tensorrt", "require", "unavailable"]

#: The first release whose parser knows ONNX's Attention operator.
OLDEST = (10, 14)
INSTALL = 'pip install "slide2vec[tensorrt]" (Linux)'


def unavailable() -> str | None:
    """Why TensorRT cannot be used with PyTorch here, None when it can."""
    if not find_spec("tensorrt"):
        return f"TensorRT is not installed: {INSTALL}"
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return "TensorRT needs an NVIDIA GPU, and PyTorch sees none; see `slide2vec doctor`"
    try:
        load_tensorrt()
    except (EngineError, ExtraMissingError) as error:
        return str(error)
    return None


def require() -> None:
    """Raises:
    ExtraMissingError: TensorRT is not installed.
    EngineError: it cannot be used here. Without a GPU its own errors say nothing, or it crashes.
    """
    if reason := unavailable():
        raise (EngineError if find_spec("tensorrt") else ExtraMissingError)(reason)


def load_tensorrt() -> None:
    """Import TensorRT, and see that it is new enough.

    Raises:
        ExtraMissingError: it is not installed.
        EngineError: it is too old, or its libraries do not load.
    """
    if not find_spec("tensorrt"):
        raise ExtraMissingError(f"TensorRT is not installed: {INSTALL}")
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        raise EngineError(f"TensorRT is installed, but does not load: {error}") from error
    if tuple(int(part) for part in trt.__version__.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"TensorRT {trt.__version__} is too old: {oldest} or newer is needed ({INSTALL})")
