"""What we call of TensorRT and TensorRT-RTX exists: our source, and the fakes of our tests, against the real
bindings of both.

Plans cannot be run here, so that a misspelt call would be found only on a user's GPU.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_rtx
import fake_tensorrt
import pytest
import tensorrt_api
from tensorrt_api import (
    API,
    drifted,
    installed_major,
    our_sources,
    placeholders,
    problems,
    read_api,
    run_with_bindings,
)

Check = Callable[[dict[str, str]], dict[str, list[str]]]

WHY_NOT = {"tensorrt": tensorrt_api.missing(), "tensorrt-rtx": tensorrt_api.missing_rtx()}
BINDINGS = {"tensorrt": "tensorrt_bindings", "tensorrt-rtx": "tensorrt_rtx_bindings"}
#: Written for both, and for TensorRT-RTX alone.
SHARED = our_sources()
EVERY = tuple(dict.fromkeys((*SHARED, *our_sources("tensorrt_rtx_bindings"))))


@pytest.fixture(scope="module", params=list(BINDINGS))
def library(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if reason := WHY_NOT[name]:
        pytest.skip(reason)
    return name


@pytest.fixture(scope="module")
def libraries(library: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What TensorRT's bindings need; TensorRT-RTX brings its own."""
    folder = tmp_path_factory.mktemp("placeholders")
    return placeholders(folder) if library == "tensorrt" else folder


@pytest.fixture(scope="module")
def api(library: str, libraries: Path) -> API:
    return read_api(libraries, BINDINGS[library])


@pytest.fixture(scope="module")
def check(library: str, api: API, tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Checks sources by name; the problems of each."""
    folder = tmp_path_factory.mktemp("checked")

    def checked(sources: dict[str, str]) -> dict[str, list[str]]:
        paths = {folder / f"{name}.py": text for name, text in sources.items()}
        for path, text in paths.items():
            path.write_text(text)
        found = problems(api, folder, tuple(paths), rtx=library == "tensorrt-rtx")
        return {path.stem: each for path, each in found.items()}

    return checked


def sources_for(library: str) -> tuple[Path, ...]:
    return EVERY if library == "tensorrt-rtx" else SHARED


def test_the_real_bindings_are_read(library: str, api: API) -> None:
    major = installed_major() if library == "tensorrt" else 1
    assert api["version"].startswith(f"{major}.")
    assert len(api["classes"]) > 100
    gone = library == "tensorrt-rtx" or installed_major() >= 11
    assert ("FP16" in api["classes"]["BuilderFlag"]["members"]) != gone
    assert ("ComputeCapability" in api["classes"]) == (library == "tensorrt-rtx")


def test_our_sources_call_only_what_exists(library: str, api: API, tmp_path: Path) -> None:
    assert {path.name for path in SHARED} >= {"library.py", "plans.py", "tensorrt_builder.py"}
    assert {path.name for path in EVERY} - {path.name for path in SHARED} == {"rtx.py"}
    assert problems(api, tmp_path, sources_for(library), rtx=library == "tensorrt-rtx") == {}


def edits(source: str, api: API) -> Iterator[tuple[str, str]]:
    """(what, source with it misspelt) for each attribute, keyword and override of a file that has a name
    of TensorRT's."""
    names = {n for described in api["classes"].values() for n in described["members"]}
    names |= {*api["classes"], "__version__"}
    lines = source.splitlines(keepends=True)
    for word, at, column in spelt(ast.parse(source), names):
        line = lines[at - 1]
        edited = [*lines[: at - 1], f"{line[:column]}q{line[column:]}", *lines[at:]]
        yield f"{word}_{at}_{column}", "".join(edited)


def spelt(tree: ast.AST, names: set[str]) -> Iterator[tuple[str, int, int]]:
    """(word, line, column after it)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node.attr, node.end_lineno or 0, node.end_col_offset or 0
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            for keyword in node.keywords:
                assert keyword.arg is not None
                yield keyword.arg, keyword.lineno, keyword.col_offset + len(keyword.arg)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(b).startswith("trt.") for b in node.bases):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in names - {"__init__"}:
                    yield method.name, method.lineno, method.col_offset + len(f"def {method.name}")


def test_every_misspelling_is_found(library: str, api: API, check: Check) -> None:
    """So that nothing we call is out of the checker's sight."""
    paths = SHARED if library == "tensorrt" else [path for path in EVERY if path.name == "rtx.py"]
    mutants = {f"{path.stem}_{what}": text for path in paths for what, text in edits(path.read_text(), api)}
    assert len(mutants) > (50 if library == "tensorrt" else 25)
    assert set(check(mutants)) == set(mutants)


HEAD = "import tensorrt as trt\n"


#: Sources, and what is said of each.
MISTAKES = [
    ("def f(b: trt.Builder) -> None:\n    b.create_netwerk()", "create_netwerk"),
    ("trt.BuilderFlag.TF23", "TF23"),
    ("trt.Bilder", "Bilder"),
    ("def f(b: trt.Builder) -> None:\n    b.create_network(flagz=0)", "flagz"),
    ("def f(b: trt.Builder) -> None:\n    b.create_network(0, 1)", "Too many arguments"),
    ("def f(c: trt.IExecutionContext) -> None:\n    c.execute_async_v3()", "stream_handle"),
    (
        "def f(b: trt.Builder) -> None:\n    b.create_builder_config().max_workspace_size = 1",
        "max_workspace_size",
    ),
    ("def f(t: trt.ITensor) -> None:\n    t.shape.sort()", "sort"),
    ("def f(e: trt.ICudaEngine) -> int:\n    return e.num_bindings", "num_bindings"),
    (
        "def f(b: trt.Builder, n: trt.INetworkDefinition, c: trt.IBuilderConfig) -> None:\n"
        "    b.build_serialized_network(c, n)",
        '"IBuilderConfig"',
    ),
    ("def f(e: trt.ICudaEngine) -> None:\n    e.num_io_tensors = 3", "read-only"),
    ("trt.IHostMemory()", "cannot_be_made"),
    (
        "class L(trt.ILogger):\n    def logg(self, severity: int, msg: str) -> None: ...",
        "L.logg",
    ),
    (
        "class M(trt.IProgressMonitor):\n    def step_complete(self) -> bool: ...",
        "incompatible with supertype",
    ),
    ("getattr(trt, 'Builder')", "getattr hides"),
    ("from typing import Any\nbuilder: Any = trt.Builder", "Any hides"),
    ("trt.Bilder  # type: ignore[attr-defined]", "type: ignore hides"),
]


@pytest.fixture(scope="module")
def found(check: Check) -> dict[str, list[str]]:
    """Of all mistakes at once: the type checker takes a while to start."""
    return check({f"mistake_{number}": f"{HEAD}{source}\n" for number, (source, _) in enumerate(MISTAKES)})


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_found(number: int, found: dict[str, list[str]]) -> None:
    problems_of = found.get(f"mistake_{number}", [])
    assert any(MISTAKES[number][1] in problem for problem in problems_of), problems_of


def test_correct_calls_are_not_called_mistakes(
    check: Check,
) -> None:
    source = (
        "def f(b: trt.Builder) -> bytes:\n    b.create_network(flags=0)\n    return bytes(trt.Dims([1]))\n"
    )
    assert check({"correct": HEAD + source}) == {}


IMPORTED = """
import sys
name, bindings = sys.argv[1:]
trt = __import__(bindings)
if name == "tensorrt":
    sys.modules["tensorrt"] = trt
import slide2vec.runtime.tensorrt.plans
from slide2vec.runtime.tensorrt.library import Library, error_text
assert "torch" not in sys.modules
library = Library(name)
assert len(library.dtypes) == 5 and len(library.compatibility) == 3 and library.installed == trt.__version__
log = library.log()
assert isinstance(log, trt.ILogger)
log.log(trt.ILogger.Severity.ERROR, "said")
assert error_text(log) == "said"
from slide2vec.compile.tensorrt_builder import Monitor
monitor = library.own(Monitor)(None)
assert isinstance(monitor, trt.IProgressMonitor)
monitor.phase_start("a", None, 1)
assert monitor.step_complete("a", 0)
assert list(library.new_dims([2, 3])) == [2, 3]
batch, *row = library.new_dims([-1, 3, 4])
assert (batch, row) == (-1, [3, 4])
print("imported")
"""


def test_our_modules_import_and_subclass_the_real_bindings(library: str, libraries: Path) -> None:
    done = run_with_bindings(libraries, "-c", IMPORTED, library, BINDINGS[library])
    assert done.stdout.split() == ["imported"], done.stderr


def test_the_fakes_of_our_tests_are_like_the_real_ones(library: str, api: API) -> None:
    """The fake TensorRT is what both have; the fake TensorRT-RTX adds its own."""
    assert list(drifted(fake_tensorrt, api)) == []
    if library == "tensorrt-rtx":
        assert list(drifted(fake_rtx, api)) == []


def test_the_fakes_have_the_values_of_the_real_ones(library: str) -> None:
    """Of enums that are more than names: diagnostics are a sum, compute capabilities numbers."""
    if library == "tensorrt":
        pytest.skip("it has none of them")
    import tensorrt_rtx_bindings as real

    for name in ("ComputeCapability", "EngineValidity", "EngineInvalidityDiagnostics"):
        values = {each.name: each.value for each in getattr(fake_rtx, name)}
        assert values == {each: getattr(real, name).__members__[each].value for each in values}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Bilder: ...", "Bilder is no class"),
        (
            "class Builder:\n    def create_netwerk(self, flags=0): ...",
            "Builder.create_netwerk does not exist",
        ),
        ("class Builder:\n    def create_network(self, flagz=0): ...", "create_network has other parameters"),
        ("class Builder:\n    def __init__(self): ...", "Builder() has other parameters"),
        ("class BuilderFlag:\n    TF23 = 1", "BuilderFlag.TF23 does not exist"),
        ("class ITensor:\n    def f(self):\n        self.shapes = 1", "ITensor.shapes does not exist"),
    ],
)
def test_a_fake_that_drifts_is_found(
    source: str, said: str, api: API, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "drifting.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("drifting", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "drifting", module)  # where inspect looks for its source
    spec.loader.exec_module(module)
    found = list(drifted(module, api))
    assert any(said in problem for problem in found), found
