"""Learned segmenters: networks of `slide2vec.encoders.segmentation` that label the pixels of slides."""
