"""Opening a data set by its place, checked, wherever it is."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.reading.remote import open_set
from data_pipeline.reading.transfer import is_address
from data_pipeline.shards.index import Manifest
from data_pipeline.shards.integrity import verify


def open_checked(place: str, cache: Path) -> Manifest:
    """A built set, its files found right: all of a folder's, only the indexes of a remote one.

    Args:
        place: a folder, or an address.
        cache: where remote sets are mirrored.

    Raises:
        DataError: the set is missing, damaged, or cannot be fetched.
    """
    return open_set(place, cache) if is_address(place) else verify(Path(place))
