"""Which device, which precision; PyTorch's threads on the CPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch

from slide2vec.errors import ConfigError

__all__ = [
    "devices_for",
    "is_numbered",
    "pick_device",
    "resolve_precision",
    "torch_threads",
    "use_device",
]

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; by default CUDA, else MPS, else the CPU. "cuda": the current GPU, by number.

    Raises:
        ConfigError: not a device, or one that this machine does not have.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not a device; try cuda, cuda:1, mps or cpu") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices; see "
            "`slide2vec doctor`"
        )
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device='mps': this machine has no Metal device")
    return chosen


def use_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What launches kernels itself, in the block, launches them on that GPU; elsewhere nothing happens."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_numbered(device: str | torch.device | None) -> bool:
    """Whether it is one device, not a kind of which there may be several."""
    return device not in (None, "auto") and torch.device(device or "cpu").index is not None


def devices_for(
    device: torch.device, *, chosen: bool, num_gpus: int | None = None, devices: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The devices that a model runs on: those named, else GPUs of this machine, else its own only.

    Args:
        device: the model's.
        chosen: it was asked for: then it counts as named, unless num_gpus or devices say otherwise.

    Raises:
        ConfigError: there are not so many, or they are of another kind than the model's.
    """
    if devices is not None:
        for name in devices:
            if pick_device(name).type != device.type:
                raise ConfigError(
                    f"devices={', '.join(devices)}: the model is on {device}; load it on {name}"
                )
        return tuple(devices)
    if device.type != "cuda":
        if (num_gpus or 0) > 1:
            logger.warning("num_gpus=%d: the model is on %s, and runs there only", num_gpus, device)
        return (str(device),)
    if num_gpus == 0 or (num_gpus is None and chosen):
        return (str(device),)
    there = torch.cuda.device_count()
    if num_gpus is not None and num_gpus > there:
        raise ConfigError(f"num_gpus={num_gpus}: PyTorch sees {there} CUDA devices; see `slide2vec doctor`")
    return tuple(f"cuda:{number}" for number in range(num_gpus or there))


def resolve_precision(asked: str | None, preset: str, device: torch.device) -> str:
    """The precision asked for; by default the preset's on CUDA and fp32 elsewhere.

    Raises:
        ConfigError: not a precision.
    """
    if asked is None:
        return preset if device.type == "cuda" else "fp32"
    if asked not in PRECISIONS:
        raise ConfigError(f"precision={asked!r} is not one of {', '.join(PRECISIONS)}")
    if asked == "fp16" and device.type == "cpu":
        logger.warning(
            "fp16 is meant for accelerators and slow on a CPU; fp32 is exact there, bf16 may be faster"
        )
    return asked


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """What PyTorch computes on the CPU in the block, it computes in `count` threads; then as before.

    By itself it takes as many as the machine has cores, whatever SLURM or a cgroup allows. The setting is of
    the calling thread (OpenMP's), and of threads that PyTorch has not seen yet: hold no block open across a
    yield. None changes nothing. Setting and putting back takes 0.2 µs.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
