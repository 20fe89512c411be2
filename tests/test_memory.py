"""What the job may take of RAM, and which encoders fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from slide2vec.memory import Need, free_ram, together

GB = 10**9


def ram(folder: Path, membership: str, files: dict[str, str]) -> int:
    for name, text in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "cgroup").write_text(membership)
    (folder / "meminfo").write_text("MemTotal:       8000 kB\nMemFree:  10 kB\nMemAvailable:   4000 kB\n")
    return free_ram(folder / "cgroup", folder / "root", folder / "meminfo")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("", {}, 4_096_000),
        (
            "0::/job\n",
            {"job/memory.max": "max\n", "job/memory.current": "7\n", "job/memory.stat": ""},
            4_096_000,
        ),
        (
            "0::/job/step\n",
            {
                **{"job/step/memory.max": "9000000\n", "job/step/memory.current": "1\n"},
                **{"job/step/memory.stat": "anon 5\ninactive_file 7\n"},
                **{"job/memory.max": "3000000\n", "job/memory.current": "2000000\n"},
                "job/memory.stat": "anon 5\ninactive_file 500000\n",
            },
            1_500_000,
        ),
        (
            "4:memory:/job\n3:cpu:/\n",
            {
                **{
                    "memory/job/memory.limit_in_bytes": "3000000\n",
                    "memory/job/memory.usage_in_bytes": "2900000\n",
                },
                "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
            100_100,
        ),
        (
            "0::/job\n",
            {"job/memory.max": "10\n", "job/memory.current": "20\n", "job/memory.stat": ""},
            0,
        ),
    ],
)
def test_free_ram(tmp_path: Path, membership: str, files: dict[str, str], expected: int) -> None:
    assert ram(tmp_path, membership, files) == expected


def test_free_ram_of_this_machine() -> None:
    assert free_ram() > 10**7
    assert free_ram(*[Path("/nowhere")] * 3) > 10**8  # half of what there is, where nobody says more


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ({"a": 1, "b": 2, "c": 3}, 6, ["abc"]),
        ({"a": 1, "b": 2, "c": 3}, 5, ["a", "bc"]),
        ({"a": 3, "b": 2, "c": 2, "d": 3}, 5, ["ab", "cd"]),
        (
            {"a": 1, "b": 9, "c": 1},
            5,
            ["ac", "b"],
        ),  # one that is too large by itself has its turn all the same
        ({"a": 4, "b": 4, "c": 4}, 5, ["a", "b", "c"]),
    ],
)
def test_as_many_as_fit_go_together(sizes: dict[str, int], limit: int, expected: list[str]) -> None:
    needs = {name: Need("cpu", size * GB) for name, size in sizes.items()}
    assert ["".join(group) for group in together(needs, {"cpu": limit * GB})] == expected


def test_each_device_has_its_own_memory() -> None:
    needs = {"a": Need("cuda:0", 4), "b": Need("cuda:1", 4), "c": Need("cuda:0", 3)}
    assert together(needs, {"cuda:0": 5, "cuda:1": 5}) == [["a", "b"], ["c"]]
