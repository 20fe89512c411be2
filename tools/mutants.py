"""`make mutants`: change one thing at a time in the modules that everything rests on, and see whether their
own unit tests notice.

Works on a copy of the working tree under mutants/, goes on where it was stopped, and prints what survived.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "mutants"
#: Module -> the tests that are to notice.
MODULES = {
    "geometry": ("slide2vec/geometry.py", "tests/test_geometry.py"),
    "grid": ("slide2vec/tiling/grid.py", "tests/tiling/test_tile_slide.py"),
    "identity": ("slide2vec/cohort/identity.py", "tests/cohort/test_identity.py -k 'makes or given_tiles'"),
    "engine-key": ("slide2vec/compile/engine_key.py", "tests/compile/test_engine_key.py"),
    "parity": ("slide2vec/compile/parity.py", "tests/compile/test_parity.py"),
    "schedule": ("slide2vec/scale/scheduler.py", "tests/scale/test_scheduler.py"),
    "batches": ("slide2vec/stream/batches.py", "tests/stream/test_batches.py"),
    "pooling": ("slide2vec/aggregate/pooling.py", "tests/aggregate/test_pooling.py"),
}
#: A mutant that makes the tests hang is noticed, too.
TIMEOUT_S = 120.0
#: Most of `|` are in annotations, which are never evaluated.
CONFIG = """\
[cosmic-ray]
module-path = "{module}"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="module", help=f"of {', '.join(MODULES)}; all by default")
    parser.add_argument("--anew", action="store_true", help="forget what earlier runs have found")
    asked = parser.parse_args()
    if unknown := set(asked.names) - MODULES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(MODULES)}")
    if asked.anew:
        shutil.rmtree(FOLDER, ignore_errors=True)
    tree = _copy()
    for name in asked.names or MODULES:
        _run(name, tree)
    return 0


def _copy() -> Path:
    """The working tree's tracked files as they are, in a folder to be changed."""
    tree = FOLDER / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def _run(name: str, tree: Path) -> None:
    module, tests = MODULES[name]
    config, session = FOLDER / f"{name}.toml", FOLDER / f"{name}.sqlite"
    text = CONFIG.format(module=module, timeout=TIMEOUT_S, python=sys.executable, tests=tests)
    config.write_text(text, encoding="utf-8")
    if not session.exists():
        _cosmic_ray(tree, "cosmic-ray", "init", config, session)
        _cosmic_ray(tree, "cr-filter-operators", session, config)
    _cosmic_ray(tree, "cosmic-ray", "exec", config, session)
    _cosmic_ray(tree, "cr-report", "--show-diff", "--surviving-only", session)


def _cosmic_ray(tree: Path, command: str, *args: str | Path) -> None:
    """In an environment of its own, which uv makes; the tests run in this one, on the copy."""
    slides = os.environ.get("SLIDE2VEC_TEST_SLIDES", str(ROOT.parent / "shared" / "slides"))
    env = {**os.environ, "PYTHONPATH": str(tree), "SLIDE2VEC_TEST_SLIDES": slides}
    uv = [str(Path(sys.executable).with_name("uv")), "tool", "run", "--from", "cosmic-ray>=8.3"]
    subprocess.run([*uv, command, *map(str, args)], cwd=tree, env=env, check=True)


if __name__ == "__main__":
    sys.exit(main())
