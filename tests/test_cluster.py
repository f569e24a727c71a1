"""recipes/cluster: the files for schedulers are well formed, and start the launcher on each machine."""

import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch.distributed.run
import yaml

CLUSTER = Path(__file__).parents[1] / "recipes" / "cluster"
SLURM, SKYPILOT = CLUSTER / "finetune.sbatch", CLUSTER / "finetune.sky.yaml"
# The fields in use, as SkyPilot 0.14 has them (`sky.Task.from_yaml` takes the file).
SKYPILOT_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "num_nodes", "resources", "workdir", "setup", "run"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z][a-z0-9-]*$"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": "string", "pattern": "^[A-Za-z0-9-]+:[0-9]+$"},
                "disk_size": {"type": "integer"},
            },
        },
        "workdir": {"type": "string"},
        "volumes": {"type": "object", "patternProperties": {"^/": {"type": "string"}}, "additionalProperties": False},
        "envs": {"type": "object", "patternProperties": {"^[A-Z_]+$": {"type": "string"}}},
        "setup": {"type": "string"},
        "run": {"type": "string"},
    },
}
SLURM_OPTIONS = {
    "job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "signal", "requeue", "open-mode", "output"
}  # fmt: skip


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Programs of a cluster that say what they are called with, one word a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "torchrun": 'printf "%s\\n" "$@"',
        "srun": 'SLURM_NODEID=1 exec "$@"',
        "scontrol": 'test "$1 $2 $3" = "show hostnames node[0-1]" && printf "node%d\\n" {0..99999}',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def launched(words: list[str], folder: Path, **variables: str) -> Any:
    """What torch understands of the command that a script gives to `torchrun`."""
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(words, env={"PATH": path, **variables}, capture_output=True, text=True, check=True)
    return torch.distributed.run.get_args_parser().parse_args(done.stdout.splitlines())


def test_slurm_starts_a_launcher_on_each_machine(commands: Path) -> None:
    told = launched(
        ["bash", str(SLURM), "my.yaml", "data.system=Be kind."], commands, SLURM_JOB_ID="123", SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[0-1]", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="8",
    )  # fmt: skip
    assert (told.nnodes, told.nproc_per_node, told.node_rank) == ("2", "4", 1)
    assert (told.master_addr, told.master_port) == ("node0", 20123)
    assert (told.module, told.training_script) == (True, "lmtune")
    assert told.training_script_args == ["finetune", "my.yaml", "data.system=Be kind."]


def test_slurm_without_gpus_starts_one_process_a_machine(commands: Path) -> None:
    told = launched(
        ["bash", str(SLURM), "my.yaml"], commands, SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[0-1]",
    )  # fmt: skip
    assert told.nproc_per_node == "1"


def test_slurm_reads_the_options() -> None:
    text = SLURM.read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {option.removeprefix("--").partition("=")[0] for option in options} == SLURM_OPTIONS
    assert text.index("#SBATCH") < text.index("set -euo")  # Slurm reads none behind the first command


def test_skypilot_reads_the_task() -> None:
    jsonschema.validate(yaml.safe_load(SKYPILOT.read_text()), SKYPILOT_SCHEMA)


@pytest.mark.parametrize(("gpus", "processes"), [("4", "4"), ("0", "1")])
def test_skypilot_starts_a_launcher_on_each_machine(commands: Path, tmp_path: Path, gpus: str, processes: str) -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    (tmp_path / "lmtune").mkdir()
    (tmp_path / "lmtune" / "bin").symlink_to(commands)
    told = launched(
        ["bash", "-c", task["run"]], commands, HOME=str(tmp_path), SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_GPUS_PER_NODE=gpus, **task["envs"],
    )  # fmt: skip
    assert (told.nnodes, told.nproc_per_node, told.node_rank) == ("2", processes, 1)
    assert (told.master_addr, told.master_port) == ("10.0.0.1", 29500)
    assert told.training_script_args == ["finetune", "my.yaml", "run.dir=/shared/runs"]


def test_the_scripts_are_well_formed() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    for script in (SLURM.read_text(), task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
