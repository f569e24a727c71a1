"""Kernels are compared with their plain twins on every device that is there."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where tensors and models are made in this test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true" if request.param == "cpu" else "false")
    with torch.device(request.param):
        yield request.param
