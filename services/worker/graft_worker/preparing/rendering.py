"""One row as pieces of text, each learnt or not.

Prompts are not learnt by default, only what follows them. Alpaca rows use the template of Stanford's Alpaca; chats use
the tokenizer's own template, or a plain one where it has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graft_shared.rows import Row, RowKind, messages_of

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text, and whether the model learns to write it."""

    text: str
    learnt: bool


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A row as it will be tokenised."""

    pieces: tuple[Piece, ...]
    brings_specials: bool  # a chat template writes its own begin and end tokens
    last_turn_only: bool = False  # the template rewrites history, so that only the last answer could be marked


def render(kind: RowKind, row: Row, tokenizer: Any) -> Rendered:
    """Turn a row into pieces.

    Raises:
        jinja2.TemplateError: The base's chat template refuses the row, e.g. one that knows no system turn.
    """
    match kind:
        case RowKind.TEXT:
            return Rendered(pieces=(Piece(text=row["text"], learnt=True),), brings_specials=False)
        case RowKind.PROMPT_COMPLETION:
            return _pair(row["prompt"], row["completion"])
        case RowKind.ALPACA:
            template = _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
            return _pair(template.format(instruction=row["instruction"], input=row.get("input")), row["output"])
        case RowKind.MESSAGES | RowKind.SHAREGPT:
            return _chat(messages_of(kind, row), tokenizer)


def _pair(prompt: str, completion: str) -> Rendered:
    pieces = (Piece(text=prompt, learnt=False), Piece(text=completion, learnt=True))
    return Rendered(pieces=pieces, brings_specials=False)


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> Rendered:
    """Mark each answer as what the template adds between asking for it and giving it."""
    whole = _apply(tokenizer, messages)
    pieces: list[Piece] = []
    done = ""
    last_turn_only = False
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _apply(tokenizer, messages[:index], ask=True)
        answered = _apply(tokenizer, messages[: index + 1])
        if not (asked.startswith(done) and answered.startswith(asked) and whole.startswith(answered)):
            pieces, done, last_turn_only = [], "", True
            if not (answered.startswith(asked) and whole.startswith(answered)):
                continue
        pieces.append(Piece(text=asked[len(done) :], learnt=False))
        pieces.append(Piece(text=answered[len(asked) :], learnt=True))
        done = answered
    pieces.append(Piece(text=whole[len(done) :], learnt=False))
    kept = tuple(piece for piece in pieces if piece.text)
    return Rendered(pieces=kept, brings_specials=tokenizer.chat_template is not None, last_turn_only=last_turn_only)


def _apply(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool = False) -> str:
    if not messages:
        return ""
    template = None if tokenizer.chat_template else PLAIN_CHAT_TEMPLATE
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=ask
    )
    return text
