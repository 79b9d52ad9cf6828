"""The tokenizer in the form of transformers, with its chat template where that says the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from data_pipeline.conversation.template import render
from data_pipeline.conversation.templates import ChatTemplate
from data_pipeline.conversation.tokenizer import TextTokenizer
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.config.model import LanguageConfig

type Messages = Sequence[Mapping[str, str]]

_PROBES: Sequence[Messages] = (
    ({"role": "user", "content": "What is the capital of France?"},),
    (
        {"role": "user", "content": " Which one,\nthe 2nd? "},
        {"role": "assistant", "content": "It's the red one."},
        {"role": "user", "content": "Why?"},
    ),
)
_ROLES = {"user": "human", "assistant": "gpt"}

NO_TEMPLATE = (
    "chat template",
    "as one text it would become other tokens than the turns did in training, one by one",
)


def write_tokenizer(folder: Path, tokenizer: TextTokenizer, language: LanguageConfig) -> bool:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Tokens behind the model's own rows, which a base got for the media's markers, are left out.

    Returns:
        Whether the chat template could be written.
    """
    text = own_tokens(tokenizer.serialised(), language.words)
    write_text(folder / "tokenizer.json", text)
    template = tokenizer.template
    begin = template.begin if template.begin in template.special else None
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": language.max_tokens,
        "clean_up_tokenization_spaces": False,
        "bos_token": begin,
        "eos_token": template.end,
        "pad_token": template.pad,
    }
    written = chat_template(template)
    true = says_the_same(written, tokenizer, Tokenizer.from_str(text))
    if true:
        config["chat_template"] = written
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1))
    return true


def own_tokens(text: str, words: int) -> str:
    """A ``tokenizer.json`` without added tokens from the id ``words`` on."""
    facts: dict[str, Any] = json.loads(text)
    kept = [token for token in facts["added_tokens"] if token["id"] < words]
    if len(kept) == len(facts["added_tokens"]):
        return text
    return json.dumps({**facts, "added_tokens": kept}, ensure_ascii=False)


def chat_template(template: ChatTemplate) -> str:
    """A chat template as Jinja. A prompt ends behind a question: what begins an answer is there."""
    parts = {
        name: "{{ " + json.dumps(getattr(template, name)) + " }}"
        for name in ("begin", "between", "before_question", "after_question", "end")
    }
    return (
        f"{parts['begin']}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{% if not loop.first %}}{parts['between']}{{% endif %}}"
        f"{parts['before_question']}{{{{ message['content'] | trim }}}}{parts['after_question']}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ message['content'] }}}}{parts['end']}"
        "{% else %}"
        "{{ raise_exception('There are turns of user and assistant only.') }}"
        "{% endif %}"
        "{% endfor %}"
    )


def says_the_same(written: str, tokenizer: TextTokenizer, bare: Tokenizer) -> bool:
    """Whether conversations as one text become the tokens that they were in training.

    Args:
        written: the template as Jinja.
        bare: the tokenizer as others read it.
    """
    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        written
    )
    for messages in _PROBES:
        turns = [{"from": _ROLES[m["role"]], "value": m["content"]} for m in messages]
        text = compiled.render(messages=messages)
        if bare.encode(text, add_special_tokens=False).ids != render(turns, tokenizer, {}).ids:
            return False
    return True
