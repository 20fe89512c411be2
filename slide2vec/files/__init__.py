"""Files that appear whole or not at all, here or behind a URL; arrays read in one thread at a time."""

from __future__ import annotations

from slide2vec.files.atomic import READING_ARRAYS, atomic_folder, atomic_path, remove, remove_partial
from slide2vec.files.hub import hub_or_cache
from slide2vec.files.plain import open_locked, open_plain, plain_stat
from slide2vec.files.remote import as_os_errors, as_path, entries, is_remote, local, names_below

__all__ = [
    "READING_ARRAYS",
    "as_os_errors",
    "as_path",
    "atomic_folder",
    "atomic_path",
    "entries",
    "hub_or_cache",
    "is_remote",
    "local",
    "names_below",
    "open_locked",
    "open_plain",
    "plain_stat",
    "remove",
    "remove_partial",
]
