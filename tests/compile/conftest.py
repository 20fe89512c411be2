"""Lets the tests of this folder import the fake TensorRT of tests/runtime."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
