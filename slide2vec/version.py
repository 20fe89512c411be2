"""The version, alone, so that whatever records it needs nothing above itself."""

__version__ = "0.1.0"
#: Which of the two projects of this name it is.
PROJECT = "PyPI's slide2vec, 7.x, is another project"
