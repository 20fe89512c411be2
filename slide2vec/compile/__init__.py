"""From an encoder to an engine: export, compile, compare with the encoder, keep, and find again."""

from slide2vec.compile.build import BuildOptions, build_engine
from slide2vec.compile.identity import Subject
from slide2vec.compile.select import find_engine, select_engine
from slide2vec.compile.store import EngineStore, StoredEngine

__all__ = [
    "BuildOptions",
    "EngineStore",
    "StoredEngine",
    "Subject",
    "build_engine",
    "find_engine",
    "select_engine",
]
