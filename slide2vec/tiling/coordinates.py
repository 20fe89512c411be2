"""HS2P coordinate files: <sample_id>.coordinates.npz and .coordinates.meta.json.

Written as HS2P 6.1 writes them, so that it loads them; read as HS2P 3.0 to 6.1 wrote them.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from math import isclose, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slide2vec.config import FilterConfig, PreprocessingConfig
from slide2vec.errors import ConfigError, TilingError
from slide2vec.files import as_os_errors, as_path, atomic_path, local, open_plain, remove
from slide2vec.files.arrays import read_npz
from slide2vec.geometry import TileGeometry
from slide2vec.labels import MERGED, class_name, split_class_name
from slide2vec.readers import SlideReader
from slide2vec.slides import Slide
from slide2vec.tiling.types import PRECOMPUTED, Segmentation, Tiling

__all__ = [
    "ARTEFACTS",
    "as_hs2p_backend",
    "check_tiling",
    "coordinate_paths",
    "find_coordinates",
    "load_coordinates",
    "load_header",
    "read_coordinates",
    "write_coordinates",
]

_MISSING = object()
#: Our back ends that HS2P has not -> the one of its own that opens such slides.
_IN_HS2P = {"tiff": "tifffile", "dicom": "openslide"}
#: What damaged JSON, ZIP and NPY make their readers raise.
_UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, ConfigError, zipfile.BadZipFile, zlib.error, EOFError),
    *(NotImplementedError, RuntimeError, OverflowError, RecursionError, MemoryError),
)
#: Side of a tile as read beyond which a coordinate file is not believed: one tile has 3 GB then.
_MOST_PX = 32_768
#: Of tissue fractions, in single precision.
_ROUNDING = 1e-5
#: How HS2P's strategies of sampling classes end.
_SAMPLING = "_sampling"
#: Metadata has a few KB.
_MOST_BYTES = 16 * 2**20
#: The arrays; HS2P 3.0 and 3.1 have `coordinates`, (N, 2), for x and y.
_ARRAYS = ("tile_index", "x", "y", "tissue_fractions", "coordinates")
#: Shares of tiles that `qc` measures; HS2P has none, and passes over them.
ARTEFACTS = ("background", "blur", "bubble", "fold", "pen", "spot")


def coordinate_paths(directory: Path, sample_id: str) -> tuple[Path, Path]:
    """Where a slide's arrays (.npz) and metadata (.json) are in a directory of coordinate files."""
    return directory / f"{sample_id}.coordinates.npz", directory / f"{sample_id}.coordinates.meta.json"


def write_coordinates(directory: Path, tiling: Tiling) -> tuple[Path | None, Path]:
    """Write a tiling's coordinate files, the metadata last, so that metadata means a complete pair.

    Returns:
        Paths of the .npz (None when there are no tiles, then none is written) and of the .json.
    """
    arrays, metadata = coordinate_paths(directory, tiling.sample_id)
    remove(metadata)
    if len(tiling):
        with atomic_path(arrays) as temporary:
            arrays_of: dict[str, Any] = {
                "tile_index": np.arange(len(tiling), dtype=np.int32),
                "x": tiling.x,
                "y": tiling.y,
                "tissue_fractions": tiling.tissue_fractions,
                **tiling.artefacts,
            }
            np.savez_compressed(temporary, **arrays_of)
    else:
        remove(arrays)
    with atomic_path(metadata) as temporary:
        temporary.write_text(json.dumps(_metadata(tiling), indent=2, sort_keys=True) + "\n")
    return (arrays if len(tiling) else None), metadata


def _metadata(tiling: Tiling) -> dict[str, dict[str, Any]]:
    geometry, tissue, filtering = tiling.geometry, tiling.segmentation, tiling.filtering
    mask_path = None if tiling.mask_path is None else str(tiling.mask_path)
    return {
        "provenance": {
            "sample_id": split_class_name(tiling.sample_id)[1],
            "image_path": str(tiling.image_path),
            "mask_path": mask_path,
            "backend": as_hs2p_backend(tiling.backend),
            "requested_backend": as_hs2p_backend(tiling.requested_backend),
            "spacing_at_level_0": tiling.spacing_at_level_0,
            "mask_backend": tissue.mask_backend and as_hs2p_backend(tissue.mask_backend),
            "requested_mask_backend": tissue.requested_mask_backend,
        },
        "slide": {
            "dimensions": list(tiling.dimensions),
            "base_spacing_um": geometry.base_spacing_um,
            "level_downsamples": list(tiling.downsamples),
        },
        "tiling": {
            "requested_tile_size_px": geometry.requested_tile_size_px,
            "requested_spacing_um": geometry.requested_spacing_um,
            "read_level": geometry.read_level,
            "read_tile_size_px": geometry.read_tile_size_px,
            "read_spacing_um": geometry.read_spacing_um,
            "tile_size_lv0": geometry.tile_size_lv0,
            "tolerance": geometry.tolerance,
            "step_px_lv0": geometry.step_px_lv0,
            "overlap": geometry.overlap,
            "min_tissue_fraction": tiling.tissue_threshold,
            "is_within_tolerance": geometry.is_within_tolerance,
            "n_tiles": len(tiling),
        },
        "segmentation": {
            "tissue_method": tissue.method,
            "requested_seg_downsample": int(tissue.requested_downsample),
            "seg_downsample": tissue.downsample,
            "seg_level": tissue.level,
            "seg_spacing_um": tissue.spacing_um,
            "sthresh": tissue.sthresh,
            "sthresh_up": tissue.sthresh_up,
            "mthresh": tissue.mthresh,
            "close": tissue.close,
            "sam2_checkpoint_path": None,
            "sam2_config_path": None,
            "mask_path": mask_path,
            "ref_tile_size_px": filtering.ref_tile_size,
            "tissue_mask_tissue_value": tissue.tissue_value,
            "mask_level": tissue.mask_level,
            "mask_spacing_um": tissue.mask_spacing_um,
        },
        "filtering": filtering.model_dump(exclude={"ref_tile_size"}),
        "artifact": {
            "coordinate_space": "level0_px",
            "tile_order": "x_then_y",
            **_sampling(tiling),
        },
    }


def _sampling(tiling: Tiling) -> dict[str, str | None]:
    """How classes were sampled, as HS2P records it; it calls all tiles of a mask of tissue merged, too."""
    if tiling.strategy is None:
        of_tissue = "merged" if tiling.mask_path is not None else None
        strategy = of_tissue and "merged_default_tiling"
        return {"annotation": None, "selection_strategy": strategy, "output_mode": of_tissue}
    together = tiling.annotation == MERGED
    return {
        "annotation": None if together else tiling.annotation,
        "selection_strategy": f"{tiling.strategy}{_SAMPLING}",
        "output_mode": "merged" if together else "per_annotation",
    }


def as_hs2p_backend(name: str) -> str:
    """What HS2P's files call a back end of ours: a name under which HS2P opens the slide."""
    return _IN_HS2P.get(name, name)


def _from_hs2p(name: str) -> str:
    return "tiff" if name == "tifffile" else name


def read_coordinates(directory: Path, sample_id: str) -> Tiling:
    """The tiling of a slide from coordinate files in `directory` or its folder `tiles`.

    Raises:
        TilingError: there are none, or they cannot be read.
    """
    return load_coordinates(find_coordinates(directory, sample_id) or directory, sample_id)


def find_coordinates(directory: Path, sample_id: str) -> Path | None:
    """Which of `directory` and its folder `tiles` holds coordinate files of a slide; None for neither."""
    folders = (directory, directory / "tiles")
    return next((folder for folder in folders if _is_there(coordinate_paths(folder, sample_id)[1])), None)


def _is_there(path: Path) -> bool:
    """Whether there is something; whoever reads it decides what it is."""
    try:
        with as_os_errors(path):
            return path.exists()
    except OSError:
        return True
    except ValueError:  # NUL in it
        return False


def check_tiling(
    tiling: Tiling, slide: Slide, reader: SlideReader | None, config: PreprocessingConfig
) -> None:
    """Refuse a loaded tiling that is not of this slide, or not of the tiles that are asked for.

    Args:
        reader: of the slide; None where its tiles come from an archive.

    Raises:
        TilingError: naming what differs, or the tile that is not on the slide.
    """
    geometry = tiling.geometry
    level = geometry.read_level
    size = config.requested_region_size_px or config.requested_tile_size_px
    checks: list[tuple[str, Any, Any]] = [
        ("sample_id", tiling.sample_id, slide.sample_id),
        ("tile size in px", geometry.requested_tile_size_px, size),
        ("spacing in µm/px", geometry.requested_spacing_um, config.requested_spacing_um),
        ("spacing_at_level_0", geometry.base_spacing_um, slide.spacing_at_level_0),
    ]
    if reader is not None:
        downsamples = _at(tiling.downsamples, level), _at(reader.downsamples, level)
        checks.append(("dimensions", tiling.dimensions, reader.dimensions))
        checks.append(("read level with downsample", *downsamples))
    for name, found, expected in checks:
        if expected is not None and not _agree(found, expected):
            raise TilingError(
                f"slide {slide.sample_id}: its coordinate files say {name} {found}; {expected} is needed: "
                "tile the slide anew, or ask for what they hold"
            )
    try:
        check_places(tiling.x, tiling.y, tiling.dimensions)
    except ValueError as error:
        raise TilingError(f"slide {slide.sample_id}: of its given tiles {error}") from error


def check_places(x: NDArray[Any], y: NDArray[Any], dimensions: tuple[int, int]) -> None:
    """Refuse tiles whose top-left corner is not on the slide, 0 <= x < width and 0 <= y < height; they may
    overhang its right and lower edge, as those of HS2P do.

    Raises:
        ValueError: naming the first that is not, or they are no whole numbers.
    """
    for name, values, side in (("x", x, dimensions[0]), ("y", y, dimensions[1])):
        if values.dtype.kind not in "iu":
            finite = np.isfinite(values) if values.dtype.kind == "f" else np.ones(len(values), bool)
            example = f", tile {int((~finite).argmax())} has {values[~finite][0]}" if not finite.all() else ""
            raise ValueError(f"{name} is {values.dtype}, not whole numbers{example}")
        outside = (values < 0) | (values >= side)
        if outside.any():
            first = int(outside.argmax())
            raise ValueError(
                f"{int(outside.sum())} of {len(values)} are not on the slide: tile {first} has {name}="
                f"{values[first]}, and {name} goes from 0 to {side - 1} level-0 px"
            )


def _at(downsamples: tuple[float, ...], level: int) -> float:
    return downsamples[level] if 0 <= level < len(downsamples) else 0.0


def _agree(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        # Readers derive downsamples differently (average of both axes, single precision).
        return isclose(found, expected, rel_tol=1e-3)
    return bool(found == expected)


def load_coordinates(directory: Path, sample_id: str) -> Tiling:
    """The tiling in a slide's coordinate files, of HS2P 3.0 or newer.

    Raises:
        TilingError: they are missing, damaged, or of an unknown layout.
    """
    return _loaded(directory, sample_id, coordinate_paths(directory, sample_id)[0])


def load_header(directory: Path, sample_id: str) -> Tiling:
    """As `load_coordinates`, without the tiles: how they were found, from the metadata alone."""
    return _loaded(directory, sample_id, None)


def _loaded(directory: Path, sample_id: str, arrays: Path | None) -> Tiling:
    metadata = coordinate_paths(directory, sample_id)[1]
    try:
        with open_plain(metadata) as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        meta = json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        return _tiling(_Sections(meta), arrays)
    except FileNotFoundError as error:
        missing = error.filename or error
        raise TilingError(f"slide {sample_id}: coordinate file {missing} does not exist") from error
    except _UNREADABLE as error:
        raise TilingError(f"slide {sample_id}: {metadata} cannot be read: {error}") from error


def _finite(text: str) -> float:
    """A number in JSON. Python's reader also takes NaN and Infinity, which no file of coordinates has."""
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"it holds {text}, which is no finite number")
    return number


class _Sections:
    """The metadata by section and key, under the names of any version."""

    def __init__(self, meta: Any) -> None:
        if not isinstance(meta, dict) or not all(isinstance(part, dict) for part in meta.values()):
            raise ValueError("it is not a mapping of sections; was it written by HS2P 3.0 or newer?")
        self._meta: dict[str, dict[str, Any]] = meta

    def get(self, section: str, *names: str, default: Any = _MISSING) -> Any:
        """The value of the first name that is there; `default`, if given, when none is or it is null."""
        values = self.all(section)
        value = next((values[name] for name in names if name in values), _MISSING)
        if default is not _MISSING and (value is _MISSING or value is None):
            return default
        if value is _MISSING:
            raise ValueError(f"section {section!r} has no {' or '.join(names)}")
        return value

    def number(self, section: str, *names: str, default: Any = _MISSING) -> Any:
        """As `get`, a number and no text or truth value that Python would take for one; null is none."""
        if default is not _MISSING and not any(name in self.all(section) for name in names):
            return default
        value = self.get(section, *names)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{section}.{names[0]} is {value!r}, not a number")
        return value

    def text(self, section: str, *names: str, default: Any = _MISSING) -> str:
        """As `get`, a text."""
        value = self.get(section, *names, default=default)
        if not isinstance(value, str):
            raise ValueError(f"{section}.{names[0]} is {value!r}, not a text")
        return value

    def all(self, section: str) -> Mapping[str, Any]:
        if section not in self._meta:
            raise ValueError(f"it has no section {section!r}; was it written by HS2P 3.0 or newer?")
        return self._meta[section]


def _tiling(meta: _Sections, arrays: Path | None) -> Tiling:
    width, height = map(int, meta.get("slide", "dimensions"))
    count = 0 if arrays is None else meta.get("tiling", "n_tiles")
    x, y, fractions, artefacts = _arrays(arrays, count, (width, height))
    mask_path = meta.get("provenance", "mask_path", default=None)
    spacing = meta.get("provenance", "spacing_at_level_0", default=None)
    annotation, strategy = _sampled(meta)
    return Tiling(
        sample_id=class_name(annotation, meta.text("provenance", "sample_id")),
        image_path=as_path(meta.get("provenance", "image_path")),
        mask_path=None if mask_path is None else as_path(mask_path),
        spacing_at_level_0=None if spacing is None else float(spacing),
        backend=_from_hs2p(meta.text("provenance", "backend")),
        requested_backend=_from_hs2p(meta.text("provenance", "requested_backend", default="auto")),
        dimensions=(width, height),
        downsamples=tuple(float(ds) for ds in meta.get("slide", "level_downsamples")),
        geometry=_geometry(meta),
        x=x,
        y=y,
        tissue_fractions=fractions,
        tissue_threshold=float(meta.number("tiling", "min_tissue_fraction")),
        segmentation=_segmentation(meta),
        filtering=_filtering(meta),
        artefacts=artefacts,
        annotation=annotation,
        strategy=strategy,
    )


def _sampled(meta: _Sections) -> tuple[str | None, str | None]:
    """The class that tiles are of, and the strategy; both None where they are of tissue."""
    recorded = meta.get("artifact", "selection_strategy", default=None)
    if not isinstance(recorded, str) or not recorded.endswith(_SAMPLING):
        return None, None
    return meta.text("artifact", "annotation", default=MERGED), recorded.removesuffix(_SAMPLING)


def _geometry(meta: _Sections) -> TileGeometry:
    def tiling(*names: str) -> Any:
        return meta.number("tiling", *names)

    read_size = int(tiling("read_tile_size_px", "effective_tile_size_px"))
    overlap = float(tiling("overlap"))
    geometry = TileGeometry(
        requested_tile_size_px=int(tiling("requested_tile_size_px")),
        requested_spacing_um=float(tiling("requested_spacing_um")),
        base_spacing_um=float(meta.number("slide", "base_spacing_um")),
        read_level=int(tiling("read_level")),
        read_spacing_um=float(tiling("read_spacing_um", "effective_spacing_um")),
        read_tile_size_px=read_size,
        tile_size_lv0=int(tiling("tile_size_lv0")),
        read_step_px=max(1, round(read_size * (1.0 - overlap))),
        step_px_lv0=int(tiling("step_px_lv0")),
        tolerance=float(tiling("tolerance")),
        overlap=overlap,
        is_within_tolerance=bool(meta.get("tiling", "is_within_tolerance")),
    )
    if min(read_size, geometry.tile_size_lv0, geometry.step_px_lv0, geometry.read_level + 1) < 1:
        raise ValueError("its tile sizes, step or level are not positive")
    numbers = geometry.requested_spacing_um, geometry.base_spacing_um, geometry.read_spacing_um, overlap
    if not all(isfinite(number) for number in numbers) or min(numbers[:3]) <= 0 or not 0 <= overlap < 1:
        raise ValueError(f"its spacings or overlap are not possible: {numbers}")
    if max(read_size, geometry.requested_tile_size_px) > _MOST_PX:
        raise ValueError(f"its tiles have {read_size} px a side, more than {_MOST_PX}")
    return geometry


def _segmentation(meta: _Sections) -> Segmentation:
    def value(*names: str, default: Any = None) -> Any:
        return meta.get("segmentation", *names, default=default)

    def number(name: str, default: float) -> Any:
        return meta.number("segmentation", name, default=default)

    downsample = int(number("seg_downsample", 1))
    return Segmentation(
        method=str(value("tissue_method", default=PRECOMPUTED)),
        requested_downsample=float(number("requested_seg_downsample", downsample)),
        downsample=downsample,
        level=int(number("seg_level", 0)),
        spacing_um=float(number("seg_spacing_um", 0.0)),
        sthresh=value("sthresh"),
        sthresh_up=value("sthresh_up"),
        mthresh=value("mthresh"),
        close=value("close"),
        tissue_value=value("tissue_mask_tissue_value"),
        mask_level=value("mask_level"),
        mask_spacing_um=value("mask_spacing_um"),
        mask_backend=meta.get("provenance", "mask_backend", default=None),
        requested_mask_backend=meta.get("provenance", "requested_mask_backend", default=None),
    )


def _filtering(meta: _Sections) -> FilterConfig:
    recorded = meta.all("filtering")
    known = {name: recorded[name] for name in FilterConfig.model_fields if recorded.get(name) is not None}
    for name, value in known.items():
        if isinstance(value, bool) != isinstance(getattr(FilterConfig(), name), bool):
            raise ValueError(f"filtering.{name} is {value!r}")
    reference = meta.get("segmentation", "ref_tile_size_px", default=None)
    return FilterConfig(**{**known, "ref_tile_size": reference})


def _arrays(
    path: Path | None, count: Any, dimensions: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    if type(count) is not int or count < 0:
        raise ValueError(f"n_tiles is {count!r}, not a number of tiles")
    if path is None or count == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), {}
    with local(path) as file:
        data = read_npz(file, (*_ARRAYS, *ARTEFACTS), most=2 * count)
    x, y = data["coordinates"].T if "coordinates" in data else (data["x"], data["y"])
    index, fractions = data["tile_index"], data["tissue_fractions"]
    if not x.shape == y.shape == index.shape == fractions.shape == (count,):
        raise ValueError(f"{path.name} does not hold the {count} tiles that the metadata announces")
    if not np.array_equal(index, np.arange(count)):
        raise ValueError(f"tile_index in {path.name} does not count from 0 to {count - 1}")
    check_places(x, y, dimensions)
    wrong = ~((fractions >= 0) & (fractions <= 1 + _ROUNDING))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"tile {first} has the tissue fraction {fractions[first]}, not one from 0 to 1")
    artefacts = {name: data[name].astype(np.float32) for name in ARTEFACTS if name in data}
    for name, shares in artefacts.items():
        if shares.shape != (count,) or not ((shares >= 0) & (shares <= 1 + _ROUNDING)).all():
            raise ValueError(f"{name} in {path.name} is not a share from 0 to 1 of each of the {count} tiles")
    return x.astype(np.int64), y.astype(np.int64), fractions.astype(np.float32), artefacts
