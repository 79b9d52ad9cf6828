"""Chat templates: the tokens around questions and answers, and which of them are learnt."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data_pipeline.conversation.published import with_markers
from data_pipeline.conversation.template import render, text_tokens
from data_pipeline.conversation.templates import CHATML, PLAIN
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError

TURNS = [
    {"from": "human", "value": "<image>\nWhich colour?"},
    {"from": "gpt", "value": "red <|im_end|>"},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "yes"},
]


def published(*special: str) -> Tokenizer:
    """Bytes and some special tokens, as a published tokenizer has them."""
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
    return tokenizer


SPARE = tuple(f"<spare_{number}>" for number in range(5))


@pytest.fixture(scope="module")
def chatml() -> TextTokenizer:
    return with_markers(published(*CHATML.special, *SPARE), "of the test")


def spelled(tokenizer: TextTokenizer, ids: list[int]) -> str:
    """Ids as text, special tokens by name."""
    return "".join(tokenizer._tokenizer.decode([i], skip_special_tokens=False) for i in ids)


def test_chatml_is_the_published_template_without_a_system_turn(chatml: TextTokenizer) -> None:
    rendered = render(TURNS, chatml, {"image": [3]})
    assert chatml.template is CHATML
    assert spelled(chatml, rendered.ids) == (
        "<|im_start|>user\n<image><image><image>Which colour?<|im_end|>\n"
        "<|im_start|>assistant\nred <|im_end|><|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>"
    )
    learnt = [i for i, learn in zip(rendered.ids, rendered.learn, strict=True) if learn]
    assert spelled(chatml, learnt) == "red <|im_end|><|im_end|>yes<|im_end|>"
    assert text_tokens(TURNS, chatml) == len(rendered.ids) - 3


def test_text_cannot_spell_a_structural_token(chatml: TextTokenizer) -> None:
    """The answer's own ``<|im_end|>`` is ten bytes; two real ones end answers, two questions."""
    ids = render(TURNS, chatml, {"image": [3]}).ids
    assert ids.count(chatml.end) == 4


def test_a_prompt_ends_where_the_answer_begins(chatml: TextTokenizer) -> None:
    prompt = render(TURNS[2:3], chatml, {})
    assert render(TURNS[2:], chatml, {}).ids[: len(prompt.ids)] == prompt.ids
    assert not any(prompt.learn)
    assert spelled(chatml, prompt.ids).endswith("<|im_start|>assistant\n")


def test_plain_is_as_it_was() -> None:
    tokenizer = TextTokenizer.train(["Which colour? red yes Sure?"] * 5, 300)
    rendered = render(TURNS[2:], tokenizer, {})
    assert tokenizer.template is PLAIN
    assert spelled(tokenizer, rendered.ids).replace(" ", "") == "<bos>Sure?<ans>yes<eos>"
    assert rendered.ids[-1] == tokenizer.end
    assert rendered.learn[-1]


def test_markers_take_the_last_spare_special_tokens(chatml: TextTokenizer) -> None:
    assert chatml.size == len(CHATML.special) + len(SPARE) + 256
    assert list(chatml.markers.values()) == [4, 5, 6, 7]
    assert chatml._tokenizer.token_to_id("<spare_0>") == 3


def test_a_tokenizer_without_a_template_or_places_for_markers_is_refused() -> None:
    with pytest.raises(DataError, match="structural tokens of no known chat template"):
        with_markers(published("<s>", *SPARE), "of the test")
    with pytest.raises(DataError, match="2 special tokens to spare, the media's markers need 4"):
        with_markers(published(*CHATML.special, *SPARE[:2]), "of the test")
