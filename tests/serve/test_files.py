"""`/v1/files` through the `openai` client: uploads are checked line by line, listed in pages, downloaded, deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lmtune.serve.fine_tuning.files import files_router
from lmtune.serve.fine_tuning.store import Store
from lmtune.serve.openai.errors import add_error_handlers
from tests.serve.fine_tuning_server import PAIRS, ROWS, Served, lines, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("files") / "runs") as server:
        yield server


@pytest.mark.parametrize("rows", [ROWS, PAIRS])
def test_a_file_comes_back_as_it_was_sent(served: Served, rows: list[object]) -> None:
    client = served.client
    file = client.files.create(file=("mine.jsonl", lines(rows)), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "mine.jsonl",
        len(lines(rows)),
        "fine-tune",
        "processed",
    )
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == lines(rows)
    assert client.files.wait_for_processing(file.id) == file
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            ask(file.id)
    assert not list(served.folder.rglob(f"*{file.id}*"))


def test_a_table_is_called_one(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=r"a table; expected JSON lines: lmtune prepare my\.csv -o"):
        served.client.files.create(file=("my.csv", b"question,answer\na,b\n"), purpose="fine-tune")


def test_every_faulty_line_is_named_and_nothing_is_kept(served: Served) -> None:
    rows = lines(ROWS[:2]) + b'{"messages": [{"role": "user", "content": "Why?"}]}\n' + lines(ROWS[2:3]) + b"{oh\n"
    before = len(served.client.files.list().data)
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.files.create(file=("mine.jsonl", rows), purpose="fine-tune")
    assert (caught.value.param, caught.value.code) == ("file", "invalid_file_format")
    message = str(caught.value.body["message"])  # type: ignore[index]
    assert message.splitlines()[0] == "file: mine.jsonl: 2 faulty lines"
    assert message.splitlines()[1].startswith("  line 3: messages holds no answer")
    assert message.splitlines()[2].startswith("  line 5: not JSON")
    assert str(served.folder) not in message
    assert "rows.jsonl" not in message
    assert len(served.client.files.list().data) == before


@pytest.mark.parametrize(
    ("content", "purpose", "said"),
    [(b"", "fine-tune", "holds no row"), (b"\x89PNG\x00", "fine-tune", "not UTF-8"), (b"x", "vision", "purpose: vis")],
)  # fmt: skip
def test_what_holds_no_rows_is_refused(served: Served, content: bytes, purpose: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        served.client.files.create(file=("mine.jsonl", content), purpose=purpose)  # type: ignore[arg-type]


def test_files_for_other_purposes_are_kept_as_they_are(served: Served) -> None:
    file = served.client.files.create(file=("notes.txt", b"anything\xff"), purpose="user_data")
    assert served.client.files.content(file.id).read() == b"anything\xff"
    with pytest.raises(openai.BadRequestError, match="uploaded for user_data") as caught:
        served.client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert caught.value.param == "training_file"


def test_lists_have_pages_orders_and_purposes(tmp_path: Path) -> None:
    with serving(tmp_path / "runs") as server:
        client = server.client
        ids = [client.files.create(file=(f"{n}.txt", b"x"), purpose="batch").id for n in range(5)]
        own = server.upload(ROWS)
        assert [file.id for file in client.files.list(purpose="batch")] == ids[::-1]
        assert [file.id for file in client.files.list(order="asc")] == [*ids, own]
        assert [file.id for file in client.files.list(purpose="batch", limit=2)] == ids[::-1]  # it asks for all pages
        page = client.files.list(purpose="batch", limit=2, after=ids[3])
        assert [file.id for file in page.data] == [ids[2], ids[1]]
        assert page.has_more
        with pytest.raises(openai.BadRequestError, match="after: file-none"):
            client.files.list(after="file-none")


def test_too_large_a_file_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    application = FastAPI()
    add_error_handlers(application)
    application.include_router(files_router(Store(tmp_path), max_bytes=1000))
    client = TestClient(application)
    for size in (1001, 5_000_000):
        answer = client.post("/v1/files", files={"file": ("a.jsonl", b"x" * size)}, data={"purpose": "batch"})
        assert answer.status_code == 413
        assert answer.json()["error"]["message"].startswith("file: larger than 1,000 bytes")
    assert client.post("/v1/files", files={"file": ("a", b"x" * 1000)}, data={"purpose": "batch"}).status_code == 200
    assert len(list((tmp_path / "files").iterdir())) == 1


def test_files_outlive_the_server(tmp_path: Path) -> None:
    with serving(tmp_path / "runs") as server:
        file = server.upload(ROWS)
    with serving(tmp_path / "runs") as server:
        assert server.client.files.content(file).read() == lines(ROWS)
