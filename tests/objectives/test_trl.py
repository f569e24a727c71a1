"""The objectives beside TRL's, where the extra `bench` is installed: the same rows and weights, over several steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmtune.config.schema import OrpoConfig, SimpoConfig
from lmtune.data.types import TokenizedExample
from lmtune.objectives.preference import Answers, Orpo, Simpo, WithOtherAnswers
from tests.jobs import final_weights, job_for, records
from tests.objectives import test_heads
from tests.objectives.test_preference import rows_for
from tests.tiny import Rows, adapted, tiny_classifier, tiny_model, token_sequence
from tests.tokenizers import make_tokenizer

trl = pytest.importorskip("trl")
orpo = pytest.importorskip("trl.experimental.orpo")
STEPS, ROWS = 6, 6


def prepared(kind: type[Any]) -> type[Any]:
    """A trainer that takes tokenized rows."""
    as_it_is = lambda self, given, *rest, **more: given  # noqa: E731
    return type("Prepared", (kind,), {"_prepare_dataset": as_it_is, "tokenize_row": as_it_is})


def parts(sequence: Any) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of the answer."""
    return sequence.input_ids[~sequence.loss_mask].tolist(), sequence.input_ids[sequence.loss_mask].tolist()


def pairs_of(rows: Rows) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": parts(row.sequences[0])[0], "chosen_ids": parts(row.sequences[0])[1],
         "rejected_ids": parts(row.sequences[1])[1]}
        for row in rows.rows
    ]  # fmt: skip


def judged_of(rows: Rows) -> list[dict[str, Any]]:
    both = WithOtherAnswers(rows)
    found = []
    for index, row in enumerate(rows.rows):
        own, other = both[index].sequences
        prompt, answer = parts(own)
        found.append({
            "prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": parts(other)[1], "label": row.label,
        })  # fmt: skip
    return found


def whole_pairs_of(rows: Rows) -> list[dict[str, Any]]:
    return [
        {"chosen_ids": row.sequences[0].input_ids.tolist(), "rejected_ids": row.sequences[1].input_ids.tolist()}
        for row in rows.rows
    ]


def labelled_pairs_of(rows: Rows) -> list[dict[str, Any]]:
    found = []
    for row in rows.rows:
        both = dict(zip(("chosen", "rejected"), map(parts, row.sequences), strict=True))
        found.append({"prompt_input_ids": both["chosen"][0], "prompt_attention_mask": [1] * len(both["chosen"][0])})
        for name, (prompt, answer) in both.items():
            found[-1][f"{name}_input_ids"] = [*prompt, *answer]
            found[-1][f"{name}_attention_mask"] = [1] * len([*prompt, *answer])
            found[-1][f"{name}_labels"] = [*[-100] * len(prompt), *answer]
    return found


def where_orpos_agree(rows: Rows) -> Rows:
    """Pairs behind one token, with chosen answers of one length.

    TRL's cross-entropy is over the prompt too, and of a batch the mean over tokens; ours and the paper's is over the
    answer, and of each answer the mean. With these pairs both are the same.
    """
    made = []
    for row in rows.rows:
        answers = [parts(sequence) for sequence in row.sequences]
        (prompt, chosen), (_, rejected) = answers
        cut = [[prompt[-1], *chosen[:3]], [prompt[-1], *rejected]]
        pair = tuple(token_sequence(ids, [0] + [1] * (len(ids) - 1)) for ids in cut)
        made.append(TokenizedExample(row.location, pair, {}, row.label, row.weight))
    return Rows(made)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"kind": "dpo", "beta": 0.5}, {"beta": 0.5, "precompute_ref_log_probs": True}),
    "ipo": ({"kind": "ipo", "beta": 0.4}, {"beta": 0.4, "loss_type": ["ipo"], "precompute_ref_log_probs": True}),
    "kto": (
        {"kind": "kto", "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7, "precompute_ref_log_probs": True},
    ),
    "orpo": ({"kind": "orpo", "beta": 0.6}, {"beta": 0.6}),
    "reward": ({"kind": "reward"}, {}),
}
MADE = {
    "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, labelled_pairs_of),
    "kto": (trl.KTOTrainer, trl.KTOConfig, judged_of),
    "reward": (trl.RewardTrainer, trl.RewardConfig, whole_pairs_of),
}


@pytest.mark.long
@pytest.mark.filterwarnings("default::FutureWarning")  # what TRL calls
@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_trls_trainer(name: str, tmp_path: Path) -> None:
    """From an adapter that is not the start; it is the reference of both."""
    from datasets import Dataset

    ours, theirs = CASES[name]
    trainer_kind, config_kind, rows_of = MADE.get(name, (trl.DPOTrainer, trl.DPOConfig, pairs_of))
    head = test_heads.CASES["reward"][1] if name == "reward" else None
    rows = test_heads.rows_for("reward", weights=False) if name == "reward" else rows_for(name, ROWS)
    rows = where_orpos_agree(rows) if name == "orpo" else Rows(rows.rows[:ROWS])

    def model() -> Any:
        return adapted(tiny_model() if head is None else tiny_classifier(head))

    job = job_for(
        tmp_path, model=model(), objective=ours, rows=rows, head=head, train__epochs=STEPS, train__batch_size=ROWS,
        train__schedule="constant", train__warmup_ratio=0.0, train__max_grad_norm=None, train__learning_rate=2e-3,
    )  # fmt: skip
    weights = final_weights(job)
    config = config_kind(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, learning_rate=2e-3, lr_scheduler_type="constant",
        max_grad_norm=1e9, num_train_epochs=STEPS, per_device_train_batch_size=ROWS, report_to="none",
        save_strategy="no", logging_steps=1, gradient_checkpointing=False, max_length=None, disable_tqdm=True,
        train_sampling_strategy="sequential", **theirs,
    )  # fmt: skip
    trainer = prepared(trainer_kind)(
        model=model(),
        args=config,
        train_dataset=Dataset.from_list(rows_of(rows)),
        processing_class=make_tokenizer(None),
    )
    trainer.train()
    wanted = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in records(job)] == pytest.approx([float(loss) for loss in wanted], abs=1e-4)
    for key, parameter in trainer.model.named_parameters():
        if key in weights:
            torch.testing.assert_close(parameter.detach(), weights[key], atol=1e-4, rtol=0)


def answers() -> Answers:
    generator = torch.Generator().manual_seed(0)
    logprobs = tuple(-5 * torch.rand(7, generator=generator) - 1 for _ in range(2))
    lengths = tuple(torch.randint(2, 9, (7,), generator=generator).float() for _ in range(2))
    zeros = torch.zeros(7)
    return Answers(logprobs, lengths, (zeros, zeros), torch.ones(7), torch.arange(7))  # type: ignore[arg-type]


def test_odds_are_those_of_trls_orpo() -> None:
    """Of answers of any length behind prompts of any length."""
    some = answers()
    chosen, rejected = some.means
    trainer: Any = SimpleNamespace(beta=0.6, accelerator=SimpleNamespace(device="cpu"))
    odds, reward_chosen, reward_rejected, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    losses, rewards = Orpo(OrpoConfig(beta=0.6)).of_pairs(some)
    torch.testing.assert_close(losses, -chosen - odds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rewards, (reward_chosen, reward_rejected))


def test_losses_are_those_of_trls_simpo() -> None:
    from trl.experimental.cpo import CPOTrainer

    some = answers()
    trainer: Any = SimpleNamespace(
        beta=2.5, simpo_gamma=0.8, loss_type="simpo", label_smoothing=0.0, alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    wanted, *rewards = CPOTrainer.cpo_loss(trainer, *some.means)
    losses, found = Simpo(SimpoConfig(beta=2.5, gamma=0.8)).of_pairs(some)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, tuple(rewards))
