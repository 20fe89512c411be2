"""How this installation came to be, and so the command that adds to it.

PyPI's slide2vec is another project: `pip install "slide2vec[cuda]"` would put that in this one's place.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["add_extra"]


def add_extra(*extras: str) -> str:
    """The command that adds what some extras bring to this installation, by the installer that it has.

    It installs from where slide2vec came from (a checkout, a wheel, a repository: PEP 610's direct_url.json);
    where that is not known, or no longer there, the packages themselves.
    """
    names = ",".join(sorted(set(extras)))
    return " ".join((*_installer(), _what(names)))


def _installer() -> Iterator[str]:
    """As people type it, where that reaches this environment."""
    beside = Path(sys.executable).parent
    has_pip = _is_installed("pip")
    found = shutil.which("pip" if has_pip else "uv")
    reaches = found is not None and Path(found).parent == beside
    if has_pip:
        yield "pip install" if reaches else f"{_quoted(sys.executable)} -m pip install"
    else:
        yield "uv pip install" if reaches else f"uv pip install --python {_quoted(sys.executable)}"


def _is_installed(name: str) -> bool:
    """By its metadata: to look for the module pip makes setuptools leave distutils to Python, and PyTorch's
    compiler then cannot import setuptools."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _what(names: str) -> str:
    try:
        here = distribution("slide2vec")
        said = json.loads(here.read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):  # run out of a folder that is not installed
        return f"-e {_with_extras(str(Path(__file__).parents[1]), names)}"
    url = str(said.get("url", ""))
    if url.startswith("file:"):
        path = unquote(urlsplit(url).path)
        if Path(path).exists():
            edited = "-e " if said.get("dir_info", {}).get("editable") else ""
            return edited + _with_extras(path, names)
    elif url:
        return f'"slide2vec[{names}] @ {_repository(said) or url}"'
    return " ".join(f'"{each}"' for each in _packages(here, names.split(",")))


def _repository(said: dict[str, Any]) -> str:
    about = said.get("vcs_info")
    return f"{about['vcs']}+{said['url']}@{about['commit_id']}" if about else ""


def _packages(here: Distribution, names: list[str]) -> list[str]:
    """What the extras require (its metadata has no extras of extras: the build resolves those)."""
    found = []
    for line in here.requires or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if set(re.findall(r"""extra\s*==\s*['"]([\w-]+)['"]""", marker)) & set(names) and _holds(marker):
            found.append(requirement)
    return list(dict.fromkeys(found))


def _holds(marker: str) -> bool:
    """Whether a package is one for this system."""
    system = re.search(r"""sys_platform\s*==\s*['"](\w+)['"]""", marker)
    return system is None or system[1] == sys.platform


def _with_extras(path: str, names: str) -> str:
    return f'"{path}[{names}]"'


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path
