"""What `mkdocs build` does besides: pages of the API reference, and what search needs without a server."""

from __future__ import annotations

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
    for name in _ASSETS:
        source = str(Path(__file__).with_name(name))
        files.append(File.generated(config, f"assets/{name}", abs_src_path=source))
    return files
