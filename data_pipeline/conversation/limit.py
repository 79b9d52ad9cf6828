"""A bound on a sample's length: what is over is cut off its end, behind its last medium."""

from __future__ import annotations

from collections.abc import Collection

from data_pipeline.conversation.template import Rendered
from data_pipeline.errors import DataError


def cut_tail(rendered: Rendered, most: int, markers: Collection[int]) -> Rendered:
    """The first ``most`` tokens of a conversation.

    Args:
        rendered: the conversation, its media expanded.
        most: language-model tokens, media included.
        markers: ids that stand in the places of media.

    Raises:
        DataError: a medium would be cut, or no token of an answer would be left.
    """
    ids, learn = rendered.ids, rendered.learn
    if len(ids) <= most:
        return rendered
    media = len(ids) - next(
        (n for n, each in enumerate(reversed(ids)) if each in markers), len(ids)
    )
    if media > most:
        raise DataError(
            f"it takes {media} tokens up to the end of its last medium, more than "
            f"data.sample_tokens={most}"
        )
    if not any(learn[:most]):
        raise DataError(
            f"its first answer begins behind the first data.sample_tokens={most} of its "
            f"{len(ids)} tokens"
        )
    return Rendered(ids[:most], learn[:most])
