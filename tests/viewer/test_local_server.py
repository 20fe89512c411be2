"""The viewer's server answers its own page and nobody else, and about slides of the run only."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser import open_page
from typer.testing import CliRunner

from slide2vec.artifacts.reading import load_embeddings
from slide2vec.cli import app
from slide2vec.errors import ArtifactError, ConfigError
from slide2vec.pictures import pca_colours
from slide2vec.search import searched_run
from slide2vec.tiling.coordinates import load_coordinates
from slide2vec.viewer import ViewerServer, viewer_server
from slide2vec.viewer.viewed_run import ViewedRun

HOSTILE = "<img src=x onerror=document.title='owned'>&\"'<script>"


def get(
    server: ViewerServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Of a path below the token, or a whole one."""
    whole = path if path.startswith("/") else f"/{server.token}/{path}"
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    try:
        connection.request(
            method, whole, headers={key.replace("_", "-"): value for key, value in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.read(), {key.lower(): value for key, value in answer.getheaders()}
    finally:
        connection.close()


def data(server: ViewerServer, path: str) -> Any:
    status, body, _ = get(server, path)
    assert status == 200, body
    return json.loads(body)


def refusal(server: ViewerServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    """Status and sentence."""
    status, body, given = get(server, path, method, **headers)
    assert given["content-type"].startswith("application/json"), body
    (sentence,) = json.loads(body).values()
    return status, sentence


def test_it_is_there_for_this_machine_only(server: ViewerServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.server_address[1]), 1):
        pass


def test_without_the_token_nothing_is_told(server: ViewerServer) -> None:
    assert len(server.token) >= 32
    for token in ("", "x", server.token[:-1], server.token + "x", server.token.swapcase(), "\xff", "%00"):
        path = f"/{token}/run.json".replace("\xff", "%ff")
        assert refusal(server, path)[0] == 403
    for path in ("/", "/run.json", "/viewer.js", f"/?token={server.token}"):
        status, sentence = refusal(server, path)
        assert status == 403 and "token" in sentence and server.token not in sentence


def test_other_hosts_and_origins_are_refused(server: ViewerServer) -> None:
    port = server.server_address[1]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1.evil.example:{port}",
        "",
        "[::1]",
        "0.0.0.0",
    ):
        assert refusal(server, "run.json", Host=host)[0] == 403
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9"):  # the last: through a tunnel
        assert get(server, "run.json", Host=host)[0] == 200
    own = f"http://127.0.0.1:{port}"
    for origin in (
        "http://evil.example",
        "null",
        f"http://127.0.0.1:{port + 1}",
        f"https://127.0.0.1:{port}",
    ):
        status, sentence = refusal(server, "run.json", Origin=origin)
        assert status == 403 and "origin" in sentence
    assert get(server, "run.json", Origin=own)[0] == 200
    for site in ("cross-site", "same-site"):
        assert refusal(server, "run.json", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors")[0] == 403
        assert (
            get(server, "", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate")[0] == 200
        )  # a link was followed


def test_answers_are_for_the_page_alone(server: ViewerServer) -> None:
    for path in ("", "run.json", "slides/0/image_files/8/0_0.jpg"):
        status, _, headers = get(server, path)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "../run.json",
        "..%2f..%2fprocess_list.csv",
        "process_list.csv",
        "slides/../process_list.csv",
        "slides/%2e%2e/image.dzi",
        "slides/etc/passwd",
        "slides/-1/slide.json",
        "slides/4/slide.json",
        "slides/999999999/tiles/0.jpg",
        "slides/9999999999999/image.dzi",
        "slides/٣/image.dzi",
        "slides/0/image_files/99/0_0.jpg",
        "slides/0/image_files/11/6_0.jpg",
        "slides/0/tiles/999999.jpg",
        "slides/0/slide.json?encoder=7",
        "slides/0/colours.json?by=__class__",
        "slides/0/colours.json?by=tile&tile=999999",
        "slides/0/colours.json?by=text&text=",
        "slides/0/slide.json?encoder=../x",
        "similar.json?slide=99&tile=0",
        "similar.json?slide=0",
    ],
)
def test_nothing_but_slides_of_the_run(server: ViewerServer, path: str) -> None:
    status, sentence = refusal(server, path.replace("٣", "%D9%A3"))
    assert status in (400, 404) and len(sentence) > 10
    assert "Traceback" not in sentence


def test_other_methods_are_refused(server: ViewerServer) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert refusal(server, "run.json", method)[0] == 501
    status, body, headers = get(server, "run.json", "HEAD")
    assert status == 200 and body == b"" and int(headers["content-length"]) > 0


def test_slides_that_are_gone_are_named_and_the_others_work(server: ViewerServer) -> None:
    slides = data(server, "run.json")["slides"]
    assert [slide["id"] for slide in slides] == ["a", HOSTILE, "gone", "broken"]
    assert [slide["gone"] for slide in slides] == [False, False, True, False]
    assert "gone.svs is gone" in slides[2]["problems"][-1] and "broken.svs" in slides[3]["problems"][0]
    gone = data(server, "slides/2/slide.json")
    assert not gone["pixels"] and "gone.svs" in gone["problems"][0]
    assert gone["size"] == [1536, 1536] and len(gone["tiles"]["x"]) > 0  # its tiles are known all the same
    assert data(server, "slides/2/colours.json?by=pca")["colours"]
    assert "gone.svs" in refusal(server, "slides/2/image_files/8/0_0.jpg")[1]
    broken = data(server, "slides/3/slide.json")
    assert not broken["pixels"] and "tiles" not in broken
    assert "no tiles" in refusal(server, "slides/3/tissue.json")[1]


def test_tiles_and_their_colours_are_those_of_the_run(server: ViewerServer, viewed: Path) -> None:
    tiling = load_coordinates(viewed / "tiles", "a")
    found = data(server, "slides/0/slide.json")
    assert found["tiles"]["x"] == tiling.x.tolist() and found["tiles"]["y"] == tiling.y.tolist()
    assert found["tiles"]["side"] == tiling.geometry.tile_size_lv0 and found["last"] == 11
    embeddings = load_embeddings(viewed / "tile_embeddings/a.pt").numpy()

    def colours(by: str) -> tuple[Any, dict[str, Any]]:
        answer = data(server, f"slides/0/colours.json?by={by}")
        return np.frombuffer(bytes.fromhex(answer["colours"]), np.uint8).reshape(-1, 3), answer

    np.testing.assert_array_equal(colours("pca")[0], pca_colours(embeddings).round())
    clusters, answer = colours("cluster")
    _, counts = np.unique(clusters, axis=0, return_counts=True)
    assert sorted(counts.tolist()) == sorted(filter(None, answer["clusters"])) and len(counts) > 2
    _, answer = colours("tile&tile=5")
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(answer["cosines"], unit @ unit[5], atol=1e-4)
    assert "text" in refusal(server, "slides/0/colours.json?by=text&text=stroma")[1]  # it has no text side


def test_similar_tiles_are_those_that_a_search_finds(server: ViewerServer, viewed: Path) -> None:
    tiling = load_coordinates(viewed / "tiles", "a")
    found = data(server, "similar.json?slide=0&tile=3&count=7")
    run = searched_run(viewed)
    asked, query = run.index.tile_at("a", int(tiling.x[3]), int(tiling.y[3]))
    expected = run.nearest(query, 7, without=asked)
    names = ["a", HOSTILE, "gone", "broken"]
    assert [(names[each["slide"]], each["row"]) for each in found] == [
        (each.sample_id, each.row) for each in expected
    ]
    status, body, headers = get(server, "slides/0/tiles/3.jpg")
    assert status == 200 and headers["content-type"] == "image/jpeg"
    picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None and picture.shape == (224, 224, 3)


def test_tissue_is_outlined_in_pixels_of_level_0(server: ViewerServer, viewed: Path) -> None:
    rings = data(server, "slides/0/tissue.json")
    tiling = load_coordinates(viewed / "tiles", "a")
    drawn = np.zeros((1536, 1536), np.uint8)
    outer = [np.array(ring).reshape(-1, 2).round().astype(np.int32) for ring in rings["outer"]]
    cv2.fillPoly(drawn, outer, 1)
    side = tiling.geometry.tile_size_lv0
    inside = [drawn[y : y + side, x : x + side].mean() for x, y in zip(tiling.x, tiling.y, strict=True)]
    full = tiling.tissue_fractions > 0.99
    assert full.any() and np.mean(np.array(inside)[full]) > 0.97
    assert drawn.mean() < 0.95


def test_pictures_of_tiles_read_no_embeddings(viewed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a whole run's like tiles would read those of every slide."""

    def none(*_: Any) -> Any:
        raise AssertionError("embeddings are read")

    monkeypatch.setattr("slide2vec.viewer.viewed_run.embedded_tiles", none)
    run = ViewedRun(viewed)
    assert run.tile(0, 0, 1)[:2] == b"\xff\xd8"
    run.close()


@pytest.mark.parametrize("screen", [True, False])
def test_command_line(viewed: Path, monkeypatch: pytest.MonkeyPatch, screen: bool) -> None:
    """It prints an address that answers, opens it where there is a screen, and ends quietly with Ctrl-C."""
    opened: list[str] = []
    answered: list[int] = []

    def interrupted(self: ViewerServer) -> None:
        thread = threading.Thread(target=self.handle_request)
        thread.start()
        answered.append(get(self, "run.json")[0])
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(ViewerServer, "serve_forever", interrupted)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if screen:
        monkeypatch.setenv("DISPLAY", ":0")
    else:
        monkeypatch.delenv("DISPLAY", raising=False)
    done = CliRunner().invoke(app, ["view", str(viewed), "--encoder", "scattering"])
    assert done.exit_code == 0, done.output
    (address,) = done.stdout.split()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address) and answered == [200]
    assert opened == ([address] if screen or sys.platform != "linux" else [])
    assert CliRunner().invoke(app, ["view", str(viewed), "--no-browser"]).exit_code == 0
    assert len(opened) <= 1
    done = CliRunner().invoke(app, ["view", "memory://run"])
    assert done.exit_code == 1 and "copy the run to local storage" in done.stderr


def test_what_cannot_be_viewed_is_said(tmp_path: Path, viewed: Path, server: ViewerServer) -> None:
    with pytest.raises(ArtifactError, match=r"process_list\.csv"):
        viewer_server(tmp_path)
    with pytest.raises(ConfigError, match="scattering"):
        viewer_server(viewed, encoder="scatering")
    with pytest.raises(ConfigError, match="--port"):
        viewer_server(viewed, port=server.server_address[1])


#: Parts of the page as a test asks for them: how many colours the canvas shows, the middle of the canvas.
COLOURS = """(() => {
  const c = document.getElementById('slide'), found = new Set();
  const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  for (let i = 0; i < data.length; i += 4004) found.add((data[i] << 16) + (data[i + 1] << 8) + data[i + 2]);
  return found.size;
})()"""
MIDDLE = """(() => {
  const c = document.getElementById('slide').getBoundingClientRect();
  return [c.x + c.width / 2, c.y + c.height / 2];
})()"""


def test_in_a_browser(server: ViewerServer, tmp_path: Path) -> None:
    """Zoom, grid, map, a click and what is like it, by what is seen."""

    def colour_by(name: str) -> str:
        return (
            f"(() => {{const e = document.getElementById('by'); e.value = '{name}';"
            "e.dispatchEvent(new Event('change'))})()"
        )

    def asked(part: str) -> str:
        return f"performance.getEntriesByType('resource').some((e) => e.name.includes('{part}'))"

    similar = "[...document.querySelectorAll('#similar li')]"
    with open_page() as tab:
        tab.allowed = ("data:", server.address)
        tab.size(1280, 800)
        tab.open(server.address)
        tab.wait("document.querySelectorAll('#slides li').length === 4")
        tab.wait("document.getElementById('about').textContent.includes('tiles of 96 px')")
        tab.wait(f"{COLOURS} > 30")  # the slide is drawn
        assert tab.run("document.getElementById('slides').textContent").count("the file is gone") == 1
        tab.shoot(tmp_path / "view-slide.png")
        tab.run(colour_by("pca"))
        tab.wait("document.querySelector('#key img')?.naturalWidth > 0")
        tab.shoot(tmp_path / "view-pca.png")
        tab.click(*tab.run(MIDDLE))
        tab.wait(f"{similar}.length === 24")
        tab.run(colour_by("tile"))
        tab.wait("document.getElementById('key').textContent.includes('cosine')")
        tab.run("document.getElementById('tissue').click()")
        tab.wait(asked("tissue.json"))
        tab.run("document.querySelectorAll('#similar img').forEach((each) => { each.loading = 'eager'; })")
        tab.wait("[...document.querySelectorAll('#similar img')].every((each) => each.complete)")
        # of the slide that is gone there are no pictures, and its tiles are named all the same
        assert tab.run(
            f"{similar}.every((e) => !!e.querySelector('.none') === e.textContent.endsWith('gone'))"
        )
        tab.shoot(tmp_path / "view-similar.png")
        tab.run(colour_by("cluster"))
        tab.wait("document.getElementById('key').textContent.includes('clusters')")
        assert not tab.run(asked("image_files/11/"))
        tab.run(f"{similar}.find((each) => each.querySelector('img')).firstChild.click()")
        tab.wait(asked("image_files/11/"))  # it went there, to the finest level
        tab.wait(f"{COLOURS} > 30")
        tab.shoot(tmp_path / "view-zoomed.png")
        tab.run("document.querySelectorAll('#slides button')[2].click()")  # the one that is gone
        tab.wait("document.getElementById('problems').textContent.includes('gone.svs')")
        tab.shoot(tmp_path / "view-gone.png")
        assert tab.run("document.querySelectorAll('#slides .name')[1].textContent") == HOSTILE
        assert tab.run("document.title").endswith("slide2vec view")  # no script of a sample_id has run
        # pictures of the slide that is gone, and what the browser thinks of how this test reads the canvas
        assert [each for each in tab.problems if "404" not in each and "Canvas2D" not in each] == []
