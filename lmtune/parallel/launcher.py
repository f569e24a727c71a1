"""`accelerate launch` without the launcher's own traceback: a process that failed has said why, in one message.

python -m lmtune.parallel.launcher --num_processes 2 recipes/finetune.py CONFIG
"""

import logging
import os
import signal
import sys

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from lmtune.io.console import err
from lmtune.parallel.worker import PARENT_PID, exit_with_parent

STOP_SECONDS = 7 * 24 * 3600  # for a step that is to be saved; torch's agent would kill its processes after 30

if __name__ == "__main__":
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(STOP_SECONDS)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a launcher that is gone, told in forty lines every second
    if PARENT_PID in os.environ:
        exit_with_parent()
    os.environ[PARENT_PID] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say anything
            name = signal.Signals(-failure.exitcode).name
            hint = "; perhaps the memory was full" if name == "SIGKILL" else ""
            err.print(f"[bold red]error:[/] process {failure.local_rank} was ended by {name}{hint}")
        sys.exit(1)
    except SignalException as stopped:  # the processes have saved and said so
        sys.exit(128 + stopped.sigval)
