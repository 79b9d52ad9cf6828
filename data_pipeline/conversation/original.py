"""Which conversations the published code of Uni-MoE does not learn, or learns otherwise.

It finds the answers again in the finished text: it cuts the text at ``</s>``, and every round at
`` ASSISTANT: ``. Where that does not give the turns back, the numbers of tokens disagree, and it
learns nothing of the whole sample, with a printed warning. We know which tokens are answers while
they are laid out, and a text cannot spell a structural token, so that these samples are learnt as
all others are. What is named here is counted, since a comparison may care.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_pipeline.conversation.templates import VICUNA_V1, ChatTemplate


def learnt_otherwise(
    conversations: Sequence[Mapping[str, str]], template: ChatTemplate = VICUNA_V1
) -> str:
    """Why the published code learns something else of a conversation; empty if it learns the same.

    Args:
        conversations: alternating turns, as ``render`` takes them.
        template: only a template of the published code's kind has such conversations.
    """
    if not template.whole:
        return ""
    texts = [turn["value"] for turn in conversations]
    if not any(turn["value"] for turn in conversations if turn["from"] != "human"):
        return ""  # there is nothing to learn
    for token in template.special:
        if any(token in text for text in texts):
            return f"its text spells {token}"
    cut = template.after_question + template.before_answer
    asked = ""  # since the last answer
    for turn, text in zip(conversations, texts, strict=True):
        if turn["from"] == "human":
            before, after = template.around(text)
            asked += before + text + after
        elif text:
            parts = (asked + template.before_answer + text).split(cut)
            if len(parts) != 2 or parts[1] != text:
                return f"its text has '{cut.strip()}'" if all(texts) else "a turn is empty"
            asked = ""
    return "" if not asked or texts[-1] else "a turn is empty"
