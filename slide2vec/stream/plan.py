"""The first station: from a slide to what will be read of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from slide2vec.config import PreprocessingConfig
from slide2vec.errors import ConfigError, Contradiction, SlideOpenError, SlideReadError
from slide2vec.files import is_remote
from slide2vec.readers import SlideReader, open_and_use, resolve_spacing
from slide2vec.readers.cross_check import compare_with_second_decoder
from slide2vec.slides import Slide
from slide2vec.stream.decode_tally import DecodeTally
from slide2vec.stream.slide_identity import Identities, SlideIdentity
from slide2vec.stream.staging import IN_PLACE, InPlace, Staged
from slide2vec.stream.tile_sources import (
    Pixels,
    SlideSource,
    TileSource,
    bad_tiles,
    damaged,
    open_archive,
    place_singly,
)
from slide2vec.tiling import BadTile, Tiling, TissueMask, TissueOnce, load_coordinates, tile_slide
from slide2vec.tiling.archives import Block, archive_paths, find_archive, write_archive
from slide2vec.tiling.coordinates import check_tiling, find_coordinates
from slide2vec.tiling.previews import preview_path, write_previews
from slide2vec.tiling.previous_files import Previous, find_reusable
from slide2vec.tiling.types import expand_regions

__all__ = [
    "PlanRequest",
    "SlidePlan",
    "check_archives_here",
    "coordinates_dir",
    "plan_slide",
    "plan_together",
]

logger = logging.getLogger(__name__)


class Announcements:
    """Who tells of a plan, one after the other, and whether anybody has."""

    def __init__(self) -> None:
        self.lock, self.made = threading.Lock(), False


@dataclass(frozen=True)
class SlidePlan:
    """A slide with its tiles, opened.

    Attributes:
        source: gives the tiles' pixels.
        tiling: of its tiles; with regions, of the tiles of these.
        skips_bad_tiles: leave tiles out that cannot be decoded (with their regions), rather than fail the
            slide.
        skipped: tiles that `tiling` has lost so already.
        tiles_tar_path: the archive of the tiles, where there is one.
        coordinates_dir: where coordinate files hold just this tiling; None where none do yet.
        decode_path: how its pixels are to get to the device; None = as the source's back end gives them.
        tally: how they did; None = as planned.
        identity: what the slide's files were before they were read; None where nobody asked.
        given: its tiles (or regions) as they were given; None where they were looked for.
        announcements: of all plans with just these tiles.
        refused: why it comes to nothing for some of the streams that it was made for.
        turn: to be held while one of its blocks is read.
        ended: called when nobody needs its source any more.
    """

    slide: Slide
    source: TileSource
    tiling: Tiling
    skips_bad_tiles: bool = False
    skipped: tuple[BadTile, ...] = ()
    mask_preview_path: Path | None = None
    tiling_preview_path: Path | None = None
    tiles_tar_path: Path | None = None
    coordinates_dir: Path | None = None
    decode_path: str | None = None
    tally: DecodeTally | None = None
    identity: SlideIdentity | None = None
    given: Tiling | None = None
    announcements: Announcements = field(default_factory=Announcements)
    refused: Mapping[Hashable, Exception] = field(default_factory=dict)
    turn: Callable[[], AbstractContextManager[object]] = nullcontext
    ended: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Close its source."""
        self.source.close()
        self.ended()

    def decoded_by(self) -> Mapping[str, int]:
        """Decode path -> tiles that came by it, so far."""
        if self.tally is not None:
            return self.tally.counts()
        return {self.decode_path or self.source.backend: len(self.tiling)} if len(self.tiling) else {}


@dataclass(frozen=True)
class PlanRequest:
    """What a stream wants planned of a slide.

    Attributes:
        config: with requested_spacing_um and requested_tile_size_px resolved.
        output_dir: where previews and archives go, if the config asks for them.
        given: the slide's tiles, if they are known.
        identities: of the run; None where nobody asks later whether the slide is still the same.
    """

    config: PreprocessingConfig
    output_dir: Path | None = None
    given: Tiling | None = None
    identities: Identities | None = None

    @property
    def key(self) -> Hashable:
        """Equal for those that get the same tiles, and files in the same place."""
        return self.config.model_dump_json(), self.output_dir, id(self.given)


def plan_slide(
    slide: Slide,
    config: PreprocessingConfig,
    output_dir: Path | None = None,
    given: Tiling | None = None,
    stager: InPlace = IN_PLACE,
    identities: Identities | None = None,
) -> SlidePlan:
    """Find a slide's tissue and tiles (or take those of coordinate files), and open what they are read from.

    Args:
        config, output_dir, given, identities: see `PlanRequest`.
        stager: knows where the slide's files are read; all that is recorded names the slide's own paths.

    Raises:
        SlideError: the slide cannot be opened, has no spacing, an unreadable mask, …
        ManifestError: its own tiling options are wrong.
        OutputError: a preview or an archive cannot be written.
    """
    (plan,) = plan_together(slide, [PlanRequest(config, output_dir, given, identities)], stager)
    if isinstance(plan, Exception):
        raise plan
    return plan


def plan_together(
    slide: Slide, requests: Sequence[PlanRequest], stager: InPlace = IN_PLACE
) -> list[SlidePlan | Exception]:
    """A slide's tiles for each request, or why there are none; the slide is opened once, and its tissue found
    once. Sources of several plans share one reader, which the last of them closes.

    Args:
        requests: whose configurations differ in tiles only, not in how slides are read.
        stager: as for `plan_slide`.
    """
    found: dict[int, SlidePlan | Exception] = {}
    opened: dict[int, _Request] = {}
    for number, request in enumerate(requests):
        try:
            prepared = _prepared(slide, request)
            if prepared.given is not None and prepared.config.read_tiles_from is not None:
                found[number] = _archived(slide, prepared)
            else:
                opened[number] = prepared
        except Exception as error:
            found[number] = error
    if opened:
        try:
            plans = _opened(slide, list(opened.values()), stager)
        except Exception as error:
            plans = [error] * len(opened)
        found.update(zip(opened, plans, strict=True))
    return [found[number] for number in range(len(requests))]


@dataclass(frozen=True)
class _Request(PlanRequest):
    """A request with the slide's own options; `given` may come from coordinate files, in `kept`."""

    kept: Path | None = None


def _prepared(slide: Slide, asked: PlanRequest) -> _Request:
    config, given, identities = (
        asked.config.for_slide(slide.sample_id, slide.tiling),
        asked.given,
        asked.identities,
    )
    kept = None if given is not None else coordinates_dir(slide, config)
    if kept is not None:
        given = load_coordinates(kept, slide.sample_id)
    if identities is None and asked.output_dir is not None:
        identities = Identities(config)
    return _Request(config, asked.output_dir, given, identities, kept)


def _archived(slide: Slide, asked: _Request) -> SlidePlan:
    assert asked.given is not None
    identity, _ = _identity(asked.identities, slide, masked=False)
    plan = _plan_archive(slide, asked.config, asked.given)
    return replace(plan, coordinates_dir=asked.kept, identity=identity, given=asked.given)


def _opened(slide: Slide, requests: Sequence[_Request], stager: InPlace) -> list[SlidePlan | Exception]:
    staged = stager.take(slide)
    copy = None if staged.image_path == slide.image_path else staged.image_path
    with ExitStack() as undo:
        undo.callback(staged.close)
        looked = [
            _identity(asked.identities, slide, masked=asked.given is None, staged=staged)
            for asked in requests
        ]
        previous = [
            None
            if identity is None or asked.identities is None or asked.output_dir is None
            else Previous(asked.output_dir / "tiles", slide, identity.content, asked.identities.warn_of_older)
            for asked, (identity, _) in zip(requests, looked, strict=True)
        ]

        def plan_all(reader: SlideReader) -> tuple[list[SlidePlan | Exception], Callable[[], None]]:
            tissue, closing = TissueOnce(), _LastCloses(reader.close, staged.close)
            checked: set[int] = set()  # levels
            done = closing.user()
            plans: list[SlidePlan | Exception] = []
            made: dict[Hashable, SlidePlan] = {}
            for asked, earlier in zip(requests, previous, strict=True):
                close = closing.user()
                try:
                    plan = made.get(asked.key) or _plan(
                        reader, slide, asked, staged, earlier, tissue, checked, close
                    )
                except Contradiction:
                    raise
                except Exception as error:
                    close()
                    plans.append(error)
                else:
                    if asked.key in made:
                        plan = _again(plan, close)
                    made[asked.key] = plan
                    if not isinstance(plan.source, SlideSource):
                        close()
                    plans.append(plan)
            return plans, done

        reader, (plans, done) = open_and_use(slide, requests[0].config.backend, copy, plan_all)
        undo.enter_context(reader)
        finished = [
            _finished(plan, asked, *identity)
            for plan, asked, identity in zip(plans, requests, looked, strict=True)
        ]
        undo.pop_all()
    done()
    return finished


def _again(plan: SlidePlan, closed: Callable[[], None]) -> SlidePlan:
    """The same plan with a source of its own."""
    if isinstance(plan.source, SlideSource):
        return replace(plan, source=plan.source.again(closed))
    assert plan.tiles_tar_path is not None
    return replace(plan, source=open_archive(plan.tiles_tar_path, plan.tiling))


def _finished(
    plan: SlidePlan | Exception,
    asked: _Request,
    identity: SlideIdentity | None,
    unreadable: SlideOpenError | None,
) -> SlidePlan | Exception:
    if isinstance(plan, Exception):
        return plan
    if unreadable is not None:
        plan.source.close()
        return unreadable
    plan = replace(plan, identity=identity, given=asked.given)
    # an archive that was written may have lost tiles
    return plan if asked.kept is None or plan.skipped else replace(plan, coordinates_dir=asked.kept)


class _LastCloses:
    """What several sources read from; the last that is closed closes it."""

    def __init__(self, *closing: Callable[[], None]) -> None:
        self._closing, self._users, self._lock = closing, 0, threading.Lock()

    def user(self) -> Callable[[], None]:
        """One more: to be called when it is closed; more than once does no harm."""
        with self._lock:
            self._users += 1
        open_ = [True]

        def close() -> None:
            with self._lock:
                self._users -= bool(open_ and open_.pop())
                last = not self._users
            if last:
                for each in self._closing:
                    each()

        return close


def _identity(
    identities: Identities | None, slide: Slide, *, masked: bool, staged: Staged | None = None
) -> tuple[SlideIdentity | None, SlideOpenError | None]:
    """Taken before anything is read; or why it cannot be (opening the files gives the better message)."""
    if identities is None:
        return None, None
    if staged is not None and is_remote(staged.image_path):
        return None, SlideOpenError(f"slide {slide.sample_id}: {slide.image_path} is on remote storage")
    try:
        return identities.of(slide, masked=masked, staged=staged), None
    except OSError as error:
        return None, SlideOpenError(f"slide {slide.sample_id}: its files cannot be read: {error}")


def coordinates_dir(slide: Slide, config: PreprocessingConfig) -> Path | None:
    """Where the user keeps coordinate files of the slide, beside tile archives perhaps."""
    if config.read_coordinates_from is not None:
        return find_coordinates(config.read_coordinates_from, slide.sample_id) or config.read_coordinates_from
    if config.read_tiles_from is not None:
        return find_coordinates(config.read_tiles_from, slide.sample_id)
    return None


def check_archives_here(config: PreprocessingConfig, output_dir: Path | None) -> None:
    """Raises ConfigError where archives that tiles are to be read from would lie behind a URL."""
    if is_remote(output_dir) and not config.on_the_fly and config.read_tiles_from is None:
        raise ConfigError(
            f"on_the_fly=False reads tiles from archives in {output_dir}, behind a URL: leave it out "
            "(save_tiles=True writes the archives all the same), or write into a local folder"
        )


def _plan_archive(slide: Slide, config: PreprocessingConfig, tiling: Tiling) -> SlidePlan:
    """Tiles and coordinates are both there: the slide itself is not needed."""
    assert config.read_tiles_from is not None
    check_tiling(tiling, slide, None, config)
    tiling = _tiles_of(replace(tiling, image_path=slide.image_path), config)
    path = find_archive(config.read_tiles_from, slide.sample_id)
    return SlidePlan(
        slide,
        open_archive(path, tiling),
        tiling,
        skips_bad_tiles=config.on_bad_tile == "skip",
        tiles_tar_path=path,
    )


def _plan(
    reader: SlideReader,
    slide: Slide,
    asked: _Request,
    staged: Staged,
    previous: Previous | None,
    tissue: TissueOnce,
    checked: set[int],
    close: Callable[[], None],
) -> SlidePlan:
    config, output_dir = asked.config, asked.output_dir
    tiling, mask, resumed = _tiles(reader, slide, asked, staged, previous, tissue)
    if tiling.geometry.read_level not in checked:
        centres = np.stack([tiling.x, tiling.y], axis=1) + tiling.geometry.tile_size_lv0 / 2
        compare_with_second_decoder(reader, tiling.geometry.read_level, centres)
        checked.add(tiling.geometry.read_level)
    mask_path, tiling_path = write_previews(reader, tiling, mask, config, output_dir)
    if config.read_tiles_from is not None:
        return replace(
            _plan_archive(slide, config, tiling),
            mask_preview_path=mask_path,
            tiling_preview_path=tiling_path,
        )
    tiling = _tiles_of(tiling, config)
    plan = SlidePlan(
        slide,
        SlideSource(reader, tiling, grouped=config.use_supertiles, closed=close),
        tiling,
        skips_bad_tiles=config.on_bad_tile == "skip",
        mask_preview_path=mask_path,
        tiling_preview_path=tiling_path,
        coordinates_dir=output_dir / "tiles" if resumed and output_dir else None,
    )
    if output_dir is None or (config.on_the_fly and not config.save_tiles):
        return plan
    plan = _with_archive(plan, config, output_dir / "tiles", previous, resumed)
    if config.on_the_fly:
        return plan
    assert plan.tiles_tar_path is not None
    return replace(plan, source=open_archive(plan.tiles_tar_path, plan.tiling))


def _tiles_of(tiling: Tiling, config: PreprocessingConfig) -> Tiling:
    """The tiles to embed: those of the regions where the tiling is one of regions."""
    return (
        tiling if config.region_tile_multiple is None else expand_regions(tiling, config.region_tile_multiple)
    )


def _tiles(
    reader: SlideReader,
    slide: Slide,
    asked: _Request,
    staged: Staged,
    previous: Previous | None,
    tissue_once: TissueOnce,
) -> tuple[Tiling, TissueMask | None, bool]:
    """Tiling (of regions, with such), tissue (where it was looked for), and whether both were there from a
    previous run."""
    config, output_dir, given = asked.config, asked.output_dir, asked.given
    if given is not None:
        check_tiling(given, slide, reader, config)
        return replace(given, image_path=slide.image_path, backend=reader.backend), None, False
    if config.resume and output_dir and previous and _may_reuse(slide, config, output_dir):
        found = find_reusable(previous, reader, config)
        if found is not None:
            return replace(found, backend=reader.backend), None, True
    mask_copy = None if staged.mask_path == slide.mask_path else staged.mask_path
    tiling, tissue = tile_slide(reader, slide, resolve_spacing(reader, slide), config, mask_copy, tissue_once)
    for remark in tiling.remarks:
        logger.warning("slide %s: %s", slide.sample_id, remark)
    return tiling, tissue, False


def _may_reuse(slide: Slide, config: PreprocessingConfig, output_dir: Path) -> bool:
    """Not where the tissue itself is still to be drawn, nor where tiles may be skipped: those that a
    previous run skipped are recorded with its embeddings only, and have to be found again."""
    drawn = preview_path(output_dir, "mask", slide.sample_id).is_file()
    return config.on_bad_tile == "fail" and (drawn or not config.preview.save_mask_preview)


def _with_archive(
    plan: SlidePlan, config: PreprocessingConfig, directory: Path, previous: Previous | None, resumed: bool
) -> SlidePlan:
    """The plan with the archive of its tiles, which is written unless a previous run has."""
    path, manifest = archive_paths(directory, plan.slide.sample_id)
    if resumed and path.is_file() and previous and previous.holds("tiles_tar", manifest):
        return replace(plan, tiles_tar_path=path)
    assert isinstance(plan.source, SlideSource)
    while True:
        bad: dict[int, SlideReadError] = {}
        try:
            path = write_archive(directory, plan.tiling, _pixels(plan, bad))
            if previous is not None:
                previous.record("tiles_tar")
            return replace(plan, tiles_tar_path=path)
        except _BadTilesFound:
            skipped = (*plan.skipped, *bad_tiles(plan.tiling, bad))
            tiling = plan.tiling.without(bad)
            source = plan.source.over(tiling, grouped=config.use_supertiles)
            plan = replace(plan, tiling=tiling, source=source, skipped=skipped)


class _BadTilesFound(Exception):
    """The archive has to be written again, without the tiles that cannot be decoded."""


def _pixels(plan: SlidePlan, bad: dict[int, SlideReadError]) -> Iterator[Block]:
    """The tiles of every block; raises at the end if some were bad, and adds these to `bad`."""
    side = plan.tiling.geometry.requested_tile_size_px
    for number, tiles in enumerate(plan.source.blocks):
        targets = np.empty((len(tiles), side, side, 3), np.uint8)
        try:
            bad.update(_placed(plan.source, number, list(targets)))
        except OSError as error:  # of the slide's storage: not to be taken for the archive's
            raise SlideReadError(f"slide {plan.slide.sample_id}: it cannot be read: {error}") from error
        if bad and not (plan.skips_bad_tiles and plan.tiling.kept(bad).any()):
            raise damaged(plan.tiling, bad)
        yield tiles, targets
    if bad:
        raise _BadTilesFound


def _placed(source: TileSource, number: int, targets: list[Pixels]) -> dict[int, SlideReadError]:
    """Read the tiles of a block; the errors of those that cannot be decoded."""
    try:
        source.place(number, source.fetch(number), targets)
    except SlideReadError:
        return place_singly(source, number, targets)
    return {}
