"""What killed processes leave half-written goes; what this one writes meanwhile does not."""

from __future__ import annotations

import os
from pathlib import Path

from slide2vec.files import atomic_path, remove_partial


def test_what_is_being_written_here_stays(tmp_path: Path) -> None:
    """As when a worker was lost, while threads of the run write what the others have embedded."""
    child = os.fork()
    if not child:
        with atomic_path(tmp_path / "in" / "lost.pt"):
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob("in/.lost.*.partial"))) == 1
    with atomic_path(tmp_path / "list.csv") as temporary, atomic_path(tmp_path / "in" / "a.pt") as other:
        temporary.write_text("slide")
        other.write_text("tiles")
        remove_partial(tmp_path)
    assert (tmp_path / "list.csv").read_text() == "slide" and (
        tmp_path / "in" / "a.pt"
    ).read_text() == "tiles"
    assert list(tmp_path.rglob(".*")) == []
