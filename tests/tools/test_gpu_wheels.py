"""GPU code for other architectures is left out of libraries; what is kept is found as before."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tools.gpu_wheels import keep_gpu_code, sections, trim

PTX, CUBIN = 1, 2


def entry(kind: int, arch: int, code: bytes) -> bytes:
    """A header of 64 bytes, and the payload."""
    header = struct.pack("<HHIQIIII", kind, 0x101, 64, len(code), 0, 0, 0, arch)
    return header.ljust(64, b"\0") + code


def fatbin(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(**content: bytes) -> bytearray:
    """An ELF file with these sections and nothing else."""
    names = b"\0" + b"".join(f".{name}\0".encode() for name in content) + b".shstrtab\0"
    whole, headers = bytearray(64), [bytes(64)]
    for name, data in [*content.items(), ("shstrtab", names)]:
        at = names.index(f".{name}\0".encode())
        headers.append(struct.pack("<IIQQQQIIQQ", at, 1, 0, 0, len(whole), len(data), 0, 0, 1, 0))
        whole += data
    whole[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", whole, 0x28, len(whole))
    struct.pack_into("<HHH", whole, 0x3A, 64, len(headers), len(headers) - 1)
    return whole + b"".join(headers)


def test_only_one_architecture_stays() -> None:
    ours, again = entry(CUBIN, 90, b"ninety" * 4), entry(CUBIN, 90, b"another!")
    others = [entry(CUBIN, arch, bytes([arch]) * 40) for arch in (75, 100)]
    first = fatbin(others[0], ours, others[1], entry(PTX, 120, b"text" * 6), again)
    second = fatbin(entry(PTX, 90, b"only text"[:8]))
    binary = library(text=b"machine code", nv_fatbin=first + second, data=b"others stay")
    before = bytes(binary)
    zeroed = keep_gpu_code(binary, 90)
    assert zeroed == len(first) - 16 - len(ours) - len(again) and len(binary) == len(before)
    place, length = next((at, size) for name, at, size in sections(binary) if name == ".nv_fatbin")
    assert binary[place : place + length] == fatbin(ours, again).ljust(len(first), b"\0") + second
    assert binary[:place] == before[:place] and binary[place + length :] == before[place + length :]


def test_what_another_python_would_load_is_left_out(tmp_path: Path) -> None:
    kept = ["a.cpython-312-x86_64-linux-gnu.so", "lib.so.1", "a.abi3.so", "nvidia/dali/fn.py"]
    gone = ["a.cpython-311-x86_64-linux-gnu.so", "a.cpython-313t-x86_64-linux-gnu.so", "nvidia/__init__.py"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not an ELF file")
    trim(tmp_path, "3.12", 90)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(kept)


def test_a_library_of_ours(tmp_path: Path) -> None:
    """With the tools that will trim it; it loads as before."""
    ctypes = pytest.importorskip("ctypes")
    simplejpeg = pytest.importorskip("simplejpeg._jpeg")
    copied = tmp_path / "copied.so"
    copied.write_bytes(Path(simplejpeg.__file__).read_bytes())
    trim(tmp_path, "3.12", 90)
    assert copied.stat().st_size <= Path(simplejpeg.__file__).stat().st_size
    ctypes.CDLL(str(copied))
