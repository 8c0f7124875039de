"""Dividing samples into those to learn from and those to test on, and writing each part as a data file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dbmpi.data.groups import groups_of
from dbmpi.data.rows import Stored
from dbmpi.data.source import Source
from dbmpi.data.survey import numbers
from dbmpi.data.writer import DataWriter, Origin, Shape, Written, check_writable
from dbmpi.errors import UserError

_STREAM = 0x73706C74
"""Sets the random numbers of a division apart from others that are made of the same seed."""
_KEPT = ("mean", "deviation", "rate", "context", "states", "window_seconds", "hop_seconds", "fill")
"""Attributes of a file that hold for each part of it."""


def at_random(samples: int, fraction: float, seed: int) -> np.ndarray:
    """Return which of so many `samples` are tested on, bool ``(samples,)``: a `fraction`, drawn with this `seed`."""
    return _drawn(np.zeros(samples, np.int64), fraction, seed)


def by_class(classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which samples are tested on: the same `fraction` of each of the `classes`, drawn with this `seed`."""
    return _drawn(classes, fraction, seed)


def by_group(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which samples are tested on: all of some groups, together about that fraction of the samples.

    Parameters
    ----------
    groups
        The group of each sample.
    fraction
        How many of the samples.
    seed
        Of the order in which groups are taken as long as they bring their number nearer to that.

    Raises
    ------
    UserError
        If there is but one group.
    """
    counts = np.bincount(groups)
    there = np.flatnonzero(counts)
    if len(there) < 2:
        raise UserError("--by group: all samples belong to one group; expected at least two, e.g. speakers")
    wanted, chosen, count = fraction * len(groups), list[int](), 0
    for group in _random(seed).permutation(there):
        more = count + int(counts[group])
        if len(chosen) < len(there) - 1 and (not chosen or abs(more - wanted) < abs(count - wanted)):
            chosen.append(int(group))
            count = more
    return np.isin(groups, chosen)


def divide(
    source: Source,
    test: np.ndarray,
    outs: Sequence[Path],
    *,
    group: str | None = None,
    force: bool = False,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> list[Written]:
    """Write the samples of a source into two data files, in their order.

    Integers stay what they are, with their factor; other inputs become float32.  Names, labels and what is said of
    the inputs are kept.

    Parameters
    ----------
    source
        The samples, with targets.
    test
        Which of them go into the second file, bool ``(samples,)``.
    outs
        Both files.
    group
        Dataset that says whose each sample is; by default what importers write.
    force
        Replace existing files.
    seen
        Told how many samples are written, and of how many.

    Raises
    ------
    UserError
        If a part would be empty, a file cannot be written, or an input is missing.
    """
    if not test.any() or test.all():
        raise UserError(
            f"{source.path}: of its {source.samples:,} samples {int(test.sum()):,} would be in the test file; expected "
            "some in each: another --fraction, or other groups"
        )
    sources = [path for path in (source.path,) if isinstance(path, Path)]
    for out in outs:
        check_writable(out, force, sources)
    names, owners = groups_of(source, group)
    stored = source.parts[0]
    keeps = stored.as_stored
    shape = Shape(
        stored.shape[1:],
        source.classes,
        source.target_size,
        stored.factor if keeps else None,
        stored.kept.name if keeps else "uint8",
        source.encoding.one_hot,
    )
    origin = Origin("split", source.path, source.path)
    done = []
    for number, out in enumerate(outs):
        with DataWriter(out, shape, origin, force) as writer:
            if source.labels is not None:
                writer.number_labels(source.labels, np.arange(len(source.labels), dtype=np.int32))
            _describe(writer, source)
            for start, rows in stored.blocks():
                wanted = np.flatnonzero(test[start : start + len(rows)] == bool(number))
                if len(wanted):
                    _append(writer, source, stored, start, rows, wanted, names, owners)
                seen(number * source.samples + start + len(rows), len(outs) * source.samples)
        done.append(writer.written)
    return done


def _append(
    writer: DataWriter,
    source: Source,
    stored: Stored,
    start: int,
    rows: np.ndarray,
    wanted: np.ndarray,
    names: Sequence[str],
    owners: np.ndarray,
) -> None:
    kept = rows[wanted]
    inputs = stored.decoded(kept) if stored.as_stored else numbers(stored, kept).reshape(kept.shape)
    targets = source.targets(start + wanted)
    groups = [names[code] for code in owners[start + wanted]] if names else None
    writer.append(
        inputs,
        targets if source.target_size is None else targets.T,
        lambda row: f"sample {start + wanted[row]}",
        groups,
    )


def _describe(writer: DataWriter, source: Source) -> None:
    """Store what the source says of its inputs and of itself."""
    dataset = source.parts[0].dataset
    encoding = source.encoding
    if encoding.subtract:
        writer.describe_inputs(
            {key: np.array(value, np.float32) for key, value in encoding.declared.items() if key != "one_hot"}
        )
    meaning = source.meaning
    if meaning.input_names or meaning.target_names:
        writer.name_columns(meaning.input_names, meaning.target_names)
    if dataset.stored:
        file = dataset.values.file
        writer.annotate({key: file.attrs[key] for key in _KEPT if key in file.attrs and file.attrs[key].size < 1 << 12})


def _drawn(strata: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return a fraction of each stratum, rounded so that the whole is as near to it as can be."""
    chosen = np.zeros(len(strata), bool)
    random, owed = _random(seed), 0.0
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        owed += fraction * len(members)
        count = min(max(round(owed), 0), len(members))
        owed -= count
        chosen[random.permutation(members)[:count]] = True
    return chosen


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STREAM])
