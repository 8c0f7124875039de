"""Grids of settings: what is a value, every combination once, and names that differ."""

from __future__ import annotations

import itertools

import pytest

from dbmpi.config.grid import combinations
from dbmpi.config.reading import read
from dbmpi.errors import UserError


def test_every_combination_comes_once_and_in_order() -> None:
    found = combinations(["optimizer.learning_rate=0.01,0.03,0.1", "optimizer.epochs=5", "optimizer.rule=sgd, adam"])
    expected = list(itertools.product(["0.01", "0.03", "0.1"], ["sgd", "adam"]))
    assert [tuple(value for _, value in each.settings) for each in found] == expected
    assert found[1].name == "learning_rate=0.01,rule=adam"
    assert found[1].overrides == ("optimizer.learning_rate=0.01", "optimizer.epochs=5", "optimizer.rule=adam")


def test_commas_in_brackets_and_quotes_belong_to_a_value() -> None:
    found = combinations(
        ["placement.weights=[1.0, 2.0],[3.0]", 'data.train="a,b.h5",c.h5', "network.layers={a = [1,2]}"]
    )
    assert [each.overrides[0] for each in found[::2]] == ["placement.weights=[1.0, 2.0]", "placement.weights=[3.0]"]
    assert found[0].overrides[1] == 'data.train="a,b.h5"'
    assert found[0].overrides[2] == "network.layers={a = [1,2]}"


def test_names_differ_and_are_names_of_directories() -> None:
    found = combinations(["a.x=1,2", "b.x=1,2"])
    assert len({each.name for each in found}) == 4
    assert found[0].name == "a.x=1,b.x=1"
    long = combinations(["data.train=" + ",".join(f"/{'d' * 200}/{number}.h5" for number in range(3))])
    assert len({each.name for each in long}) == 3
    for each in long:
        assert "/" not in each.name
        assert len(each.name) < 120


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "several values"),
        (["optimizer.epochs=5"], "several values"),
        (["optimizer.epochs=5,,6"], "a value is missing"),
        (["optimizer.epochs"], "expected section.key=value"),
        (["optimizer.epochs=5,5"], "given twice"),
        (["optimizer.epochs=5,6", "optimizer.epochs=7"], "given twice"),
        ([f"a.k{number}=1,2,3,4" for number in range(6)], "4,096 combinations (4 x 4 x 4 x 4 x 4 x 4)"),
    ],
)
def test_mistakes_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        combinations(overrides)
    assert words in str(caught.value)


def test_what_a_combination_says_is_what_a_run_has(tmp_path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = "x.h5"\n[[network.layers]]\nunits = 3\n')
    runs = [read(path, each.overrides) for each in combinations(["network.layers.0.units=3,4", "optimizer.n_push=1,2"])]
    assert [(run.network.layers[0].units, run.optimizer.n_push) for run in runs] == [(3, 1), (3, 2), (4, 1), (4, 2)]
