"""The notebook of the documentation runs from top to bottom, and shows what it says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/tutorial.ipynb"


def test_outputs_are_not_committed() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(
        not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code"
    )


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it puts its slides
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type != "stream"
    ]
    assert sum("image/png" in data for data in shown) == 2
    html = [data["text/html"] for data in shown if "text/html" in data]
    assert "data:image/" in html[0] and any("broken.svs" in table for table in html[1:])
    text = "\n".join(data.get("text/plain", "") for data in shown)
    assert "RunResult(2 tile artifacts, 1 failed" in text and "(2, ())" in text
    assert "{'slide-1': (195,), 'slide-2': (195,)}" in text
