"""Dropout: the generator against its published values, masks that depend on places alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from unit.layer_checks import CONTEXT, check_cuts, check_gradients, run

from dbmpi import config
from dbmpi.errors import UserError
from dbmpi.kernels.compile import kernel
from dbmpi.kernels.dropout import CHUNK, fill_words
from dbmpi.network.dropout import DropoutLayer
from dbmpi.network.layer import Context


def dropout(shape, rate, name="drop"):
    return DropoutLayer(name, shape, config.Dropout(rate=rate))


@kernel
def words_of(unit, chunk, key, words):
    fill_words(unit, chunk, key, words)


def philox(counter, key):
    """Philox4x32 with ten rounds, in Python's integers, as its paper writes it."""
    x, k = list(counter), list(key)
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * x[0], 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high_1 ^ x[1] ^ k[0], low_1, high_0 ^ x[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def test_the_twin_gives_the_known_answers_of_its_authors():
    # of the file kat_vectors of Random123
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    counter, key = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox(counter, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@settings(max_examples=50)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_the_words_are_those_of_the_twin(unit, chunk, key):
    words = np.empty(CHUNK, np.uint32)
    words_of(np.uint64(unit), np.uint64(chunk), np.uint64(key), words)
    for lane in range(CHUNK // 4):
        expected = philox([lane, chunk, unit % 2**32, unit >> 32], [key % 2**32, key >> 32])
        assert words[lane :: CHUNK // 4].tolist() == expected


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.integers(1, 150),
    st.sampled_from([np.float32, np.float64]),
    st.data(),
)
def test_pieces_make_the_whole(shape, rate, samples, dtype, data):
    check_cuts(dropout(shape, rate), samples, dtype, data)


def test_gradients_are_finite_differences():
    check_gradients(dropout((4, 3), 0.4), 70, 1)


def mask(layer, context, samples=200):
    return run(layer, np.ones((*layer.input_shape, samples), np.float32), context=context)[0] != 0


def test_as_many_are_dropped_as_the_rate_says_and_the_others_are_scaled():
    layer = dropout((100, 7), 0.25)
    outputs, input_gradient, _ = run(layer, np.ones((100, 7, 200), np.float32))
    assert set(np.unique(outputs)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(outputs, input_gradient)
    kept = int((outputs != 0).sum())
    assert stats.binomtest(kept, outputs.size, 0.75).pvalue > 1e-6
    # and no unit or sample is treated in a special way
    for axes, count in (((0, 1), 700), (2, 200)):
        totals = (outputs != 0).sum(axis=axes).reshape(-1)
        assert stats.kstest(totals, stats.binom(count, 0.75).cdf).statistic < 0.2


def test_masks_differ_with_the_seed_the_step_and_the_layer():
    layer = dropout((50,), 0.5)
    masks = [
        mask(layer, CONTEXT),
        mask(layer, Context(True, CONTEXT.seed + 1, CONTEXT.step)),
        mask(layer, Context(True, CONTEXT.seed, CONTEXT.step + 1)),
        mask(dropout((50,), 0.5, "another"), CONTEXT),
    ]
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert 0.45 < (one == other).mean() < 0.55
    np.testing.assert_array_equal(mask(layer, CONTEXT), masks[0])


def test_a_sample_has_the_same_mask_in_a_shorter_batch():
    layer = dropout((20,), 0.5)
    np.testing.assert_array_equal(mask(layer, CONTEXT, 77), mask(layer, CONTEXT, 200)[:, :77])


def test_evaluation_drops_nothing():
    inputs = np.random.default_rng(1).normal(size=(5, 9))
    outputs, input_gradient, _ = run(dropout((5,), 0.5), inputs, context=Context(training=False))
    np.testing.assert_array_equal(outputs, inputs)
    np.testing.assert_array_equal(input_gradient, 1)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_that_is_no_probability_below_one_is_refused(rate):
    with pytest.raises(UserError, match="rate"):
        config.Dropout(rate=rate)
