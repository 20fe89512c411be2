"""Run with Python: prints the API of TensorRT's or TensorRT-RTX's bindings as JSON, read off the real module.

The argument names the module. On a machine without TensorRT the placeholder libraries of tensorrt_api.py must
be on LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib import import_module
from typing import Any

trt = import_module(sys.argv[1])

#: Of PyTypeObject, on 64 bits: twenty words before tp_as_buffer.
TP_AS_BUFFER = 20 * 8
SPECIAL = ("__init__", "__int__", "__index__", "__len__", "__getitem__")


def has_buffer(cls: type) -> bool:
    """Whether bytes can be read off its objects; before Python 3.12 only C can tell."""
    table = ctypes.c_void_p.from_address(id(cls) + TP_AS_BUFFER).value
    return bool(table and ctypes.c_void_p.from_address(table).value)


def member(value: Any) -> dict[str, Any]:
    if isinstance(value, property):
        doc = value.fget.__doc__ if value.fget else ""
        return {"kind": "property", "doc": doc or "", "settable": value.fset is not None}
    if callable(value):
        return {"kind": "method", "doc": value.__doc__ or ""}
    return {"kind": "value", "type": type(value).__qualname__}


def described(cls: type) -> dict[str, Any]:
    own = {n: v for n, v in vars(cls).items() if not n.startswith("_") or n in SPECIAL}
    nested = {n: v for n, v in own.items() if isinstance(v, type)}
    return {
        "bases": [base.__name__ for base in cls.__bases__ if base.__module__ == cls.__module__],
        "buffer": has_buffer(cls),
        "nested": {n: described(v) for n, v in nested.items() if v.__qualname__ == f"{cls.__name__}.{n}"},
        "members": {
            n: member(v if isinstance(v, property) else getattr(cls, n))
            for n, v in own.items()
            if n not in nested
        },
    }


classes = {name: described(value) for name, value in vars(trt).items() if isinstance(value, type)}
print(json.dumps({"version": trt.__version__, "classes": classes}))
