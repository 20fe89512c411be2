"""Tile a cohort of special files in a process of its own, read in place and staged, as somebody who may not
read everything; prints the errors of both as JSON.

Usage: special.py FOLDER, with good.svs in it
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from slide2vec import ExecutionOptions, PreprocessingConfig
from slide2vec.cohort import tile_cohort
from slide2vec.slides import as_slides

CONFIG = PreprocessingConfig(
    requested_spacing_um=0.5, requested_tile_size_px=96, filtering={"a_t": 0}, resume=True
)


def special_files(folder: Path) -> dict[str, str]:
    """Name -> path of what is no slide, mask, coordinate file or archive."""
    os.chdir(folder)  # names of sockets are short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    Path("device").symlink_to("/dev/zero")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    Path("directory").mkdir()
    Path("unreadable").write_bytes(b"II*\0")
    Path("unreadable").chmod(0)
    names = ("pipe", "socket", "device", "loop", "dangling", "directory", "unreadable")
    return {**{name: str(folder / name) for name in names}, "nul": f"{folder}/a\0b.svs"}


def main(folder: Path) -> None:
    good = str(folder / "good.svs")
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true"}
    given: list[dict[str, Any]] = [{"sample_id": "good", "image_path": good}]
    for name, path in special_files(folder).items():
        given.append({"sample_id": f"slide-{name}", "image_path": path})
        given.append({"sample_id": f"mask-{name}", "image_path": good, "mask_path": path})
    given.append({"sample_id": "slide-s3", "image_path": "s3://no-such-bucket/a.svs"})
    given.append({"sample_id": "mask-s3", "image_path": good, "mask_path": "s3://no-such-bucket/a.png"})
    (folder / "out").mkdir()
    for path in (folder, folder / "out"):
        path.chmod(0o777)
    slides = as_slides(given)
    found = []
    for number, stage in enumerate((True, False, True)):
        output = folder / "out" / str(number)
        execution = ExecutionOptions(output_dir=output, stage_dir=output if stage else None)
        result = tile_cohort(slides, CONFIG, execution)
        found.append({item.sample_id: str(item.error) for item in result.failed})
        if os.geteuid() == 0:
            os.seteuid(65_534)  # root may read everything; all that is imported was by the first turn
    print(json.dumps(found[1:]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
