"""What others wrote, on a terminal: as they wrote it, and without what could steer one."""

from __future__ import annotations

from rich import markup
from rich.console import Console

_STEERING = (*range(32), *range(127, 160), *range(0xD800, 0xE000))  # the last are no characters: no stream takes them
_HARMLESS = {code: "�" for code in _STEERING if chr(code) not in "\n\t"}


def console(*, stderr: bool = False) -> Console:
    """A terminal that makes no pictures of names such as `exp:a:lr2e-4`."""
    return Console(stderr=stderr, emoji=False)


def harmless(text: str) -> str:
    """The text, with a sign for each character that could steer a terminal."""
    return text.translate(_HARMLESS)


def escape(text: str) -> str:
    """The text as a part of rich markup, of which it holds none itself."""
    return markup.escape(harmless(text))
