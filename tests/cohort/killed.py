"""Runs a pipeline in forked processes that are killed, at any moment or in the middle of a file's birth.

`python killed.py MANIFEST OUTPUT_DIR SEED`: prints how often it killed the run, and how far it was.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from slide2vec import ExecutionOptions, Model, Pipeline, PreprocessingConfig

#: Times that a run is killed before it is left in peace.
KILLS = 7
#: Everything that changes the output directory.
SYSTEM_CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


def run(model: Model, manifest: Path, output_dir: Path) -> None:
    preprocessing = PreprocessingConfig(
        requested_tile_size_px=128,
        tissue_threshold=0.1,
        resume=True,
        save_tiles=True,
        preview={"save_mask_preview": True, "save_tiling_preview": True},
    )
    execution = ExecutionOptions(output_dir=output_dir, num_workers=2, num_preprocessing_workers=2)
    Pipeline(model, preprocessing, execution).run(manifest_path=manifest)


def die_at_file_operation(number: int) -> None:
    """Have this process killed right before its operation `number` on files."""
    left = iter(range(number))

    def counted(call: object) -> object:
        def wrapped(*args: object, **options: object) -> object:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)  # type: ignore[operator]

        return wrapped

    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def main() -> None:
    manifest, output_dir, chance = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)  # a pool of threads does not survive forking
    model = Model.from_preset("scattering", device="cpu")
    import slide2vec.pipeline  # loaded before forking, so that a child starts at once
    import slide2vec.readers.cucim
    import slide2vec.tiling.previews  # noqa: F401

    kills = 0
    for attempt in range(KILLS + 1):
        child = os.fork()
        if child == 0:
            if attempt < KILLS and attempt % 3:
                # even a run with nothing left to do has more than 15 operations
                early = attempt % 3 == 1
                die_at_file_operation(chance.randrange(15) if early else chance.randrange(15, 90))
            run(model, manifest, output_dir)
            os._exit(0)
        if attempt < KILLS and attempt % 3 == 0:
            time.sleep(chance.uniform(0.0, 1.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
    print(kills, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
