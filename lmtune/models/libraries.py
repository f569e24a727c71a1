"""What is set before transformers, PEFT, bitsandbytes and Accelerate are imported: their logs and their environment.

Every entry calls it first: `load_tokenizer`, `load_model`, `check_bitsandbytes` and `start_accelerator`.
"""

from __future__ import annotations

import logging
import os
import warnings

from lmtune.io.console import warn
from lmtune.models.device import USE_CPU

_NEUTRAL = ("", "no", "none", "false", "0", "off", "default")  # what `accelerate launch` sets for a plain job
_QUIET = (
    # "inputs will be cast" and "failed to load the optional kernels" on import and on every int8 or nf4 layer
    "bitsandbytes", "bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops",
    "accelerate.big_modeling",  # "some parameters are on the meta device", where a merge reads them from the disk
    "huggingface_hub",  # a line for each of five retries without a network
)  # fmt: skip


def quiet_libraries() -> None:
    """Silence the libraries' progress bars and logs; lmtune prints what matters."""
    ignore_accelerate_settings()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # `check_loaded` says it
    # PEFT looks at it whenever an adapter is put on a model
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # a merge unties them
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True but")  # GPT-2's head beside its layers
    for name in _QUIET:  # before they are imported: some speak while they are
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def ignore_accelerate_settings() -> None:
    """Remove the variables of `accelerate config` or another project; warn of those in effect.

    lmtune uses Accelerate for its processes only: such a variable would load DeepSpeed, or shard or compile the model.
    """
    names = sorted(name for name in os.environ if name.startswith("ACCELERATE_") and name != USE_CPU)
    meant = [name for name in names if os.environ[name].lower() not in _NEUTRAL]
    for name in names:
        del os.environ[name]
    if meant and os.environ.get("RANK", "0") == "0":
        warn(f"{', '.join(meant)}: ignored; lmtune is configured by its own settings; unset these variables")
