"""From tile embeddings to those of regions, slides and patients."""

from __future__ import annotations

from slide2vec.aggregate.disk import aggregate_stored
from slide2vec.aggregate.gather import embed_in_order, embed_or_raise
from slide2vec.aggregate.patient_embedding import (
    embed_groups,
    embed_one,
    group_slides,
    one_patient,
    patient_embedding,
)
from slide2vec.aggregate.pooling import Aggregator, aggregate
from slide2vec.aggregate.regions import regrouped
from slide2vec.aggregate.slide_embedding import with_slide_embedding

__all__ = [
    "Aggregator",
    "aggregate",
    "aggregate_stored",
    "embed_groups",
    "embed_in_order",
    "embed_one",
    "embed_or_raise",
    "group_slides",
    "one_patient",
    "patient_embedding",
    "regrouped",
    "with_slide_embedding",
]
