"""Chat templates: what stands around questions and answers, and which tokens that takes."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """``begin question answer between question answer ...``.

    Attributes:
        name: name and version; part of the fingerprint of token lengths.
        special: the structural tokens, each one token of the tokenizer.
        pad: the one among them that fills up rows.
        begin: stands before the first turn.
        before_question: stands before a question.
        after_question: stands between a question and its answer; ends a prompt.
        end: the structural token that ends an answer, and is learnt with it.
        between: stands between an answer and the next question.
        whole: text between structural tokens and markers goes through the tokenizer in one piece,
            blanks included. Otherwise every part goes through it by itself, and questions lose
            the blanks around them.
        before_answer: stands between ``after_question`` and an answer and is learnt with it, since
            it melts into the answer's first token; with ``whole`` only.
    """

    name: str
    special: tuple[str, ...]
    pad: str
    begin: str
    before_question: str
    after_question: str
    end: str
    between: str
    whole: bool = False
    before_answer: str = ""

    def around(self, question: str) -> tuple[str, str]:
        """What stands before and after a question; with ``whole``, no blanks around an empty one.

        So in the published code of Vicuna, which spells an empty turn by its role alone.
        """
        if self.whole and not question:
            return self.before_question.rstrip(), self.after_question.lstrip()
        return self.before_question, self.after_question

    def pieces(self, text: str) -> list[str]:
        """Text of the template, cut at its structural tokens; they are pieces of their own."""
        cut = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
        return [piece for piece in cut if piece]


PLAIN = ChatTemplate(
    name="plain-1",
    special=("<pad>", "<bos>", "<eos>", "<ans>"),
    pad="<pad>",
    begin="<bos>",
    before_question="",
    after_question="<ans>",
    end="<eos>",
    between="",
)
"""Of bases trained here: as few tokens as can be."""

CHATML = ChatTemplate(
    name="chatml-1",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    pad="<|endoftext|>",
    begin="",
    before_question="<|im_start|>user\n",
    after_question="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    between="\n",
)
"""Of SmolLM2 and many others. Without a system turn: it would say the same in every sample, and
cost twenty tokens."""

VICUNA_V1 = ChatTemplate(
    name="vicuna_v1-1",
    special=("<unk>", "<s>", "</s>"),
    pad="<unk>",
    begin="<s>A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    before_question="USER: ",
    after_question=" ASSISTANT:",
    end="</s>",
    between="",
    whole=True,
    before_answer=" ",
)
"""Of Vicuna 1.1 and 1.5, LLaVA 1.5 and Uni-MoE, on Llama's SentencePiece tokenizer."""

TEMPLATES = (PLAIN, CHATML, VICUNA_V1)
"""A tokenizer has the first of which it has all structural tokens."""
