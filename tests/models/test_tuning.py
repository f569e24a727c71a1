"""The seam of tunings: what is trained is saved and loaded again as it was, whichever way of tuning it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmtune.config.schema import LoraConfig
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.base import Tuning
from lmtune.models.tuning.full import Full
from lmtune.models.tuning.lora import Lora
from tests.tiny import tiny_model

TUNINGS: dict[str, Callable[[], Tuning]] = {"lora": lambda: Lora(LoraConfig(rank=4, alpha=8)), "full": Full}
IDS = torch.arange(3, 20)[None]


@pytest.mark.parametrize("name", TUNINGS)
def test_what_was_trained_is_saved_and_loaded_as_it_was(tmp_path: Path, name: str) -> None:
    tuning = TUNINGS[name]()
    assert tuning.kind == name
    model = tuning.apply(tiny_model(), seed=0, base_name="tiny-random")
    groups = tuning.parameter_groups(model, weight_decay=0.5)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.trainable().values()}
    for parameter in grouped:
        parameter.data += 0.01 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    before = model.module.eval()(input_ids=IDS).logits
    tuning.save(model, tmp_path, Metadata())
    loaded = TUNINGS[name]().load(tiny_model(), tmp_path)
    assert torch.equal(loaded.module(input_ids=IDS).logits, before)
    assert not loaded.trainable()
    assert not torch.equal(tiny_model()(input_ids=IDS).logits, before)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("name", TUNINGS)
def test_other_weights_are_saved_in_place_of_the_models_own(tmp_path: Path, name: str, is_tied: bool) -> None:
    """Those of the best step, while the model holds the last one's; a tied head is that of the embedding."""
    tuning = TUNINGS[name]()
    model = tuning.apply(tiny_model(tie_word_embeddings=is_tied), seed=0, base_name="tiny-random")
    best = {key: parameter.detach() + 0.5 for key, parameter in model.trainable().items()}
    tuning.save(model, tmp_path, Metadata(), best)
    loaded = TUNINGS[name]().load(tiny_model(tie_word_embeddings=is_tied), tmp_path)
    found = dict(loaded.module.named_parameters())
    assert all(torch.equal(found[key], tensor) for key, tensor in best.items())
    if name == "full":
        assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not is_tied


def test_matrices_decay_and_norms_do_not() -> None:
    groups = Full().parameter_groups(Full().apply(tiny_model(), 0, "x"), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.dim() >= 2 for parameter in groups[0]["params"])
    assert all(parameter.dim() < 2 for parameter in groups[1]["params"])
