"""Update rules of a user's own: what they are called with, and how wrong ones are refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dbmpi.config import OptimizerSection, load
from dbmpi.errors import UserError
from dbmpi.paramserver.rules import rule
from dbmpi.paramserver.schedule import Moment

HERE = Path(__file__).parent


def own(function: str, **given: object):
    return rule(OptimizerSection(rule=f"own_rules:{function}", **given), code=HERE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("settings", [{}, {"beta2": 0.5}])
def test_a_rule_of_ones_own(dtype, settings):
    random = np.random.default_rng(4)
    ours = own("lion", learning_rate=0.01, settings=settings, schedule="step", decay_epochs=10, decay_factor=0.5)
    assert ours.state_names == ("momentum",)
    w = random.normal(size=100).astype(dtype)
    state, expected, m = ours.init(w), w.copy(), np.zeros_like(w)
    b1, b2 = 0.9, settings.get("beta2", 0.99)
    for update in range(1, 6):
        g = random.normal(size=100).astype(dtype)
        ours.apply(w, g, state, Moment(update, samples=4 * update))
        rate = 0.01 * 0.5 ** (4 * update // 10)
        expected -= dtype(rate) * np.sign(dtype(b1) * m + dtype(1 - b1) * g)
        m = dtype(b2) * m + dtype(1 - b2) * g
        np.testing.assert_array_equal(w, expected)
        np.testing.assert_array_equal(state["momentum"], m)


def test_a_rule_of_ones_own_may_have_no_state():
    ours = own("stateless", learning_rate=0.5)
    w, g = np.ones(3, np.float32), np.ones(3, np.float32)
    ours.apply(w, g, ours.init(w))
    assert (ours.state_names, w.tolist()) == ((), [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", "defines no 'nothing'"),
        ("NUMBER", "that is a int; expected a function (parameters, gradient, rate, update, "),
        ("plain", "that is a function; expected a function (parameters, gradient, rate, update, "),
        ("other_arguments", "it takes (weights, gradient, rate, update); expected"),
        ("name_of_another", "vectors of L-BFGS have names like 's1'"),
        ("text_setting", "the default of mode is 'fast'; expected a finite number"),
        ("changes_the_gradient", "it changes the gradient, which belongs to a worker"),
        ("not_a_number", "gives {'parameters': 1.0, 'mean': nan}"),
        ("raises", "fails on arrays of 3: ValueError: not today"),
        ("does_not_compile", "no_such_attribute"),
    ],
)
def test_what_is_no_rule_is_refused(function, said):
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        own(function)
    assert str(refused.value).startswith(f"optimizer.rule = 'own_rules:{function}': ")


def test_settings_that_the_function_does_not_take_are_refused():
    with pytest.raises(UserError, match=r"optimizer.settings.gamma: the function has only beta1, beta2"):
        own("lion", settings={"gamma": 1.0})
    with pytest.raises(UserError, match=r"optimizer.settings.beta1: the function has no setting"):
        own("stateless", settings={"beta1": 1.0})


def test_a_missing_module_is_named():
    with pytest.raises(UserError, match=r"has no no_such_rules.py, and Python finds no module 'no_such_rules'"):
        rule(OptimizerSection(rule="no_such_rules:lion"), code=HERE)


def test_the_code_is_looked_for_beside_the_configuration(tmp_path):
    (tmp_path / "run.toml").write_text('[data]\ntrain = "x.h5"\n[[network.layers]]\nunits = 2\n')
    run = load(tmp_path / "run.toml", ["optimizer.rule=mine:lion"])
    assert run.network.code == tmp_path
