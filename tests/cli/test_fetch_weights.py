"""Weights from a hub to a machine that reaches none. The hub is a stand-in on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import serve_hub
from safetensors.torch import save

from slide2vec.artifacts.reading import load_embeddings

GENERIC, ITS_REPO = "timm:test_vit", "timm/test_vit.r160_in1k"
REMOTE, GATED = "rudolfv2-s", "virchow2"


def slide2vec(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "slide2vec", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**known, **environment})


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model("test_vit").eval()


@pytest.mark.slow
def test_what_was_fetched_is_used_without_network(
    published: torch.nn.Module, small_slide: Path, tmp_path: Path
) -> None:
    """A preset that cannot be had stops no other; a repository with code is fetched with it, and not run."""
    repositories = {
        ITS_REPO: {"model.safetensors": save(dict(published.state_dict()))},
        "Aignostics/RudolfV-2-S": {"config.json": b"{}", "code.py": b"raise SystemExit(3)"},
        "paige-ai/Virchow2": {},
    }
    folder = tmp_path / "weights"
    with serve_hub(repositories, gated=frozenset({"paige-ai/Virchow2"})) as (address, asked):
        done = slide2vec(
            "fetch-weights", f"{GENERIC},{REMOTE}", GATED, "scattering", "--to", folder, "--json",
            HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
    told = json.loads(done.stdout)
    assert done.returncode == 1 and list(told["failed"]) == [GATED] and "gated" in told["failed"][GATED]
    assert list(told["fetched"]) == [GENERIC, REMOTE, "scattering"]
    (file,) = map(Path, told["fetched"][GENERIC][GENERIC])
    assert file.is_relative_to(folder) and file.read_bytes() == repositories[ITS_REPO]["model.safetensors"]
    assert {Path(path).name for path in told["fetched"][REMOTE][REMOTE]} == {"config.json", "code.py"}
    assert told["fetched"]["scattering"] == {"scattering": []}
    assert any("model.safetensors" in each for each in asked)

    elsewhere = folder.rename(tmp_path / "carried")
    command = ("embed", small_slide, "--preset", GENERIC, "--spacing", "0.5", "--offline")
    with serve_hub({}) as (address, asked):
        done = slide2vec(
            *command, "-o", tmp_path / "out", HF_HUB_CACHE=str(elsewhere), HF_ENDPOINT=address,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert asked == []
    embeddings = load_embeddings(next((tmp_path / "out/tile_embeddings").glob("*.pt")))
    assert len(embeddings) > 3 and embeddings.isfinite().all()
