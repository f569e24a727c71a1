"""The picture of a confusion matrix: what it shows is what was counted, whatever the classes are called."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from lmtune.runs.pictures import confusion_svg

SVG = "{http://www.w3.org/2000/svg}"


def cells(picture: str) -> list[tuple[str, str, str]]:
    """Of each cell: its title, its color, and the number in it."""
    root = ET.fromstring(picture)
    groups = [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    return [
        (group.findtext(f"{SVG}title") or "", group.find(f"{SVG}rect").attrib["fill"], group.findtext(f"{SVG}text", ""))  # type: ignore[union-attr]
        for group in groups
    ]


def test_a_cell_counts_rows_and_is_as_dark_as_its_share_of_the_right_class() -> None:
    picture = confusion_svg({"labels": ["cat", "dog"], "confusion": [[3, 1], [0, 400]]})
    assert picture is not None
    found = cells(picture)
    assert [(title, number) for title, _, number in found] == [
        ("cat as cat: 3 of 4", "3"), ("cat as dog: 1 of 4", "1"),
        ("dog as cat: 0 of 400", "0"), ("dog as dog: 400 of 400", "400"),
    ]  # fmt: skip
    brightness = [int(color[1:3], 16) for _, color, _ in found]
    assert brightness[2] == 255
    assert brightness[3] < brightness[0] < brightness[1] < brightness[2]


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a & b", 'x" onload="y', "\x00\x1b[31mred\ud7ff", "差评", "w" * 500, ""]
)
def test_any_name_of_a_class_is_shown_as_text(name: str) -> None:
    picture = confusion_svg({"labels": [name, "other"], "confusion": [[1, 0], [0, 1]]})
    assert picture is not None
    root = ET.fromstring(picture)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {"svg", "rect", "g", "text", "title"}
    assert not any(key.startswith("on") for element in root.iter() for key in element.attrib)
    assert float(root.attrib["width"]) < 800


def test_many_classes_are_drawn_without_numbers() -> None:
    count = 120
    square = [[int(row == column) for column in range(count)] for row in range(count)]
    picture = confusion_svg({"labels": [str(one) for one in range(count)], "confusion": square})
    assert picture is not None
    assert len(cells(picture)) == count**2
    assert not any(number for _, _, number in cells(picture))
    assert float(ET.fromstring(picture).attrib["width"]) < 2400


def test_rows_of_several_classes_have_no_matrix() -> None:
    assert confusion_svg({"labels": ["a", "b"], "confusion": None}) is None
