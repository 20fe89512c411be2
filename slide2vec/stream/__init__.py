"""The stream: plan, read, prepare, encode, collect, on one device."""

from slide2vec.stream.plan import SlidePlan, plan_slide
from slide2vec.stream.stations import SlideOutcome, Stream

__all__ = ["SlideOutcome", "SlidePlan", "Stream", "plan_slide"]
