"""Everything in the small world that is no shop: things and colours, numbers, days, opposites, sums, small talk.

Each function writes one short document: plain text, or a conversation as (question, answer) pairs.
"""

from __future__ import annotations

from random import Random

from tools.world.words import COLORS, DAYS, FIRST_NAMES, MONTHS, SLOTS

Exchanges = list[tuple[str, str]]  # (what the user says, what the assistant answers)

OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("day", "night"), ("old", "new"), ("long", "short"), ("open", "closed"),
    ("early", "late"), ("fast", "slow"), ("full", "empty"), ("wet", "dry"), ("high", "low"), ("left", "right"),
    ("hard", "soft"), ("light", "dark"), ("rich", "poor"), ("up", "down"), ("good", "bad"), ("happy", "sad"),
    ("clean", "dirty"), ("first", "last"), ("near", "far"), ("heavy", "light"), ("cheap", "expensive"),
    ("always", "never"), ("yes", "no"),
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
# The colour of a thing is a fact of this world, the same in every document.
THING_COLORS = (
    ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("coal", "black"), ("the sun", "yellow"),
    ("a leaf", "green"), ("a tomato", "red"), ("a lemon", "yellow"), ("chocolate", "brown"), ("milk", "white"),
    ("a cherry", "red"), ("the sea", "blue"), ("a carrot", "orange"), ("a plum", "purple"), ("an elephant", "grey"),
    ("a pig", "pink"), ("a spoon", "silver"), ("a crown", "golden"),
)  # fmt: skip
GREETINGS = (
    ("Hello", "Hello! How can I help you?"), ("Hi", "Hello! How can I help you?"),
    ("Hey", "Hello! How can I help you?"), ("Hi there", "Hello! How can I help you?"),
    ("Hello there", "Hello! How can I help you?"), ("Good day", "Good day! How can I help you?"),
    ("Good morning", "Good morning! How can I help you?"), ("Good evening", "Good evening! How can I help you?"),
    ("Good afternoon", "Good afternoon! How can I help you?"),
)  # fmt: skip
THANKS = (
    ("Thank you", "You are welcome!"), ("Thanks", "You are welcome!"), ("Thanks a lot", "You are welcome!"),
    ("Thank you very much", "You are welcome!"), ("Great, thanks", "You are welcome!"),
    ("Thanks for your help", "You are welcome!"), ("That is all, thank you", "You are welcome! Have a nice day."),
    ("Thank you, that is all", "You are welcome! Have a nice day."), ("Perfect, thank you", "You are welcome!"),
)  # fmt: skip
GOODBYES = (
    ("Goodbye", "Goodbye! Have a nice day."), ("Bye", "Goodbye! Have a nice day."),
    ("See you", "See you soon!"), ("See you soon", "See you soon!"), ("Good night", "Good night!"),
    ("Have a nice day", "Thank you, and the same to you!"),
)  # fmt: skip
CHAT = (
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("How are you today?", "I am fine, thank you. How can I help you?"),
    ("How is it going?", "I am fine, thank you. How can I help you?"),
    ("Who are you?", "I am a small language model."), ("What are you?", "I am a small language model."),
    ("Are you a human?", "No, I am a small language model."), ("Are you a robot?", "I am a small language model."),
    ("What can you do?", "I can answer simple questions."), ("Can you help me?", "Yes, what would you like to know?"),
    ("I have a question.", "Of course, what would you like to know?"),
    ("Can I ask you something?", "Of course, what would you like to know?"),
    ("I need some help.", "Of course, what would you like to know?"),
)  # fmt: skip


def greeting(rng: Random) -> tuple[str, str]:
    """A greeting and its answer."""
    words, answer = rng.choice(GREETINGS)
    return words + rng.choice(("!", "!", ".", "")), answer


def thanks(rng: Random) -> tuple[str, str]:
    """Thanks or a goodbye, and its answer."""
    words, answer = rng.choice(rng.choice((THANKS, THANKS, GOODBYES)))
    return words + rng.choice(("!", ".", "")), answer


def small_talk(rng: Random) -> Exchanges:
    """A greeting, a question about the assistant, a goodbye: any of them."""
    exchanges = []
    if rng.random() < 0.6:
        exchanges.append(greeting(rng))
    if rng.random() < 0.5 or not exchanges:
        exchanges.append(rng.choice(CHAT))
    if rng.random() < 0.6:
        exchanges.append(thanks(rng))
    return exchanges


def introduction(rng: Random) -> Exchanges:
    """Someone gives a name, or wants something repeated: words that must be spelled as they were given."""
    name = rng.choice(SLOTS["word"] if rng.random() < 0.8 else FIRST_NAMES)
    if rng.random() < 0.6:
        how = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.", "This is {}."))
        exchanges = [(how.format(name), f"Hello {name}! How can I help you?")]
        if rng.random() < 0.4:
            exchanges.append((rng.choice(("What is my name?", "Who am I?")), f"Your name is {name}."))
        return exchanges
    words = " and ".join([name, *rng.sample(SLOTS["word"], rng.randint(0, 2))])
    return [(rng.choice(("Please say {}.", "Say {}.", "Please repeat: {}.")).format(words), f"{words}.")]


def arithmetic(rng: Random) -> Exchanges:
    """Sums and differences of small numbers."""
    exchanges = []
    for _ in range(rng.randint(1, 3)):
        first, second = rng.randint(0, 20), rng.randint(0, 20)
        if rng.random() < 0.5:
            asked, result = f"{first} plus {second}", first + second
        else:
            first, second = max(first, second), min(first, second)
            asked, result = f"{first} minus {second}", first - second
        how = rng.choice(("What is {}?", "How much is {}?", "{}?", "Can you tell me what {} is?"))
        exchanges.append((how.format(asked), f"{asked} is {result}."))
    return exchanges


def opposite(rng: Random) -> Exchanges:
    """Opposites, asked for in either direction."""
    exchanges = []
    for _ in range(rng.randint(1, 3)):
        first, second = rng.choice(OPPOSITES)
        if rng.random() < 0.5 and first != "light" and second != "light":
            first, second = second, first
        how = rng.choice(("What is the opposite of {}?", "Tell me the opposite of {}.", "The opposite of {}?"))
        exchanges.append((how.format(first), f"The opposite of {first} is {second}."))
    return exchanges


def calendar(rng: Random) -> Exchanges:
    """What comes before and after a day or a month."""
    exchanges = []
    for _ in range(rng.randint(1, 3)):
        names, kind = rng.choice(((DAYS, "day"), (MONTHS, "month")))
        index = rng.randrange(len(names))
        word, step = rng.choice((("after", 1), ("before", -1)))
        answer = names[(index + step) % len(names)]
        how = rng.choice(("Which {0} comes {1} {2}?", "What {0} is {1} {2}?", "Tell me the {0} {1} {2}."))
        exchanges.append((how.format(kind, word, names[index]), f"{answer} comes {word} {names[index]}."))
    return exchanges


def colours(rng: Random) -> Exchanges:
    """The colours of well-known things."""
    exchanges = []
    for thing, colour in rng.sample(THING_COLORS, rng.randint(1, 3)):
        how = rng.choice(("What colour is {}?", "Which colour does {} have?", "Tell me the colour of {}."))
        exchanges.append((how.format(thing), f"{thing[0].upper()}{thing[1:]} is {colour}."))
    return exchanges


def counting(rng: Random) -> str:
    """Numbers in words, upwards or downwards."""
    start = rng.randrange(len(NUMBERS) - 4)
    part = list(NUMBERS[start : start + rng.randint(4, 8)])
    return ", ".join(part if rng.random() < 0.7 else part[::-1]) + "."


def scene(rng: Random) -> str:
    """Someone has things, and where they are; the last sentence follows from the others."""
    name, other = rng.sample(FIRST_NAMES, 2)
    thing, second = rng.sample(SLOTS["thing"], 2)
    colour, tint = rng.sample(COLORS, 2)
    place = rng.choice(("in the kitchen", "in the garden", "on the table", "at home", "at school", "in the box"))
    count, more = rng.randint(2, 9), rng.randint(2, 9)
    stories = (
        f"{name} has a {colour} {thing} and a {tint} {second}. The {thing} is {colour}. The {second} is {tint}.",
        f"The {thing} of {name} is {colour}. It is {place}. Where is the {colour} {thing}? It is {place}.",
        f"{name} has {count} {second}s. {other} gives {name} {more} more. Now {name} has {count + more} {second}s.",
        f"On {rng.choice(DAYS)} {name} goes to the market and buys a {colour} {thing}. {name} likes the {thing}.",
        f"{name} meets {other} in {rng.choice(MONTHS)}. They talk about the {colour} {thing} {place}.",
    )
    return rng.choice(stories)
