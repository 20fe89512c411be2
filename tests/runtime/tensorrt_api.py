"""The API of TensorRT and TensorRT-RTX, read off the real bindings, and as stubs for a type checker.

TensorRT's bindings need three libraries that only NVIDIA's own index has. They import against placeholders
that have the same symbols and do nothing; every class, method, enum and docstring is then the real one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
API = dict[str, Any]

SYMBOLS = {
    "libnvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
        "getInferLibVersion",
    ),
    "libnvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin": ("initLibNvInferPlugins",),
}

PACKAGE = HERE.parents[1] / "slide2vec"
#: Only what is named on the command line is read, so that it takes seconds; other modules are Any.
OPTIONS = (
    "--config-file=",
    "--follow-imports=skip",
    "--ignore-missing-imports",
    "--no-site-packages",
    "--check-untyped-defs",
    "--no-error-summary",
    "--no-pretty",
)
#: What our sources use of ours, so that the type checker sees it, too.
COMPANIONS = tuple(
    PACKAGE / name
    for name in ("errors.py", "files/__init__.py", "files/atomic.py", "files/remote.py", "runtime/base.py")
)

BUILTIN = {"int", "float", "str", "bool", "bytes", "list", "tuple", "dict", "object", "None"}
PYTHON = {
    "typing.SupportsInt": "int",
    "typing.SupportsFloat": "float",
    "typing_extensions.Buffer": "typing_extensions.Buffer",
    "collections.abc.Sequence": "collections.abc.Sequence",
    "collections.abc.Iterable": "collections.abc.Iterable",
}


def installed_major() -> int:
    """Of the bindings: 11, or 10."""
    for package in ("tensorrt-cu13-bindings", "tensorrt-cu12-bindings"):
        with suppress(PackageNotFoundError):
            return int(version(package).partition(".")[0])
    raise AssertionError("tensorrt_bindings of an unknown package")


def missing() -> str | None:
    """Why the real bindings cannot be imported here."""
    if not find_spec("tensorrt_bindings"):
        return "TensorRT's Python bindings are not installed (tensorrt-cu13-bindings)"
    return None if shutil.which("gcc") else "no gcc to compile the placeholder libraries with"


def placeholders(folder: Path) -> Path:
    """Compile the three libraries into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, symbols in SYMBOLS.items():
        library = folder / f"{name}.so.{installed_major()}"
        source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols)
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), "-xc", "-"]
        subprocess.run(command, input=source, text=True, check=True)
    return folder


def run_with_bindings(libraries: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where `import tensorrt_bindings` finds the placeholders."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def missing_rtx() -> str | None:
    """Why TensorRT-RTX cannot be imported here; it needs no placeholders."""
    return None if find_spec("tensorrt_rtx_bindings") else "TensorRT-RTX is not installed (Linux on x86-64)"


def read_api(libraries: Path, module: str = "tensorrt_bindings") -> API:
    """The API of the installed bindings."""
    done = run_with_bindings(libraries, str(HERE / "tensorrt_dump.py"), module)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    default: bool


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]
    returns: str


def signatures(doc: str, api: API) -> Iterator[Signature]:
    """Those that pybind11 writes at the head of a docstring; several when it is overloaded."""
    for line in doc.splitlines():
        found = re.match(r"(?:\d+\. )?\w*\((.*)\) -> (.+)$", line)
        if found and "*args" not in line:
            parameters = (_parameter(text, api) for text in _split(found[1]) if text not in ("/", "*"))
            yield Signature(tuple(parameters), python_type(found[2], api))
            if not line[0].isdigit():
                return


def _split(parameters: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in parameters.replace("->", "→"):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _parameter(text: str, api: API) -> Parameter:
    name, _, rest = text.partition(":")
    kind, assigned, _ = rest.partition(" = ")
    name = f"{name.strip()}_" if keyword.iskeyword(name.strip()) else name.strip()
    return Parameter(name, python_type(kind.strip() or "object", api), bool(assigned))


def python_type(text: str, api: API) -> str:
    """A type of a docstring as one of the stubs; `object`, of which nothing can be used, when unknown."""
    text = re.sub(r"tensorrt_(rtx_)?bindings\.tensorrt(_rtx)?\.", "", text)
    text = re.sub(r"\w+(?:::\w+)+", lambda match: _from_cpp(match[0], api), text)
    for theirs, ours in PYTHON.items():
        text = text.replace(theirs, ours)
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return "object"
    known = {*api["classes"], *BUILTIN, "typing_extensions", "collections"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return text if names <= known else "object"


def _from_cpp(name: str, api: API) -> str:
    last = name.rpartition("::")[2]
    return next((n for n in (last, last.removeprefix("I")) if n in api["classes"]), "object")


def stubs(api: API) -> str:
    """The text of `tensorrt/__init__.pyi`: nothing but what the bindings have."""
    lines = ["import collections.abc", "import typing", "import typing_extensions", "__version__: str"]
    for name, described in api["classes"].items():
        lines += _class_stub(name, described, api)
    return "\n".join(lines) + "\n"


def _class_stub(name: str, described: API, api: API) -> list[str]:
    lines = [f"class {name}({', '.join(described['bases'])}):"]
    for inner, inside in described["nested"].items():
        lines += [f"    {line}" for line in _class_stub(inner, inside, api)]
    for member, what in described["members"].items():
        if member.isidentifier():
            lines += [f"    {line}" for line in _member_stub(member, what, api)]
    if "__getitem__" in described["members"]:
        lines.append("    def __iter__(self) -> collections.abc.Iterator[int]: ...")
    if described["buffer"]:
        lines.append("    def __buffer__(self, flags: int, /) -> memoryview: ...")
    return [*lines, "    ..."]


def _member_stub(name: str, what: API, api: API) -> list[str]:
    if what["kind"] == "value":
        return [f"{name}: typing.ClassVar[{what['type']}]"]
    found = list(signatures(what["doc"], api))
    if what["kind"] == "property":
        returns = found[0].returns if found else "object"
        getter = ["@property", f"def {name}(self) -> {returns}: ..."]
        return [*getter, f"@{name}.setter", f"def {name}(self, value: {returns}) -> None: ..."][
            : 4 if what["settable"] else 2
        ]
    if not found and name == "__init__":  # it is only given out, never made
        return ["def __init__(self, *, cannot_be_made: typing.Never) -> None: ..."]
    overload = ["@typing.overload"] if len(found) > 1 else []
    lines = []
    for signature in found:
        lines += [*overload, *_method_stub(name, signature)]
    return lines or [f"def {name}(self) -> object: ..."]


def _method_stub(name: str, signature: Signature) -> list[str]:
    names = [p.name for p in signature.parameters]
    required = max((i for i, p in enumerate(signature.parameters) if not p.default), default=-1)
    written = [
        p.name if p.name == "self" else f"{p.name}: {p.type}" + (" = ..." if i > required else "")
        for i, p in enumerate(signature.parameters)
    ]
    static = [] if names[:1] == ["self"] else ["@staticmethod"]
    return [*static, f"def {name}({', '.join(written)}) -> {signature.returns}: ..."]


@functools.cache
def our_sources(module: str = "tensorrt") -> tuple[Path, ...]:
    """Files of the package that import TensorRT, or what only TensorRT-RTX has."""
    sources = sorted(PACKAGE.rglob("*.py"))
    imports = re.compile(rf"^ *import {module}\b", re.M)
    return tuple(path for path in sources if imports.search(path.read_text()))


def problems(api: API, folder: Path, files: tuple[Path, ...], rtx: bool = False) -> dict[Path, list[str]]:
    """What in some files is not in the API: names, keywords, counts and types of arguments (mypy against
    the stubs), and what those could not see (below).

    Args:
        rtx: the API is TensorRT-RTX's, under its own name and, for what is written for both, TensorRT's.
    """
    found: dict[Path, list[str]] = {path: list(unseen(path.read_text(), api)) for path in files}
    texts = {"tensorrt": stubs(api)}
    ours = our_sources()
    if rtx:
        both = "from tensorrt_rtx_bindings import *\n__version__: str\n"
        texts = {"tensorrt": both, "tensorrt_rtx_bindings": stubs(api)}
        ours += our_sources("tensorrt_rtx_bindings")
    homes = {folder / "stubs" / name / "__init__.pyi": text for name, text in texts.items()}
    for home, text in homes.items():
        home.parent.mkdir(parents=True, exist_ok=True)
        home.write_text(text)
    given = dict.fromkeys((*homes, *ours, *COMPANIONS, *files))
    command = [sys.executable, "-m", "mypy", *OPTIONS, f"--cache-dir={folder.parent / 'mypy'}"]
    done = subprocess.run(
        [*command, *map(str, given)],
        env={**os.environ, "MYPYPATH": str(folder / "stubs")},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    for line in done.stdout.splitlines():
        path, _, message = line.partition(":")
        owner = (folder / path).resolve()
        if owner in found and "error:" in message:
            found[owner].append(message)
    return {path: messages for path, messages in found.items() if messages}


#: What takes an object out of the type checker's sight.
BLINDING = ("Any", "cast", "getattr", "setattr", "hasattr", "import_module", "__import__")


def unseen(source: str, api: API) -> Iterator[str]:
    """What a type checker does not report: overrides of methods that TensorRT does not have (it would
    never call them), and ways around the checker."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Attribute) and ast.unparse(base).startswith("trt."):
                    yield from _strangers(node, api["classes"].get(base.attr, {"members": {}}))
        if isinstance(node, ast.Name | ast.alias):
            name = node.id if isinstance(node, ast.Name) else node.name
            if name in BLINDING:
                yield f"{name} hides from the type checker what TensorRT does not have"
    for ignored in re.findall(r"^(.*)# type: ignore(?!\[misc\])", source, re.M):
        yield f"type: ignore hides what TensorRT does not have: {ignored.strip()}"


def _strangers(node: ast.ClassDef, base: API) -> Iterator[str]:
    for method in node.body:
        public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
        if public and method.name not in base["members"]:
            yield f"{node.name}.{method.name} overrides nothing of its base in TensorRT"


def drifted(fake: ModuleType, api: API) -> Iterator[str]:
    """What of a fake TensorRT the real one has not: classes, members, enum values, parameters."""
    for name, cls in vars(fake).items():
        if not isinstance(cls, type) or cls.__module__ != fake.__name__ or name.startswith("_"):
            continue
        if name in api["classes"]:
            yield from _class_drift(name, cls, api["classes"][name], api)
        else:
            yield f"{name} is no class of TensorRT"


def _class_drift(name: str, cls: type, real: API, api: API) -> Iterator[str]:
    for inner, value in vars(cls).items():
        if isinstance(value, type) and inner in real["nested"]:
            yield from _class_drift(f"{name}.{inner}", value, real["nested"][inner], api)
    for member in sorted(_public(cls) - set(real["nested"])):
        what = real["members"].get(member)
        if what is None:
            yield f"{name}.{member} does not exist"
        elif what["kind"] == "method" and not _same_parameters(getattr(cls, member), what, api):
            yield f"{name}.{member} has other parameters"
    made = real["members"].get("__init__", {"doc": ""})
    makes = list(signatures(made["doc"], api)) and not issubclass(cls, IntEnum)
    if makes and not _same_parameters(cls.__init__, made, api):
        yield f"{name}() has other parameters"


def _public(cls: type) -> set[str]:
    """Members that a class defines, and attributes that its __init__ sets."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name))
    own |= {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in targets
        if isinstance(node.ctx, ast.Store)
        and (ast.unparse(node).isupper() or ast.unparse(node).startswith("self."))
    }
    return {name for name in own if not name.startswith("_")}


def _same_parameters(function: Any, what: API, api: API) -> bool:
    """Whether some signature has these parameters; a fake may leave out last ones that have defaults."""
    ours = [name for name in inspect.signature(function).parameters if name != "self"]
    for signature in signatures(what["doc"], api):
        real = [p for p in signature.parameters if p.name != "self"]
        if ours == [p.name for p in real[: len(ours)]] and all(p.default for p in real[len(ours) :]):
            return True
    return False
