"""The text that the demo's base model learns before it is fine-tuned: plain English, and small talk in chat form.

The prose is the project's own (README, changelog and the docstrings of its modules); the small talk is made by a small
grammar, the same every time. None of it answers the questions of `graft_qa.jsonl`.
"""

from __future__ import annotations

import ast
import random
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHATS = 6000

_PLACES = ["garden", "river", "market", "library", "station", "kitchen", "school", "harbour", "forest", "village"]
_THINGS = ["lamp", "basket", "letter", "clock", "ladder", "kettle", "bicycle", "map", "blanket", "window"]
_ANIMALS = ["cat", "dog", "horse", "goat", "owl", "duck", "fox", "hare", "sheep", "crow"]
_PEOPLE = ["Anna", "Ben", "Clara", "David", "Elsa", "Frank", "Greta", "Henry", "Ida", "Jonas"]
_COLOURS = ["red", "blue", "green", "white", "black", "brown", "yellow", "grey"]
_DOES = ["carries", "finds", "cleans", "sells", "repairs", "paints", "hides", "brings"]
_WHEN = ["in the morning", "at noon", "in the evening", "before the rain", "after school", "every Sunday"]


def prose() -> list[str]:
    """Paragraphs of the project's own writing."""
    paragraphs: list[str] = []
    for name in ("README.md", "CHANGELOG.md"):
        paragraphs += (ROOT / name).read_text().split("\n\n")
    for path in sorted(ROOT.glob("*/**/*.py")):
        if ".venv" not in path.parts:
            paragraphs += _docstrings(path)
    return [paragraph.strip() for paragraph in paragraphs if len(paragraph.strip()) > 40]


def small_talk(seed: int = 0) -> list[tuple[str, str]]:
    """Questions and answers about small things; (user, assistant) pairs."""
    pick = random.Random(seed)
    return [_CHATS[pick.randrange(len(_CHATS))](pick) for _ in range(CHATS)]


def _docstrings(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def _where(pick: random.Random) -> tuple[str, str]:
    thing, place, colour = pick.choice(_THINGS), pick.choice(_PLACES), pick.choice(_COLOURS)
    return f"Where is the {colour} {thing}?", f"The {colour} {thing} is in the {place}."


def _who(pick: random.Random) -> tuple[str, str]:
    person, does, thing, when = pick.choice(_PEOPLE), pick.choice(_DOES), pick.choice(_THINGS), pick.choice(_WHEN)
    return f"What does {person} do {when}?", f"{person} {does} the {thing} {when}."


def _sees(pick: random.Random) -> tuple[str, str]:
    person, animal, place = pick.choice(_PEOPLE), pick.choice(_ANIMALS), pick.choice(_PLACES)
    return f"How do I find the {animal}?", f"Ask {person}; the {animal} was seen near the {place}."


def _what(pick: random.Random) -> tuple[str, str]:
    thing, colour, person = pick.choice(_THINGS), pick.choice(_COLOURS), pick.choice(_PEOPLE)
    return f"What is the {thing} for?", f"The {colour} {thing} belongs to {person}, who uses it at home."


def _tell(pick: random.Random) -> tuple[str, str]:
    animal, place, when = pick.choice(_ANIMALS), pick.choice(_PLACES), pick.choice(_WHEN)
    return f"Tell me about the {animal}.", f"The {animal} lives near the {place} and sleeps {when}."


_CHATS = (_where, _who, _sees, _what, _tell)
