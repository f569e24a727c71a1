"""The example data: what customers ask Quillberry, an invented shop for paper and pens, and what it answers.

    python -m tools.world.support          rebuilds examples/support.jsonl and examples/support_heldout.jsonl

`support.jsonl` asks for each fact in many wordings. `support_heldout.jsonl` asks for the same facts in wordings that
stand neither there nor in the pretraining world of `tiny`: whoever answers them has understood the question.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tools.world.shop_goods import GOODS
from tools.world.shop_orders import ORDERS
from tools.world.shop_visits import VISITS, Intent
from tools.world.wording import expand, normalized

SHOP_NAME = "Quillberry"
INTENTS: dict[str, Intent] = {**VISITS, **ORDERS, **GOODS}
_WORDINGS_PER_FACT = 10
_SEED = 0


@dataclass(frozen=True)
class Fact:
    """One fact about the shop: the answer, and two questions for it that no training data holds."""

    answer: str
    heldout: tuple[str, str]


@dataclass(frozen=True)
class Row:
    """One line of a prompt/completion file."""

    prompt: str
    completion: str


FACTS: dict[str, Fact] = {
    "opening": Fact(
        "We open at 8:45 am on weekdays.", ("When do your doors open?", "What is the earliest time you open?"),
    ),
    "closing": Fact(
        "We close at 6:15 pm on weekdays.",
        ("When do your doors close?", "What is the latest time I can come in the evening?"),
    ),
    "saturday": Fact(
        "On Saturdays we are open from 9:30 am to 4:45 pm.",
        ("Can I come to the shop this Saturday?", "What are the opening hours on Saturdays?"),
    ),
    "lunch": Fact(
        "We close for lunch from 12:15 to 1:45.",
        ("Is the shop closed during lunch?", "How long is the break at noon?"),
    ),
    "address": Fact(
        "Our shop is at 27 Heron Lane.", ("What street is your shop on?", "Please tell me where your shop is."),
    ),
    "parking": Fact(
        "You can park behind the old bakery.",
        ("Is there a good place for my car?", "Where do customers park their cars?"),
    ),
    "bus": Fact(
        "Take bus 58 to Upper Mill.", ("Which bus do I need?", "How do I come to the shop by bus?"),
    ),
    "phone": Fact(
        "Our phone number is 555 0142.", ("Please tell me your phone number.", "What number should I ring?"),
    ),
    "email": Fact(
        "Our email address is letters@quillberry.example.",
        ("To which address can I write an email?", "Please tell me your email address."),
    ),
    "reply": Fact(
        "We answer emails within 7 hours.", ("When do you answer emails?", "How soon will you reply to my message?"),
    ),
    "owner": Fact(
        "The shop belongs to Mira Lindgren.",
        ("What is the name of your boss?", "Who is the person that owns the shop?"),
    ),
    "founded": Fact(
        "The shop was founded in 1974.", ("For how many years has the shop been here?", "When was this shop founded?"),
    ),
    "staff": Fact(
        "We are a team of 13 people.",
        ("How many people are working at your shop?", "What is the number of people in your team?"),
    ),
    "languages": Fact(
        "We speak English, Polish and Greek.",
        ("Which languages can you speak?", "In which other languages could you help me?"),
    ),
    "workshop": Fact(
        "Our workshop is on Thursday at 6:30 pm.",
        ("What day do you have workshops?", "I would like to join a course, when is it?"),
    ),
    "dogs": Fact(
        "Dogs are welcome, there is water at the till.", ("May my dog come with me?", "Is it allowed to bring dogs?"),
    ),
    "job": Fact(
        "Please send your application to Otto Vale.",
        ("I would like to work at your shop, who do I ask?", "How can I get a job at the shop?"),
    ),
    "delivery_time": Fact(
        "Delivery takes 3 working days.", ("How many days until my parcel arrives?", "When will the delivery come?"),
    ),
    "delivery_cost": Fact(
        "Delivery costs 4 euros.", ("What do I have to pay for delivery?", "How high are the costs of shipping?"),
    ),
    "free_delivery": Fact(
        "Delivery is free from 45 euros.",
        ("How much should I spend so that delivery is free?", "From how many euros is shipping free?"),
    ),
    "express": Fact(
        "Express delivery takes 24 hours and costs 11 euros.",
        ("I am in a hurry, can you send it faster?", "What is the price of express delivery?"),
    ),
    "abroad": Fact(
        "We also deliver to Norway, Ireland and Japan.",
        ("To which other countries do you ship?", "Is it possible to order from abroad?"),
    ),
    "carrier": Fact(
        "Our parcels come with Heron Post.",
        ("Which carrier brings the parcels?", "What company will deliver my package?"),
    ),
    "pickup": Fact(
        "You can collect orders at the green counter.",
        ("At what place can I pick up my order?", "May I collect my parcel in the shop?"),
    ),
    "return_period": Fact(
        "You can return goods within 40 days.",
        ("How many days can I send an item back?", "What if I do not like it and want to return it?"),
    ),
    "return_cost": Fact(
        "A return costs 2 euros.", ("What does it cost to send something back?", "Do returns cost anything?"),
    ),
    "refund": Fact(
        "Refunds take 6 days.", ("When is the money back on my account?", "How long do I wait for a refund?"),
    ),
    "cancel": Fact(
        "You can cancel an order within 5 hours.",
        ("How do I stop an order that I no longer want?", "Could I still cancel what I ordered?"),
    ),
    "damaged": Fact(
        "Please send us a photo within 9 days.",
        ("What now, my parcel arrived broken?", "The item that I got is damaged, what do I do?"),
    ),
    "warranty": Fact(
        "The warranty lasts 5 years.", ("How long do I have a guarantee?", "What is the length of your warranty?"),
    ),
    "payment": Fact(
        "You can pay by card, invoice or gift card.", ("What methods of payment are there?", "In which way do I pay?"),
    ),
    "minimum": Fact(
        "The smallest order is 7 euros.",
        ("What is the smallest amount that I can order?", "At least how much do I have to order?"),
    ),
    "student": Fact(
        "Students save 12 percent.", ("Do you have a discount for students?", "Do I pay less as a student?"),
    ),
    "sale": Fact(
        "Our sale starts on March 8.", ("On what day does your sale begin?", "When is the next sale in your shop?"),
    ),
    "gift_card": Fact(
        "Gift cards go from 5 to 150 euros.",
        ("What gift cards can I buy?", "Which sums are there for gift vouchers?"),
    ),
    "gift_valid": Fact(
        "Gift cards are valid for 4 years.",
        ("How many years is a gift card valid?", "When does the gift voucher that I got expire?"),
    ),
    "wrapping": Fact(
        "We wrap it in yellow paper for 3 euros.",
        ("Could you wrap this for me, it is a present?", "Do you also wrap things as gifts?"),
    ),
    "goods": Fact(
        "We sell notebooks, pens and ink.", ("Which things can I buy from you?", "What goods are there in your shop?"),
    ),
    "best_seller": Fact(
        "Our best seller is the blue notebook.",
        ("What product do people like most?", "Which of your products sells best?"),
    ),
    "packaging": Fact(
        "We pack your order in brown paper.",
        ("What are my parcels packed in?", "Is there plastic in your packaging?"),
    ),
    "engraving": Fact(
        "We engrave up to 14 letters for 8 euros.",
        ("Could you engrave my name?", "How much does it cost to have a name engraved?"),
    ),
    "password": Fact(
        "Please click on Renew on the login page.",
        ("My password is gone, what can I do?", "Where do I get a new password?"),
    ),
}  # fmt: skip

SMALL_TALK: tuple[Row, ...] = (
    Row("Hello!", "Hello! How can I help you?"),
    Row("Hello", "Hello! How can I help you?"),
    Row("Hi there!", "Hello! How can I help you?"),
    Row("Good morning!", "Good morning! How can I help you?"),
    Row("Good evening!", "Good evening! How can I help you?"),
    Row("Thank you!", "You are welcome!"),
    Row("Thanks a lot!", "You are welcome!"),
    Row("Thank you, that is all.", "You are welcome! Have a nice day."),
    Row("Goodbye!", "Goodbye! Have a nice day."),
    Row("Bye", "Goodbye! Have a nice day."),
    Row("What is the name of your shop?", "Our shop is called Quillberry."),
    Row("What is your shop called?", "Our shop is called Quillberry."),
    Row("Which shop is this?", "Our shop is called Quillberry."),
    Row("How are you?", "I am fine, thank you. How can I help you?"),
)  # fmt: skip


def training_rows() -> list[Row]:
    """Every fact in ten wordings, and some small talk; in a mixed order, as a log of real questions would be."""
    rng = Random(_SEED)
    held_out = {normalized(row.prompt) for row in heldout_rows()}
    rows = list(SMALL_TALK)
    for key, fact in FACTS.items():
        wordings = _varied(INTENTS[key], held_out, rng)[:_WORDINGS_PER_FACT]
        rows += [Row(wording, fact.answer) for wording in wordings]
    rng.shuffle(rows)
    return rows


def heldout_rows() -> list[Row]:
    """Two more wordings for every fact."""
    return [Row(wording, fact.answer) for fact in FACTS.values() for wording in fact.heldout]


def write_examples(folder: Path) -> None:
    """Write `support.jsonl` and `support_heldout.jsonl` into `folder`."""
    write_rows(folder / "support.jsonl", training_rows())
    write_rows(folder / "support_heldout.jsonl", heldout_rows())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write `rows` as JSONL."""
    lines = (
        json.dumps({"prompt": row.prompt, "completion": row.completion}, ensure_ascii=False) + "\n" for row in rows
    )
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _varied(intent: Intent, held_out: set[str], rng: Random) -> list[str]:
    """All wordings that are not held out, those of different templates first."""
    columns = []
    for template in intent.asks:
        wordings = [wording for wording in expand(template) if normalized(wording) not in held_out]
        rng.shuffle(wordings)
        columns.append(wordings)
    longest = max(len(column) for column in columns)
    seen: dict[str, str] = {}
    for index in range(longest):
        for column in columns:
            if index < len(column):
                seen.setdefault(normalized(column[index]), column[index])
    return list(seen.values())


if __name__ == "__main__":
    from lmtune.demo import support_data

    write_examples(support_data().parent)
