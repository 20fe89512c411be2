"""Every entry of slide2vec 7.1.4: what it returns and writes, against ours, for the same calls.

    python -m benchmarks.entries_714 --peer-python /path/to/bin/python --slides SLIDES [CALL …]

tools/slide2vec_entries.py has the calls, which both packages run with their own arguments: small encoders
that it registers in both, one file of weights, OpenSlide, fp32 on the CPU. SLIDES is the folder of test
slides. A table of what is the same and what differs: types and fields of what is returned, dtypes, shapes,
values (the largest difference over the largest absolute value), names of files, and keys and values of
sidecars, process lists and coordinate files, but `compatibility`, paths and versions.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import timm
import torch
from PIL import Image

TOOL = Path(__file__).parents[1] / "tools/slide2vec_entries.py"
#: Of the largest absolute value.
CLOSE = 1e-5
#: Keys of JSON files that may differ: identities, and what says where files are.
OTHER = {"compatibility", "config"}
#: Files whose content is a run's own: settings, logs.
NOT_READ = (".yaml", ".log", ".txt", ".jpg", ".lock", ".tar")
#: Differences that docs/migration.md gives a reason for, by what they are called here.
KNOWN = {
    "further fields": r"^returned[^:]*: also |meta\.json: also ",
    "transform": r"^returned\S*\.transform",
    "in memory": r"^files: only there: .*(tile|slide|hierarchical)_embeddings/(?!blank)",
    "own files": r"^files: only (there: (first/)?embedding_request\.json|here: \.slide2vec\.lock)",
    "process list": r"^(first/)?process_list\.csv\[\d\]: (also|no (annotation|output_mode|\w*mask_backend)) ",
    "coordinates of another run": r"^first/process_list\.csv\[\d\]\.(feature_|encoder_name|output_variant)",
    "regions": r"(tile_size_lv0|process_list.csv\[\d\]\.num_tiles|returned\S*\.num_tiles): '\d+' there",
    "encoder of tiles": r"_embeddings/\S+\.encoder_(level|name): ",
    "downsamples": r"(level_downsamples\[\d\]|seg_spacing_um): ",
    "annotation": r"^returned\S*_artifacts\[\d\]\.annotation: 'tissue' there, 'None' here",
    "mask reader": r"provenance\.(requested_)?mask_backend: ",
    "archives": r"process_list\.csv\[\d\]\.backend: 'openslide' there, 'archive' here",
}
#: Likewise, by call.
KNOWN_CALLS = {
    "embed_slide_keywords": "class of a mask",
    "embed_slide_mapping": "class of a mask",
    "embed_slide_fp16_features": "fp16 in memory",
    "embed_slide_blank": "no tissue",
    "embed_slides_npz_and_blank": "no tissue",
    "pipeline_blank": "no tissue",
    "embed_slides_none": "no slides",
    "from_preset_unknown": "errors",
    "images_transparent": "transparency",
    "images_slide_level": "images of slide models",
    "regions_upsampled": "errors",
    "regions_of_a_convolution": "errors",
    "dense_images_wrong_size": "errors",
    "dense_images_without_spacing": "errors",
    "dense_kit_wrong_options": "errors",
    "identity_wrong_options": "errors",
    "listed": "slides of patient models",
    "command_threshold_by_default": "threshold of files",
}
BUILTIN = ("ValueError", "TypeError", "NotImplementedError", "FileNotFoundError", "RuntimeError", "KeyError")


def write_material(folder: Path, slides: Path) -> None:
    """Slides, masks, images and weights that both sides get."""
    shutil.copy(slides / "CMU-1-Small-Region.svs", folder / "tissue.svs")
    shutil.copy(slides / "aperio-jpeg-pyramid.svs", folder / "other.svs")
    numbers = np.random.default_rng(0)
    micrometres: dict[str, Any] = {
        "resolution": (20_000, 20_000),
        "resolutionunit": "CENTIMETER",
    }  # 0.5 µm/px
    white = np.full((2048, 1536, 3), 255, np.uint8)
    tifffile.imwrite(
        folder / "blank.tif", white, tile=(256, 256), photometric="rgb", compression="deflate", **micrometres
    )
    labels = np.zeros((2967 // 4, 2220 // 4), np.uint8)
    labels[60:400, 40:280], labels[200:600, 280:420], labels[420:700, 60:200] = 1, 2, 3
    coarse: dict[str, Any] = {**micrometres, "resolution": (5_000, 5_000)}
    for name, values in (("labels", labels), ("mask", (labels > 0).astype(np.uint8))):
        tifffile.imwrite(
            folder / f"{name}.tif",
            values,
            tile=(256, 256),
            photometric="minisblack",
            compression="deflate",
            **coarse,
        )
    write_images(folder / "images", numbers)
    torch.manual_seed(0)
    small = timm.create_model(
        "vit_tiny_patch16_224",
        depth=2,
        embed_dim=48,
        num_heads=3,
        reg_tokens=2,
        num_classes=0,
        dynamic_img_size=True,
    )
    for parameter in small.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    torch.save(small.state_dict(), folder / "small.pth")


def write_images(folder: Path, numbers: np.random.Generator) -> None:
    folder.mkdir()
    noise = numbers.integers(0, 256, (700, 900, 4), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((450, 350), Image.Resampling.BOX).resize((900, 700)))
    Image.fromarray(smooth[:300, :231, :3]).save(folder / "odd.png")
    Image.fromarray(smooth[:224, :224, 0]).save(folder / "grey.png")
    Image.fromarray(smooth[:231, :300]).save(folder / "rgba.png")
    Image.fromarray(smooth[:231, :300, :3]).convert("RGBA").save(folder / "opaque.png")
    Image.fromarray(smooth[:518, :518, :3]).save(folder / "photo.jpg", quality=90)
    Image.fromarray(smooth[:518, :640, :3]).save(folder / "large.png")
    Image.fromarray(smooth[:90, :100, :3]).quantize(64).save(folder / "palette.png")
    Image.fromarray(smooth[:150, :140, :3]).save(folder / "small.tif")
    for name in "ab":
        Image.fromarray(np.roll(smooth, ord(name), 0)[:480, :448, :3]).save(folder / f"dense-{name}.png")


class Differences:
    """What differs between two sides of one call."""

    def __init__(self) -> None:
        self.words = list[str]()
        self.worst = 0.0

    def say(self, where: str, words: str) -> None:
        self.words.append(f"{where}: {words}")

    def tensors(self, where: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
            said = [
                f"{tuple(each.shape)} {str(each.dtype).removeprefix('torch.')}" for each in (theirs, ours)
            ]
            self.say(where, " there, ".join(said) + " here")
        elif theirs.numel():
            largest = float(theirs.double().abs().max()) or 1.0
            difference = float((theirs.double() - ours.double()).abs().max()) / largest
            self.worst = max(self.worst, difference)
            if not difference <= (1e-3 if theirs.dtype == torch.float16 else CLOSE):
                self.say(where, f"differs by {difference:.1e}")

    def values(self, where: str, theirs: Any, ours: Any) -> None:
        if isinstance(theirs, dict) and "tensor" in theirs and isinstance(ours, dict) and "tensor" in ours:
            if theirs["kind"] != ours["kind"]:
                self.say(where, f"{theirs['kind']} there, {ours['kind']} here")
            self.tensors(where, theirs["tensor"], ours["tensor"])
        elif isinstance(theirs, dict) and isinstance(ours, dict):
            for key in theirs:
                if key not in OTHER and key not in ours:
                    self.say(where, f"no {key} here")
                elif key not in OTHER and not key.endswith("_path"):
                    self.values(
                        f"{where}.{key}" if key not in ("fields", "mapping", "list", "tuple") else where,
                        theirs[key],
                        ours[key],
                    )
            if "type" not in theirs and (more := sorted(ours.keys() - theirs.keys() - OTHER)):
                self.say(where, f"also {', '.join(more)} here")
        elif isinstance(theirs, list) and isinstance(ours, list):
            if len(theirs) != len(ours):
                self.say(where, f"{len(theirs)} there, {len(ours)} here")
            for index, (one, other) in enumerate(zip(theirs, ours, strict=False)):
                self.values(f"{where}[{index}]", one, other)
        elif isinstance(theirs, float) and isinstance(ours, float | int):
            if abs(theirs - ours) > 1e-9 * max(abs(theirs), 1e-300):
                self.say(where, f"{theirs!r} there, {ours!r} here")
        elif theirs != ours:
            self.say(where, f"{str(theirs)[:60]!r} there, {str(ours)[:60]!r} here")

    def files(self, theirs: Path, ours: Path) -> int:
        names = [
            {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            for folder in (theirs, ours)
        ]
        if missing := sorted(names[0] - names[1]):
            self.say("files", f"only there: {', '.join(missing)}")
        if more := sorted(names[1] - names[0]):
            self.say("files", f"only here: {', '.join(more)}")
        for name in sorted(names[0] & names[1]):
            if not name.endswith(NOT_READ):
                self.file(name, theirs / name, ours / name)
        return len(names[0])

    def file(self, name: str, theirs: Path, ours: Path) -> None:
        self.values(name, content(theirs), content(ours))


def content(path: Path) -> Any:
    if path.suffix == ".pt":
        return {"tensor": torch.load(path, weights_only=True), "kind": "torch"}
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {key: {"tensor": torch.from_numpy(arrays[key]), "kind": "numpy"} for key in arrays.files}
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return sorted(csv.DictReader(file), key=lambda row: int(row.get("tile_index", 0)))
    return None


def compared(
    name: str, theirs: dict[str, Any], ours: dict[str, Any], folder: Path
) -> tuple[str, str, Differences]:
    """In words what 7.1.4 gives, ours, and what differs."""
    found = Differences()
    said = [
        f"{next(k for k in side['raised'] if k in BUILTIN or k == 'Exception')}" if "raised" in side else ""
        for side in (theirs, ours)
    ]
    if "raised" in theirs or "raised" in ours:
        if "raised" not in ours or "raised" not in theirs or said[0] not in ours["raised"]:
            words = [
                f"{kind or 'nothing'} ({side.get('message', '')[:150]})"
                for kind, side in zip(said, (theirs, ours), strict=True)
            ]
            found.say("raises", f"{words[0]} there, {words[1]} here")
        return f"raises {said[0]}" if said[0] else "returns", said[1] or "-", found
    found.values("returned", theirs["value"], ours["value"])
    count = found.files(folder / "theirs" / name, folder / "ours" / name)
    return f"{count} files" if count else "in memory", f"{found.worst:.1e}", found


def sorted_out(name: str, words: list[str]) -> tuple[list[str], list[str]]:
    """What differences are called that have a reason, and those that have none."""
    known, others = list[str](), list[str]()
    for each in words:
        label = next((label for label, pattern in KNOWN.items() if re.search(pattern, each)), None)
        label = label or KNOWN_CALLS.get(name)
        known += [label] if label and label not in known else []
        others += [] if label else [each]
    return known, others


def rows(folder: Path, asked: list[str]) -> Iterator[tuple[str, str, str, list[str], list[str]]]:
    sides = [torch.load(folder / side / "returned.pt", weights_only=True) for side in ("theirs", "ours")]
    for name in asked or sides[1]:
        gives, worst, found = compared(name, sides[0][name], sides[1][name], folder)
        yield name, gives, worst, *sorted_out(name, found.words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of an environment with slide2vec 7.1.4")
    parser.add_argument("--slides", required=True, type=Path)
    parser.add_argument("--folder", type=Path, help="where everything stays; a temporary one by default")
    parser.add_argument("--again", action="store_true", help="compare what --folder has of an earlier run")
    parser.add_argument("calls", nargs="*", help="only these")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not args.again:
            run(folder, args)
        far = 0
        print("| call | 7.1.4 | largest difference | differs, with a reason | else |\n|---|---|---|---|---|")
        for name, gives, worst, known, others in rows(folder, args.calls):
            far += bool(others)
            print(f"| {name} | {gives} | {worst} | {', '.join(known)} | {'<br>'.join(others) or 'nothing'} |")
    return int(far > 0)


def run(folder: Path, args: argparse.Namespace) -> None:
    material = folder / "material"
    if not material.exists():
        material.mkdir(parents=True)
        write_material(material, args.slides)
    for python, side in ((args.peer_python, "theirs"), (sys.executable, "ours")):
        command = [python, str(TOOL), str(material), str(folder / side), *args.calls]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        (folder / f"{side}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            raise SystemExit(f"{side}: {done.stderr[-2500:]}")


if __name__ == "__main__":
    sys.exit(main())
