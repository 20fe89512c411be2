"""What `mkdocs build` does besides: pages of the notebook and of the API, search without a server, and links
and code as a site has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from reference import PAGES, page

__all__ = ["on_files", "on_page_content", "on_page_markdown"]

#: Beside this file. The script replaces one that mkdocs-material would fetch from a network.
_ASSETS = ("iframe-worker.js", "site.css")

#: A link that is called as its file, which is what a reader of the files wants.
_NAMED_AS_FILE = re.compile(r"\[([\w-]+\.md)\]\((\1[^)]*)\)")
#: A name or an option, which is not to be broken at its hyphens.
_SHORT_CODE = re.compile(r"(?<!<pre>)<code>([^<\n]{1,24})</code>")


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


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """Links that are called as their file get the name that the page has on the site."""
    titles = {file: title for section in config.nav or () for title, file in _pages(section)}
    return _NAMED_AS_FILE.sub(lambda found: f"[{titles.get(found[1], found[1])}]({found[2]})", markdown)


def _pages(entry: Any) -> list[tuple[str, str]]:
    """Titles and files of an entry of the navigation."""
    if not isinstance(entry, dict):
        return []
    ((title, inside),) = entry.items()
    if isinstance(inside, str):
        return [(title, inside)]
    return [page for each in inside for page in _pages(each)]


def on_page_content(html: str, **_: Any) -> str:
    return _SHORT_CODE.sub(r'<code class="whole">\1</code>', html)


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
