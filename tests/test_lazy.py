"""What is imported when it is first used: names of our packages, and PyTorch's compiler."""

from __future__ import annotations

import gc
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from slide2vec import lazy

PACKAGE = """\
from slide2vec.lazy import lazy_attributes

__all__ = ["here", "there"]
here = 1
__getattr__, __dir__ = lazy_attributes(__name__, {"there": "home"})
"""


def test_lazy_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazily").mkdir()
    (tmp_path / "lazily/__init__.py").write_text(PACKAGE)
    (tmp_path / "lazily/home.py").write_text("there = 2\nother = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    import lazily

    assert dir(lazily) == ["here", "there"] and "lazily.home" not in sys.modules
    assert (lazily.here, lazily.there) == (1, 2)
    with pytest.raises(AttributeError, match="module 'lazily' has no attribute 'other'"):
        _ = lazily.other
    with pytest.raises(ImportError, match="nothing"):
        from lazily import nothing  # noqa: F401


def test_the_garbage_collector_waits_for_imports() -> None:
    """And goes on as it was before: at work or not, and with what a program has frozen."""
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with lazy.without_collection():
        assert not gc.isenabled()
        with lazy.without_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with pytest.raises(ImportError), lazy.without_collection():
            import_module("no.such.module")
        assert gc.isenabled() and 0 < gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


TIMM_ALONE = """\
import sys
import torch

disable, waits = torch.compiler.disable, ("torch._dynamo", "torch._dynamo.utils", "sympy")
from slide2vec.encoders.timm import timm
from slide2vec.lazy import import_timm
import torchvision

assert torch.compiler.disable is disable and import_timm() is timm is sys.modules["timm"]
small = timm.create_model("resnet18", features_only=True, feature_cls="fx", out_indices=(1,))
assert small(torch.zeros(1, 3, 32, 32))[0].shape == (1, 64, 8, 8)
assert torchvision.ops.nms(torch.eye(4)[:2], torch.ones(2), 0.5).tolist() == [0, 1]
print(*[name for name in waits if name in sys.modules])
"""


#: Encoders are built as for their weights, and find that none of them is in the file.
WEIGHTS = """
from slide2vec.encoders import build_encoder, weights
from slide2vec.encoders.slide import build_slide_encoder
from slide2vec.errors import WeightsError
from slide2vec.recipes import load_recipe

weights._state = lambda path, recipe: {}
for name, build in (("prost40m", build_encoder), ("titan", build_slide_encoder)):
    recipe = load_recipe(name)
    try:
        build(recipe, recipe.variant(None)[1], sys.executable)
    except WeightsError as error:
        assert "missing: " in str(error)
print(*[name for name in waits[:2] if name in sys.modules])
"""


def test_timm_without_the_compiler() -> None:
    """timm 1.0.31 and torchvision 0.29 load it, and sympy with it, when they are imported by themselves; so
    does PyTorch 2.15 when it draws initial values for tensors without memory."""
    done = subprocess.run([sys.executable, "-c", TIMM_ALONE + WEIGHTS], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package in place of PyTorch's compiler, which nobody has imported yet."""
    name = f"compiler_of_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("from .utils import other\n")
    (tmp_path / name / "utils.py").write_text(
        "other = 3\ndef is_compile_supported(device_type): return device_type == 'cpu'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lazy, "_COMPILER", name)
    monkeypatch.setattr(lazy, "_ITS_UTILS", f"{name}.utils")
    return name


def test_what_is_asked_of_the_compiler_loads_it(compiler: str) -> None:
    with lazy._compiler_when_called():
        supported = import_module(f"{compiler}.utils").is_compile_supported
    assert not {compiler, f"{compiler}.utils"} & sys.modules.keys()
    assert (supported("cpu"), supported("meta")) == (True, False)
    assert sys.modules[f"{compiler}.utils"].other == 3


@pytest.mark.parametrize("imported", ["{}", "{}.utils"])
def test_who_needs_the_compiler_meanwhile_has_it(compiler: str, imported: str) -> None:
    with lazy._compiler_when_called():
        found = import_module(imported.format(compiler))
        assert found.other == 3
    real = sys.modules[f"{compiler}.utils"]
    assert real.__file__ and real.other == 3


def test_decorators_of_the_compiler_wait_for_the_call(compiler: str) -> None:
    disable = torch.compiler.disable
    with lazy._compiler_when_called():
        later: Any = torch.compiler.disable

        @later
        def twice(number: int) -> int:
            """Doubles."""
            return 2 * number

        assert later is not disable and not hasattr(twice, "_torchdynamo_disable")
    assert torch.compiler.disable is disable
    assert (twice(3), twice.__doc__) == (6, "Doubles.")
    for given in ({"reason": "a test"}, {"recursive": False}):
        assert later(**given)(lambda number: number)(1) == 1
    assert later(torch.nn.ReLU())(torch.ones(1)) == 1
