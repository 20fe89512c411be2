"""From an encoder to an engine: export, compile, compare with the encoder, keep, and find again."""

from slide2vec.compile.auto_build import build_where_it_pays, gain_of_build, goes_on_in_torch, offer_bf16
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
    "build_where_it_pays",
    "find_engine",
    "gain_of_build",
    "goes_on_in_torch",
    "offer_bf16",
    "select_engine",
]
