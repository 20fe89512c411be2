"""Read tiles of a finished run again, encode them in fp32 in PyTorch, and compare with what is on disk."""

from __future__ import annotations

import datetime
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slide2vec.artifacts.places import Owner, names_of_all, owners, owners_called
from slide2vec.artifacts.reading import load_embeddings
from slide2vec.artifacts.records import FORMATS, SIDECAR, read_metadata
from slide2vec.artifacts.tile_features import coordinates_folder
from slide2vec.audit.certificate import SCHEMA, digest_of
from slide2vec.audit.second_reader import NoSecondReader, Pixels, SecondReader, second_readers
from slide2vec.config import ExecutionOptions
from slide2vec.errors import ArtifactError, ConfigError, Slide2VecError, TilingError
from slide2vec.labels import class_name
from slide2vec.lazy import import_timm
from slide2vec.model import Model
from slide2vec.settings import versions
from slide2vec.settings.text import read_yaml
from slide2vec.slides import Slide
from slide2vec.tiling import Tiling
from slide2vec.tiling.coordinates import coordinate_paths, load_coordinates
from slide2vec.tiling.types import expand_regions

__all__ = ["LEAST_TILES", "MOST_SHIFT", "audit_run"]

#: Tiles of a slide that are compared at least, where it has as many.
LEAST_TILES = 4
#: Tiles per forward pass.
_BATCH = 16
#: How far the embeddings of a slide may lie from the reference, the median over its tiles, as a part of how
#: far its tiles lie apart: a cosine says little where all tiles of an encoder point the same way. Sound runs
#: have 0.000001 in fp32 and 0.03 in bf16 (`benchmarks.audit`, random weights); fp16 has 3 more bits than
#: bf16, fp8 at least 3 fewer.
MOST_SHIFT = {"fp32": 0.02, "fp16": 0.05, "bf16": 0.2, "fp8": 0.5}
#: Tiles that a slide must have for that to mean something.
_SPREAD_TILES = 8
_KINDS = ("tile", "hierarchical")

Row = dict[str, Any]
#: Called with how many slides are done, and how many there are.
Progress = Callable[[int, int], None]


def audit_run(
    run: Path | str,
    *,
    sample: float = 0.005,
    seed: int = 0,
    device: str | None = None,
    weights: str | None = None,
    encoder: str | None = None,
    slides_dir: Path | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda done, count: None,
) -> Row:
    """Compare a sample of the tiles of every slide of a run with what other code makes of them.

    Pixels are read by OpenSlide or tifffile, area-averaged by matrix products, transformed by torchvision and
    encoded by PyTorch in fp32. Embeddings must be as close as their precision allows (cosine, see
    `slide2vec.recipes.MIN_COSINE`, and `MOST_SHIFT`), all rows finite, coordinates on the slide and of the
    spacing that was asked for, and the weights those that the run names.

    Args:
        run: output directory.
        sample: part of each slide's tiles, above 0, to 1; at least `LEAST_TILES`.
        seed: decides which.
        device: for PyTorch; None = the best that is there.
        weights: of the tile encoder; None = as the run's config.yaml says.
        encoder: only of this one, by its name in the run.
        slides_dir: where slides are looked for, by their file names; None = where they were.
        trust_remote_code: let a preset that needs it run the Python code of its repository.
        progress: called with every slide.

    Returns:
        What `write_certificate` writes. Its "verdict" is "agrees", "differs", or "not audited" where no slide
        of an encoder could be.

    Raises:
        ArtifactError: the run has no embeddings of tiles.
        ConfigError: the sample is no part, or there is no such encoder.
        PresetError, WeightsError: the encoder cannot be built. One of several is not audited then.
    """
    if not 0 < sample <= 1:
        raise ConfigError(f"sample={sample:g} is no part of the tiles: give more than 0, at most 1 (100%)")
    run, slides_dir = Path(run), None if slides_dir is None else Path(slides_dir)
    there = owners(run)
    chosen = there if encoder is None else owners_called(encoder, there)
    if not chosen:
        names = ", ".join(names_of_all(there)) or "none"
        raise ArtifactError(
            f"{run} has no embeddings of {encoder or 'tiles'} with a sidecar that can be read; "
            f"of encoders it has: {names}"
        )
    todo = [(owner, list(_sidecars(owner))) for owner in chosen]
    count = sum(len(sidecars) for _, sidecars in todo)
    if not count:
        raise ArtifactError(
            f"{run} has embeddings of slides or patients, and none of tiles to compare: embed with "
            "save_tile_embeddings=True"
        )
    done, encoders = 0, []
    for owner, sidecars in todo:
        if not sidecars:
            continue
        audit: _Audit | _NotBuilt
        try:
            model = _model(owner, sidecars, weights, device, trust_remote_code)
            audit = _Audit(run, owner, model, sample, seed, slides_dir)
        except Slide2VecError as error:
            if len(sidecars) == count:
                raise
            audit = _NotBuilt(run, owner, error)
        rows = []
        for sidecar in sidecars:
            rows.append(audit.row(sidecar))
            done += 1
            progress(done, count)
        encoders.append({**audit.described, "verdict": _verdict(rows), "slides": rows})
    every = [row for each in encoders for row in each["slides"]]
    return {
        "schema": SCHEMA,
        "run": run.resolve().name,
        "audited_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "sample": sample,
        "seed": seed,
        "verdict": _of_all([each["verdict"] for each in encoders]),
        "slides": dict(Counter(row["verdict"] for row in every)),
        "tiles_compared": sum(row["compared"] for row in every),
        "encoders": encoders,
    }


def _verdict(rows: Sequence[Row]) -> str:
    verdicts = {row["verdict"] for row in rows}
    return next((each for each in ("differs", "agrees") if each in verdicts), "not audited")


def _of_all(verdicts: Sequence[str]) -> str:
    """Of several encoders: they agree only where each does."""
    return next(each for each in ("differs", "not audited", "agrees") if each in verdicts)


def _sidecars(owner: Owner) -> Iterator[Path]:
    """Of tiles and of regions, those of classes in their folders."""
    for kind in _KINDS:
        yield from sorted((owner.folder / f"{kind}_embeddings").rglob(f"*{SIDECAR}"))


def _model(
    owner: Owner, sidecars: Sequence[Path], weights: str | None, device: str | None, trust_remote_code: bool
) -> Model:
    """The tile encoder of a run, as its configuration, and the first sidecar that can be read, say.

    Raises:
        ArtifactError: none can.
    """
    recorded = _first_readable(owner, sidecars)
    settings: Mapping[str, Any] = {}
    if (owner.folder / "config.yaml").is_file():
        settings = read_yaml(owner.folder / "config.yaml")
    of_model = settings.get("model") or {}
    preset = str(recorded["encoder_name"])
    source = weights or of_model.get("weights")
    if isinstance(source, Mapping):
        source = source.get(preset)
    identity = _encoder(recorded)
    return Model.from_preset(
        preset,
        weights=source,
        seed=int(settings.get("seed") or 0),
        device=device,
        output_variant=identity.get("output_variant"),
        precision="fp32",
        input_size_px=of_model.get("input_size_px"),
        allow_non_recommended_settings=True,
        trust_remote_code=trust_remote_code,
    )


def _first_readable(owner: Owner, sidecars: Sequence[Path]) -> Mapping[str, Any]:
    for sidecar in sidecars:
        try:
            recorded = read_metadata(sidecar)
        except ArtifactError:
            continue
        if isinstance(recorded.get("encoder_name"), str):
            return recorded
    raise ArtifactError(f"none of the {len(sidecars)} sidecars of {owner.name} in {owner.folder} can be read")


def _encoder(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    found = _compatibility(recorded).get("encoder")
    return found if isinstance(found, Mapping) else {}


def _compatibility(recorded: Mapping[str, Any]) -> Mapping[str, Any]:
    found = recorded.get("compatibility")
    return found if isinstance(found, Mapping) else {}


class _Differs(Exception):
    """What is wrong with a slide's files."""


def _row(run: Path, owner: Owner, sidecar: Path) -> Row:
    """Of a slide that nothing is found of yet."""
    return {
        "sample_id": sidecar.name.removesuffix(SIDECAR),
        "kind": sidecar.relative_to(owner.folder).parts[0].removesuffix("_embeddings"),
        "verdict": "agrees",
        "why": None,
        "tiles": None,
        "compared": 0,
        "files": {_named(run, sidecar): digest_of(sidecar)},
    }


def _named(run: Path, path: Path) -> str:
    """In the run; of coordinates that were given, wherever they are."""
    return (path.relative_to(run) if path.is_relative_to(run) else path.resolve()).as_posix()


@dataclass(frozen=True)
class _NotBuilt:
    """One of several encoders of a run, which cannot be built."""

    run: Path
    owner: Owner
    error: Slide2VecError

    @property
    def described(self) -> Row:
        return {"encoder": self.owner.name, "preset": self.owner.preset, "weights": None}

    def row(self, sidecar: Path) -> Row:
        """Of a slide, which is not compared."""
        return _row(self.run, self.owner, sidecar) | {"verdict": "not audited", "why": str(self.error)}


@dataclass(frozen=True)
class _Audit:
    """Of one encoder of a run."""

    run: Path
    owner: Owner
    model: Model
    sample: float
    seed: int
    slides_dir: Path | None

    @cached_property
    def weights(self) -> str:
        """What the weights that the reference has are."""
        return str(self.model.identity(ExecutionOptions(engine="torch"))["weights"])

    @property
    def described(self) -> Row:
        return {"encoder": self.owner.name, "preset": self.model.name, "weights": self.weights}

    def row(self, sidecar: Path) -> Row:
        """What is found of a slide."""
        found = _row(self.run, self.owner, sidecar)
        try:
            self._compare(sidecar, found["kind"], found)
        except _Differs as error:
            found |= {"verdict": "differs", "why": str(error)}
        except (ArtifactError, TilingError, KeyError, TypeError) as error:  # of a sidecar by other hands
            found |= {"verdict": "differs", "why": f"its files cannot be read: {error}"}
        except (NoSecondReader, Slide2VecError, OSError) as error:
            found |= {"verdict": "not audited", "why": str(error)}
        return found

    def _compare(self, sidecar: Path, kind: str, found: Row) -> None:
        recorded = read_metadata(sidecar)
        found["sample_id"] = str(recorded.get("sample_id", found["sample_id"]))
        if recorded.get("annotation"):
            found["annotation"] = recorded["annotation"]
        source = _compatibility(recorded).get("tiles_from", "slide")
        if source != "slide":
            where = "an archive" if source == "archive" else "JPEGs of them"
            raise NoSecondReader(f"its tiles were embedded from {where}, whose pixels are not the slide's")
        precision = str(_encoder(recorded).get("precision", "fp32"))
        if precision not in MOST_SHIFT:
            raise _Differs(f"its sidecar has precision {precision!r}, which is none")
        found["precision"] = precision
        features = self._features(sidecar, recorded, found)
        tiling = self._tiling(recorded, kind, found)
        rows = features.reshape(-1, features.shape[-1])
        found["tiles"] = len(rows)
        self._check_encoder(recorded)
        if len(rows) != len(tiling):
            raise _Differs(f"{len(rows)} embeddings for {len(tiling)} tiles")
        if not len(rows):
            return
        if (wrong := int((~rows.isfinite().all(1)).sum())) > 0:
            raise _Differs(f"{wrong} of {len(rows)} embeddings hold NaN or infinities")
        _check_tiles(tiling)
        tiles = self._sampled(found["sample_id"], len(rows))
        _check_width(tiling)
        reference = self._read_again(recorded, tiling, tiles, found)
        self._judge(rows, reference, tiles, tiling, precision, found)

    def _features(self, sidecar: Path, recorded: Mapping[str, Any], found: Row) -> torch.Tensor:
        stem = sidecar.name.removesuffix(SIDECAR)
        names = [str(recorded.get("format")), *FORMATS]
        paths = (sidecar.with_name(f"{stem}.{suffix}") for suffix in names)
        path = next(filter(Path.is_file, paths), None)
        if path is None:
            raise _Differs("the file of its embeddings is missing")
        found["files"][_named(self.run, path)] = digest_of(path)
        return load_embeddings(path)

    def _tiling(self, recorded: Mapping[str, Any], kind: str, found: Row) -> Tiling:
        name = class_name(recorded.get("annotation"), found["sample_id"])
        folder = coordinates_folder(recorded, self.owner.tiling / "tiles", name)
        for path in coordinate_paths(folder, name):
            if path.is_file():
                found["files"][_named(self.run, path)] = digest_of(path)
        tiling = load_coordinates(folder, name)
        return expand_regions(tiling, int(recorded["region_tile_multiple"])) if kind != "tile" else tiling

    def _check_encoder(self, recorded: Mapping[str, Any]) -> None:
        weights = _encoder(recorded).get("weights")
        if weights is not None and weights != self.weights:
            raise _Differs(f"its weights are {weights}, those of the reference {self.weights}")

    def _sampled(self, name: str, count: int) -> NDArray[np.int64]:
        wanted = min(count, max(LEAST_TILES, math.ceil(count * self.sample)))
        chosen = np.random.default_rng([self.seed, zlib.crc32(name.encode())]).choice(count, wanted, False)
        return np.sort(chosen)

    def _read_again(
        self, recorded: Mapping[str, Any], tiling: Tiling, tiles: NDArray[np.int64], found: Row
    ) -> torch.Tensor:
        """The reference of tiles, by the first second reader that reads all of them.

        Raises:
            NoSecondReader: none does.
        """
        path = Path(recorded["image_path"])
        if self.slides_dir is not None:
            path = self.slides_dir / path.name
        if not path.exists():
            raise NoSecondReader(f"{path} does not exist; --slides-dir says where the slides are now")
        slide = Slide(
            sample_id=found["sample_id"], image_path=path, spacing_at_level_0=tiling.spacing_at_level_0
        )
        reasons = list[str]()
        for opening in second_readers(slide, str(recorded.get("backend", ""))):
            try:
                with closing(opening()) as reader:
                    if reader.dimensions[0] != tiling.dimensions:
                        wrong = f"{reader.name}: its level 0 has {reader.dimensions[0]} px"
                        raise NoSecondReader(f"{wrong}, not {tiling.dimensions}")
                    reference = self._reference(reader, tiling, tiles, recorded)
                found["reader"] = reader.name
                return reference
            except NoSecondReader as error:
                reasons.append(str(error))
        raise NoSecondReader("; ".join(reasons))

    def _reference(
        self, reader: SecondReader, tiling: Tiling, tiles: NDArray[np.int64], recorded: Mapping[str, Any]
    ) -> torch.Tensor:
        """(n, D) float64."""
        transform = _transform(_encoder(recorded).get("transform") or _of_recipe(self.model))
        encoder, device = self.model.encoder, self.model.device
        found = []
        for start in range(0, len(tiles), _BATCH):
            pictures = [_picture(reader, tiling, int(tile)) for tile in tiles[start : start + _BATCH]]
            batch = torch.stack([transform(picture) for picture in pictures]).to(device)
            with torch.inference_mode():
                found.append(encoder(batch).double().cpu())
        return torch.cat(found)

    def _judge(
        self,
        rows: torch.Tensor,
        reference: torch.Tensor,
        tiles: NDArray[np.int64],
        tiling: Tiling,
        precision: str,
        found: Row,
    ) -> None:
        stored = rows[torch.from_numpy(tiles)].double()
        if stored.shape != reference.shape:
            raise _Differs(f"embeddings of {stored.shape[1]} numbers; the encoder gives {reference.shape[1]}")
        cosines = torch.nn.functional.cosine_similarity(stored, reference, dim=1)
        worst = int(cosines.argmin())
        least = self.model.recipe.engine.threshold(precision)
        found |= {
            "compared": len(tiles),
            "cosine": _distribution(cosines) | {"required": least},
            "worst": {
                "tile": int(tiles[worst]),
                "x": int(tiling.x[tiles[worst]]),
                "y": int(tiling.y[tiles[worst]]),
                "cosine": cosines[worst].item(),
            },
        }
        at = f"tile {found['worst']['tile']} at level-0 px ({found['worst']['x']}, {found['worst']['y']})"
        if not bool(reference.isfinite().all()):
            raise _Differs("the encoder in fp32 gives NaN or infinities")
        if cosines.min() < least:
            raise _Differs(
                f"{at} has cosine {cosines.min():.6f} to its reference; {precision} allows {least:g}"
            )
        if len(rows) >= _SPREAD_TILES:
            spread = rows.float().var(0, correction=0).sum().sqrt().item()
            if spread > 0:
                shift = float(((stored - reference).norm(dim=1) / spread).median())
                most = MOST_SHIFT[precision]
                found["shift"] = {"median": shift, "allowed": most}
                if shift > most:
                    raise _Differs(
                        f"its embeddings lie {shift:.3f} of the distance between tiles from their reference; "
                        f"{precision} allows {most:g}"
                    )


def _distribution(cosines: torch.Tensor) -> Row:
    points = torch.quantile(cosines, torch.tensor([0.0, 0.01, 0.5], dtype=cosines.dtype)).tolist()
    return dict(zip(("min", "p01", "median"), points, strict=True)) | {"mean": cosines.mean().item()}


def _check_tiles(tiling: Tiling) -> None:
    width, height = tiling.dimensions
    outside = (tiling.x < 0) | (tiling.y < 0) | (tiling.x >= width) | (tiling.y >= height)
    if outside.any():
        first = int(outside.argmax())
        raise _Differs(f"tile {first} begins at ({tiling.x[first]}, {tiling.y[first]}), not on the slide")
    if tiling.regions is None:
        places = np.stack([tiling.x, tiling.y], axis=1)
        if len(np.unique(places, axis=0)) != len(places):
            raise _Differs("two of its tiles have one place")


def _check_width(tiling: Tiling) -> None:
    """Whether tiles cover what was asked for on the level that they were read from."""
    geometry, side = tiling.geometry, tiling.geometry.read_tile_size_px
    covered = side * tiling.downsamples[geometry.read_level] * geometry.base_spacing_um
    asked = geometry.requested_tile_size_px * geometry.requested_spacing_um
    # Rounded to whole pixels of the level; within the tolerance nothing is resized at all.
    allowed = geometry.tolerance + 1 / side
    if abs(covered / asked - 1) > allowed:
        raise _Differs(f"its tiles are {covered:.1f} µm wide; {asked:.1f} µm were asked for")


def _picture(reader: SecondReader, tiling: Tiling, tile: int) -> Pixels:
    geometry = tiling.geometry
    downsample = tiling.downsamples[geometry.read_level]
    return reader.tile(
        int(tiling.x[tile]),
        int(tiling.y[tile]),
        reader.level_of(downsample),
        downsample,
        geometry.read_tile_size_px,
        geometry.requested_tile_size_px,
    )


def _of_recipe(model: Model) -> Mapping[str, Any]:
    return model.recipe.transform.model_dump(mode="json")


def _transform(recorded: Mapping[str, Any]) -> Callable[[Pixels], torch.Tensor]:
    """torchvision's, of a picture (S, S, 3) uint8 -> (3, crop, crop) float32."""
    import_timm()  # with torchvision, without PyTorch's compiler
    from PIL import Image
    from torchvision import transforms

    composed = transforms.Compose(
        [
            transforms.Resize(
                recorded["resize"],
                interpolation=transforms.InterpolationMode(recorded["interpolation"]),
                antialias=True,
            ),
            transforms.CenterCrop(recorded["crop"]),
            transforms.ToTensor(),
            transforms.Normalize(recorded["mean"], recorded["std"]),
        ]
    )
    return lambda pixels: composed(Image.fromarray(pixels))
