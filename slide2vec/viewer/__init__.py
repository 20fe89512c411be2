"""A run in a browser: a local page of its slides by their own pixels, with tiles, colours and search."""

from slide2vec.viewer.local_server import ViewerServer, viewer_server

__all__ = ["ViewerServer", "viewer_server"]
