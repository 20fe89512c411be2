"""Shards of a cohort: jobs that know nothing of each other work out the same division of the slides."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from slide2vec.cohort.pending_patients import by_patient
from slide2vec.config import PreprocessingConfig, shard_numbers
from slide2vec.errors import TilingError
from slide2vec.readers.slide_files import bytes_of
from slide2vec.slides import Slide
from slide2vec.tiling.archives import find_archive

__all__ = ["divided", "is_empty", "my_slides", "slide_bytes", "slide_sizes"]

#: Threads that ask for sizes of files, on network storage perhaps.
_LOOKERS = 16


def my_slides(
    slides: Sequence[Slide], shard: str, config: PreprocessingConfig, *, patients: bool
) -> list[Slide]:
    """The slides of a shard "i/n", in the order of `slides`.

    Every job gives `slides` whole. What is finished does not matter, or jobs that are started again would
    divide otherwise than those that still run.

    Args:
        patients: slides of one patient stay together.
    """
    number, count = shard_numbers(shard)
    return divided(slides, slide_sizes(slides, config), count, patients=patients)[number - 1]


def slide_sizes(slides: Sequence[Slide], config: PreprocessingConfig) -> dict[str, int]:
    """`slide_bytes` of each, by sample_id; looked up in threads."""
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="size") as pool:
        sizes = pool.map(lambda slide: slide_bytes(slide, config), slides)
        return {slide.sample_id: size for slide, size in zip(slides, sizes, strict=True)}


def is_empty(slides: Iterable[Slide], shard: str, *, patients: bool) -> bool:
    """Whether a shard has no slides. No file is looked at: the first shards get the first slides."""
    slides = list(slides)
    number, _ = shard_numbers(shard)
    return number > len(by_patient(slides) if patients else slides)


def divided(
    slides: Sequence[Slide], sizes: Mapping[str, int], count: int, *, patients: bool
) -> list[list[Slide]]:
    """`count` shards, each with its slides in the order of `slides`; a pure function.

    The largest slide (or patient) that is left goes to the shard with the least bytes, so that none has
    more than the mean and one slide (Graham's longest processing time first). Of equal ones the first
    sample_id goes first; of equal shards the one with the fewest slides.

    Args:
        sizes: in bytes, by sample_id.
        patients: slides of one patient stay together.
    """
    groups = list(by_patient(slides).values()) if patients else [[slide] for slide in slides]
    weighed = [(sum(sizes[slide.sample_id] for slide in group), group) for group in groups]
    weighed.sort(key=lambda item: (-item[0], min(slide.sample_id for slide in item[1])))
    loads = [(0, 0, shard) for shard in range(count)]
    shard_of: dict[str, int] = {}
    for size, group in weighed:
        load, slides_there, shard = loads[0]
        heapq.heapreplace(loads, (load + size, slides_there + len(group), shard))
        shard_of.update((slide.sample_id, shard) for slide in group)
    shards: list[list[Slide]] = [[] for _ in range(count)]
    for slide in slides:
        shards[shard_of[slide.sample_id]].append(slide)
    return shards


def slide_bytes(slide: Slide, config: PreprocessingConfig) -> int:
    """Length of what is read of a slide, all its files; 0 where it is missing (its shard reports that)."""
    try:
        if config.read_tiles_from is not None:
            return find_archive(config.read_tiles_from, slide.sample_id).stat().st_size
        return bytes_of(slide.image_path)
    except (OSError, ValueError, TilingError):  # NUL in a path is a ValueError
        return 0
