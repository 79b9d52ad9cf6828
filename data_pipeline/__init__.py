"""Raw datasets to shards to plan to micro-batches. Imports no Megatron."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.webdatasets import as_webdataset

__all__ = ["as_webdataset"]


def __getattr__(name: str) -> Any:
    """``as_webdataset`` when it is asked for: the ``webdataset`` package imports torch."""
    if name == "as_webdataset":
        from data_pipeline.webdatasets import as_webdataset

        return as_webdataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
