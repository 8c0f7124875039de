"""Whose each sample is: the speaker of a recording, the patient of an image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dbmpi.data.source import Source
from dbmpi.data.writer import GROUPS
from dbmpi.errors import UserError


def groups_of(source: Source, name: str | None = None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return what the groups of samples are called, and the group of each sample, int32 ``(samples,)``.

    Parameters
    ----------
    source
        The samples.
    name
        Dataset of whole numbers or texts, one a sample; None for that which importers write, if it is there: both are
        empty where it is not.

    Raises
    ------
    UserError
        If there is no such dataset, or it does not say one thing of each sample.
    """
    nothing: tuple[tuple[str, ...], np.ndarray] = (), np.empty(0, np.int32)
    if source.place is None:
        return nothing
    reading = replace(source.reading, targets=name or GROUPS, weights=None, class_weights=None, labels=None)
    try:
        owners = Source.open(source.place, 1 << 20, "required", replace(reading, wanted="any"))
    except UserError:
        if name is None:
            return nothing
        raise
    with owners:
        if owners.classes is None:
            raise UserError(
                f"{source.path}: {name!r} holds numbers, not groups; expected a whole number or a text each"
            )
        codes = np.concatenate([block for block, _ in owners.answers()])
        return tuple(str(label) for label in owners.labels or range(owners.classes)), codes
