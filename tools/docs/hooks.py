"""What `mkdocs build` does besides: pages of the API reference, and what search needs without a server."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from reference import PAGES, page

__all__ = ["on_files"]

#: In place of the one that mkdocs-material would fetch from a network (`extra.polyfills`).
_SHIM = "assets/iframe-worker.js"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, (title, names) in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page(title, names)))
    shim = Path(__file__).with_name(Path(_SHIM).name)
    files.append(File.generated(config, _SHIM, abs_src_path=str(shim)))
    return files
