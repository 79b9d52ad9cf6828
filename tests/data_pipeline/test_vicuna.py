"""vicuna_v1: tokens and labels are those of the published code, computed again on its own terms.

The reference spells a conversation out, cuts it at the markers, runs every piece through
SentencePiece's own library by transformers' class for it, and finds the answers again by cutting
the text at ``</s>`` and `` ASSISTANT: ``, as the published code does.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from data_pipeline.conversation.original import learnt_otherwise
from data_pipeline.conversation.published import with_markers
from data_pipeline.conversation.template import render, text_tokens
from data_pipeline.conversation.templates import VICUNA_V1
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.modalities import MODALITIES
from tests.data_pipeline.sentencepieces import SPECIAL, converted, train
from unimoe_mcore.checkpoints.hf_tokenizer import read_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
IGNORED = -100
MARKER = re.compile("(" + "|".join(f"<{modality}>" for modality in MODALITIES) + ")")
Conversation = list[dict[str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def slow(model: Path) -> SentencePieceBackend:
    unknown, begin, end = SPECIAL
    return SentencePieceBackend(
        vocab_file=str(model), legacy=True, unk_token=unknown, bos_token=begin, eos_token=end
    )


@pytest.fixture(scope="module", params=["older", "newer", "imported"])
def ours(request: pytest.FixtureRequest, model: Path) -> TextTokenizer:
    """Of a ``tokenizer.json`` of either form, and as a folder with ``tokenizer.model`` is taken."""
    if request.param == "imported":
        return with_markers(read_tokenizer(model.parent), "of the test", room=True)
    return TextTokenizer(converted(model, newer=request.param == "newer"), "of the test")


class Original:
    """Tokens and labels of a conversation by the published code's procedure."""

    def __init__(self, slow: SentencePieceBackend, markers: dict[str, int]) -> None:
        self.slow = slow
        self.markers = {f"<{modality}>": number for modality, number in markers.items()}

    def text(self, conversation: Conversation) -> str:
        spelled = SYSTEM + " "
        for turn in conversation:
            human = turn["from"] == "human"
            role, end = ("USER", " ") if human else ("ASSISTANT", "</s>")
            spelled += f"{role}: {turn['value']}{end}" if turn["value"] else f"{role}:"
        return spelled

    def tokens(self, text: str) -> list[int]:
        """``<s>`` and the text, a medium being one token."""
        ids = [1]
        for piece in MARKER.split(text):
            if piece in self.markers:
                ids.append(self.markers[piece])
            elif piece:
                for each in self.slow.tokenize(piece):
                    number = self.slow.convert_tokens_to_ids(each)
                    assert isinstance(number, int)  # of one token; a list would give a list
                    ids.append(number)
        return ids

    def labels(self, text: str) -> list[int]:
        ids = self.tokens(text)
        labels, place = [IGNORED] * len(ids), 1
        for piece in text.split("</s>"):
            parts = piece.split(" ASSISTANT: ")
            if len(parts) != 2:
                break
            length = len(self.tokens(piece))  # its own <s> stands for the </s> that was cut off
            asked = len(self.tokens(parts[0] + " ASSISTANT: ")) - 2  # <s>, and the last blank
            labels[place + asked : place + length] = ids[place + asked : place + length]
            place += length
        known = sum(number != 0 for number in ids)  # the padding token is <unk>
        return labels if place == known else [IGNORED] * len(ids)

    def expanded(
        self, conversation: Conversation, media: dict[str, list[int]]
    ) -> tuple[list[int], list[int]]:
        """Tokens and labels with as many places for each medium as it has tokens."""
        text = self.text(conversation)
        left = {f"<{modality}>": iter(counts) for modality, counts in media.items()}
        names = {number: name for name, number in self.markers.items()}
        ids, labels = [], []
        for number, label in zip(self.tokens(text), self.labels(text), strict=True):
            count = next(left[names[number]]) if number in names else 1
            ids += [number] * count
            labels += [IGNORED if number in names else label] * count
        return ids, labels


WORDS = re.split(
    r"\|",
    "bird|robin|Which|is|this|?|.|,|'|12|1999|naïve|Grüße|東京|🙂|🏳️\u200d🌈|\u2581|e\u0301|USER:|"
    "ASSISTANT:|ASSISTANT|USER|<img>|<|>|<imag|<<s|</|s>|\n|\n\n|\t|| |   |\xa0",
)
RARE = ("</s>", "<s>", "<unk>", " ASSISTANT: ", " ASSISTANT:", "ASSISTANT: ", " USER: ")


def phrase(rng: random.Random, most: int) -> str:
    words = rng.choices(WORDS, k=rng.randint(0, most))
    if rng.random() < 0.05:
        words.insert(rng.randint(0, len(words)), rng.choice(RARE))
    return rng.choice(["", " "]).join(words)


def generated(rng: random.Random) -> tuple[Conversation, dict[str, list[int]]]:
    """A conversation of one to five rounds with up to four markers in a question."""
    conversation, media = [], {modality: list[int]() for modality in MODALITIES}
    for _ in range(rng.randint(1, 5)):
        parts = [phrase(rng, 6)]
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            modality = rng.choice(MODALITIES)
            media[modality].append(rng.randint(1, 9))
            parts += [f"<{modality}>", rng.choice(["\n", " ", "", phrase(rng, 3)])]
        conversation += [
            {"from": "human", "value": "".join(parts)},
            {"from": "gpt", "value": phrase(rng, 8)},
        ]
    return conversation, media


def test_tokens_and_labels_are_the_originals(
    slow: SentencePieceBackend, ours: TextTokenizer
) -> None:
    """200 conversations; where the original learns something else (mostly nothing), it is said."""
    original = Original(slow, ours.markers)
    seen = Counter[str]()
    for seed in range(200):
        conversation, media = generated(random.Random(seed))
        ids, labels = original.expanded(conversation, media)
        rendered = render(conversation, ours, media)
        assert text_tokens(conversation, ours) == len(rendered.ids) - sum(map(sum, media.values()))
        found = [
            i if learn else IGNORED for i, learn in zip(rendered.ids, rendered.learn, strict=True)
        ]
        why = learnt_otherwise(conversation)
        seen[why] += 1
        if "spells" not in why:
            assert rendered.ids == ids, conversation
        assert (found == labels) == (not why), (why, conversation)
        answers = [turn["value"] for turn in conversation if turn["from"] == "gpt"]
        assert rendered.ids.count(ours.end) == sum(map(bool, answers))
    assert seen[""] > 60
    assert len(seen) == 6, seen


EXAMPLES = [
    [("<audio>\nGenerate audio caption.", "A dog barks.")],
    [("<audio>\nListen to the article and answer the question: who?", "B")],
    [("<audio>\n<video>\nWhat happens?", "Two cats.")],
    [("<image>\n<audio>", "a robin"), ("<audio>", "12")],
    [("What do you hear <audio> and see <image>?", "trams"), ("Sure?", "yes")],
]


@pytest.mark.parametrize("rounds", EXAMPLES)
def test_the_documented_examples(
    slow: SentencePieceBackend, ours: TextTokenizer, rounds: list[tuple[str, str]]
) -> None:
    turns = [
        {"from": who, "value": text}
        for each in rounds
        for who, text in zip(("human", "gpt"), each, strict=True)
    ]
    text = "".join(turn["value"] for turn in turns)
    media = {modality: [3] * text.count(f"<{modality}>") for modality in MODALITIES}
    rendered = render(turns, ours, media)
    ids, labels = Original(slow, ours.markers).expanded(turns, media)
    assert (rendered.ids, learnt_otherwise(turns)) == (ids, "")
    assert rendered.learn == [label != IGNORED for label in labels]
    learnt = [i for i, learn in zip(rendered.ids, rendered.learn, strict=True) if learn]
    ends = [place for place, number in enumerate(learnt) if number == ours.end]
    starts = [0, *(end + 1 for end in ends)]
    said = [ours.decode(learnt[a:b]) for a, b in zip(starts, ends, strict=False)]
    assert said == [answer for _, answer in rounds]


def test_a_piece_begins_with_the_dummy_prefix(
    slow: SentencePieceBackend, ours: TextTokenizer
) -> None:
    """Llama's (29871, 13): a blank of its own, then the newline."""
    newline = [slow.sp_model.piece_to_id(each) for each in ("▁", "<0x0A>")]
    assert ours.encode("\n") == newline
    ids = render([{"from": "human", "value": "<image>\nWhat?"}], ours, {"image": [2]}).ids
    place = ids.index(ours.markers["image"])
    assert ids[place + 2 : place + 4] == newline


def test_a_prompt_is_what_an_answer_follows(ours: TextTokenizer) -> None:
    turns = EXAMPLES[3]
    asked = [{"from": "human", "value": turns[0][0]}]
    answered = [*asked, {"from": "gpt", "value": turns[0][1]}]
    media = {"image": [2], "audio": [3]}
    prompt, whole = render(asked, ours, media), render(answered, ours, media)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert whole.learn.index(True) == len(prompt.ids)
    assert not any(prompt.learn)


def test_the_tokenizer_of_a_llama_folder_gets_this_template(model: Path) -> None:
    again = TextTokenizer(converted(model, newer=True), "of the test")
    assert again.template is VICUNA_V1
    assert (again.pad, again.end) == (0, 2)
    assert again.decode(again.encode("Grüße,  東京\n")) == "Grüße,  東京"
