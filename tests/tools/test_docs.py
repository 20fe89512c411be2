"""The documentation is built strictly, asks no network, and has every public name."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import open_page
from mkdocs.commands.build import build
from mkdocs.config import load_config

import slide2vec
from slide2vec import list_models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "tools/docs/mkdocs.yml"), site_dir=str(folder), strict=True))
    sys.modules.pop("reference")  # imported by its hook, beside which it lies
    return folder


def _tool(name: str) -> Any:
    """A module of tools/docs."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_the_site", ROOT / f"tools/docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Loaded(HTMLParser):
    """What a browser loads by itself for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.addresses.append(str(given["src"]))
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(str(given.get("href")))


def test_nothing_is_loaded_from_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = _Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.addresses
        for address in loaded.addresses:
            assert not re.match(r"(https?:)?//", address), (page, address)
            file = page.parent / address.partition("?")[0]
            assert page.name == "404.html" or file.exists(), (page, address)


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    found = re.findall(r'<h2 id="slide2vec\.(\w+)">', text)
    assert sorted(found) == sorted(name.strip("_") for name in slide2vec.__all__)
    for name in ("Model.embed_images", "Model.from_preset", "Pipeline.run", "PreprocessingConfig.resolved"):
        assert f'<h3 id="slide2vec.{name}">' in text
    assert "hf-hub:&lt;owner&gt;/&lt;repo&gt;" in text


def test_what_is_for_our_own_use_is_not_in_the_reference(site: Path) -> None:
    """Nor does a page for users call it."""
    reference = _tool("reference")
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    pages = set((ROOT / "docs").glob("*.md")) - {ROOT / "docs/design.md"}
    prose = "".join(path.read_text(encoding="utf-8") for path in pages)
    for owner, names in reference.INTERNAL.items():
        for name in names.split():
            assert hasattr(getattr(slide2vec, owner), name), f"{owner}.{name}"
            assert f'id="slide2vec.{owner}.{name}"' not in text
            assert f"{owner}.{name}" not in prose and f"{owner.lower()}.{name}(" not in prose
    assert "A kind of <a" in text and 'id="slide2vec.TimmTileEncoder.encode_tiles_dense"' in text
    assert 'id="slide2vec.TimmTileEncoder.encode_tiles"' not in text


def test_links_have_the_names_of_pages(site: Path) -> None:
    page = (site / "other-tools.html").read_text(encoding="utf-8")
    assert '<a href="formats.html">Formats</a>' in page and ">formats.md<" not in page
    assert '<code class="whole">--data_h5_dir</code>' in page  # not broken at its hyphens


def test_search_knows_the_pages(site: Path) -> None:
    """Of a script, so that no server is needed."""
    index = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = ") and "grandqc-artefact" in index


def test_a_page_is_searched_without_a_server(site: Path) -> None:
    """In the first screen of a telephone nothing reaches over its side."""
    find = """new Promise((resolve) => {
        const field = document.querySelector("[data-md-component=search-query]");
        const found = document.querySelector("[data-md-component=search-result]");
        new MutationObserver(() => {
            if (found.querySelector("li")) resolve(found.textContent);
        }).observe(found, {childList: true, subtree: true});
        document.querySelector("label[for=__search]").click();
        field.focus();
        field.value = "shard";
        field.dispatchEvent(new Event("keyup", {bubbles: true}));
        setTimeout(() => resolve(found.textContent), 10000);
    })"""
    with open_page() as tab:
        tab.size(400, 800)
        tab.open((site / "cluster.html").as_uri())
        assert tab.run("document.documentElement.scrollWidth") <= 400
        assert "From one machine to many" in tab.run(find)
        assert tab.problems == []


def test_messages_of_troubleshooting_are_ours() -> None:
    """What the code says, … for what is filled in."""
    said = set()
    for path in (ROOT / "slide2vec").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                said.add("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 30
    assert [message for message in messages if not any(message in text for text in said)] == []


def test_tables_of_encoders_are_those_of_the_recipes() -> None:
    """`python tools/docs/presets.py` makes them anew."""
    presets = _tool("presets")
    page = presets.PAGE.read_text(encoding="utf-8")
    assert page == presets.with_tables(page)
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(list_models())


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text)
    files = [(first or second).partition("#")[0] for first, second in links]
    missing = [file for file in files if not file.startswith("https://") and not (ROOT / file).is_file()]
    assert len(files) > 30 and missing == []
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(files) <= {"docs/index.md", "docs/design.md", "docs/dicom.md", "docs/gpu.md"}
