"""From tile embeddings to those of regions, slides and patients."""

from __future__ import annotations

from slide2vec.aggregate.disk import aggregate_tiles
from slide2vec.aggregate.gather import embed_slide, embed_slides
from slide2vec.aggregate.patient_embedding import (
    embed_patient,
    embed_patients,
    patient_embedding,
    require_patient_level,
)
from slide2vec.aggregate.pooling import Aggregator, aggregate
from slide2vec.aggregate.regions import regrouped
from slide2vec.aggregate.slide_embedding import with_slide_embedding

__all__ = [
    "Aggregator",
    "aggregate",
    "aggregate_tiles",
    "embed_patient",
    "embed_patients",
    "embed_slide",
    "embed_slides",
    "patient_embedding",
    "regrouped",
    "require_patient_level",
    "with_slide_embedding",
]
