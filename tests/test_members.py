"""Several adapters on one base: each row of a batch by its own, and what several say together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig

from lmtune.inference.engine import TransformersEngine
from lmtune.inference.request import Request, Sampling
from lmtune.kernels.lora_linear import fuse
from lmtune.models.members import BASE, Members
from tests.chat_models import random_model

PROMPTS = [[5, 6, 7], list(range(40, 61)), [9] * 8, [100, 200, 300, 17, 18], [11, 12]]
NAMES = ("default", "wide", "scaled", BASE, "wide")


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def model(request: pytest.FixtureRequest) -> Any:
    """Three adapters of different ranks and layers on one base, one of them with DoRA where that is asked."""
    model = random_model()
    torch.manual_seed(3)
    model.add_adapter("wide", LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", init_lora_weights=False))
    model.add_adapter(
        "scaled",
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, use_dora=request.param),
    )
    assert fuse(model) == []
    return model.eval()


def logits(model: Any, name: str, ids: Sequence[int]) -> torch.Tensor:
    """`[T, V]` of one adapter alone, without padding or cache."""
    with torch.no_grad():
        if name == BASE:
            with model.disable_adapter():
                return model(input_ids=torch.tensor([list(ids)])).logits[0]
        model.set_adapter(name)
        found = model(input_ids=torch.tensor([list(ids)])).logits[0]
        model.set_adapter("default")
        return found


def greedy(model: Any, prompt: Sequence[int], members: Members, count: int) -> list[int]:
    """The tokens of all members together, found the plain way: every sequence read anew by each of them alone."""
    ids = list(prompt)
    for _ in range(count):
        each = torch.stack([logits(model, name, ids)[-1] for name in members.adapters])
        shares = each.softmax(-1)
        if members.method == "vote":
            votes = shares.argmax(-1).tolist()
            shares = torch.stack([torch.nn.functional.one_hot(torch.tensor(v), shares.shape[-1]) + 1e-4 * s
                                  for v, s in zip(votes, shares, strict=True)])  # fmt: skip
        weights = members.weights or (1.0,) * len(each)
        ids.append(int(sum(w * s for w, s in zip(weights, shares, strict=True)).argmax()))
    return ids[len(prompt) :]


def test_each_row_of_a_batch_is_what_its_adapter_says_alone(model: Any) -> None:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    places = (mask.cumsum(-1) - 1).clamp(0)
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, position_ids=places, adapter_names=list(NAMES)).logits
    for row, name, prompt in zip(mixed, NAMES, PROMPTS, strict=True):
        wanted = logits(model, name, prompt)
        assert float((row[-len(prompt) :] - wanted).abs().max() / wanted.abs().max()) < 1e-5
        torch.testing.assert_close(row[-len(prompt) :].softmax(-1), wanted.softmax(-1), atol=1e-5, rtol=0)
    apart = [(logits(model, name, PROMPTS[1]) - logits(model, BASE, PROMPTS[1])).abs().max() for name in NAMES]
    assert sum(float(one) > 0.1 for one in apart) == 4, "the adapters say other things than the base"


def test_a_layer_in_16_bit_rounds_once_for_every_row(model: Any) -> None:
    """PEFT rounds the base's product before it adds the adapter's; here a row is bit for bit what it is alone."""
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    half, x = layer.get_base_layer().to(torch.bfloat16), torch.randn(3, 4, 64).bfloat16()
    try:
        mixed = layer(x, adapter_names=["default", "wide", "default"])
        for index, name in enumerate(("default", "wide", "default")):
            layer.set_adapter(name)
            torch.testing.assert_close(mixed[index], layer(x[index : index + 1])[0], atol=2e-2, rtol=8e-3)
    finally:
        layer.set_adapter("default")
        half.float()


def test_a_batch_generates_what_each_request_generates_alone(model: Any) -> None:
    engine = TransformersEngine(model)
    samplings = [
        Sampling(max_new_tokens=12), Sampling(max_new_tokens=5), Sampling(0.8, 0.9, 12, seed=4),
        Sampling(max_new_tokens=12), Sampling(1.2, max_new_tokens=9, seed=1),
    ]  # fmt: skip
    requests = [
        Request(prompt, sampling, Members((name,)))
        for prompt, name, sampling in zip(PROMPTS, NAMES, samplings, strict=True)
    ]
    alone = [list(engine.submit(request)) for request in requests]
    assert engine.generate(requests) == alone
    assert [len(one) for one in alone] == [12, 5, 12, 12, 9]
    for place in (0, 3):
        assert alone[place] == greedy(model, PROMPTS[place], requests[place].members, 12)
    stops = [Request(one.prompt_ids, Sampling(max_new_tokens=12, stop_token_ids=(said[2],)), one.members)
             for one, said in zip(requests, alone, strict=True) if one.sampling.temperature == 0]  # fmt: skip
    assert [len(said) for said in engine.generate(stops)] == [2, 2, 2]
    assert TransformersEngine(model, batch_tokens=1).generate(requests) == alone


@pytest.mark.parametrize(
    "members",
    [
        Members(("default", "wide", "scaled")), Members(("default", "wide", "scaled"), (0.2, 3.0, 1.0)),
        Members(("default", "wide", "scaled"), method="vote"), Members(("wide", BASE), (1.0, 2.5), "vote"),
    ],
)  # fmt: skip
def test_an_ensemble_says_the_token_of_all_members_together(model: Any, members: Members) -> None:
    engine = TransformersEngine(model)
    requests = [Request(prompt, Sampling(max_new_tokens=8), members) for prompt in PROMPTS[:3]]
    requests.append(Request(PROMPTS[3], Sampling(max_new_tokens=8)))  # by whom is active, in the same batch
    wanted = [greedy(model, one.prompt_ids, one.members, 8) for one in requests[:3]]
    wanted.append(greedy(model, PROMPTS[3], Members(("default",)), 8))
    assert engine.generate(requests) == wanted
    assert [list(engine.submit(one)) for one in requests] == wanted


def test_probabilities_are_combined_by_weight_and_ties_of_votes_go_to_the_mean() -> None:
    each = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1]])
    each = each.double()
    torch.testing.assert_close(Members(("a", "b", "c")).combine(each), each.mean(0))
    weighted = Members(("a", "b", "c"), (1.0, 2.0, 1.0))
    torch.testing.assert_close(weighted.combine(each), (each[0] + 2 * each[1] + each[2]) / 4)
    vote = Members(("a", "b", "c"), method="vote").combine(each)  # one each: the mean is 0.37, 0.33, 0.30
    torch.testing.assert_close(vote, torch.full((3,), 1 / 3).double(), atol=1e-4, rtol=0)
    assert int(vote.argmax()) == 0
    assert int(Members(("a", "b", "c"), (1.0, 1.0, 1.5), "vote").combine(each).argmax()) == 1


def test_outputs_of_classifiers_say_the_mean_of_probabilities_or_values() -> None:
    scores = torch.tensor([[[2.0, -1.0]], [[-3.0, 0.5]]])  # [M, S, K]
    both = Members(("a", "b"), (1.0, 3.0))
    one = both.outputs("single_label", scores).softmax(-1)
    torch.testing.assert_close(one[0], 0.25 * scores[0, 0].softmax(-1) + 0.75 * scores[1, 0].softmax(-1))
    many = both.outputs("multi_label", scores).sigmoid()
    torch.testing.assert_close(many[0], 0.25 * scores[0, 0].sigmoid() + 0.75 * scores[1, 0].sigmoid())
    torch.testing.assert_close(both.outputs("value", scores[..., :1]), torch.tensor([[0.25 * 2 - 0.75 * 3]]))
    votes = Members(("a", "b"), (1.0, 3.0), "vote").outputs("multi_label", scores).sigmoid()
    torch.testing.assert_close(votes[0], torch.tensor([0.25, 0.75]), atol=1e-4, rtol=0)
