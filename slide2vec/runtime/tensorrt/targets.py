"""The GPUs that TensorRT-RTX compiles for, and what they compute in. No GPU and no library is needed."""

from __future__ import annotations

from slide2vec.errors import ConfigError

__all__ = ["TARGETS", "check_targets", "default_targets", "target_of", "unsuited"]

#: Compute capability -> what has it (`tensorrt_rtx_bindings.ComputeCapability` of 1.7).
TARGETS = {
    "sm75": "RTX 20, T4, Quadro RTX",
    "sm80": "A100, A30",
    "sm86": "RTX 30, RTX A2000 to A6000, A10, A40",
    "sm89": "RTX 40, RTX Ada, L4, L40, L40S",
    "sm120": "RTX 50, RTX PRO Blackwell",
    "sm121": "GB10",
}
#: What it takes by default (its documentation: 8.0, 8.6, 8.9, 12.0).
USUAL = ("sm80", "sm86", "sm89", "sm120")
#: Precision -> the first that it is compiled for. TensorRT-RTX 1.7.1 itself refuses earlier ones: on sm75 it
#: has no products in fp32 and no bf16, before sm89 no fp8.
FIRST = {"fp32": "sm80", "bf16": "sm80", "fp8": "sm89"}


def target_of(major: int, minor: int) -> str:
    """The name of a compute capability, whether TensorRT-RTX knows it or not."""
    return f"sm{major}{minor}"


def default_targets(precision: str) -> tuple[str, ...]:
    """Those that a plan is built for where none are named and no GPU is at hand."""
    return tuple(target for target in USUAL if unsuited(target, precision) is None)


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


def check_targets(targets: tuple[str, ...], precision: str) -> None:
    """Raises ConfigError where there are none, or one cannot be built for."""
    if not targets:
        raise ConfigError(f"TensorRT-RTX needs a target, one or more of {', '.join(TARGETS)}")
    for target in targets:
        if reason := unsuited(target, precision):
            raise ConfigError(reason)
