"""Pack what a bare GPU machine without a network lacks into archives that are small enough to be sent there.

    python -m tools.gpu_wheels [--to .whl] [--python 3.12] [--arch 90]

Writes .whl/base/site.tar.xz and .whl/dali/site.tar.xz, which tools/gpu_plan.sh unpacks where it finds them.
The machine is taken to have PyTorch, timm and their like. Of each package stays what that Python on that GPU
can load: GPU code of other architectures, symbol tables and other Pythons' modules are left out.
Needs uv, strip, tar and xz.
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Archive -> what goes into it. DALI alone is as large as all the others together.
ARCHIVES = {
    "base": (
        "annotated-types",
        "cucim-cu13",
        "imagecodecs",
        "nvidia-nvimgcodec-cu13",
        "nvidia-nvjpeg",
        "openslide-bin",
        "openslide-python",
        "pydantic",
        "pydantic-core",
        "pydicom",
        "pytest-timeout",
        "simplejpeg",
        "typing-inspection",
    ),
    "dali": ("astunparse", "gast", "makefun", "nvidia-dali-cuda130", "nvtx", "optree"),
    "rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
}
#: Packed unless others are named: what tools/gpu_plan.sh needs without --rtx.
USUAL = ("base", "dali")
#: Nothing of slide2vec loads them, or they would hide another package's (nvidia/__init__.py).
LEFT_OUT = (
    "nvidia/__init__.py",
    "nvidia/*/include",
    "nvidia/cu13/include",
    "nvidia/dali/Acknowledgements.txt",
    "nvidia/dali/test",
    "nvidia/nvimgcodec/extensions/libnvjpeg2k_ext.*",  # of libraries that are not packed
    "nvidia/nvimgcodec/extensions/libnvtiff_ext.*",
    "cucim/skimage",
    "**/*.a",
    "**/__pycache__",
)
_FATBIN_MAGIC = 0xBA55ED50
_CUBIN = 2  # a kind of entry: machine code


def sections(binary: bytearray) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, count, names = struct.unpack_from("<HHH", binary, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", binary, table + number * size) for number in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        yield binary[start : binary.index(b"\0", start)].decode(), offset, length


def keep_gpu_code(binary: bytearray, arch: int) -> int:
    """Leave only the GPU code for one architecture in an ELF file; bytes zeroed.

    Code for the GPU lies in fat binaries, as in fatbinary_section.h: a header (magic, version, its own size,
    size of all entries), then entries, each with a header (kind, version, its own size, size of its payload,
    …, architecture). Of each the entries that fit exactly move to the front, and the header says that there
    are no others. A fat binary that has none that fits stays as it is.
    """
    zeroed = 0
    for name, start, length in sections(binary):
        place, end = start, start + length
        while name in (".nv_fatbin", "__nv_relfatbin") and place < end - 16:
            magic, _, own, size = struct.unpack_from("<IHHQ", binary, place)
            if magic != _FATBIN_MAGIC:
                place += 8
                continue
            first, stop = place + own, place + own + size
            kept = b"".join(entry for for_arch, entry in _entries(binary, first, stop) if for_arch == arch)
            if kept:
                binary[first:stop] = kept + bytes(size - len(kept))
                struct.pack_into("<Q", binary, place + 8, len(kept))
                zeroed += size - len(kept)
            place = stop
    return zeroed


def _entries(binary: bytearray, place: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The entries of a fat binary: the architecture of machine code, 0 for other kinds; the bytes."""
    while place < stop:
        kind, _, header, payload = struct.unpack_from("<HHIQ", binary, place)
        (arch,) = struct.unpack_from("<I", binary, place + 28)
        yield arch if kind == _CUBIN else 0, bytes(binary[place : place + header + payload])
        place += header + payload


def trim(folder: Path, python: str, arch: int) -> None:
    """Leave out what that Python on that GPU cannot load."""
    for pattern in LEFT_OUT:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    own = f"cpython-{python.replace('.', '')}-"
    for path in folder.rglob("*.so*"):
        if not path.is_file() or path.is_symlink():
            continue
        other_python = re.search(r"\.cpython-\w+-", path.name)
        if other_python and own not in path.name:
            path.unlink()
            continue
        binary = bytearray(path.read_bytes())
        if binary[:5] == b"\x7fELF\x02" and keep_gpu_code(binary, arch):
            path.unlink()  # the file may be a link into uv's cache
            path.write_bytes(binary)
            path.chmod(0o755)
        stripped = path.with_name(path.name + ".stripped")
        command = ["strip", "--strip-unneeded", "-o", stripped, path]
        if subprocess.run(command, capture_output=True).returncode:
            stripped.unlink(missing_ok=True)
        else:
            stripped.replace(path)


def pack(name: str, to: Path, python: str, arch: int) -> Path:
    """Install, trim and compress one archive."""
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        install = ["uv", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", site]
        platform = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
        subprocess.run([*install, *platform, "--link-mode", "copy", *ARCHIVES[name]], check=True)
        trim(site, python, arch)
        archive = to / name / "site.tar.xz"
        archive.parent.mkdir(parents=True, exist_ok=True)
        with archive.open("wb") as file:
            packed = subprocess.Popen(["tar", "c", "-C", site, "."], stdout=subprocess.PIPE)
            subprocess.run(["xz", "--x86", "--lzma2=preset=9"], stdin=packed.stdout, stdout=file, check=True)
            if packed.wait():
                raise SystemExit(f"tar failed on {site}")
    return archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path(".whl"))
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--arch", type=int, default=90, help="of the GPU: 80 (A100), 90 (H100), 100 (B200)")
    parser.add_argument("--only", choices=ARCHIVES, nargs="+", default=USUAL, help="some archives")
    args = parser.parse_args()
    for name in args.only:
        archive = pack(name, args.to, args.python, args.arch)
        print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
