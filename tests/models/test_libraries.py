"""The libraries say nothing of their own, from the first import on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workplace import environment

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

LOUD = """
import logging
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load a kernel")
logging.getLogger("bitsandbytes").warning("no GPU here")
"""
ENTRIES = {
    "tokenizer": "from lmtune.config.schema import ModelConfig; from lmtune.models.base import load_tokenizer;"
    "load_tokenizer(ModelConfig(name='tiny')); import bitsandbytes",
    "processes": "from lmtune.config.schema import ReplicatedConfig; from lmtune.parallel.launch import connect; "
    "connect(ReplicatedConfig(), 60); import bitsandbytes",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_a_library_says_while_it_is_imported_is_not_shown(tmp_path: Path, entry: str) -> None:
    """bitsandbytes speaks of kernels that it does not find on some CPUs; this stands for it on any."""
    (tmp_path / "bitsandbytes.py").write_text(LOUD)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {ENTRIES[entry]}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert set(done.stderr.splitlines()) <= {"loading the tokenizer of tiny …"}  # our own progress


@pytest.mark.slow
def test_an_adapter_is_put_on_a_model_without_a_word(tmp_path: Path) -> None:
    code = """
from lmtune.config.schema import LoraConfig, ModelConfig
from lmtune.models.tuning.lora import attach_adapter
from lmtune.models.base import load_model
attach_adapter(load_model(ModelConfig(name="tiny", quantization="nf4"), "cpu"), LoraConfig(), 1, "tiny")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert set(done.stderr.splitlines()) <= {"loading tiny in nf4 …"}  # our own progress, if it takes so long


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_do_not_spin_while_they_wait_unless_asked_to(given: dict[str, str], policy: str) -> None:
    """However lmtune is used: the command, a recipe, or a program that imports it before torch."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    variables = {**variables, **given, "OMP_DISPLAY_ENV": "true"}
    code = "import lmtune, torch"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
