"""Tests run offline, on a fixed number of threads, with caches of their own."""

import os
from pathlib import Path

import pytest

# The models are tiny: a second thread gains nothing, and waits for its turn where other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # of the terminal that the tests were started in
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LMTUNE_CACHE", str(folder))
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked `gpu` where there is none, and `real` outside of `make test-real`; count as deselected."""
    left_out = [item for item in items if item.get_closest_marker("real") and "LMTUNE_REAL" not in os.environ]
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        left_out += [item for item in items if item.get_closest_marker("gpu") and not torch.cuda.is_available()]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
