"""Whether a weights file is the one that a recipe pins, by its SHA-256."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from slide2vec.errors import WeightsError
from slide2vec.recipes import Recipe, all_recipes

__all__ = ["check_download", "check_own_file"]

logger = logging.getLogger(__name__)


def check_download(path: Path, recipe: Recipe) -> None:
    """Refuse a file of the hub that is not the published one.

    Raises:
        WeightsError: its digest is another than the recipe's.
    """
    wanted = _published(recipe).get(path.name)
    if wanted and (found := _digest(path)) != wanted:
        raise WeightsError(
            f"weights file {path} is not the one that preset {recipe.name} was published with: its SHA-256 "
            f"is {found}, not {wanted}. Remove it from the hub's cache to have it fetched again"
        )


def check_own_file(path: Path, recipe: Recipe) -> None:
    """Refuse a user's file that is another preset's, and say so of one that is nobody's: it may be their own.
    Files under names that nothing is published by are taken as they are.

    Raises:
        WeightsError: it is the published file of another preset.
    """
    owners = _owners()
    if not any(name == path.name for _, name in owners.values()):
        return
    found = _digest(path)
    preset, _ = owners.get(found, (recipe.name, ""))
    wanted = _published(recipe)
    if found in wanted.values():
        return
    if preset != recipe.name:
        raise WeightsError(
            f"weights file {path} is that of preset {preset}, not of {recipe.name} (SHA-256 {found})"
        )
    if path.name in wanted:
        logger.warning(
            "weights file %s is not the one that preset %s was published with (SHA-256 %s, not %s): "
            "it is taken for weights of your own",
            path,
            recipe.name,
            found,
            wanted[path.name],
        )


def _published(recipe: Recipe) -> dict[str, str]:
    """File name -> digest."""
    digests = recipe.weights.sha256 if recipe.weights else {}
    return {Path(name).name: digest for name, digest in digests.items()}


def _owners() -> dict[str, tuple[str, str]]:
    """Digest -> the preset, and the name of its file."""
    return {
        digest: (recipe.name, name)
        for recipe in all_recipes().values()
        for name, digest in _published(recipe).items()
    }


def _digest(path: Path) -> str:
    """The file's SHA-256; the hub's cache keeps large files under theirs, so these are not read for it."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
