"""The stream: plan, read, prepare, encode, collect, on one device."""

from slide2vec.stream.feed import Feed, feed_for
from slide2vec.stream.fitting import bytes_per_tile, fitting_batch_size
from slide2vec.stream.jobs import SlideOutcome
from slide2vec.stream.plan import SlidePlan, coordinates_dir, plan_slide
from slide2vec.stream.planner import Planner
from slide2vec.stream.planning import Arrivals
from slide2vec.stream.staging import stager_for
from slide2vec.stream.stations import Stream

__all__ = [
    "Arrivals",
    "Feed",
    "Planner",
    "SlideOutcome",
    "SlidePlan",
    "Stream",
    "bytes_per_tile",
    "coordinates_dir",
    "feed_for",
    "fitting_batch_size",
    "plan_slide",
    "stager_for",
]
