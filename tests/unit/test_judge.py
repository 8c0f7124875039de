"""Which evaluation is the best, and when one ends a run: beside a naive twin that remembers everything."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from unit.checkpoint_files import make_info

from dbmpi.checkpoint.judge import Criterion, Judge
from dbmpi.config import MonitorSection, Run
from dbmpi.errors import UserError
from dbmpi.objective import Outcome

STORED = {name: json.dumps({"monitor": {"metric": name, "better": "auto"}}) for name in ("loss", "accuracy")}


def evaluation(loss: float, correct: int = 0, f1: float = 0.0) -> Outcome:
    return Outcome(20, 20 * loss, correct, (("F1", 20 * f1),))


class Twin:
    """All evaluations, one after the other."""

    def __init__(self, section: MonitorSection) -> None:
        self.section, self.values, self.steps = section, [], []

    def hear(self, step: int, value: float) -> bool:
        sign = -1 if self.section.higher else 1
        best = all(math.isfinite(value) and sign * value < sign * old for old in self.values if math.isfinite(old))
        self.values.append(value)
        self.steps.append(step)
        return best and math.isfinite(value)

    @property
    def ends(self) -> bool:
        section, sign = self.section, -1 if self.section.higher else 1
        last = self.values[-1]
        if section.target is not None and math.isfinite(last) and sign * last <= sign * section.target:
            return True
        counted, waited = None, 0
        for value in self.values:
            better = math.isfinite(value) and (counted is None or sign * (counted - value) > section.min_delta)
            counted, waited = (value, 0) if better else (counted, waited + 1)
        return bool(section.patience) and waited >= section.patience


@pytest.mark.parametrize("seed", range(40))
def test_it_judges_as_one_that_remembers_everything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    metric = ("loss", "accuracy", "F1")[seed % 3]
    higher = {"loss": False, "accuracy": True, "F1": bool(rng.integers(2))}[metric]
    section = MonitorSection(
        metric=metric,
        better=("lower", "higher")[higher],
        patience=int(rng.integers(1, 6)),
        min_delta=float(rng.choice([0.0, 0.05, 0.2])),
        target=float(rng.choice([0.05, 0.95])) if rng.integers(2) else None,
    )
    judge, twin, steps = Judge(section), Twin(section), np.cumsum(rng.integers(1, 9, 30)).tolist()
    configuration = json.dumps({"monitor": section.model_dump()})
    for step in steps:
        loss, correct, f1 = (
            float(rng.choice([rng.random(), math.nan], p=[0.9, 0.1])),
            int(rng.integers(21)),
            rng.random(),
        )
        outcome = evaluation(loss, correct, f1)
        value = {"loss": outcome.mean_loss, "accuracy": correct / 20, "F1": outcome.metrics["F1"]}[metric]
        assert judge.hear(step, outcome) == twin.hear(step, value)
        assert bool(judge.verdict) == twin.ends
        finite = [(value, at) for value, at in zip(twin.values, twin.steps, strict=True) if math.isfinite(value)]
        if finite:
            best = (max if higher else min)(value for value, _ in finite)
            assert judge.fields["best_value"] == best
            assert judge.fields["best_step"] == next(at for value, at in finite if value == best)
        if rng.integers(4) == 0:  # the run resumes from a checkpoint
            tested = {"test_step": step, "test_loss": loss if math.isfinite(loss) else None}
            tested |= {"test_accuracy": correct / 20, "test_metrics": {"F1": outcome.metrics["F1"]}}
            info = make_info(step=1000, configuration=configuration, **tested, **judge.fields)
            judge = Judge(section, info)
            assert bool(judge.verdict) == twin.ends


def test_the_same_parameters_do_not_count_twice() -> None:
    judge = Judge(MonitorSection(patience=2))
    for step in (10, 20, 20, 20):
        judge.hear(step, evaluation(1.0))
        assert not judge.verdict
    judge.hear(30, evaluation(1.0))
    assert judge.verdict == (
        "the test loss was best, 1, at step 10, and 2 evaluations have not been better (monitor.patience = 2)"
    )


def test_a_run_by_another_metric_begins_anew() -> None:
    judge = Judge(MonitorSection(metric="accuracy", patience=1))
    judge.hear(5, evaluation(0.5, 20))
    judge.hear(9, evaluation(0.25, 10))
    assert judge.verdict
    info = make_info(step=9, configuration=STORED["accuracy"], **judge.fields, test_step=9, test_accuracy=0.5)
    assert Judge(MonitorSection(metric="accuracy", patience=1), info).verdict == judge.verdict
    assert not Judge(MonitorSection(metric="accuracy", patience=2), info).verdict
    assert not Judge(MonitorSection(patience=1), info).verdict
    assert not Judge(MonitorSection(metric="accuracy", patience=1), replace(info, best_value=None)).verdict


def test_where_a_configuration_says_nothing_the_loss_counts() -> None:
    for text in ("", "{", "[]", "{}", '{"monitor": 3}', '{"monitor": {"metric": "accuracy"}}', "[" * 10**5):
        assert Criterion.stored(text) == Criterion("loss", False)
    assert Criterion.stored(STORED["accuracy"]) == Criterion("accuracy", True)
    assert Criterion.stored(Run().to_json()) == Criterion("loss", False)


REFUSED = [
    ({"metric": "F1"}, "needs better = 'lower' or 'higher'|say which values are better"),
    ({"metric": "accuracy", "better": "lower"}, "higher values are better"),
    ({"metric": "accuracy", "target": 95.0}, "an accuracy is a fraction, above 0 and at most 1"),
    ({"min_delta": 0.1}, "is for patience: set patience"),
    ({"patience": 3, "evaluate_epochs": 0}, "set evaluate_epochs to more, or patience = 0"),
    ({"target": 0.5, "evaluate_epochs": 0}, "set evaluate_epochs to more, or leave target out"),
    ({"target": math.inf}, "finite"),
    ({"patience": -1}, "patience"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_settings_that_do_not_fit_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MonitorSection(**values)


@pytest.mark.parametrize(
    ("network", "metric", "words"),
    [
        (
            {"loss": "squared", "layers": [{"units": 2}]},
            "accuracy",
            "the loss 'squared' knows no classes: set it to 'loss'",
        ),
        ({"layers": [{"units": 2}]}, "F1", "a network has none but 'loss' and 'accuracy'"),
    ],
)
def test_a_metric_that_the_loss_does_not_have_is_refused(network: dict[str, object], metric: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Run(network=network, monitor={"metric": metric, "better": "higher"})
