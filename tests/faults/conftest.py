"""A run that nothing disturbed, and places where one is about to be."""

from pathlib import Path
from typing import Any

import pytest

from tests.processes import lmtune, said, together
from tests.workplace import RESTLESS, lasting, make_workplace, write_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test here starts whole runs, most of them several: all are slow."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with base, data and the settings of a restless run, not begun yet."""
    folder = make_workplace(tmp_path / "work")
    write_config(folder, **RESTLESS)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lasts of the restless run when nothing goes wrong."""
    folder = make_workplace(tmp_path_factory.mktemp("undisturbed"))
    write_config(folder, **RESTLESS)
    assert lmtune(folder, "finetune", "run.yaml") == 0, said(folder)
    return lasting(folder)


@pytest.fixture(scope="session")
def undisturbed_pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of two processes."""
    folder = make_workplace(tmp_path_factory.mktemp("pair"))
    write_config(folder, **RESTLESS)
    assert together(folder, "finetune", "run.yaml") == [0, 0], said(folder, "output0")
    return lasting(folder)
