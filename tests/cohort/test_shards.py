"""How a cohort is divided: the same for all, no slide twice, none left out, as even as can be."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path

import pytest

from slide2vec import ExecutionOptions, PreprocessingConfig
from slide2vec.cohort.shards import divided, is_empty, my_slides, slide_bytes
from slide2vec.config import shard_numbers
from slide2vec.errors import ConfigError
from slide2vec.slides import Slide

CONFIG = PreprocessingConfig()


def cohort(count: int, patients: int = 1_000_000, seed: int = 0) -> tuple[list[Slide], dict[str, int]]:
    """Slides in a random order, with sizes as of a real cohort: many of some GB, a few ten times as large."""
    chance = random.Random(seed)
    names = [f"s{number:05}" for number in range(count)]
    chance.shuffle(names)
    slides = [
        Slide(sample_id=name, image_path=Path(name), patient_id=f"p{chance.randrange(patients)}")
        for name in names
    ]
    return slides, {name: int(chance.lognormvariate(21, 1.0)) for name in names}


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("patients", [False, True])
def test_complete_disjoint_and_balanced(count: int, patients: bool) -> None:
    slides, sizes = cohort(1000, patients=300, seed=count)
    shards = divided(slides, sizes, count, patients=patients)
    names = [slide.sample_id for slide in chain(*shards)]
    assert len(shards) == count
    assert sorted(names) == sorted(sizes) and len(set(names)) == len(names)
    whole: dict[str, int] = {}
    for slide in slides:
        group = str(slide.patient_id) if patients else slide.sample_id
        whole[group] = whole.get(group, 0) + sizes[slide.sample_id]
    loads = [sum(sizes[slide.sample_id] for slide in shard) for shard in shards]
    assert max(loads) <= sum(loads) / count + max(whole.values())


def test_order_within_a_shard_is_that_of_the_manifest() -> None:
    slides, sizes = cohort(200)
    place = {slide.sample_id: number for number, slide in enumerate(slides)}
    for shard in divided(slides, sizes, 5, patients=False):
        places = [place[slide.sample_id] for slide in shard]
        assert places == sorted(places)


def test_shards_do_not_depend_on_the_order_of_the_manifest() -> None:
    slides, sizes = cohort(200)
    sizes = {name: size // 10**9 for name, size in sizes.items()}  # many ties
    one = divided(slides, sizes, 6, patients=False)
    other = divided(slides[::-1], sizes, 6, patients=False)
    assert [{s.sample_id for s in shard} for shard in one] == [
        {s.sample_id for s in shard} for shard in other
    ]


def test_slides_of_a_patient_stay_together() -> None:
    slides, sizes = cohort(300, patients=40)
    where: dict[str | None, set[int]] = {}
    for number, shard in enumerate(divided(slides, sizes, 8, patients=True)):
        for slide in shard:
            where.setdefault(slide.patient_id, set()).add(number)
    assert len(where) == 40 and all(len(shards) == 1 for shards in where.values())
    apart = divided(slides, sizes, 8, patients=False)
    assert any(len({s.patient_id for s in shard}) > 5 for shard in apart)


def test_largest_goes_first() -> None:
    slides = [Slide(sample_id=name, image_path=Path(name)) for name in "abcde"]
    sizes = {"a": 1, "b": 7, "c": 5, "d": 4, "e": 3}
    # b | c, d to the lesser (c), e to b (7 < 9), a to c (9 < 10)
    shards = divided(slides, sizes, 2, patients=False)
    assert [[s.sample_id for s in shard] for shard in shards] == [["b", "e"], ["a", "c", "d"]]


@pytest.mark.parametrize("patients", [False, True])
def test_more_shards_than_slides(patients: bool) -> None:
    slides, _ = cohort(12, patients=5)
    groups = len({slide.patient_id for slide in slides}) if patients else 12
    sizes = {slide.sample_id: 0 for slide in slides}  # also where nothing is known of sizes
    shards = divided(slides, sizes, 20, patients=patients)
    assert [bool(shard) for shard in shards] == [True] * groups + [False] * (20 - groups)
    for number, shard in enumerate(shards, 1):
        assert is_empty(slides, f"{number}/20", patients=patients) is not bool(shard)


def test_sizes_of_files(tmp_path: Path) -> None:
    def file(name: str, size: int) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        return path

    def size(path: Path) -> int:
        return slide_bytes(Slide(sample_id="a", image_path=path), CONFIG)

    assert size(file("a.svs", 10)) == 10
    assert size(tmp_path / "gone.svs") == 0
    file("folder/level/1.dcm", 3)
    named = file("folder/2.dcm", 4)
    assert size(tmp_path / "folder") == 7 == size(named)
    file("b/Data0001.dat", 50)
    assert size(file("b.mrxs", 2)) == 52
    assert size(file("alone.mrxs", 2)) == 2  # without its folder


def test_tile_archives_are_what_counts_where_they_are_read(tmp_path: Path) -> None:
    config = PreprocessingConfig(read_tiles_from=tmp_path)
    (tmp_path / "a.tiles.tar").write_bytes(bytes(30))
    assert slide_bytes(Slide(sample_id="a", image_path=tmp_path / "gone.svs"), config) == 30
    assert slide_bytes(Slide(sample_id="b", image_path=tmp_path / "gone.svs"), config) == 0


def test_every_job_finds_its_part(tmp_path: Path) -> None:
    slides = []
    for number in range(20):
        path = tmp_path / f"{number}.svs"
        path.write_bytes(bytes(number * 100))
        slides.append(Slide(sample_id=str(number), image_path=path))
    parts = [my_slides(slides, f"{number}/3", CONFIG, patients=False) for number in (1, 2, 3)]
    assert sorted(int(slide.sample_id) for part in parts for slide in part) == list(range(20))
    assert parts[1] == my_slides(slides, "2/3", CONFIG, patients=False)


@pytest.mark.parametrize("wrong", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1.0/4", "/4", "1/"])
def test_what_is_no_shard(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"ExecutionOptions.shard: a shard is .*SLURM_ARRAY_TASK_ID"):
        ExecutionOptions(output_dir="out", shard=wrong)


def test_spelling() -> None:
    assert ExecutionOptions(output_dir="out", shard=" 03/16 ").shard == "3/16"
    assert shard_numbers("16/16") == (16, 16)


def test_a_shard_is_of_a_run_on_disk() -> None:
    with pytest.raises(ConfigError, match="shard=1/2 is for a Pipeline"):
        ExecutionOptions(shard="1/2")
