"""Transforms of batches, as users write them, for tests of runs."""

from __future__ import annotations


def noise(batch, random):
    """Add noise, and turn the samples of every other batch around."""
    inputs = batch.inputs + random.normal(0, 0.1, batch.inputs.shape)
    return batch._replace(inputs=inputs[:, ::-1] if random.random() < 0.5 else inputs)


number = 5
