"""Messages of exporters and compilers: silenced, or cut down to what a user needs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["first_line", "silenced"]

LOGGERS = ("torch.onnx", "torch.export", "torch._inductor", "torch.utils.cpp_extension", "onnxscript")


def first_line(error: BaseException) -> str:
    """The first line of an error that says anything."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


@contextmanager
def silenced() -> Iterator[None]:
    """Without the remarks of exporters and compilers, which are for their developers."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
