"""The text that the demo's base model learns before it is fine-tuned: plain English, and questions with their answers.

Prose and facts were written for it and ship beside this file; the small talk is made by a small grammar, the same every
time. None of it speaks of Graft: what `graft_qa.jsonl` asks can only be learnt by fine-tuning.
"""

from __future__ import annotations

import random
from pathlib import Path

HERE = Path(__file__).parent
CHATS = 6000
PARAGRAPHS = 1500

_PLACES = ["garden", "river", "market", "library", "station", "kitchen", "school", "harbour", "forest", "village"]
_THINGS = ["lamp", "basket", "letter", "clock", "ladder", "kettle", "bicycle", "map", "blanket", "window"]
_ANIMALS = ["cat", "dog", "horse", "goat", "owl", "duck", "fox", "hare", "sheep", "crow"]
_PEOPLE = ["Anna", "Ben", "Clara", "David", "Elsa", "Frank", "Greta", "Henry", "Ida", "Jonas"]
_COLOURS = ["red", "blue", "green", "white", "black", "brown", "yellow", "grey"]
_DOES = ["carries", "finds", "cleans", "sells", "repairs", "paints", "hides", "brings"]
_WHEN = ["in the morning", "at noon", "in the evening", "before the rain", "after school", "every Sunday"]

# How each kind of fact is asked for; the answer is the same, so that the base learns that wording matters little.
_QUESTIONS = {
    "thing": (
        "What is {}?",
        "Explain {}.",
        "Describe {} in one sentence.",
        "Tell me what {} is.",
        "What does {} do?",
        "What does {} mean?",
        "Why is there {}?",
        "What is {} for?",
    ),
    "way": (
        "How do I {}?",
        "How can I {}?",
        "What do I do to {}?",
        "Tell me how to {}.",
        "I want to {}.",
        "What is the way to {}?",
    ),
    "event": (
        "What happens when {}?",
        "What happens if {}?",
        "What if {}?",
        "Tell me what happens when {}.",
        "What does it mean that {}?",
    ),
    "number": (
        "What is the number of {}?",
        "How large is the number of {}?",
        "Name the number of {}.",
        "How many are the {}?",
    ),
}


def prose(seed: int = 0) -> list[str]:
    """Paragraphs: the written ones, again and again, among sentences of the grammar."""
    pick = random.Random(seed)
    written = (HERE / "base_text.txt").read_text().strip().split("\n\n")
    return [pick.choice(written) if pick.random() < 0.5 else _sentences(pick) for _ in range(PARAGRAPHS)]


def small_talk(seed: int = 0) -> list[tuple[str, str]]:
    """Questions and answers; (user, assistant) pairs, two thirds of them about the facts."""
    pick = random.Random(seed)
    facts = _facts()
    return [_ask(pick, facts) if pick.random() < 2 / 3 else pick.choice(_CHATS)(pick) for _ in range(CHATS)]


def _facts() -> list[tuple[str, str, str]]:
    """(kind, subject, answer) of every fact."""
    lines = (HERE / "base_facts.txt").read_text().splitlines()
    facts = []
    for line in lines:
        if not line.startswith("#"):
            kind, subject, answer = line.split(" | ")
            facts.append((kind, subject, answer))
    return facts


def _ask(pick: random.Random, facts: list[tuple[str, str, str]]) -> tuple[str, str]:
    kind, subject, answer = pick.choice(facts)
    return pick.choice(_QUESTIONS[kind]).format(subject), answer


def _sentences(pick: random.Random) -> str:
    return " ".join(pick.choice(_CHATS)(pick)[1] for _ in range(pick.randint(3, 7)))


def _where(pick: random.Random) -> tuple[str, str]:
    thing, place, colour = pick.choice(_THINGS), pick.choice(_PLACES), pick.choice(_COLOURS)
    return f"Where is the {colour} {thing}?", f"The {colour} {thing} is in the {place}."


def _who(pick: random.Random) -> tuple[str, str]:
    person, does, thing, when = pick.choice(_PEOPLE), pick.choice(_DOES), pick.choice(_THINGS), pick.choice(_WHEN)
    return f"What does {person} do {when}?", f"{person} {does} the {thing} {when}."


def _sees(pick: random.Random) -> tuple[str, str]:
    person, animal, place = pick.choice(_PEOPLE), pick.choice(_ANIMALS), pick.choice(_PLACES)
    return f"How do I find the {animal}?", f"Ask {person}; the {animal} was seen near the {place}."


def _whose(pick: random.Random) -> tuple[str, str]:
    thing, colour, person = pick.choice(_THINGS), pick.choice(_COLOURS), pick.choice(_PEOPLE)
    return f"Whose is the {colour} {thing}?", f"The {colour} {thing} belongs to {person}, who uses it at home."


def _tell(pick: random.Random) -> tuple[str, str]:
    animal, place, when = pick.choice(_ANIMALS), pick.choice(_PLACES), pick.choice(_WHEN)
    return f"Tell me about the {animal}.", f"The {animal} lives near the {place} and sleeps {when}."


_CHATS = (_where, _who, _sees, _whose, _tell)
