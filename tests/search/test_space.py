"""What `--over` means, and every fault of it by its key, before anything is loaded."""

import pytest

from lmtune.config.schema import FinetuneConfig
from lmtune.errors import ConfigError
from lmtune.search.space import read_space, shown
from tests.workplace import config_of


def config() -> FinetuneConfig:
    return config_of()


def test_ranges_and_values() -> None:
    space = read_space(
        config(),
        [
            "train.learning_rate=1e-5..1e-3:log", "tuning.rank=4,16,64", "tuning.dropout=0..0.9",
            "train.batch_size=2..16:2",
            "tuning.target_modules=all-linear,[q_proj, v_proj]", "train.weight_decay=0.1",
        ],
    )  # fmt: skip
    rate, rank, dropout, batch, modules = space.choices
    assert (rate.low, rate.high, rate.is_log, rate.is_whole) == (1e-5, 1e-3, True, False)
    assert rank.values == ("4", "16", "64")
    assert not dropout.is_whole
    assert not read_space(config(), ["train.warmup_ratio=0..1"]).choices[0].is_whole  # the config takes 0.5
    assert (batch.is_whole, batch.step, batch.count) == (True, 2, 8)
    assert modules.values == ("all-linear", "[q_proj, v_proj]")
    assert space.config.train.weight_decay == 0.1  # one value is a setting
    values = {"train.learning_rate": rate.written(2e-5), "tuning.rank": "16", "train.batch_size": batch.written(4.0)}
    found = space.configured({**values, "tuning.target_modules": modules.values[1], "tuning.dropout": "0.25"})
    assert (found.train.learning_rate, found.tuning.rank, found.train.batch_size) == (2e-5, 16, 4)
    assert found.tuning.target_modules == ("q_proj", "v_proj")
    assert shown(values) == "train.learning_rate=2e-05 tuning.rank=16 train.batch_size=4"


def test_sections_of_several_kinds_are_searched_whole() -> None:
    space = read_space(config(), ["tuning={kind: lora, rank: 2},{kind: partial, parts: [head]}"])
    kinds = [type(space.configured(values).tuning).__name__ for values in space.combinations(9)]
    assert kinds == ["LoraConfig", "PartialConfig"]


def test_combinations_are_counted_where_there_are_few() -> None:
    space = read_space(config(), ["tuning.rank=4,8", "train.seed=0,1,2"])
    assert len(space.combinations(6)) == 6
    assert space.combinations(5) == []
    assert read_space(config(), ["train.batch_size=1..3"]).combinations(99) == []


@pytest.mark.parametrize(
    ("words", "faults"),
    [
        (["train.learning_rat=1e-4,1e-3"], ["train.learning_rat: unknown key; did you mean learning_rate?"]),
        (["tuning.rank=4,x"], ["tuning.rank: got 'x'"]),
        (["tuning.rank=0..8"], ["tuning.rank: got 0"]),
        (["train.learning_rate=1e-3..1e-5"], ["train.learning_rate: got 1e-3..1e-5; the first number must be below"]),
        (["train.learning_rate=0..1e-3:log"], ["train.learning_rate: got 0..1e-3:log; a range of magnitudes"]),
        (["train.learning_rate=1e-5..1e-3:lin"], ["train.learning_rate: got 1e-5..1e-3:lin; behind a range stands"]),
        (["train.learning_rate=1e-5..1e-3:log:2"], ["a range has a step or :log, not both"]),
        (["train.learning_rate=1e-5...1e-3"], ["train.learning_rate: got 1e-5...1e-3; expected LOW..HIGH"]),
        (["tuning.rank=4,,8"], ["tuning.rank: got 4,,8; a value is missing"]),
        (["tuning.rank=4,8,4"], ["tuning.rank: 4 is given twice"]),
        (["tuning.rank=4,8", "tuning.rank=1..2"], ["tuning.rank: given twice"]),
        (["tuning.rank="], ["tuning.rank: no values"]),
        (["rank"], ["'rank': expected KEY="]),
        (["run.name=a,b"], ["run.name: cannot be searched"]),
        (["evaluation.metric=loss,perplexity"], ["evaluation.metric: cannot be searched"]),
        (["tuning.rank=16"], ["nothing to choose"]),
        (["tuning.kind=lora,full", "tuning.rank=4,8"], ["tuning.rank: unknown key of tuning.kind: full"]),
        (["tuning.rank=0,4", "train.learning_rate=0,1"], ["tuning.rank: got 0", "train.learning_rate: got 0"]),
    ],
)  # fmt: skip
def test_faults_name_the_key(words: list[str], faults: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_space(config(), words)
    assert all(fault in str(caught.value) for fault in faults), str(caught.value)


def test_what_holds_out_other_rows_needs_rows_of_its_own() -> None:
    own = config_of(data__validation=None, data__validation_fraction=0.2)
    for word in ("train.seed=0,1", "data.max_length=64,128"):
        with pytest.raises(ConfigError, match="other values hold out other rows"):
            read_space(own, [word])
        assert read_space(config(), [word])
