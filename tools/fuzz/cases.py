"""Cases by number: which slide or file, and how it is damaged, follow from seed and number alone."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from random import Random
from typing import Any

from tools.fuzz.child import in_child
from tools.fuzz.damage import Regions, regions_of

__all__ = ["Cases", "warm_up"]

#: Of eight cases in a row, these many damage slides.
SLIDES_OF_EIGHT = 5


def warm_up() -> None:
    """Load what cases need, without starting a thread: their processes are forked from this one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.CRITICAL)
    import cv2

    cv2.setNumThreads(0)
    import h5py  # noqa: F401
    import imagecodecs  # noqa: F401
    import openslide  # noqa: F401
    import pydicom.encaps  # noqa: F401
    import simplejpeg  # noqa: F401

    from slide2vec.readers import backends
    from slide2vec.readers.cucim import configure_cufile

    configure_cufile()
    backends()
    native = len(list(Path("/proc/self/task").iterdir()))
    if threading.active_count() > 1 or native > 1:
        raise RuntimeError(f"{native} threads run before the first fork")


class Cases:
    """Sound slides and files in a folder, and cases of them.

    Args:
        folder: for what is sound; kept from one run to the next.
        sample: only the slides of the short run in CI.
    """

    def __init__(self, folder: Path, seed: int, *, sample: bool = False) -> None:
        from tools.fuzz.slides import BASES

        self.seed, self._folder = seed, folder
        self.bases = [base for base in BASES if base.sample or not sample]
        self._regions: dict[str, dict[str, Regions]] = {}

    def prepare(self) -> dict[str, str]:
        """Make what is sound, where it is not there yet; how every slide is read, by name."""
        states = {}
        for base in self.bases:
            place = self._folder / base.name
            if not (place / "sound.json").is_file():
                self._make(place, base)
            states[base.name] = self._sound(base.name).state
        if not (self._folder / "others" / "done").is_file():
            shutil.rmtree(self._folder / "others", ignore_errors=True)
            _in_child_or_raise(self._make_others)
        gc.freeze()  # children share the memory, if nobody touches it
        return states

    def _make(self, place: Path, base: Any) -> None:
        from tools.fuzz.truth import make_sound, note_failure

        shutil.rmtree(place, ignore_errors=True)
        made = in_child(lambda: make_sound(base, place))
        if made["outcome"] != "right":
            note_failure(base, place, f"{made['outcome']}: {made['message'][-300:]}")

    def _make_others(self) -> dict[str, Any]:
        from tools.fuzz.othermade import make_others
        from tools.fuzz.others import OTHERS

        make_others(self._folder / "others", OTHERS)
        (self._folder / "others" / "done").touch()
        return {"outcome": "right"}

    def _sound(self, name: str) -> Any:
        from tools.fuzz.truth import load_sound

        return load_sound(self._folder / name)

    def run(self, number: int) -> dict[str, Any]:
        """A case, in a process of its own."""
        turn, place = divmod(number, 8)
        rng = Random(f"{self.seed}:{number}")
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory()) as folder:
            if place < SLIDES_OF_EIGHT:
                result = self._slide(turn * SLIDES_OF_EIGHT + place, Path(folder), rng)
            else:
                result = self._other(
                    turn * (8 - SLIDES_OF_EIGHT) + place - SLIDES_OF_EIGHT, Path(folder), rng
                )
        return {"seed": self.seed, "case": number, **result}

    def _slide(self, turn: int, folder: Path, rng: Random) -> dict[str, Any]:
        from tools.fuzz.slidecase import damage_slide, run_slide_case

        base = self.bases[turn % len(self.bases)]
        sound = self._sound(base.name)
        about: dict[str, Any] = {
            "kind": "slide",
            "base": base.name,
            "container": base.container,
            "codec": base.codec,
        }
        if not sound.files:
            return {**about, "outcome": "absent", "message": sound.state}
        if base.name not in self._regions:
            files = self._folder / base.name / "files"
            self._regions[base.name] = {name: regions_of((files / name).read_bytes()) for name in sound.files}
        victim, data, done, way = damage_slide(sound, self._regions[base.name], rng)
        about |= {"file": victim, "damage": done, "way": way}
        return {**about, **in_child(lambda: run_slide_case(base, sound, folder, victim, data, way))}

    def _other(self, turn: int, folder: Path, rng: Random) -> dict[str, Any]:
        from tools.fuzz.others import OTHERS, damage_other, run_other_case

        other, sound = OTHERS[turn % len(OTHERS)], self._folder / "others"
        victim, data, done = damage_other(other, sound, rng)
        about: dict[str, Any] = {
            "kind": "other",
            "base": other.name,
            "container": other.kind,
            "codec": other.format,
        }
        about |= {"file": victim, "damage": [done]}
        return {**about, **in_child(lambda: run_other_case(other, sound, folder, victim, data))}


def _memory() -> str | None:
    """A folder in memory, where there is one: a case writes a file of a megabyte."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _in_child_or_raise(task: Any) -> None:
    made = in_child(task)
    if made["outcome"] != "right":
        raise RuntimeError(made["message"])
