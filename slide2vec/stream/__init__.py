"""The stream: plan, read, prepare, encode, collect, on one device."""

from slide2vec.stream.decode_paths import tile_transfer
from slide2vec.stream.jobs import SlideOutcome
from slide2vec.stream.plan import SlidePlan, coordinates_dir, plan_slide
from slide2vec.stream.plan_ahead import SlideQueue
from slide2vec.stream.planner import Planner
from slide2vec.stream.staging import stager_for
from slide2vec.stream.stream import Stream
from slide2vec.stream.transfer import TileTransfer

__all__ = [
    "Planner",
    "SlideOutcome",
    "SlidePlan",
    "SlideQueue",
    "Stream",
    "TileTransfer",
    "coordinates_dir",
    "plan_slide",
    "stager_for",
    "tile_transfer",
]
