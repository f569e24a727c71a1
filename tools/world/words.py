"""The words of the small world: what a `{slot}` in a template can become. All names are invented.

Numbers and times are strings like all other entries, so that a template needs no format of its own.
"""

from __future__ import annotations

from random import Random


def _numbers(start: int, stop: int, step: int = 1) -> tuple[str, ...]:
    """`start` to `stop`, both included."""
    return tuple(str(number) for number in range(start, stop + 1, step))


def _times(first: int, last: int, half: str) -> tuple[str, ...]:
    """Quarter hours: "7 am", "7:15 am", …"""
    return tuple(f"{hour}{minutes} {half}" for hour in range(first, last + 1) for minutes in ("", ":15", ":30", ":45"))


def _invented(count: int, seed: int) -> tuple[str, ...]:
    """Words of two or three syllables that mean nothing: names that must be spelled, not known."""
    rng = Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        parts = []
        for _ in range(rng.choice((2, 2, 3))):
            parts += [rng.choice(_ONSETS), rng.choice(_VOWELS), rng.choice(_LINKS)]
        words["".join([*parts[:-1], rng.choice(_CODAS)]).capitalize()] = None
    return tuple(words)


_ONSETS = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "l", "m", "m", "n", "n", "p", "qu", "r",
    "r", "s", "s", "sh", "st", "t", "t", "th", "tr", "v", "w", "z",
)  # fmt: skip
_LINKS = ("", "", "", "", "", "n", "r", "l", "m", "s")
_VOWELS = ("a", "a", "a", "e", "e", "i", "i", "o", "o", "u", "ai", "ee")
_CODAS = (
    "", "n", "r", "l", "m", "s", "t", "nd", "ng", "ck", "rd", "ll", "st", "ry", "ly", "den", "gren", "berry", "ton",
    "field",
)  # fmt: skip
INVENTED = _invented(6000, seed=0)

COLORS = (
    "red", "blue", "green", "yellow", "orange", "purple", "brown", "black", "white", "grey", "pink", "silver", "golden",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
FIRST_NAMES = (
    "Anna", "Ben", "Clara", "David", "Ella", "Frank", "Greta", "Henry", "Iris", "Jonas", "Karin", "Leo", "Mona",
    "Nils", "Olga", "Paul", "Rosa", "Simon", "Tara", "Victor",
)  # fmt: skip
_WORDS = (
    "oak", "fern", "river", "stone", "maple", "fox", "lake", "hill", "rose", "barley", "willow", "cloud", "amber",
    "copper", "meadow", "raven", "sparrow", "cedar", "harbour", "mill", "bridge", "garden", "clover", "hazel", "birch",
)  # fmt: skip
_ENDINGS = ("field", "wood", "brook", "ford", "dale", "well", "side", "gate")

SLOTS: dict[str, tuple[str, ...]] = {
    "morning": _times(6, 10, "am"),
    "evening": _times(4, 9, "pm"),
    "noon": ("11:30", "11:45", "12", "12:15", "12:30", "12:45"),
    "afternoon": ("1", "1:15", "1:30", "1:45", "2", "2:15", "2:30"),
    "clock": _numbers(1, 8),
    "few": _numbers(2, 12),
    "count": _numbers(2, 60),
    "price": _numbers(2, 90),
    "percent": _numbers(3, 40),
    "year": _numbers(1900, 2021),
    "size": _numbers(28, 40),
    "large": _numbers(41, 56),
    "degrees": _numbers(20, 95, 5),
    "house": _numbers(1, 199),
    "bus": _numbers(1, 99),
    "phone": tuple(f"555 0{number}" for number in range(100, 1000, 7)),
    "day": DAYS,
    "month": MONTHS,
    "colour": COLORS,
    "name": (*FIRST_NAMES, *INVENTED[:20]),
    "word": INVENTED,
    "surname": (
        "Archer", "Baker", "Carver", "Dale", "Ellis", "Fisher", "Grant", "Hale", "Irving", "Jensen", "Keller", "Lund",
        "Moss", "North", "Olsen", "Porter", "Quinn", "Reed", "Stone", "Turner", *INVENTED[20:],
    ),
    "street": tuple(
        f"{word.capitalize()} {kind}"
        for word in (*_WORDS, *INVENTED[1000:1030])
        for kind in ("Street", "Road", "Lane", "Square")
    ),
    "stop": tuple(
        f"{kind} {place}" for kind in ("Old", "New", "North", "South", "East", "West", "Upper", "Lower")
        for place in ("Mill", "Bridge", "Church", "Market", "Harbour", "Station", "Park", "Gate", "Tower")
    ),
    "site": (*(f"{word}{ending}" for word in _WORDS for ending in _ENDINGS), *(word.lower() for word in INVENTED)),
    "mailbox": ("hello", "help", "info", "team", "shop", "contact", "service", "mail", "office", "orders", "support"),
    "country": (
        "Norway", "Spain", "Italy", "France", "Poland", "Ireland", "Denmark", "Austria", "Greece", "Portugal",
        "Sweden", "Finland", "Iceland", "Belgium", "Hungary", "Japan", "Canada", "Chile", "Kenya", "India",
    ),
    "carrier": tuple(
        f"{first} {second}" for first in ("Swift", "Red", "Blue", "Royal", "Arrow", "Falcon", "Star", "River", "Hare")
        for second in ("Post", "Parcel", "Express", "Couriers", "Mail")
    ),
    "payment": ("card", "cash", "bank transfer", "cheque", "gift card", "phone", "voucher", "invoice", "direct debit"),
    "product": (
        "lamps", "chairs", "tables", "cups", "plates", "shoes", "boots", "coats", "scarves", "gloves", "hats", "bags",
        "books", "maps", "toys", "kites", "candles", "soaps", "teas", "cakes", "seeds", "plants", "tools", "clocks",
        "pans", "knives", "blankets", "pillows", "tents", "ropes", "bells", "drums", "paints", "brushes", "baskets",
    ),
    "thing": (
        "lamp", "chair", "table", "cup", "plate", "coat", "scarf", "hat", "bag", "book", "map", "kite", "candle",
        "clock", "pan", "knife", "blanket", "pillow", "tent", "rope", "bell", "drum", "brush", "basket", "kettle",
    ),
    "material": (
        "wood", "wool", "cotton", "linen", "leather", "glass", "steel", "copper", "clay", "paper", "cork", "bamboo",
        "silk", "felt", "oak", "pine", "recycled plastic", "recycled paper",
    ),
    "language": (
        "English", "Spanish", "French", "German", "Polish", "Italian", "Danish", "Greek", "Turkish", "Dutch", "Arabic",
        "Swedish", "Czech", "Hindi",
    ),
    "place": (
        "the library", "the school", "the station", "the church", "the town hall", "the bakery", "the museum",
        "the cinema", "the park", "the market", "the post office", "the theatre", "the swimming pool", "the bank",
        "the old mill", "the hospital",
    ),
    "where": ("behind", "next to", "in front of", "opposite", "below", "near"),
    "spot": (
        "the front door", "the side door", "the back door", "the till", "the garden gate", "the main desk",
        "the blue counter", "the window on the left", "the small office", "the yard", "the lift", "the stairs",
    ),
    "page": (
        "account page", "order page", "help page", "start page", "login page", "contact page", "delivery page",
        "profile page", "settings page", "news page",
    ),
    "button": ("Help", "Send", "Next", "Change", "New", "Reset", "Start", "Open", "Forgotten", "Begin", "Renew"),
    "drink": (
        "green tea", "mint tea", "black coffee", "apple juice", "hot chocolate", "ginger tea", "lemonade", "cold milk",
        "pear juice", "rose tea", "white coffee", "plum juice",
    ),
    "box": (
        "paper boxes", "cotton bags", "straw", "wooden crates", "old newspaper", "tin boxes", "cork", "cloth",
        "brown paper", "wool", "used boxes", "paper bags",
    ),
}  # fmt: skip

SHOP_NAMES: tuple[str, ...] = (
    *(f"The {colour.capitalize()} {thing.capitalize()}" for colour in COLORS for thing in SLOTS["thing"]),
    *(f"{first.capitalize()} & {second.capitalize()}" for first in _WORDS for second in _WORDS if first != second),
    *(
        f"{name}'s {thing.capitalize()}s"
        for name in SLOTS["surname"][:20]
        for thing in ("Lamp", "Cup", "Book", "Toy", "Hat")
    ),
    *INVENTED[:2000],
)
