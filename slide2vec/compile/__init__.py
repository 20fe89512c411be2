"""From an encoder to an engine: export, compile, compare with the encoder, keep, and find again."""

from slide2vec.compile.build import BuildOptions, build_engine
from slide2vec.compile.engine_choice import find_engine, select_engine
from slide2vec.compile.engine_key import EngineTarget
from slide2vec.compile.store import EngineStore, StoredEngine

__all__ = [
    "BuildOptions",
    "EngineStore",
    "EngineTarget",
    "StoredEngine",
    "build_engine",
    "find_engine",
    "select_engine",
]
