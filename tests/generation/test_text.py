"""Text in pieces, and tokens that are drawn."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.generation.choosing import Chooser
from unimoe_mcore.generation.sampling import Sampling
from unimoe_mcore.generation.text_stream import TextStream

WORDS = "Grüße aus Zürich: 猫 und 🦉, na und ob 👩‍👩‍👧"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """Of single bytes, so that most tokens are parts of a character."""
    return TextTokenizer.train(["a b"], 300)


def test_pieces_hold_whole_characters(tokenizer: TextTokenizer) -> None:
    stream, pieces = TextStream(tokenizer), []
    ids = tokenizer.encode(WORDS)
    assert len(ids) > len(WORDS)
    for token in ids:
        pieces.append(stream.push(token))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
    assert "".join(pieces) == WORDS
    assert stream.rest() == ""
    assert "猫" in pieces


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_what_is_cut_off_comes_last(tokenizer: TextTokenizer, cut: int) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("so 🦉")[:-cut]
    told = "".join(stream.push(token) for token in ids)
    assert told.strip() == "so"
    assert told + stream.rest() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith("\N{REPLACEMENT CHARACTER}")


def test_bytes_that_are_no_text_hold_nothing_up(tokenizer: TextTokenizer) -> None:
    owl = tokenizer.encode("🦉")
    ids = [*owl[:-1], *owl[:-1], *tokenizer.encode("ab")]
    stream = TextStream(tokenizer)
    told = "".join(stream.push(token) for token in ids)
    assert told.endswith("ab")
    assert told + stream.rest() == tokenizer.decode(ids)


def test_structure_is_no_text(tokenizer: TextTokenizer) -> None:
    assert all(tokenizer.is_text(token) for token in tokenizer.encode(WORDS))
    for token in (tokenizer.end, tokenizer.pad, *tokenizer.markers.values(), tokenizer.size, -1):
        assert not tokenizer.is_text(token)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, expected in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0])):
        chooser = Chooser(Sampling(temperature=1.0, top_p=top_p, seed=3))
        counts = torch.bincount(
            torch.tensor([chooser.choose(logits) for _ in range(4000)]), minlength=4
        )
        # Four standard deviations of a share in 4000 draws are 0.032 at most.
        assert torch.allclose(counts / 4000, torch.tensor(expected), atol=0.032)
    cold = Chooser(Sampling(temperature=0.01, seed=3))
    assert {cold.choose(logits) for _ in range(100)} == {0}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-1),
        Sampling(temperature=float("nan")),
        Sampling(temperature=float("inf")),
        Sampling(top_p=0),
        Sampling(top_p=1.1),
        Sampling(seed=-1),
    ],
)
def test_settings_that_mean_nothing(sampling: Sampling) -> None:
    with pytest.raises(UserError):
        sampling.check()
