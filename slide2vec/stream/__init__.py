"""The stream: plan, read, prepare, encode, collect, on one device."""

from slide2vec.stream.plan import SlidePlan, coordinates_dir, plan_slide
from slide2vec.stream.stations import SlideOutcome, Stream

__all__ = ["SlideOutcome", "SlidePlan", "Stream", "coordinates_dir", "plan_slide"]
