"""One row as pieces of text, each learnt or not.

Prompts are not learnt by default, only what follows them. Alpaca rows use the template of Stanford's Alpaca; chats use
the tokenizer's own template, or a plain one where it has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template

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
    line: int = 0


class ChatTemplate:
    """The chat template of a tokenizer, or a plain one where it has none.

    It gives what `apply_chat_template` gives, in a quarter of the time: that copies the messages, in case they are more
    than plain JSON, and looks every setting up anew. Rows are rendered twice for each answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.is_own = bool(tokenizer.chat_template)
        self._template = _compile_jinja_template(tokenizer.get_chat_template() if self.is_own else PLAIN_CHAT_TEMPLATE)
        self._settings = {
            **self._template.globals,
            **tokenizer.special_tokens_map,
            "tools": None,
            "documents": None,
        }

    def text(self, messages: list[dict[str, str]], *, ask: bool = False) -> str:
        """The messages as the model reads them, or as it is asked for the next answer."""
        if not messages:
            return ""
        values = {**self._settings, "messages": messages, "add_generation_prompt": ask}
        return "".join(self._template.root_render_func(self._template.new_context(values, shared=True)))


def render(kind: RowKind, row: Row, chat: ChatTemplate, *, line: int = 0) -> Rendered:
    """Turn a row into pieces; `line` is where it stands in its file.

    Raises:
        jinja2.TemplateError: The base's chat template refuses the row, e.g. one that knows no system turn.
    """
    match kind:
        case RowKind.TEXT:
            return Rendered(pieces=(Piece(text=row["text"], learnt=True),), brings_specials=False, line=line)
        case RowKind.PROMPT_COMPLETION:
            return _pair(row["prompt"], row["completion"], line)
        case RowKind.ALPACA:
            template = _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
            prompt = template.format(instruction=row["instruction"], input=row.get("input"))
            return _pair(prompt, row["output"], line)
        case RowKind.MESSAGES | RowKind.SHAREGPT:
            return _chat(messages_of(kind, row), chat, line)


def as_one_piece(rendered: Rendered) -> Rendered:
    """The same text, all of it learnt."""
    whole = Piece(text="".join(piece.text for piece in rendered.pieces), learnt=True)
    return replace(rendered, pieces=(whole,), last_turn_only=False)


def _pair(prompt: str, completion: str, line: int) -> Rendered:
    pieces = (Piece(text=prompt, learnt=False), Piece(text=completion, learnt=True))
    return Rendered(pieces=pieces, brings_specials=False, line=line)


def _chat(messages: list[dict[str, str]], chat: ChatTemplate, line: int) -> Rendered:
    """Mark each answer as what the template adds between asking for it and giving it."""
    whole = chat.text(messages)
    pieces: list[Piece] = []
    done = ""
    last_turn_only = False
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = chat.text(messages[:index], ask=True)
        answered = whole if index + 1 == len(messages) else chat.text(messages[: index + 1])
        if not (asked.startswith(done) and answered.startswith(asked) and whole.startswith(answered)):
            pieces, done, last_turn_only = [], "", True
            if not (answered.startswith(asked) and whole.startswith(answered)):
                continue
        pieces.append(Piece(text=asked[len(done) :], learnt=False))
        pieces.append(Piece(text=answered[len(asked) :], learnt=True))
        done = answered
    pieces.append(Piece(text=whole[len(done) :], learnt=False))
    kept = tuple(piece for piece in pieces if piece.text)
    return Rendered(pieces=kept, brings_specials=chat.is_own, last_turn_only=last_turn_only, line=line)
