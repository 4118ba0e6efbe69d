"""Long documents that anyone can make again: a register of lighthouses, invented from a seed, and questions about it.

Every seed gives another text from its first line on, so that two documents share no prefix beyond the chat template's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_FIRST = (
    "Amber",
    "Birch",
    "Cedar",
    "Dunmore",
    "Ember",
    "Falcon",
    "Garnet",
    "Heron",
    "Iron",
    "Juniper",
    "Kestrel",
    "Linden",
)
_SECOND = (
    "Head",
    "Point",
    "Rock",
    "Skerry",
    "Ness",
    "Reef",
    "Sound",
    "Island",
    "Bluff",
    "Bar",
    "Haven",
    "Cape",
)
_COASTS = ("northern", "western", "southern", "eastern")
_STONES = ("granite", "sandstone", "brick", "cast iron", "limestone")
_COLOURS = ("white", "white with a red band", "black and white", "grey", "red")
_KEEPERS = (
    "Alder",
    "Brandt",
    "Corin",
    "Doyle",
    "Eaves",
    "Farrow",
    "Gale",
    "Hollis",
    "Imber",
    "Jarvis",
    "Keane",
    "Lorne",
)


@dataclass(frozen=True)
class Document:
    """A text and questions about it; ``answers[i]`` is a fact that the text gives for ``questions[i]``."""

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class _Light:
    name: str
    coast: str
    year: int
    height_m: int
    stone: str
    colour: str
    range_miles: int
    flash_s: int
    keeper: str

    def describe(self) -> str:
        return (
            f"{self.name} stands on the {self.coast} coast. It was first lit in {self.year}. The tower is {self.height_m} metres "
            f"high, built of {self.stone} and painted {self.colour}. Its light flashes every {self.flash_s} seconds and is seen "
            f"from {self.range_miles} miles. The first keeper was {self.keeper}."
        )


def make_document(seed: int, lights: int = 48, questions: int = 4) -> Document:
    """A register of ``lights`` lighthouses, about 72 tokens each; the questions ask for ``questions`` different ones of them.

    The defaults give about 3,500 tokens with SmolLM2's tokenizer.
    """
    assert 1 <= questions <= lights <= len(_FIRST) * len(_SECOND)
    rng = random.Random(seed)
    names = rng.sample([f"{first} {second}" for first in _FIRST for second in _SECOND], lights)
    entries = [_invent(name, rng) for name in names]
    lines = [f"{number}. {light.describe()}" for number, light in enumerate(entries, start=1)]
    title = f"Register number {seed} of the lighthouse service, with {lights} stations."
    asked = rng.sample(entries, questions)
    pairs = [_ask(light, turn) for turn, light in enumerate(asked)]
    return Document(
        text="\n".join([title, *lines]),
        questions=tuple(question for question, _ in pairs),
        answers=tuple(answer for _, answer in pairs),
    )


def prompt_text(document: Document, question: int) -> str:
    """The document first and the question after it, so that all questions share the document as a prefix."""
    return f"{document.text}\n\nAnswer from the register above. {document.questions[question]}"


def _invent(name: str, rng: random.Random) -> _Light:
    return _Light(
        name=name,
        coast=rng.choice(_COASTS),
        year=rng.randint(1760, 1930),
        height_m=rng.randint(12, 60),
        stone=rng.choice(_STONES),
        colour=rng.choice(_COLOURS),
        range_miles=rng.randint(8, 30),
        flash_s=rng.randint(2, 30),
        keeper=rng.choice(_KEEPERS),
    )


def _ask(light: _Light, turn: int) -> tuple[str, str]:
    asks = (
        (f"In which year was {light.name} first lit?", str(light.year)),
        (f"How many metres high is the tower of {light.name}?", str(light.height_m)),
        (f"Who was the first keeper of {light.name}?", light.keeper),
        (f"Of what is the tower of {light.name} built?", light.stone),
    )
    return asks[turn % len(asks)]
