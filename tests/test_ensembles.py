"""Ensembles: how their members are trained, what they say together, and one adapter made of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lmtune
from lmtune.data.types import Message
from lmtune.errors import ConfigError, LmtuneError, ModelError
from lmtune.evaluation.drift import drift_of
from lmtune.evaluation.evaluate import evaluate_loaded
from lmtune.evaluation.scoring import row_losses
from lmtune.inference.load import load_for_inference
from lmtune.inference.request import Request, Sampling
from lmtune.models.members import BASE, Members
from lmtune.recipes import evaluate
from lmtune.runs.ensembles import FILE, EnsembleFile, joined
from lmtune.runs.store import RunDirectory
from lmtune.search.combine import combine
from lmtune.search.ensemble import bootstrap, load_rows, samme, score_ensemble, train_ensemble
from lmtune.training.run import run_finetune
from tests.processes import KILL, after_update, said
from tests.processes import lmtune as command
from tests.workplace import config_of, inside, lasting, make_workplace, write_config, write_rows

pytestmark = pytest.mark.slow  # runs

COLOURS = {"red": "fire blood rose", "green": "grass leaf frog", "blue": "sea sky ice"}
TEXTS = [
    {"text": f"{word} number {n}", "label": colour}
    for n in range(4) for colour, words in COLOURS.items() for word in words.split()
]  # fmt: skip
CLASSIFY: dict[str, Any] = {"objective__kind": "classification", "train__learning_rate": 3e-3, "train__max_steps": 6}


def labelled_place(folder: Path) -> Path:
    """A workplace with texts of three classes."""
    place = make_workplace(folder)
    write_rows(place / "train.jsonl", TEXTS[:-9])
    write_rows(place / "validation.jsonl", TEXTS[-9:])
    return place


@pytest.fixture(scope="module")
def bagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a bagged classifier, `runs/trial`."""
    place = labelled_place(tmp_path_factory.mktemp("work"))
    with inside(place):
        train_ensemble(config_of(**CLASSIFY), 3, "bagging")
    return place


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a bagged language model."""
    place = make_workplace(tmp_path_factory.mktemp("work"))
    with inside(place):
        train_ensemble(config_of(), 2, "bagging")
    return place


# --- rows and weights


def test_samme_weighs_as_scikit_learn_does() -> None:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.ensemble import AdaBoostClassifier

    generator = np.random.default_rng(0)
    right = generator.integers(0, 4, 60)
    guesses = [np.where(generator.random(60) < share, right, (right + 1) % 4) for share in (0.6, 0.5, 0.7, 0.55)]
    seen: list[np.ndarray] = []

    class Fixed(ClassifierMixin, BaseEstimator):
        said: ClassVar[list[np.ndarray]] = [*guesses]

        def fit(self, rows: np.ndarray, labels: np.ndarray, sample_weight: np.ndarray) -> Any:
            self.classes_, self.guess = np.unique(labels), self.said[len(seen)]
            seen.append(sample_weight.copy())
            return self

        def predict(self, rows: np.ndarray) -> np.ndarray:
            return self.guess

    weights = generator.random(60) + 0.5
    theirs = AdaBoostClassifier(Fixed(), n_estimators=4).fit(np.zeros((60, 1)), right, weights)
    factors = np.ones(60)
    for guess, alpha, before in zip(guesses, theirs.estimator_weights_, seen, strict=True):
        np.testing.assert_allclose(weights * factors / weights.sum(), before, rtol=1e-9)
        step = samme(guess != right, weights, factors, 4)
        assert step.alpha == pytest.approx(alpha, rel=1e-9)
        assert not step.is_last
        factors = step.factors


def test_boosting_ends_with_a_member_that_is_perfect_or_no_better_than_chance() -> None:
    ones = np.ones(6)
    perfect = samme(np.zeros(6, dtype=bool), ones, ones, 3)
    assert (perfect.alpha, perfect.is_last) == (1.0, True)
    chance = samme(np.array([1, 1, 1, 1, 0, 0], dtype=bool), ones, ones, 3)
    assert (chance.alpha, chance.is_last) == (None, True)


def test_a_bootstrap_sample_depends_on_seed_and_member_alone() -> None:
    one = bootstrap(200, 7, 1)
    assert one == bootstrap(200, 7, 1) != bootstrap(200, 7, 2)
    assert one != bootstrap(200, 8, 1)
    assert len(one.train) == 200
    assert 110 < len(set(one.train)) < 145, "63 % of the rows"


# --- members are runs


def test_bagging_is_what_one_does_by_hand(bagged: Path, tmp_path: Path) -> None:
    place = labelled_place(tmp_path)
    for number in (1, 2, 3):
        with inside(place):
            config = config_of(**CLASSIFY, run__name=f"hand-{number}")
            run_finetune(config, RunDirectory.of(config.run), bootstrap(27, 0, number))
        ours = bagged / "runs" / "trial" / f"member-{number}"
        one, other = (load_file(run / "adapter" / "adapter_model.safetensors")
                      for run in (ours, place / "runs" / f"hand-{number}"))  # fmt: skip
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_classifier_says_the_mean_of_its_members_or_their_votes(bagged: Path) -> None:
    with inside(bagged):
        rows = [{"text": row["text"]} for row in TEXTS[-9:]] + [{"text": "sky rose"}]
        each = [lmtune.predict(f"runs/trial/member-{number}", rows) for number in (1, 2, 3)]
        together = lmtune.predict("trial", rows)
        votes = lmtune.predict(lmtune.load("trial", vote=True), rows)
        scored = lmtune.evaluate("runs/trial", "validation.jsonl")
        said = lmtune.load("trial").chat(rows[0]["text"])
    for place, (found, voted) in enumerate(zip(together, votes, strict=True)):
        shares = [one[place]["probabilities"] for one in each]
        mean = {name: sum(one[name] for one in shares) / 3 for name in shares[0]}
        assert found["probabilities"] == pytest.approx(mean, abs=1e-5)
        assert found["prediction"] == max(mean, key=mean.__getitem__)
        counted = [one[place]["prediction"] for one in each]
        assert counted.count(voted["prediction"]) == max(counted.count(name) for name in counted)
        assert voted["probabilities"] == pytest.approx({n: counted.count(n) / 3 for n in mean}, abs=2e-4)
    right = [row["prediction"] == truth["label"] for row, truth in zip(together, TEXTS[-9:], strict=False)]
    assert scored.tuned.sequence_accuracy == pytest.approx(sum(right) / 9)
    assert said.startswith(together[0]["prediction"])


def test_answers_are_scored_by_the_mean_of_probabilities_of_each_token(writers: Path) -> None:
    with inside(writers):
        rows = load_rows(config_of()).validation
        assert rows is not None
        scores = score_ensemble(Path("runs/trial"), config_of())
        assert scores is not None
        loaded = load_for_inference("trial")
        losses, targets, right = row_losses(loaded.packed_forward(), rows, 256)
        shares = []
        for number in (1, 2):
            alone = load_for_inference(f"runs/trial/member-{number}")
            with torch.no_grad():
                shares.append([alone.model(input_ids=torch.tensor(rows[row].sequences[0].input_ids[None]).long())
                               .logits[0].softmax(-1) for row in range(len(rows))])  # fmt: skip
        for row, (one, other) in enumerate(zip(*shares, strict=True)):
            ids, mask = rows[row].sequences[0].input_ids, rows[row].sequences[0].loss_mask
            mean, places = (one + other) / 2, np.flatnonzero(mask)
            wanted = -sum(float(mean[place - 1, ids[place]].log()) for place in places)
            assert losses[row] == pytest.approx(wanted, abs=1e-4)
            assert right[row] == sum(int(mean[place - 1].argmax()) == ids[place] for place in places)
        with loaded.use_base():
            base = row_losses(loaded.packed_forward(), rows, 256)[0]
        plain = row_losses(load_for_inference("base").packed_forward(), rows, 256)[0]
        np.testing.assert_allclose(base, plain, atol=1e-4)
    assert scores.together.rows.scores.loss == pytest.approx(float(losses.sum() / targets.sum()), abs=1e-5)
    assert scores.metric == "loss"
    assert scores.best.rows.scores.loss == min(one.rows.scores.loss for one in scores.members)
    gain = scores.beside(scores.best, scores.together).difference
    assert gain.value == pytest.approx(scores.best.rows.scores.loss - scores.together.rows.scores.loss)
    assert gain.interval.low <= gain.value <= gain.interval.high


def test_benchmarks_of_an_ensemble_are_refused_before_rows_are_scored(
    writers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*_: object) -> None:
        raise AssertionError("rows are scored")

    monkeypatch.setattr("lmtune.evaluation.evaluate.evaluate_loaded", score)
    for place in ("further", "lm_eval_tasks"):
        monkeypatch.setattr(f"lmtune.evaluation.{place}.require_lm_eval", lambda: None)
    with inside(writers), pytest.raises(ConfigError, match="give one of its members"):
        evaluate.main("runs/trial", [Path("train.jsonl")], lm_eval="words")


@pytest.mark.parametrize("method", ["mean", "vote"])
def test_drift_of_an_ensemble_is_that_of_what_its_members_say_together(writers: Path, method: Any) -> None:
    with inside(writers):
        loaded = load_for_inference("runs/trial", method=method)
        first = load_for_inference(str(EnsembleFile.read(Path("runs/trial")).places(Path("runs/trial"))[0]))
    prompts = writers / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "What is number 3?"}) + "\n")
    found = drift_of(loaded, prompts, max_new_tokens=6)
    (row,) = found.rows
    names = loaded.members.adapters
    alone = drift_of(dataclasses.replace(loaded, members=Members(names[:1])), prompts, max_new_tokens=6)
    assert alone.kl.value == pytest.approx(drift_of(first, prompts, max_new_tokens=6).kl.value, abs=1e-5)
    prompt = loaded.renderer.prompt_ids([Message("user", "What is number 3?")])
    said = loaded.engine.generate([Request(prompt, Sampling(max_new_tokens=row.tokens), Members((BASE,)))])[0]
    ids = torch.tensor([[*prompt, *said]])
    with torch.no_grad():
        each = torch.stack([loaded.model(input_ids=ids, adapter_names=[name]).logits[0].softmax(-1) for name in names])
        base = loaded.model(input_ids=ids, adapter_names=[BASE]).logits[0].log_softmax(-1)
    together = loaded.members.combine(each).log()
    places = slice(len(prompt) - 1, len(prompt) - 1 + row.tokens)
    wanted = (base.exp() * (base - together)).sum(-1)[places].mean()
    assert row.kl == pytest.approx(float(wanted), abs=1e-4)
    assert row.kl > 0


def test_an_ensemble_chats_and_its_base_too(writers: Path) -> None:
    with inside(writers):
        model = lmtune.load("runs/trial")
        base = lmtune.load("base").chat("What is number 3?", max_new_tokens=8)
        assert model.chat("What is number 3?", max_new_tokens=8, base=True) == base
        assert model.chat("What is number 3?", max_new_tokens=8) != base
        rows = [{"prompt": f"What is number {n}?"} for n in (3, 4, 5)]
        answers = [row["prediction"] for row in lmtune.predict(model, rows, max_new_tokens=8)]
        assert answers == [model.chat(row["prompt"], max_new_tokens=8) for row in rows]


@pytest.mark.parametrize("method", ["bagging", "boosting"])
def test_a_killed_ensemble_goes_on_to_the_same_result(tmp_path: Path, method: str) -> None:
    whole, killed = (labelled_place(tmp_path / part) for part in ("whole", "killed"))
    for place in (whole, killed):
        write_config(place, **CLASSIFY, run__checkpoint_every_steps=2)
    words = ("ensemble", "run.yaml", "--members", "3", "--method", method)
    assert command(whole, *words) == 0, said(whole)
    assert command(killed, *words, trouble=after_update(11, KILL)) == -9
    assert not (killed / "runs" / "trial" / FILE).exists()
    assert command(killed, *words) == 0, said(killed)
    assert (killed / "runs" / "trial" / FILE).read_bytes() == (whole / "runs" / "trial" / FILE).read_bytes()
    for number in range(1, 1 + len(EnsembleFile.read(whole / "runs" / "trial").members)):
        assert lasting(killed, f"trial/member-{number}") == lasting(whole, f"trial/member-{number}")
    assert "beside member-" in said(whole)
    assert command(whole, *words, "--json") == 0


def test_boosting_weighs_rows_by_the_errors_before(tmp_path: Path) -> None:
    place = labelled_place(tmp_path)
    with inside(place):
        folder = train_ensemble(config_of(**{**CLASSIFY, "train__max_steps": 3}), 3, "boosting")
        file = EnsembleFile.read(folder)
        assert file.method == "vote"
        factors = np.ones(27)
        for member, weight in zip(file.members, file.weights, strict=True):
            selection = RunDirectory(folder / member).read_selection()
            assert selection is not None
            np.testing.assert_allclose(selection.weights, factors)
            predicted = lmtune.predict(str(folder / member), TEXTS[:-9])
            wrong = np.array([row["prediction"] != row["label"] for row in predicted])
            error = (factors * wrong).sum() / factors.sum()
            assert weight == pytest.approx(np.log((1 - error) / error) + np.log(2))
            factors = factors * np.exp(weight * wrong)
            factors *= 27 / factors.sum()


def test_without_validation_rows_members_are_scored_on_rows_that_they_have_not_seen(tmp_path: Path) -> None:
    place = labelled_place(tmp_path)
    with inside(place):
        config = config_of(**CLASSIFY, data__validation=None, data__validation_fraction=0.0)
        folder = train_ensemble(config, 2, "bagging")
        for number in (1, 2):
            run = RunDirectory(folder / f"member-{number}")
            selection = run.read_selection()
            assert selection is not None
            assert selection.validation is not None
            assert set(selection.train) | set(selection.validation) == set(range(27))
            assert not set(selection.train) & set(selection.validation)
            assert run.read_summary().tuned is not None
        assert score_ensemble(folder, config) is None


# --- runs that are there


def test_rows_that_a_member_was_trained_on_are_counted(bagged: Path) -> None:
    """Those of its bootstrap sample, not all of the file; of an ensemble those that any member was trained on."""
    with inside(bagged):
        runs = [RunDirectory(f"runs/trial/member-{number}") for number in (1, 2, 3)]
        samples = [set(selection.train) for run in runs if (selection := run.read_selection())]
        found = [
            evaluate_loaded(load_for_inference(str(place)), ["train.jsonl", "validation.jsonl"], 0, 8, 128).trained_rows
            for place in ("runs/trial/member-1", "runs/trial")
        ]
        assert found == [len(samples[0]), len(set().union(*samples))]
        assert found[0] < found[1] <= len(TEXTS) - 9


def test_runs_that_are_there_are_joined(bagged: Path) -> None:
    with inside(bagged):
        shutil.copytree("runs/trial", "runs/folds")
        Path("runs/folds", FILE).unlink()
        assert joined([Path("runs/folds")]) == Path("runs/folds")
        assert EnsembleFile.read(Path("runs/folds")).members == ("member-1", "member-2", "member-3")
        two = joined([Path("trial/member-2"), Path("runs/folds/member-3")], Path("runs/two"), "vote")
        file = EnsembleFile.read(two)
        assert (file.members, file.method) == (("../trial/member-2", "../folds/member-3"), "vote")
        assert lmtune.predict("two", [{"text": "sky"}])[0]["prediction"] in COLOURS
        with pytest.raises(ConfigError, match=r"several runs make a new ensemble; give its folder: -o"):
            joined([Path("trial/member-2"), Path("trial/member-3")])
        with pytest.raises(ConfigError, match=r"--from: nothing: expected a run, or a folder of runs"):
            joined([Path("nothing")])


def test_members_that_do_not_fit_together_are_named(bagged: Path, writers: Path) -> None:
    with inside(bagged):
        both = joined([Path("trial/member-1"), writers / "runs/trial/member-1"], Path("runs/mixed"))
        with pytest.raises(ModelError, match=r"member-1: another head than .*member-1 has; members of an ensemble"):
            load_for_inference(str(both))
        with pytest.raises(ConfigError, match=r"--vote: runs/trial/member-1 is one model; expected an ensemble"):
            load_for_inference("runs/trial/member-1", method="vote")
        Path("runs/mixed", FILE).write_text("{}")
        with pytest.raises(ModelError, match=r"(?s)ensemble.json: damaged: .*members: missing"):
            load_for_inference("mixed")


@pytest.mark.parametrize(
    ("changes", "way", "said"),
    [
        ({"tuning__kind": "full"}, "bagging", "tuning.kind: full; expected lora"),
        ({}, "boosting", "boosting: weighs rows by the class .* objective.kind is sft; expected classification"),
        ({**CLASSIFY, "run__dir": "runs/trial", "run__name": "member-1"}, "bagging", "is a run already; give run.name"),
        ({**CLASSIFY}, "boosting", "is an ensemble by bagging; give run.name=…"),
    ],
)  # fmt: skip
def test_settings_of_which_no_ensemble_is_made(bagged: Path, changes: Any, way: Any, said: str) -> None:
    with inside(bagged):
        before = sorted(map(str, Path("runs").rglob("*")))
        with pytest.raises(ConfigError, match=said):
            train_ensemble(config_of(**changes), 2, way)
        assert sorted(map(str, Path("runs").rglob("*"))) == before


def test_boosting_that_ends_with_one_member_says_so(tmp_path: Path) -> None:
    place = labelled_place(tmp_path)
    with inside(place), pytest.raises(LmtuneError, match=r"runs/trial: 1 member left, and an ensemble needs two"):
        train_ensemble(config_of(**{**CLASSIFY, "train__max_steps": 60}), 3, "boosting")


# --- one adapter


@pytest.mark.parametrize("kind", ["linear", "ties", "dare"])
def test_one_adapter_is_made_of_the_members(bagged: Path, kind: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    with inside(bagged):
        scores = score_ensemble(Path("runs/trial"), config_of(**CLASSIFY), kind)
        assert scores is not None
        assert scores.combined is not None
        assert scores.beside(scores.together, scores.combined).difference.interval is not None
        folder = Path("runs/trial") / f"combined-{kind}"
        each = [_updates(Path("runs/trial") / place / "adapter") for place in ("member-1", "member-2", "member-3")]
        for key, found in _updates(folder).items():
            updates = torch.stack([one[key] for one in each])
            if kind == "linear" or "score" in key:
                torch.testing.assert_close(found, updates.mean(0), atol=1e-6, rtol=1e-4)
            elif kind == "ties":
                torch.testing.assert_close(found, _of_rank(_ties(updates), 12), atol=1e-5, rtol=1e-3)
        again = load_for_inference("trial")
        combine(again, kind, Path("runs/trial/member-1/adapter"), Path("runs/again"), seed=1)
        one, other = _updates(folder), _updates(Path("runs/again"))
        assert all(torch.equal(one[key], other[key]) for key in one) == (kind != "dare"), "dare is random by the seed"
        base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
        plain = PeftModel.from_pretrained(base, str(folder)).eval()
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            wanted = load_for_inference(str(folder)).model(input_ids=ids).logits
            torch.testing.assert_close(plain(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)


def test_equal_members_make_the_adapter_that_they_are(bagged: Path, tmp_path: Path) -> None:
    with inside(bagged):
        joined([Path("trial/member-1")] * 3, tmp_path / "same")
        loaded = load_for_inference(str(tmp_path / "same"))
        assert loaded.members == Members(("default", "member-0002", "member-0003"), (1.0,) * 3)
        source = Path("runs/trial/member-1/adapter")
        combine(loaded, "linear", source, tmp_path / "one")
        one, other = _updates(source), _updates(tmp_path / "one")
        for key, update in one.items():
            torch.testing.assert_close(other[key], update, atol=1e-6, rtol=1e-4)


def _ties(updates: torch.Tensor) -> torch.Tensor:
    """TIES of updates `[M, out, in]`, the plain way."""
    least = [one.abs().flatten().topk(one.numel() // 2).values[-1] for one in updates]
    large = torch.stack([torch.where(one.abs() >= edge, one, 0) for one, edge in zip(updates, least, strict=True)])
    agree = (large.sign() == large.sum(0).sign()) & (large != 0)
    return torch.where(agree, large, 0).sum(0) / agree.sum(0).clamp(min=1)


def _of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def _updates(folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, and its whole modules."""
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    scaling = config["lora_alpha"] / config["r"]
    found = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    for key, a in tensors.items():
        if ".lora_A." in key:
            found[key] = scaling * tensors[key.replace("lora_A", "lora_B")] @ a
    return found
