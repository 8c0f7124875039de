"""What samples are like: ranges, gaps, the balance of classes; and some of them to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dbmpi.data.groups import groups_of
from dbmpi.data.moments import Moments
from dbmpi.data.rows import Stored
from dbmpi.data.source import Source

MOST_SHOWN = 10
"""Samples of each class that are looked at."""

Seen = Callable[[int, int], None]
"""Called with how many samples have been read, and of how many."""


@dataclass
class Survey:
    """What was found in all samples of some data."""

    source: Source
    lowest: float = np.inf
    highest: float = -np.inf
    mean: float = np.nan
    deviation: float = np.nan
    constant: int = 0
    """Inputs that have one value in all samples."""
    missing: int = 0
    """Inputs of all samples that are missing, NaN or infinite."""
    incomplete: int = 0
    """Samples that lack some."""
    moments: Moments = field(default_factory=lambda: Moments(1))
    """Of each input."""
    counts: np.ndarray | None = None
    """Samples of each class; None where there are none."""
    target_moments: Moments | None = None
    """Of each value of the targets; None where there are none."""
    groups: dict[str, int] = field(default_factory=dict)
    """Samples of each group, e.g. speaker."""

    @classmethod
    def of(cls, source: Source, seen: Seen = lambda done, total: None) -> Survey:
        """Read all samples once.

        Parameters
        ----------
        source
            Open, and not yet read.
        seen
            Told how far it is.

        Raises
        ------
        UserError
            If the file is damaged, or a label is no class.
        """
        found = cls(source)
        stored = source.parts[0]
        features = int(np.prod(stored.shape[1:], dtype=np.int64))
        found.moments = Moments(features)
        least, most = np.full(features, np.inf), np.full(features, -np.inf)
        for start, rows in stored.blocks():
            values = numbers(stored, rows)
            values[~np.isfinite(values)] = np.nan
            absent = np.isnan(values)
            found.missing += int(absent.sum())
            found.incomplete += int(absent.any(axis=1).sum())
            found.moments.add(values)
            np.fmin(least, np.fmin.reduce(values, axis=0), out=least)
            np.fmax(most, np.fmax.reduce(values, axis=0), out=most)
            seen(start + len(rows), source.samples)
        together = found.moments.together(1)
        found.lowest, found.highest = float(least.min()), float(most.max())
        found.mean, found.deviation = float(together.mean[0]), float(together.deviation[0])
        found.constant = int((least == most).sum())
        if source.has_targets:
            found._look_at_targets()
        names, codes = groups_of(source)
        if names:
            found.groups = dict(zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True))
        return found

    def _look_at_targets(self) -> None:
        source = self.source
        if source.classes is not None:
            self.counts = np.zeros(source.classes, np.int64)
        else:
            self.target_moments = Moments(source.target_size or 1)
        for targets, _ in source.answers():
            if self.counts is not None:
                self.counts += np.bincount(targets, minlength=len(self.counts))
            elif self.target_moments is not None:
                self.target_moments.add(targets)

    @property
    def labels(self) -> list[str]:
        """What the classes are called."""
        known = self.source.labels or range(self.source.classes or 0)
        return [str(label) if str(label).strip() else repr(label) for label in known]

    def summary(self) -> dict[str, Any]:
        """Return what was found, for JSON."""
        source, stored = self.source, self.source.parts[0]
        found: dict[str, Any] = {
            "data": str(source.path),
            "samples": source.samples,
            "inputs": {
                "shape": [*stored.shape[1:]],
                "type": str(stored.dtype),
                "scale": stored.meaning.scale,
                "lowest": _or_none(self.lowest),
                "highest": _or_none(self.highest),
                "mean": _or_none(self.mean),
                "deviation": _or_none(self.deviation),
                "constant": self.constant,
                "missing": self.missing,
                "incomplete_samples": self.incomplete,
                **{key: value for key, value in source.encoding.declared.items() if key == "one_hot"},
                "normalised": bool(source.encoding.subtract),
            },
            "notes": [*source.notes],
        }
        if self.counts is not None:
            found["classes"] = dict(zip(self.labels, self.counts.tolist(), strict=True))
        if self.target_moments is not None:
            moments = self.target_moments
            found["values"] = {"mean": moments.mean.tolist(), "deviation": moments.deviation.tolist()}
        if self.groups:
            found["groups"] = self.groups
        return found

    def lines(self) -> list[tuple[str, str]]:
        """Return what was found as text: what it is of, and what was found."""
        source, stored = self.source, self.source.parts[0]
        shape = " x ".join(map(str, stored.shape[1:])) or "one number"
        factor = f", times {stored.meaning.scale:.6g}" if stored.meaning.scale != 1 else ""
        hot = f", which stand for one-hot vectors of {source.encoding.one_hot}" if source.encoding.one_hot else ""
        inputs = stored.samples * self.moments.mean.size
        missing = (
            "none"
            if not self.missing
            else (
                f"{self.missing:,} of {inputs:,} ({100 * self.missing / inputs:.2g} %), in {self.incomplete:,} samples"
            )
        )
        found = [
            ("samples", f"{source.samples:,}"),
            ("inputs", f"{shape}, {stored.dtype}{factor}{hot}"),
            ("", f"from {self.lowest:.6g} to {self.highest:.6g}, mean {self.mean:.4g}, deviation {self.deviation:.4g}"),
            ("missing", missing),
        ]
        if self.constant:
            found.append(("constant", f"{self.constant:,} of {self.moments.mean.size:,} inputs never vary"))
        if source.encoding.subtract:
            found.append(
                ("normalised", f"by {len(source.encoding.subtract):,} means and deviations when they are used")
            )
        if self.counts is not None:
            found.append(("targets", f"{source.classes:,} classes"))
            order, counts = np.argsort(-self.counts, kind="stable"), self.counts
            width = max((len(self.labels[code]) for code in order[:20]), default=0)
            found += [
                (
                    "",
                    f"{self.labels[code]:<{width}}  {counts[code]:>9,}  {_percent(counts[code], source.samples)}",
                )
                for code in order[:20]
            ]
            if len(order) > 20:
                rest = int(self.counts[order[20:]].sum())
                found.append(("", f"{len(order) - 20:,} more, with {rest:,} samples together"))
        if self.target_moments is not None:
            moments, size = self.target_moments, source.target_size or 1
            found.append(("targets", f"{size:,} value{'s' * (size > 1)} a sample"))
            pairs = zip(moments.mean[:8], moments.deviation[:8], strict=True)
            found += [("", f"mean {mean:.4g}, deviation {deviation:.4g}") for mean, deviation in pairs]
        if self.groups:
            found.append(("groups", f"{len(self.groups):,}"))
            found += [("", f"{name}  {count:,}") for name, count in [*self.groups.items()][:12]]
        return found + [("note", note) for note in source.notes]


def numbers(stored: Stored, rows: np.ndarray) -> np.ndarray:
    """Return stored rows as numbers, float32 ``(rows, features)``, before they are encoded; NaN where one is missing.

    Parameters
    ----------
    stored
        The inputs.
    rows
        As it reads them.
    """
    values = stored.decoded(rows).reshape(len(rows), -1).astype(np.float32)
    return values * np.float32(stored.factor)


def _or_none(number: float) -> float | None:
    return number if np.isfinite(number) else None


def _percent(count: int, of: int) -> str:
    return f"{100 * count / of:5.1f} %"
