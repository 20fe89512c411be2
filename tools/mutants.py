"""`make mutants`: change one thing at a time in the modules that everything rests on, and see whether their
own unit tests notice.

Every mutant is tested in a fork of this process, which has what the tests import but slide2vec itself. What
was noticed is kept under mutants/, so that a run goes on where it was stopped; what was not is tried
again, and printed unless SURVIVORS has it, with the reason why it may live.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from difflib import ndiff
from functools import partial
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "mutants"
SURVIVORS = Path(__file__).with_name("survivors.toml")
#: Module -> the tests that are to notice.
MODULES = {
    "geometry": ("slide2vec/geometry.py", "tests/test_geometry.py"),
    "grid": ("slide2vec/tiling/grid.py", "tests/tiling/test_tile_slide.py"),
    "identity": (
        "slide2vec/cohort/identity.py",
        "tests/cohort/test_completed_artifacts.py tests/cohort/test_identity.py "
        "-k 'completed or makes or made or given_tiles'",
    ),
    "engine-key": ("slide2vec/compile/engine_key.py", "tests/compile/test_engine_key.py"),
    "parity": ("slide2vec/compile/parity.py", "tests/compile/test_parity.py"),
    "schedule": ("slide2vec/scale/scheduler.py", "tests/scale/test_scheduler.py"),
    "batches": ("slide2vec/stream/batches.py", "tests/stream/test_batches.py"),
    "pooling": ("slide2vec/aggregate/pooling.py", "tests/aggregate/test_pooling.py"),
    "regions": ("slide2vec/aggregate/regions.py", "tests/aggregate/test_regions.py -k regrouped"),
    "supertiles": ("slide2vec/tiling/supertiles.py", "tests/tiling/test_supertiles.py"),
    "spacing": ("slide2vec/readers/spacing.py", "tests/readers/test_spacing.py"),
    "cut": ("slide2vec/prepare/cut.py", "tests/prepare/test_prepare.py -k cut"),
    "tile-sources": ("slide2vec/stream/tile_sources.py", "tests/stream/test_tile_sources.py"),
}
#: A mutant that makes the tests compute without end is noticed, too: after this many times the CPU time that
#: they take without it. Or wait without end: after as many times the time, and half a minute, for a machine
#: with other work is slower at times.
PATIENCE = 5
WAIT_S = 30.0
#: Or ask for memory without end.
MEMORY_BYTES = 16 * 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="module", help=f"of {', '.join(MODULES)}; all by default")
    parser.add_argument("--anew", action="store_true", help="forget what earlier runs have found")
    asked = parser.parse_args()
    if unknown := set(asked.names) - MODULES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(MODULES)}")
    if asked.anew:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(exist_ok=True)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return int(any([_try_module(name) for name in asked.names or MODULES]))


def _try_module(name: str) -> int:
    """How many mutants survive without a reason, or have one and do not survive."""
    module, tests = MODULES[name]
    mutants = _mutants(module)
    survivors, explained = _survivors(name, module, tests, mutants), _explained(name)
    unexplained = [each for each in survivors if each not in explained]
    for before, after in unexplained:
        print(f"{module}\n- {before}\n+ {after}\n")
    for before, after in (gone := explained.difference(survivors)):
        print(f"{SURVIVORS.name} has a mutant of {module} that does not survive:\n- {before}\n+ {after}\n")
    why = f"{len(survivors)} survived, {len(unexplained)} of them without a reason"
    print(f"{name}: {len(mutants)} mutants, {why}", flush=True)
    return len(unexplained) + len(gone)


def _survivors(name: str, module: str, tests: str, mutants: list[str]) -> list[tuple[str, str]]:
    """What survives, as `_change` has it."""
    source, limits_s = Path(module).read_text(encoding="utf-8"), _warm_up(tests)
    noticed_file = FOLDER / f"{name}.noticed"
    noticed_file.touch()
    noticed = set(noticed_file.read_text(encoding="utf-8").split())
    survivors = []
    for mutant in mutants:
        key = hashlib.sha256(mutant.encode()).hexdigest()
        if key in noticed:
            continue
        if _forked(partial(_test, tests, module, mutant), *limits_s):
            with noticed_file.open("a", encoding="utf-8") as file:
                file.write(f"{key}\n")
        else:
            survivors.append(_change(source, mutant))
    return survivors


def _explained(name: str) -> set[tuple[str, str]]:
    """Changes of a module that may survive: the line before and after."""
    reasons = tomllib.loads(SURVIVORS.read_text(encoding="utf-8")).get(name, ())
    return {(each["line"], mutant) for each in reasons for mutant in each["mutants"]}


def _mutants(module: str) -> list[str]:
    """Sources of the module, each with one change, by cosmic-ray in an environment that uv makes for it."""
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "tool", "run", "--from", "cosmic-ray>=8.3", "python", "tools/mutations.py", module]
    mutants: list[str] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return mutants


def _warm_up(tests: str) -> tuple[float, float]:
    """Import what the tests import from elsewhere; returns the seconds of CPU time that they may take, and
    those that may pass."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        listing = Path(folder) / "modules"

        def listed() -> int:
            failed = _test(tests)
            listing.write_text("\n".join(filter(_is_from_elsewhere, list(sys.modules))), encoding="utf-8")
            return failed

        if _forked(listed, 600, 600):
            raise SystemExit(f"{tests}: fails without a mutant")
        for name in listing.read_text(encoding="utf-8").split():
            with suppress(Exception):  # names that libraries give to what is no file
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pytest collects what is no longer used, again and again
    begun, used = time.monotonic(), _cpu_s_of_children()
    _forked(lambda: _test(tests), 600, 600)
    cpu_s = 5.0 + PATIENCE * (_cpu_s_of_children() - used)
    return cpu_s, cpu_s + WAIT_S + PATIENCE * (time.monotonic() - begun)


def _cpu_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _is_from_elsewhere(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and ("site-packages" in file or not Path(file).is_relative_to(ROOT))


def _forked(work: Callable[[], int], cpu_s: float, wait_s: float) -> bool:
    """Whether the work failed in a process of its own."""
    pid = os.fork()
    if not pid:
        os.setsid()
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, wait_s)
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    failed = os.waitpid(pid, 0)[1] != 0
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return failed


def _test(tests: str, module: str | None = None, mutant: str = "") -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    if module is not None:
        sys.meta_path.insert(0, _Mutant(module, mutant))
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        args = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", folder, *shlex.split(tests)]
        return int(pytest.main(args))


class _Mutant(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Imports one module with another source than its file's."""

    def __init__(self, module: str, source: str) -> None:
        super().__init__(module.removesuffix(".py").replace("/", "."), str(ROOT / module))
        self._source = source

    def find_spec(self, fullname: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source.encode(), self.path)


def _change(source: str, mutant: str) -> tuple[str, str]:
    """The lines that differ, before and after."""
    lines = [line for line in ndiff(source.splitlines(), mutant.splitlines()) if line[0] in "-+"]
    before, after = ("\n".join(line[2:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return before, after


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # libraries that were imported for the forks complain when they are taken down
