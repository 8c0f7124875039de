"""What is said of the losses that a run ended with."""

import math

import numpy as np
import pytest

from dbmpi import config
from dbmpi.data.run_data import network_notes
from dbmpi.monitor.verdict import Recent, warning
from dbmpi.objective import Outcome

GUESSING = math.log(10)


def said(loss, test=None, enough=True, guessing=GUESSING):
    outcome = None if test is None else Outcome(10, 10 * test, 3)
    return warning(guessing, loss, outcome, enough=enough, remedy="another rate")


@pytest.mark.parametrize("loss", [0.0, 0.1, 1.5, 0.98 * GUESSING])
def test_nothing_is_said_of_a_loss_that_is_better_than_guessing(loss):
    assert said(loss) == said(loss, test=20.0) == ""


def test_a_loss_of_guessing_is_named_unless_the_run_was_short():
    assert "the loss at the end, 2.3, is no better than that of always giving the same answer (2.303)" in said(2.3)
    assert said(2.5)
    assert said(2.3, enough=False) == ""


def test_an_absurd_loss_is_named_also_after_few_steps():
    assert "far above" in said(4.7e34)
    assert "extreme values in the data" in said(4.7e34, enough=False)
    assert "far above" in said(300.0)
    assert said(300.0, enough=False) == ""  # it may have begun there


def test_a_test_loss_out_of_all_proportion_is_named():
    assert "test loss, 500, is far above" in said(0.1, test=500.0)
    assert said(0.1, test=100.0) == ""


@pytest.mark.parametrize("guessing", [math.nan, 0.0])
def test_without_a_loss_of_guessing_there_is_nothing_to_compare_with(guessing):
    assert said(1e30, guessing=guessing) == ""
    assert said(math.nan) == ""


def test_recent_losses_are_those_of_about_an_epoch():
    random = np.random.default_rng(0)
    recent, naive = Recent(100), []
    assert math.isnan(recent.mean_loss)
    for _ in range(200):
        samples, loss = int(random.integers(0, 8)), float(random.random())
        recent.add(Outcome(samples, samples * loss, 0))
        naive += [loss] * samples
        if len(naive) > 200:
            # Ten parts of 10 to 17 samples each: some number of the last samples, between 90 and 170
            means = [np.mean(naive[-count:]) for count in range(90, 171)]
            assert min(abs(recent.mean_loss - mean) for mean in means) < 1e-12


def section(*layers):
    return config.NetworkSection(layers=(*layers, config.Dense(units=2)))


@pytest.mark.parametrize("skipped", [(), (config.Dropout(rate=0.2),)])
def test_channels_that_seem_to_come_last_are_named(skipped):
    local = section(*skipped, config.Local(maps=2, field=3))
    (hint,) = network_notes(local, (32, 24, 3), "first")
    assert "taken for 32 channels of 24 x 3; if they are images of 32 x 24 with 3 channels, set data.channels" in hint
    (hint,) = network_notes(local, (32, 3, 24), "last")
    assert "images of 3 channels of 24 x 32, leave data.channels out" in hint
    for shape, channels in [((3, 32, 24), "first"), ((3, 32, 24), "last"), ((28, 28), "first"), ((2, 2, 2), "first")]:
        assert network_notes(local, shape, channels) == []
    assert network_notes(section(), (32, 24, 3), "first") == []
