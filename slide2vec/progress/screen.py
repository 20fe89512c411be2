"""Whether this process shows its output in a terminal or a notebook."""

from __future__ import annotations

import os
import sys

__all__ = ["in_notebook", "in_terminal"]


def in_terminal() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    stream = sys.stderr
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def in_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
