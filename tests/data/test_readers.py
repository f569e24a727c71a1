"""Files of every type in, the same rows with their places out; what a spreadsheet does to cells is undone."""

from __future__ import annotations

import codecs
import datetime
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmtune.data import readers
from lmtune.data.formats import parse_row
from lmtune.data.in_memory import paths_or_rows
from lmtune.data.readers import read_rows
from lmtune.data.reading import ReadReport, read_examples
from lmtune.data.sources import find_files, unread_entries
from lmtune.data.values import RowFault

ROWS = [{"prompt": "Where, please?", "completion": 'In "A"\nand B'}, {"prompt": "p", "completion": "ü 汉字"}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(name: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """(place, row or fault) of each row of what `name` names, and what is said."""
    said: list[str] = []
    return [(file.place(n), row) for file in find_files([name]) for n, _, row in read_rows(file, said)], said


def fault(name: str) -> str:
    """The place and the text of the first fault."""
    return next(f"{place}: {row}" for place, row in read(name)[0] if isinstance(row, RowFault))


def quoted_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [list(rows[0]), *([cell(row[key]) for key in rows[0]] for row in rows)]
    return "".join(delimiter.join(line) + "\r\n" for line in lines)


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=0))


def write_csv(path: Path) -> None:
    path.write_bytes(quoted_csv(ROWS).encode())


def write_tsv(path: Path) -> None:
    path.write_bytes(quoted_csv(ROWS, "\t").encode())


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_xlsx(path: Path) -> None:
    write_book(path, Sheet1=[list(ROWS[0]), *(list(row.values()) for row in ROWS)], Sheet2=[])


def write_book(path: Path, **sheets: list[list[Any]]) -> None:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)


WRITERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "rows.jsonl": (write_jsonl, ["rows.jsonl:1", "rows.jsonl:2"]),
    "rows.json": (write_json, ["rows.json:2", "rows.json:6"]),
    "rows.csv": (write_csv, ["rows.csv:2", "rows.csv:4"]),
    "rows.tsv": (write_tsv, ["rows.tsv:2", "rows.tsv:4"]),
    "rows.parquet": (write_parquet, ["rows.parquet:row 1", "rows.parquet:row 2"]),
    "rows.xlsx": (write_xlsx, ["rows.xlsx:Sheet1!A2", "rows.xlsx:Sheet1!A3"]),
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_type_gives_the_same_rows_with_their_places(name: str, packed: str) -> None:
    write, places = WRITERS[name]
    write(Path(name))
    content = Path(name).read_bytes()
    if packed == ".gz":
        Path(name + packed).write_bytes(gzip.compress(content[:50]) + gzip.compress(content[50:]))
    elif packed == ".zst":
        Path(name + packed).write_bytes(pa.compress(content[:50], "zstd", asbytes=True)
                                        + pa.compress(content[50:], "zstd", asbytes=True))  # fmt: skip
    if packed and name.endswith(("parquet", "xlsx")):  # which are compressed inside
        assert "a Parquet file" in fault(name + packed) or "a workbook" in fault(name + packed)
        return
    rows, _ = read(name + packed)
    assert rows == [(place.replace(name, name + packed), row) for place, row in zip(places, ROWS, strict=True)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_that_spans_lines_is_placed_where_it_begins(end: str) -> None:
    lines = ["", "id,prompt,completion", '1,"a', 'b","c', '"', "", '2,"d",e', ",,", '3,f,"""g"""']
    Path("rows.csv").write_bytes(end.join(lines).encode())
    rows, _ = read("rows.csv")
    assert [place for place, _ in rows] == ["rows.csv:3", "rows.csv:7", "rows.csv:9"]
    assert rows[0][1] == {"id": "1", "prompt": f"a{end}b", "completion": f"c{end}"}
    assert rows[2][1]["completion"] == '"g"'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt;completion\na, b;c\nd;e\n", 'delimiter ";"'),
        ("prompt\tcompletion\na, b\tc; d\n", "delimiter tab"),
        ("prompt|completion\na, b|c\n", 'delimiter "|"'),
        ('sep=;\nprompt;completion\n"a, b";c\n', 'delimiter ";"'),
        ('"prompt, for short";completion\na;b\n', 'delimiter ";"'),
        ("text\nlonely\n", 'delimiter ","'),
        (",prompt,completion\n0,a,b\n1,c,d\n", "1 column without a name not read"),  # pandas writes its index
    ],
)
def test_the_delimiter_is_detected_and_said(content: str, said: str) -> None:
    Path("rows.csv").write_text(content)
    rows, found = read("rows.csv")
    assert said in found
    assert not any(isinstance(row, RowFault) for _, row in rows), rows
    assert "" not in rows[0][1]


CHINESE = "prompt,completion\n你们什么时候发货?,我们每天下午三点以前发货。\n可以退吗?,七天之内可以。\n"
FRENCH = "prompt,completion\nOù est ma commande ?,Elle arrivera après-demain à midi.\nC’est cher…,Non : 5 €\n"


@pytest.mark.parametrize(
    ("text", "codec", "said"),
    [
        (FRENCH, "utf-8", None), (FRENCH, "utf-8-sig", None), (FRENCH, "utf-16", "UTF-16"),
        (FRENCH, "utf-16-le", "UTF-16-LE"), (CHINESE, "utf-16-be", "UTF-16-BE"), (FRENCH, "cp1252", "Windows-1252"),
        (CHINESE, "gb18030", "GB18030"), (CHINESE, "utf-32", "UTF-32"), (CHINESE, "utf-8", None),
    ],
)  # fmt: skip
def test_the_encoding_is_detected_and_said(text: str, codec: str, said: str | None) -> None:
    lines = [line.split(",") for line in text.splitlines()[1:]]
    marked = {"utf-16-le": codecs.BOM_UTF16_LE}.get("", b"")
    Path("rows.csv").write_bytes(marked + text.encode(codec))
    objects = [{"prompt": prompt, "completion": completion} for prompt, completion in lines]
    jsonl = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
    Path("rows.jsonl").write_bytes(jsonl.encode(codec))
    Path("rows.json").write_bytes(json.dumps(objects, ensure_ascii=False).encode(codec))
    for name in ("rows.csv", "rows.jsonl", "rows.json"):
        rows, found = read(name)
        assert [row for _, row in rows] == objects, name
        assert [one for one in found if "delimiter" not in one] == ([said] if said else []), name


@pytest.mark.parametrize(
    "content",
    [
        "prompt,completion\né,".encode() + b"\xe9\n",  # UTF-8, with one letter that is not
        "prompt,completion\nПривет,мир\n".encode("cp1251"),  # neither of the two that are told apart
        "prompt,completion\nこんにちは世界,ありがとうございます\n".encode("shift_jis"),
        "prompt,completion\n안녕하세요 세계,감사합니다\n".encode()[:-8] + b"\xff\xff\n",
    ],
)
def test_what_cannot_be_told_is_a_fault(content: bytes) -> None:
    Path("rows.csv").write_bytes(content)
    assert "rows.csv:2: byte" in fault("rows.csv")
    assert "is not UTF-8; save the file as UTF-8" in fault("rows.csv")


OTHERS = {  # what one could take for Chinese or Western, by the encoding that iconv knows
    "CP949": "배송은 얼마나 걸리나요?,보통 이틀이 걸립니다.\n매장은 어디에 있나요?,서울 강남구에 있습니다.\n",
    "EUC-JP": "配送にはどのくらいかかりますか?,通常は二日かかります。\n",
    "BIG5": "請問配送需要多久?,通常需要兩天,有時候三天。\n".replace(",有", "、有"),
    "ISO-8859-2": "Jak dlouho trvá doručení?,Někdy tři dny.\nKde je váš obchod?,Náměstí Míru.\n",
    "WINDOWS-1250": "Jak długo trwa dostawa?,Proszę zadzwonić.\nGdzie jest sklep?,Wrocław; ulica Świdnicka.\n",
    "WINDOWS-1254": "Kargo ne kadar sürer?,Şimdi değil.\nİade nasıl yapılır?,Lütfen müşteri hizmetlerini arayın.\n",
    "WINDOWS-1257": "Kiek laiko?,Ačiū labai; šiandien gražu.\nKur?,Ėjo į mišką.\n",
    "CP850": "Où est le café?,Très près; à côté de l'église.\n",
    "MACINTOSH": "Où est-il?,Voilà; c’est déjà là.\n",
}
_CODECS = {"MACINTOSH": "mac_roman", "WINDOWS-1250": "cp1250", "WINDOWS-1254": "cp1254", "WINDOWS-1257": "cp1257"}


@pytest.mark.parametrize("encoding", OTHERS)
@pytest.mark.parametrize("beside", ["", "café,señor\nGröße,für\n"])
def test_another_encoding_is_a_fault_that_says_how_to_convert(encoding: str, beside: str) -> None:
    """Also where rows of Windows-1252 stand before, and outnumber them by far."""
    content = OTHERS[encoding].encode(_CODECS.get(encoding, encoding))
    western = (beside * 40).encode("cp1252")
    for name, lines in (("rows.csv", b"prompt,completion\n" + western + content), ("rows.jsonl", b'{"text": "')):
        if name == "rows.jsonl":
            lines += content.split(b"\n")[0].replace(b'"', b"") + b'"}\n'
        Path(name).write_bytes(lines)
        message = fault(name)
        assert "is not UTF-8; save the file as UTF-8: " in message
        if not beside:
            assert f"iconv -f {encoding} -t UTF-8 {name} > NEW_FILE" in message or name == "rows.jsonl", message


WESTERN = [
    "Größe über alles,Müller fährt Straßenbahn", "Où est le café ?,Très près; à côté de l'église", "Voilà,très bien",
    "¿Dónde está el niño?,¡Aquí! Mañana; señor", "Não é você?,Informação às três", "È già qui,però così; perché no",
    "Åsa är här,på ön", "Rødgrød på fløden,æble", "Það er þó gott,að sjá þig; maður æfir", "“Hello” — it’s 5 €,a café…",
    "Hyvää päivää,yötä", "Què és això?,una història de comunicació", "Größe,für\ncafé,très\nseñor,mañana\nNão,é",
]  # fmt: skip


@pytest.mark.parametrize("text", WESTERN)
def test_windows_1252_is_a_guess_that_is_warned_of_with_a_sample(text: str) -> None:
    Path("rows.csv").write_bytes(f"prompt,completion\n{text}\n".encode("cp1252"))
    report = ReadReport()
    rows = list(read_examples(find_files(["rows.csv"]), report))
    assert [row.messages[0].content for row in rows] == [line.split(",")[0] for line in text.split("\n")]
    (warning,) = report.warnings
    assert warning.startswith("rows.csv: the encoding is a guess: Windows-1252; it reads")
    assert text.split(",")[0][:10] in warning


def test_chinese_with_single_characters_of_other_scripts_is_gb18030() -> None:
    lines = ["の", *["味道不错，就是送餐有点慢，下次还会再来", "挺好吃的，谢谢"] * 20]
    Path("rows.csv").write_bytes(("text\n" + "\n".join(lines) + "\n").encode("gb18030"))
    assert "GB18030" in read("rows.csv")[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,completion,prompt\na,b,c\n", 'rows.csv:1: the header names "prompt" twice'),
        ("prompt,completion\na,b\nprompt,completion\nc,d\n", "rows.csv:3: the header stands here again"),
        ("\ufeffprompt,completion\na,b\n\ufeffprompt,completion\nc,d\n", "rows.csv:3: the header stands here again"),
        ("prompt,completion\na,b\nPrompt,Completion\nc,d\n", "rows.csv:3: the header stands here again"),
        ("prompt,completion\na,b\ncompletion,prompt\nd,c\n", "rows.csv:3: here the header stands again, in another"),
        ("\ufefftext\na\nb\ufefftext\nc\n", "rows.csv:3: the first row of another file follows"),
        ("prompt,completion\na,b\nHello, world,b\n", "rows.csv:3: 3 cells, but the header names 2 columns"),
        ("prompt,completion\na,b\nc\n", "rows.csv:3: 1 cells, but the header names 2 columns"),
        ('prompt,completion\na,b\nc,"d\ne,f\n', "rows.csv:3: a cell that begins here"),
        ('prompt,completion\na,"b" c\n', "rows.csv:2: not CSV"),
        ("prompt,completion\nq,a\nm,[]\n".replace("completion", "messages"), "rows.csv:2"),
        ("messages\n\"[{'role': 'user'}]\"\n", "rows.csv:2: messages is no JSON"),
    ],
)
def test_a_faulty_table_is_a_fault_with_its_place(content: str, words: str) -> None:
    Path("rows.csv").write_text(content)
    if words == "rows.csv:2":
        assert read("rows.csv")[0][0][1]["messages"] == "a"
    else:
        assert words in fault("rows.csv")


def test_cells_of_a_csv_become_what_their_keys_hold() -> None:
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
    row = {"messages": json.dumps(turns), "prompt": "[1]", "label": "007", "weight": "0.5", "id": "0012", "text": "12"}
    Path("rows.csv").write_text(quoted_csv([row, {**row, "label": "True"}, {**row, "label": '["a", "b"]'}]))
    rows = [row for _, row in read("rows.csv")[0]]
    assert rows[0] == {"messages": turns, "prompt": "[1]", "label": "007", "weight": 0.5, "id": "0012", "text": "12"}
    assert [row["label"] for row in rows] == ["007", True, ["a", "b"]]


def test_cells_of_a_workbook_are_what_excel_shows() -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    cells: list[tuple[Any, str, str | None]] = [
        (1, "General", "1"), (1.0, "General", "1"), (1.5, "0.00", "1.50"), (7, "00000", "00007"),
        (123456789, "000-00-0000", "123-45-6789"), (0.5, "0%", "50%"), (1234.5, "#,##0.00", "1,234.50"),
        (0.1 + 0.2, "General", "0.3"), (123456789012, "General", "123456789012"), ("007", "@", "007"),
        (datetime.date(2026, 3, 5), "yyyy-mm-dd", "2026-03-05"), (datetime.time(13, 20), "h:mm", "13:20:00"),
        (datetime.datetime(2026, 3, 5, 13, 20), "yyyy-mm-dd h:mm", "2026-03-05 13:20:00"), (True, "General", "TRUE"),
        ("a_x000D_\nb", "General", "a\nb"), (None, "General", None),
    ]  # fmt: skip
    sheet.append(["text", "note"])
    for number, (value, format, _) in enumerate(cells, 2):
        sheet.cell(number, 1, value).number_format = format
        sheet.cell(number, 2, "n")
    book.save("rows.xlsx")
    assert [row.get("text") for _, row in read("rows.xlsx")[0]] == [shown for _, _, shown in cells]


def test_cells_of_a_parquet_file_are_text_as_written() -> None:
    when = datetime.datetime(2026, 3, 5, 13, 20)
    table = pa.table(
        {
            "whole": pa.array([1, None]), "real": pa.array([1.0, None]), "short": pa.array([0.1, None], pa.float32()),
            "exact": pa.array([Decimal("1.50"), None]), "day": pa.array([when.date(), None]),
            "time": pa.array([when, None], pa.timestamp("ns")), "truth": pa.array([True, None]),
            "bytes": pa.array([b"spark", None]), "empty": pa.array(["", None]),
            "kind": pa.array(["a", None]).dictionary_encode(),
            "messages": pa.array([[{"role": "user", "content": "p", "call": {"a": 1, "b": None}}], None]),
        }
    )  # fmt: skip
    pq.write_table(table, "rows.parquet")
    first, second = (row for _, row in read("rows.parquet")[0])
    assert first == {
        "whole": "1", "real": "1.0", "short": "0.1", "exact": "1.50", "day": "2026-03-05",
        "time": "2026-03-05 13:20:00", "truth": "true", "bytes": "spark", "kind": "a",
        "messages": [{"role": "user", "content": "p", "call": {"a": 1}}],
    }  # fmt: skip
    assert second == {}


CALLS = [
    [{"role": "user", "content": "p"}, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}]}]
    for name, arguments in (("lamp", {"on": True}), ("where", {"city": "Rome"}))
]  # fmt: skip


def test_calls_in_a_parquet_file_are_those_of_the_rows_it_was_made_of() -> None:
    """Arrow has one type for all rows, so each call has the arguments of every other one as null."""
    Path("rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in CALLS))
    pq.write_table(pa.table({"messages": CALLS}), "rows.parquet")
    of_jsonl, of_parquet = (
        [example.messages for example in read_examples(find_files([name]), ReadReport())]
        for name in ("rows.jsonl", "rows.parquet")
    )
    assert of_jsonl == of_parquet
    assert of_parquet[1][1].tool_calls[0].arguments == '{"city": "Rome"}'
    assert any("null in tools and calls left out" in one for one in read("rows.parquet")[1])
    rows = paths_or_rows(datasets.Dataset.from_dict({"messages": CALLS}))
    assert [parse_row(row, "messages").messages for row in rows if isinstance(row, dict)] == of_jsonl


def test_classes_have_the_names_that_the_table_notes_for_their_numbers() -> None:
    classes = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes, "all": [classes]})
    data = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [0, 1, -1], "all": [[0], [0, 1], []]}, features=features
    )
    data.to_parquet("rows.parquet")
    wanted = [
        {"text": "a", "label": "bad", "all": ["bad"]}, {"text": "b", "label": "good", "all": ["bad", "good"]},
        {"text": "c", "all": []},
    ]  # fmt: skip
    rows, said = read("rows.parquet")
    assert [row for _, row in rows] == wanted
    assert said[0] == 'label by the names of its classes: "bad", "good"'
    assert paths_or_rows(data) == [*wanted[:2], {**wanted[2], "label": None}]


def test_each_sheet_that_holds_cells_is_a_source() -> None:
    write_book(Path("book.xlsx"), One=[["text"], ["a"]], Empty=[], Two=[[], ["text"], [None], ["b"]], Hid=[["x"]])
    book = openpyxl.load_workbook("book.xlsx")
    book["Hid"].sheet_state = "hidden"
    book.save("book.xlsx")
    assert [place for place, _ in read("book.xlsx")[0]] == ["book.xlsx:One!A2", "book.xlsx:Two!A4"]
    assert [place for place, _ in read("book.xlsx:Two")[0]] == ["book.xlsx:Two!A4"]
    assert "book.xlsx:Three!A1: the workbook has no such sheet; it has One, Empty, Two, Hid" in fault("book.xlsx:Three")
    said = "book.xlsx: hidden sheets are not read: Hid; show them, or name one: book.xlsx:Hid"
    assert unread_entries(["book.xlsx"]) == unread_entries(["."]) == [said]


def test_a_sheet_without_rows_is_passed_over_and_named_where_another_has_rows() -> None:
    write_book(Path("book.xlsx"), Notes=[["just some notes"]], One=[["text"], ["a"]])
    report = ReadReport()
    assert [row.text for row in read_examples(find_files(["book.xlsx"]), report)] == ["a"]
    assert not report.num_faults
    assert report.warnings == ["book.xlsx:Notes: the sheet holds no row under a header and is not read"]
    alone = ReadReport()
    assert not list(read_examples(find_files(["book.xlsx:Notes"]), alone))
    assert "the file holds no row" in alone.fatal[0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["text"], ["=1+1"]], "book.xlsx:S!A2: column A is a formula without a value"),
        ([["text"], ["#N/A"]], "book.xlsx:S!A2: column A holds the error #N/A"),
        ([["text", "text"], ["a", "b"]], 'book.xlsx:S!A1: the header names "text" twice'),
        ([["text"], ["a", "b"]], "book.xlsx:S!A2: column B has a cell here and no name"),
        ([["text"], ["a"], ["text"]], "book.xlsx:S!A3: the header stands here again"),
    ],
)
def test_a_faulty_sheet_is_a_fault_with_its_cell(rows: list[list[Any]], words: str) -> None:
    write_book(Path("book.xlsx"), S=rows)
    assert words in fault("book.xlsx")


def test_a_list_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces are, items, lines and the faults' columns are the same."""
    good = "\n[\n" + ",\n".join(json.dumps(row, ensure_ascii=False, indent=1) for row in ROWS * 3)
    for end in ("]", "]\n  x", ',\n {"a": 1} , {"b" 2}]', ',\n {"a": 1, "a": 2}]', ", 12, 34]", ""):
        Path("rows.json").write_text(good + end)
        found = []
        for size in (1 << 20, 1, 7, 64):
            monkeypatch.setattr(readers, "_PIECE_BYTES", size)
            found.append([(place, str(row)) for place, row in read("rows.json")[0]])
        assert found[0] == found[1] == found[2] == found[3]
        assert [place for place, _ in found[0][:3]] == ["rows.json:3", "rows.json:7", "rows.json:11"]


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_compressed_file_that_breaks_off_is_a_fault(packed: str) -> None:
    text = "".join(json.dumps({"text": f"{n * 7919 % 1000} words"}) + "\n" for n in range(5000)).encode()
    content = gzip.compress(text) if packed == ".gz" else pa.compress(text, "zstd", asbytes=True)
    Path(f"rows.jsonl{packed}").write_bytes(content[: len(content) // 2])
    rows, _ = read(f"rows.jsonl{packed}")
    assert isinstance(rows[-1][1], RowFault), rows[-1]
    assert rows[-1][1].ends_file
