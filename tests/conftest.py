"""Where the real slides are: SLIDE2VEC_TEST_SLIDES, else shared/slides beside the checkout. How many
processes `-n auto` starts, and which files they begin with."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several on these CPUs; before libraries read it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else it starts processes of its own

sys.path.append(str(Path(__file__).parent))  # tests import `forked`

from slide2vec.cpus import job_cpus
from slide2vec.readers.cucim import configure_cufile
from slide2vec.synthetic import write_synthetic_slide

#: Processes that tests run in at most: each takes up to 4 GB.
MAX_PROCESSES = 8

#: Files that take longest, the longest first: what is begun last is short, and processes end together.
LONGEST = (
    "tests/compile/test_matrix.py",
    "tests/scale/test_ray_pool.py",
    "tests/runtime/test_engine_contract.py",
    "tests/compile/test_onnx.py",
    "tests/scale/test_local_pool.py",
    "tests/cli/test_engines.py",
    "tests/compile/test_build.py",
    "tests/test_model.py",
    "tests/cli/test_s3.py",
    "tests/cohort/test_disk_full.py",
    "tests/aggregate/test_patient_embedding.py",
    "tests/test_fuzz_sample.py",
    "tests/encoders/test_catalogue.py",
)

configure_cufile()  # some tests import cuCIM themselves


@pytest.hookimpl(optionalhook=True)  # pytest-xdist need not be there
def pytest_xdist_auto_num_workers() -> int:
    """The CPUs of this job, which a container or SLURM may have made fewer than the machine's."""
    return min(job_cpus(), MAX_PROCESSES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


def slides_folder() -> Path:
    given = os.environ.get("SLIDE2VEC_TEST_SLIDES")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "slides"


@pytest.fixture(autouse=True, scope="session")
def no_engines_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty engine store, and no digests: whoever runs the tests may have built engines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDE2VEC_ENGINES", str(tmp_path_factory.mktemp("engines")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def short_rounds() -> Iterator[None]:
    """Speeds of engines are measured on two or three batches, not for seconds: no test is about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slide2vec.compile.speed.ROUND_S", 0.01)
        yield


@pytest.fixture(scope="session")
def generated_slide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`write_synthetic_slide`, which draws a slide once for all tests and processes of this session."""
    own = tmp_path_factory.getbasetemp()
    kept = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "generated-slides"
    kept.mkdir(exist_ok=True)

    def write(path: Path, *, size_px: int, seed: int, levels: int) -> Path:
        drawn = kept / f"{size_px}-{seed}-{levels}.svs"
        with drawn.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not drawn.exists():
                write_synthetic_slide(drawn, size_px=size_px, seed=seed, levels=levels)
        return Path(shutil.copyfile(drawn, path))

    return write


@pytest.fixture(scope="session")
def real_slide() -> Callable[[str], Path]:
    """Gives the path of a real slide by its file name; skips the test when it is not there."""

    def find(name: str) -> Path:
        path = slides_folder() / name
        if not path.is_file():
            pytest.skip(f"no {path}: set SLIDE2VEC_TEST_SLIDES to the folder of test slides")
        return path

    return find


@pytest.fixture(scope="session")
def reference_slide(real_slide: Callable[[str], Path]) -> Path:
    """An Aperio slide of H&E tissue, 2220 x 2967 px, one level, 0.499 µm/px."""
    return real_slide("CMU-1-Small-Region.svs")


@pytest.fixture(scope="session")
def slides_dir() -> Path:
    """The folder of real slides; skips the test when it is not there."""
    folder = slides_folder()
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set SLIDE2VEC_TEST_SLIDES to the folder of test slides")
    return folder


@pytest.fixture(scope="session")
def dialects_dir() -> Path:
    """The folder of real files in uncommon dialects, beside the test slides; skips the test without it."""
    folder = slides_folder().parent / "dialects"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


@pytest.fixture(scope="session")
def broken_dir() -> Path:
    """The folder of damaged files, beside the test slides; skips the test without it."""
    folder = slides_folder().parent / "broken"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder
