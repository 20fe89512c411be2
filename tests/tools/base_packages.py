"""`python base_packages.py MODULE ARGS…`: runs a module where nothing can be imported but the standard
library, what slide2vec's base packages bring along, pytest, and this checkout."""

from __future__ import annotations

import importlib.machinery
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import (
    Distribution,
    DistributionFinder,
    MetadataPathFinder,
    PackageNotFoundError,
    distribution,
    packages_distributions,
)
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
#: Packages that several distributions put modules into: each of these is judged by itself.
SHARED = ("nvidia",)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def base_distributions() -> set[str]:
    """The base packages of pyproject.toml, and pytest, with all that they require (without extras)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    left = [*project["dependencies"], "pytest"]
    while left:
        requirement, _, marker = left.pop().partition(";")
        name = normal(re.split(r"[\s\[(<>=!~]", requirement.strip())[0])
        if "extra" in marker or name in found:
            continue
        try:
            needs = distribution(name).requires
        except PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        left += needs or []
    return found


def modules_of(distributions: set[str]) -> Iterator[str]:
    """Their modules; those in a shared package with it: nvidia.dali."""
    for module, owners in packages_distributions().items():
        if module not in SHARED and distributions & set(map(normal, owners)):
            yield module
    for name in distributions:
        for file in distribution(name).files or ():
            if file.parts[0] in SHARED and len(file.parts) > 2:
                yield ".".join(file.parts[:2])


class BaseOnly:
    """Finds modules in `sys.path` as Python does, unless a distribution that is not allowed brought them."""

    def __init__(self, distributions: set[str]) -> None:
        self._distributions, self._allowed = distributions, set(modules_of(distributions))

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        parts = name.split(".")
        judged = ".".join(parts[:2]) if parts[0] in SHARED and len(parts) > 1 else parts[0]
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or judged in self._allowed or judged in SHARED:
            return spec
        installed = "site-packages" in str(spec.origin or list(spec.submodule_search_locations or ()))
        return None if installed else spec

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        found = MetadataPathFinder.find_distributions(context or DistributionFinder.Context())
        return (each for each in found if normal(each.metadata["Name"]) in self._distributions)


def main() -> None:
    own = BaseOnly(base_distributions())
    sys.meta_path[:] = [
        own if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
    ]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(ROOT)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
