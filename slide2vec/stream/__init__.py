"""The stream: plan, read, prepare, encode, collect, on one device."""

from slide2vec.stream.feed import Feed, feed_for
from slide2vec.stream.fitting import bytes_per_tile, fitting_batch_size
from slide2vec.stream.plan import SlidePlan, coordinates_dir, plan_slide
from slide2vec.stream.planning import Arrivals
from slide2vec.stream.staging import IN_PLACE, InPlace, stager_for
from slide2vec.stream.stations import SlideOutcome, Stream

__all__ = [
    "IN_PLACE",
    "Arrivals",
    "Feed",
    "InPlace",
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
