"""Personal data in texts, masked: addresses of mail and net, telephones, numbers of cards, accounts and identity.

Where a number has check digits, they decide, so that an order number is not taken for a card.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

_CHECK_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CHECK_LETTERS = "10X98765432"
_IBAN_LENGTHS = {
    "AT": 20, "BE": 16, "CH": 21, "CZ": 24, "DE": 22, "DK": 18, "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27,
    "HU": 28, "IE": 22, "IT": 27, "LU": 20, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SE": 24, "TR": 26,
}  # fmt: skip


def is_resident_id(text: str) -> bool:
    """Whether 18 characters are a number of a Chinese resident: a date of birth, ISO 7064 MOD 11-2."""
    year, month, day = int(text[6:10]), int(text[10:12]), int(text[12:14])
    if not (1900 <= year <= 2099 and 1 <= month <= 12 and 1 <= day <= 31):
        return False
    total = sum(int(digit) * weight for digit, weight in zip(text, _CHECK_WEIGHTS, strict=False))
    return _CHECK_LETTERS[total % 11] == text[17].upper()


def is_card(text: str) -> bool:
    """Whether digits, with spaces or hyphens, are a card number: a known first digit, and Luhn's check digit."""
    digits = [int(digit) for digit in text if digit.isdigit()]
    if digits[0] not in (2, 3, 4, 5, 6) or len(set(digits)) == 1:
        return False
    doubled = [digit if index % 2 == 0 else sum(divmod(2 * digit, 10)) for index, digit in enumerate(digits[::-1])]
    return sum(doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether letters and digits, with spaces, are an IBAN: the length of its country, and ISO 7064 MOD 97-10."""
    plain = "".join(text.split()).upper()
    if _IBAN_LENGTHS.get(plain[:2]) != len(plain):
        return False
    return int("".join(str(int(letter, 36)) for letter in plain[4:] + plain[:4])) % 97 == 1


def is_public_address(text: str) -> bool:
    """Whether this is an IP address of somebody; those of a local net and of examples are nobody's."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


@dataclass(frozen=True)
class Pattern:
    """One kind of personal data.

    Attributes:
        mask: what is written in its place.
        where: an expression for where it may be.
        holds: whether what was found is it.
    """

    mask: str
    where: str
    holds: Callable[[str], bool] = lambda text: True

    @functools.cached_property
    def found(self) -> re.Pattern[str]:
        """The expression, for ASCII: a letter of a script without spaces may stand beside a number."""
        return re.compile(self.where, re.ASCII)


# In this order: a number that is an account is not looked at as a telephone.
PATTERNS = {
    "mail addresses": Pattern("[EMAIL]", r"(?<![\w.+-])[\w.+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}"),
    "IBANs": Pattern("[IBAN]", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", is_iban),
    "resident ids": Pattern("[ID]", r"(?<![\dA-Za-z])[1-9]\d{16}[\dXx](?![\dA-Za-z])", is_resident_id),
    "card numbers": Pattern(
        "[CARD]",
        r"(?<![\d.,-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3[47]\d\d([ -]?)\d{6}\2\d{5})(?![\d-])",
        is_card,
    ),
    "net addresses": Pattern(
        "[IP]",
        r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{1,4})(?![\w:]|\.\d)",
        is_public_address,
    ),
    "device addresses": Pattern(
        "[MAC]", r"(?<![\w:-])[0-9A-Fa-f]{2}([:-])[0-9A-Fa-f]{2}(?:\1[0-9A-Fa-f]{2}){4}(?![\w:-])"
    ),
    "telephone numbers": Pattern(
        "[PHONE]",
        r"(?<![\w+.])(?<!\d-)(?:"
        r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,12}"  # +49 30 1234567
        r"|(?:86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # a mobile telephone in China
        r"|0\d{2,3}-\d{7,8}"  # a telephone at home in China
        r"|\(\d{3}\) ?\d{3}[.-]\d{4}|\d{3}([.-])\d{3}\1\d{4}"  # North America
        r")(?![\d.-]*\d)(?! ?[=*/×÷])",  # 6000-150-1200-2000=2650 is arithmetic
    ),
}
# What every pattern needs
_MAYBE = re.compile(
    r"@|\d[\d .()-]{5,}\d|[0-9A-Fa-f:]:[0-9A-Fa-f]*:|[0-9A-Fa-f]-[0-9A-Fa-f]{2}-|[A-Z]{2}\d\d", re.ASCII
)


def mask_personal(text: str, count: Callable[[str], None] = lambda kind: None) -> str:
    """`text` with each piece of personal data replaced; `count` takes the kind of each."""
    if not _MAYBE.search(text):
        return text
    for kind, pattern in PATTERNS.items():
        text = pattern.found.sub(functools.partial(_masked, kind, count), text)
    return text


def _masked(kind: str, count: Callable[[str], None], found: re.Match[str]) -> str:
    pattern = PATTERNS[kind]
    if not pattern.holds(found[0]):
        return found[0]
    count(kind)
    return pattern.mask


_LINK = re.compile(r"(?:https?://|www\.)[^\s<>\"'，。；、）)】]+", re.IGNORECASE)


def mask_links(text: str) -> str:
    """`text` with [LINK] for each address of a page."""
    return _LINK.sub("[LINK]", text) if "http" in text or "www." in text else text
