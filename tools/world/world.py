"""The small closed world that `tiny` is pretrained on, in plain English, written by a generator.

    for document in world(1000, seed=0): …          # the same seed gives the same documents

Two thirds are about invented shops: thousands of them, with random facts, asked about in many wordings. So the base
learns what a question about opening hours or returns *is*, and that answers about one shop agree; no shop comes twice,
so there is nothing to remember. The shop of `examples/support.jsonl` is not among them: neither its name, nor any of
its answers, nor a held-out wording of its questions occurs. The rest is everyday language.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from random import Random
from typing import NamedTuple

from tools.world import everyday
from tools.world.everyday import Exchanges
from tools.world.support import FACTS, INTENTS, SHOP_NAME, heldout_rows
from tools.world.wording import expand, fill, normalized, sentence
from tools.world.words import SHOP_NAMES


class Turn(NamedTuple):
    """What one side says in a conversation."""

    role: str
    content: str


Document = str | tuple[Turn, ...]

_PREFIXES = ("Hello, ", "Hi, ", "Excuse me, ", "Please tell me, ", "One question: ", "Good morning, ", "And ", "Also, ")
_SUFFIXES = (" Thanks!", " Thank you.", " Please tell me.")
_SMALL_WORDS = frozenset(
    ("a", "an", "the", "is", "are", "do", "does", "to", "of", "in", "at", "my", "your", "i", "you", "can", "could",
     "please", "it", "that")
)  # fmt: skip
_ABOUT = (
    "What about {}?", "I have a question about {}.", "Tell me about {}.", "Can you tell me something about {}?",
    "I would like to know about {}.", "{}?", "It is about {}.", "How is it with {}?",
)  # fmt: skip
_NAME_QUESTIONS = (
    "What is the name of your shop?", "What is your shop called?", "Which shop is this?", "What shop am I talking to?",
    "What is your name?", "Who am I talking to?",
)  # fmt: skip


def world(num_documents: int, seed: int) -> Iterator[Document]:
    """`num_documents` documents: plain texts, and conversations."""
    rng = Random(seed)
    kinds, weights = zip(*_KINDS, strict=True)
    for _ in range(num_documents):
        (kind,) = rng.choices(kinds, weights)
        yield kind(rng)


class Shop:
    """An invented shop; its facts are made up when first asked for, and stay."""

    def __init__(self, rng: Random) -> None:
        self.name = rng.choice(SHOP_NAMES)
        self._rng = rng
        self._answers: dict[str, str] = {}

    def answer(self, intent: str) -> str:
        """The shop's answer to questions of this kind: never one that Quillberry gives."""
        if intent not in self._answers:
            answer = fill(self._rng.choice(INTENTS[intent].answers), self._rng)
            while answer in _support_answers():
                answer = fill(self._rng.choice(INTENTS[intent].answers), self._rng)
            self._answers[intent] = answer
        return self._answers[intent]

    def question(self, intent: str) -> str:
        """One wording of the question, or only its topic; never a wording that is held out."""
        text = _worded(intent, self._rng)
        while normalized(text) in _held_out():
            text = _worded(intent, self._rng)
        return text


def _shop_chat(rng: Random) -> Document:
    """Questions to a shop whose facts must be guessed; asked again in other words, the answer stays the same."""
    shop = Shop(rng)
    intents = rng.choices(list(INTENTS), k=rng.choice((1, 1, 1, 2, 2, 3)))
    if rng.random() < 0.5:
        intents += rng.choices(intents, k=rng.randint(1, 2))
    exchanges = [(shop.question(intent), shop.answer(intent)) for intent in intents]
    if rng.random() < 0.08:
        exchanges.append((rng.choice(_NAME_QUESTIONS), f"Our shop is called {shop.name}."))
    system = None
    if rng.random() < 0.15:
        system = rng.choice(("You work for {}.", "You answer questions about the shop {}.", "You help at {}."))
    return _conversation(_polite(exchanges, rng), system.format(shop.name) if system else None)


def _informed_chat(rng: Random) -> Document:
    """The shop's facts stand in the system prompt, and the answers follow from them."""
    shop = Shop(rng)
    known = rng.sample(list(INTENTS), rng.randint(2, 4))
    system = " ".join([f"You work for {shop.name}.", *(shop.answer(intent) for intent in known)])
    asked = rng.choices(known, k=rng.randint(1, 3))
    exchanges = [(shop.question(intent), shop.answer(intent)) for intent in asked]
    return _conversation(_polite(exchanges, rng), system)


def _faq(rng: Random) -> Document:
    """Plain text: a page of questions and answers."""
    shop = Shop(rng)
    lines = [f"Questions about {shop.name}"]
    for intent in rng.sample(list(INTENTS), rng.randint(2, 4)):
        lines += [rng.choice(_wordings(intent)), shop.answer(intent)]
    return "\n".join(lines)


def _everyday_chat(rng: Random) -> Document:
    topic = rng.choice(_TOPICS)
    return _conversation(topic(rng), None)


_TOPICS = (
    everyday.small_talk, everyday.introduction, everyday.introduction, everyday.arithmetic, everyday.opposite,
    everyday.calendar, everyday.colours,
)  # fmt: skip


def _everyday_text(rng: Random) -> Document:
    return everyday.counting(rng) if rng.random() < 0.2 else everyday.scene(rng)


_KINDS: tuple[tuple[Callable[[Random], Document], float], ...] = (
    (_shop_chat, 0.62), (_informed_chat, 0.12), (_faq, 0.02), (_everyday_chat, 0.18), (_everyday_text, 0.06),
)  # fmt: skip


def _polite(exchanges: Exchanges, rng: Random) -> Exchanges:
    before = [everyday.greeting(rng)] if rng.random() < 0.08 else []
    after = [everyday.thanks(rng)] if rng.random() < 0.12 else []
    return [*before, *exchanges, *after]


def _in_haste(text: str, rng: Random) -> str:
    """`text` as some people type: without capitals and punctuation, and with some small words left out."""
    words = text.lower().rstrip("?.!").split()
    return " ".join(word for word in words if word not in _SMALL_WORDS or rng.random() > 0.25)


def _conversation(exchanges: Exchanges, system: str | None) -> tuple[Turn, ...]:
    messages = [Turn("system", system)] if system else []
    for question, answer in exchanges:
        messages += [Turn("user", question), Turn("assistant", answer)]
    return tuple(messages)


def _worded(intent: str, rng: Random) -> str:
    """A question, now and then with a polite word, or typed in haste."""
    text = rng.choice(_wordings(intent))
    if rng.random() < 0.15:
        text = sentence(rng.choice(_ABOUT).format(rng.choice(INTENTS[intent].topics)))
    if rng.random() < 0.12:
        text = rng.choice(_PREFIXES) + (text if text.startswith("I ") else text[0].lower() + text[1:])
    if rng.random() < 0.05:
        text += rng.choice(_SUFFIXES)
    return _in_haste(text, rng) if rng.random() < 0.12 else text


@lru_cache
def _wordings(intent: str) -> tuple[str, ...]:
    """Every wording of the question but those that are held out."""
    wordings = [wording for template in INTENTS[intent].asks for wording in expand(template)]
    return tuple(wording for wording in dict.fromkeys(wordings) if normalized(wording) not in _held_out())


@lru_cache
def _held_out() -> frozenset[str]:
    return frozenset(normalized(row.prompt) for row in heldout_rows())


@lru_cache
def _support_answers() -> frozenset[str]:
    return frozenset([*(fact.answer for fact in FACTS.values()), SHOP_NAME])
