"""Every decoder of JPEGs on a GPU is asked to interpolate chroma, as libjpeg does: what none of these tests
runs is looked for in the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from slide2vec.readers import decoders
from slide2vec.readers.decoders import NvimgcodecDecoder

PACKAGE = Path(decoders.__file__).parents[1]
#: The only file that makes decoders of nvImageCodec.
MAKES_NVIMGCODEC = PACKAGE / "readers" / "decoders.py"
#: What decodes images in DALI's modules `fn` and `ops`, whichever name these go by.
DALI_DECODERS = ("decoders", "image_decoder", "ImageDecoder", "decode_jpeg")


def calls(path: Path) -> Iterator[tuple[ast.Call, list[str]]]:
    """Every call of a file, and the names that it is called by: fn.decoders.image -> fn, decoders, image."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            names, found = [], node.func
            while isinstance(found, ast.Attribute):
                names.append(found.attr)
                found = found.value
            if isinstance(found, ast.Name):
                names.append(found.id)
            yield node, names[::-1]


def without_fancy_upsampling(path: Path) -> list[str]:
    """Calls of a file that decode JPEGs by DALI or make a decoder of nvImageCodec, and do not ask for it."""
    wrong, uses_dali = [], "dali" in path.read_text().lower()
    for call, names in calls(path):
        by_dali = uses_dali and any(name in DALI_DECODERS for name in names)
        if by_dali and not any(
            keyword.arg == "jpeg_fancy_upsampling"
            and isinstance(keyword.value, ast.Constant)
            and keyword.value.value is True
            for keyword in call.keywords
        ):
            wrong.append(f"{path.name}:{call.lineno}")
        if names[-1:] == ["Decoder"] and path != MAKES_NVIMGCODEC:
            wrong.append(f"{path.name}:{call.lineno}")
    return wrong


def test_every_call_in_the_sources() -> None:
    found = {path.name: wrong for path in PACKAGE.rglob("*.py") if (wrong := without_fancy_upsampling(path))}
    assert found == {}


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("fn.decoders.image(x, device='mixed', jpeg_fancy_upsampling=True)", False),
        ("fn.decoders.image(x, device='mixed')", True),
        ("fn.decoders.image(x, jpeg_fancy_upsampling=fancy)", True),
        ("fn.decoders.image(x, **options)", True),
        ("fn.experimental.decoders.image_crop(x)", True),
        ("ops.ImageDecoder(device='mixed')", True),
        ("nvimgcodec.Decoder(options=':fancy_upsampling=1')", True),  # elsewhere than in decoders.py
        ("library.decode(x)", False),
    ],
)
def test_calls_without_it_are_found(source: str, wrong: bool, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(f"import nvidia.dali\nfound = {source}\n")
    assert bool(without_fancy_upsampling(path)) == wrong


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_nvimgcodec(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever way the options take: those of every decoder that is made."""
    made: list[dict[str, Any]] = []

    class Library(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return lambda *values, **named: SimpleNamespace(values=values, **named)

    class Decoder:
        def __init__(self, **options: Any) -> None:
            made.append(options)

    library = Library("nvidia.nvimgcodec")
    library.Decoder = Decoder  # type: ignore[attr-defined]
    for kind in ("BackendKind", "ColorSpec"):
        setattr(library, kind, SimpleNamespace(CPU_ONLY=0, SRGB=1, SYCC=2, UNCHANGED=3))
    library.NVIMGCODEC_DEVICE_CPU_ONLY = -99999  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", library)
    monkeypatch.setattr(decoders, "nvimgcodec_unavailable", lambda: None)
    real = decoders.import_module
    monkeypatch.setattr(
        decoders, "import_module", lambda name: library if name == "nvidia.nvimgcodec" else real(name)
    )
    NvimgcodecDecoder(torch.device(device))
    assert made and all(":fancy_upsampling=1" in each["options"].split() for each in made)
