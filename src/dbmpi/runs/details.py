"""A detailed evaluation: measures of each class, or of each output, over all samples and ranks."""

from __future__ import annotations

import numpy as np

from dbmpi.checkpoint.meaning import Meaning
from dbmpi.data.source import Source
from dbmpi.errors import UserError
from dbmpi.runs.class_measures import ClassMeasures, ConfusionCounts, Ranking
from dbmpi.runs.inference import Inference
from dbmpi.runs.value_measures import ValueMeasures, ValueSums

_KEPT_BYTES = 256 << 20
"""Outputs of a rank up to this size are kept for the second pass of a classifier; of more, they are computed anew."""
_BLOCK_BYTES = 16 << 20
"""Sums of batches that are added up over the ranks at a time."""


def details(network: Inference, source: Source) -> ClassMeasures | ValueMeasures:
    """Return the measures of all samples, the same on every rank, whatever their number (collective).

    Parameters
    ----------
    network
        What was trained.
    source
        The samples, with targets.

    Raises
    ------
    UserError
        On all ranks, if there are no targets to compare the outputs with.
    """
    meaning = network.trained.info.meaning or Meaning()
    with network.together("looking at the targets"):
        _check(network, source)
    if network.trained.info.classes:
        return _classes(network, source, meaning)
    return _values(network, source, meaning)


def _check(network: Inference, source: Source) -> None:
    if not source.has_targets or (network.trained.network.loss is None and not network.trained.info.classes):
        raise UserError(
            f"{network.trained.called}: was trained without targets, so there is nothing to compare its outputs with; "
            "leave --details out"
        )


def _classes(network: Inference, source: Source, meaning: Meaning) -> ClassMeasures:
    classes, units = network.trained.info.classes, network.units(source)
    with network.together("comparing outputs and classes"):
        if units < classes:
            raise UserError(
                f"{network.trained.called}: has {units} outputs for {classes} classes; expected one for each, or leave "
                "--details out"
            )
    batches = network.batches(source)
    counts, kept = ConfusionCounts(units), {}
    keep = 4 * source.samples * classes <= _KEPT_BYTES * network.replicas
    # Every sample is in one batch, and every batch on one replica: elsewhere they are 0.
    scores, targets = np.zeros(source.samples, np.float32), np.zeros(source.samples, np.int32)

    def count(number: int, outputs: np.ndarray) -> None:
        indices = batches[number]
        wanted = source.targets(indices)
        counts.add(outputs, wanted)
        targets[indices], scores[indices] = wanted, outputs[wanted, np.arange(len(wanted))]
        if keep:
            kept[number] = np.array(outputs[:classes])

    network.visit(source, batches, range(len(batches)), count)
    counts.merge(network.gathered(counts.flat()))
    target, predicted, count_of = counts.entries()
    area = np.full(classes, np.nan)
    if (predicted >= 0).all():
        ranking = Ranking(network.sum(scores), network.sum(targets), classes)

        def rank(number: int, outputs: np.ndarray) -> None:
            ranking.add(outputs[:classes], source.targets(batches[number]))

        if keep:
            for number, outputs in kept.items():
                rank(number, outputs)
        else:
            network.visit(source, batches, range(len(batches)), rank)
        area = ranking.areas(network.sum(ranking.halves))
    return ClassMeasures(classes, meaning.labels, target, predicted, count_of, area)


def _values(network: Inference, source: Source, meaning: Meaning) -> ValueMeasures:
    units, batches = network.units(source), network.batches(source)
    with network.together("comparing outputs and targets"):
        if units != source.target_size:
            raise UserError(
                f"{network.trained.called}: has {units} outputs, and {source.path} has {source.target_size} values a "
                "sample; expected as many, or leave --details out"
            )
    block = max(1, _BLOCK_BYTES // (8 * 4 * units))
    total: ValueSums | None = None
    for first in range(0, len(batches), block):
        numbers = range(first, min(first + block, len(batches)))
        rows = np.zeros((len(numbers), 4, units))

        def add(number: int, outputs: np.ndarray, rows: np.ndarray = rows, first: int = first) -> None:
            wanted = source.targets(batches[number])
            if outputs.shape != wanted.shape:  # an objective of the user's own has samples first
                wanted = wanted.reshape(len(batches[number]), -1).T
            rows[number - first] = ValueSums.of(outputs, wanted)[1:]

        network.visit(source, batches, numbers, add)
        # Added up batch by batch in their order, so that the sums do not depend on which rank computed them.
        for number, row in zip(numbers, network.sum(rows), strict=True):
            one = ValueSums(len(batches[number]), *row)
            total = one if total is None else total.plus(one)
    assert total is not None
    return ValueMeasures(meaning.target_names, total)
