"""The version, alone, so that whatever records it needs nothing above itself."""

__version__ = "0.1.0"
