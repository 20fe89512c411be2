"""What `mkdocs build` does besides: pages of the notebook and of the API, and search without a server."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from reference import PAGES, page

__all__ = ["on_files"]

#: Beside this file. The script replaces one that mkdocs-material would fetch from a network.
_ASSETS = ("iframe-worker.js", "site.css")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, (title, names) in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page(title, names)))
    files.append(
        File.generated(config, "tutorial.md", content=_notebook(Path(config.docs_dir) / "tutorial.ipynb"))
    )
    for name in _ASSETS:
        source = str(Path(__file__).with_name(name))
        files.append(File.generated(config, f"assets/{name}", abs_src_path=source))
    return files


def _notebook(path: Path) -> str:
    """Its cells, and where the file is; the page has no outputs, as the file has none."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.insert(
        1, f"Run it: [{path.name}]({path.name}), in JupyterLab, VS Code or another program for notebooks."
    )
    return "\n\n".join(parts) + "\n"
