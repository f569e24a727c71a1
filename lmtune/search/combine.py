"""One adapter of the members of an ensemble, by PEFT: as fast as a single model, and mostly not as good as all.

    combine(load_members(file, folder), "ties", source, folder / "combined-ties")

linear   the mean of the members' updates, `Σ w B A`, exactly: an adapter of the sum of their ranks (PEFT's `cat`)
ties     of each update the larger half, of the sign that most of it has, then their mean (TIES, arXiv:2306.01708)
dare     of each update a random half, twice as large, then their mean (DARE, arXiv:2311.03099)

ties and dare are of the updates themselves (PEFT's `ties_svd` and `dare_linear_svd`), and what comes of them is cut to
the rank of all members together. PEFT's forms without `svd` take A and B apart, whose product is no mean of updates.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from lmtune.config.schema import MAX_RANK
from lmtune.errors import ConfigError
from lmtune.io.atomic import new_folder
from lmtune.models.locate import adapter_base, shareable_name
from lmtune.models.tuning.adapter_files import CONFIG, WEIGHTS, Metadata
from lmtune.models.tuning.lora import write_adapter_files

if TYPE_CHECKING:
    from peft import PeftModel

    from lmtune.inference.load import LoadedModel

Combination = Literal["linear", "ties", "dare"]
_OF_PEFT = {"linear": "cat", "ties": "ties_svd", "dare": "dare_linear_svd"}
_DENSITY = 0.5  # the share of an update that is kept
_NAME = "combined"


def combine(loaded: LoadedModel, kind: Combination, source: Path, folder: Path, seed: int = 0) -> None:
    """Write the adapter folder of all members as one; plain PEFT loads it.

    Args:
        loaded: of `load_members`.
        kind: how.
        source: the adapter folder of a member, for its tokenizer and what else is in it.
        folder: to write; one from before is replaced.
        seed: of the random halves of `dare`.

    Raises:
        ConfigError: PEFT cannot combine these adapters.
    """
    from peft import get_peft_model_state_dict

    model, names = cast("PeftModel", loaded.model), list(loaded.members.adapters)
    shares = torch.tensor(loaded.members.weights, dtype=torch.float64)
    shares /= shares.sum()
    configs = [model.peft_config[name] for name in names]
    if any(getattr(config, "use_dora", False) for config in configs):
        raise ConfigError("--combine: DoRA's magnitudes have no mean with PEFT; expected plain LoRA (tuning.use_dora)")
    rank = sum(max(config.r, *config.rank_pattern.values(), 0) for config in configs)
    if rank > MAX_RANK:
        raise ConfigError(f"--combine: the ranks add up to {rank}; expected {MAX_RANK} or less; take fewer members")
    # `ties` takes the mean over those that are left of an element, the others a sum
    weights = (shares * len(names) if kind == "ties" else shares).tolist()
    with _without_heads(model, names[1:]), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.base_model.add_weighted_adapter(
                names, weights, _NAME, combination_type=_OF_PEFT[kind], svd_rank=rank, svd_full_matrices=False,
                density=None if kind == "linear" else _DENSITY,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"--combine {kind}: PEFT cannot combine these adapters: {error}") from None
    stored = dict(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))
    each = [get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in names]
    for key in each[0]:
        if ".lora_" not in key:  # whole modules, as a classifier's head: the mean
            stored[key] = sum(share * state[key].double() for share, state in zip(shares, each, strict=True)).float()
    stored = {key: tensor.contiguous() for key, tensor in stored.items()}
    metadata = replace(Metadata.read(source), base_model=shareable_name(adapter_base(source).name, folder))
    config = model.peft_config[_NAME].to_dict()
    config.update(r=rank, lora_alpha=rank, use_rslora=False, lora_dropout=0.0)  # the scaling is in the tensors
    model.delete_adapter(_NAME)
    with new_folder(folder) as staging:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in (WEIGHTS, CONFIG, "README.md"):
                shutil.copy2(path, staging / path.name)
        write_adapter_files(staging, stored, config, metadata)


@contextlib.contextmanager
def _without_heads(model: PeftModel, names: Sequence[str]) -> Iterator[None]:
    """Inside the block these adapters have no whole modules: PEFT combines LoRA layers alone, and refuses others."""
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    held = [(one.modules_to_save, name, one.modules_to_save.pop(name))
            for one in wrappers for name in names if name in one.modules_to_save]  # fmt: skip
    try:
        yield
    finally:
        for modules, name, module in held:
            modules[name] = module
