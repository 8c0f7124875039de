"""Whether samples suit a network, or what was learned before: what they stand for, beside what was expected."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dbmpi.checkpoint.meaning import Meaning, agree
from dbmpi.data.reading import Label
from dbmpi.errors import UserError

_LOOKED_AT_ROWS, _LOOKED_AT_BYTES = 64, 16 << 20
"""Most that is read to see what samples are like, however many there are; two rows at least."""


class Comparable:
    """What is known of samples before any batch is made: a base of :class:`dbmpi.data.source.Source`."""

    path: Path | str
    """The file, or what the user calls the data that were given instead."""
    samples: int
    """Number of samples."""
    input_shape: tuple[int, ...]
    """Shape of one sample."""
    has_targets: bool
    """Whether there are targets; otherwise only :meth:`inputs` can be asked for."""
    names: dict[str, str]
    """What the user calls the parts: ``inputs``, ``targets``, and if there are any, ``weights``."""
    scale: float
    """Factor on every stored input."""
    classes: int | None = None
    """Number of classes, or None where the targets are values or missing."""
    target_size: int | None = None
    """Number of values of a target, or None where the targets are classes or missing."""
    labels: tuple[Label, ...] | None = None
    """What the classes are called in the user's own data, in their order; None where they are just numbers."""
    in_file: bool
    """Whether they are in a file, and not given as arrays."""
    _declared: dict[str, Any]
    _codes: np.ndarray | None = None
    """For each class of the data the one that it is taken for; None where they are the same."""

    def expect(self, outputs: int, loss: str) -> None:
        """Raise UserError unless a last layer of `outputs` units with this loss fits the targets.

        ``softmax`` needs one output a class; ``logistic`` (one-vs-all) at least that many, or one a value between 0
        and 1; ``squared`` one output a value, or one a class, which is then compared with the one-hot vector of the
        class.
        """
        given = f"the network's last layer has {outputs} outputs"
        if self.target_size is not None:
            if loss not in ("squared", "logistic"):
                raise UserError(
                    f"{self.path}: the targets are {self.target_size} values a sample, but the loss {loss!r} needs "
                    f"classes; use the loss 'squared', 'logistic' for several labels of 0 and 1 a sample, or integer "
                    f"targets of shape (samples,)"
                )
            if outputs != self.target_size:
                hint = "; for classes store them as integers of shape (samples,)" if self.target_size == 1 else ""
                raise UserError(
                    f"{self.path}: the targets are {self.target_size} values a sample, but {given}; "
                    f"set its units to {self.target_size}{hint}"
                )
        elif self.classes is not None and (outputs < self.classes or (outputs > self.classes and loss != "logistic")):
            more = "at least " if loss == "logistic" else ""
            hint = f", or set the attribute 'classes' of {self.names['targets']!r}" if self.in_file else ""
            hint = "" if outputs < self.classes else hint or ", or give one-hot rows (samples, outputs) as targets"
            raise UserError(
                f"{self.path}: the targets are {self.classes} classes, but {given}; the loss {loss!r} needs "
                f"{more}{self.classes}: set its units to {self.classes}{hint}"
            )

    def expect_like(self, train: Comparable) -> tuple[str, ...]:
        """Raise UserError unless this (test) file's samples suit a network trained on `train`; return notices.

        Classes are from then on those of `train` with the same labels.
        """
        if self.input_shape != train.input_shape:
            raise UserError(
                f"{self.path}: samples have shape {self.input_shape}, but those of {train.path} have "
                f"{train.input_shape}; expected the same"
            )
        if not self.has_targets:
            return self.mean_the_same(train.meaning, 0, learner=str(train.path), targets=False)
        if self.target_size != train.target_size:
            raise UserError(
                f"{self.path}: the targets are {self._kind()}, but those of {train.path} are {train._kind()}; "
                f"expected the same"
            )
        notices = self.mean_the_same(train.meaning, train.classes or 0, learner=str(train.path))
        if self.classes is not None and train.classes is not None and self.classes > train.classes:
            raise UserError(
                f"{self.path}: has {self.classes} classes, but {train.path} only {train.classes}; "
                f"expected no class that is not trained"
            )
        return notices

    @cached_property
    def meaning(self) -> Meaning:
        """Meaning of the samples, with the range of some of the rows."""
        row_bytes = 4 * max(1, int(np.prod(self.input_shape)))
        count = max(2, min(_LOOKED_AT_ROWS, _LOOKED_AT_BYTES // row_bytes))
        indices = np.unique(np.linspace(0, self.samples - 1, count).astype(np.int64))
        digest = hashlib.sha256(f"{self.samples} samples of {self.input_shape}".encode())
        lowest = highest = 0.0
        for inputs in self._shown(indices):
            digest.update(inputs.data)
            finite = inputs[np.isfinite(inputs)]
            lowest, highest = min(lowest, float(finite.min(initial=0))), max(highest, float(finite.max(initial=0)))
        if self.has_targets:
            digest.update(self._targets_at(indices, first=False).data)
        known = {"scale": self.scale, "labels": self.labels or (), "digest": digest.hexdigest()}
        return Meaning.model_validate({"lowest": lowest, "highest": highest, **known, **self._declared})

    def _shown(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return each of the inputs at `indices` as a network would get it, float32 ``(features, samples)``."""
        raise NotImplementedError

    def _targets_at(self, indices: np.ndarray, first: bool) -> np.ndarray:
        """Return the targets at `indices`, with the sample first, or innermost as a network would get them."""
        raise NotImplementedError

    def mean_the_same(
        self, learned: Meaning | None, classes: int, *, learner: str, targets: bool = True
    ) -> tuple[str, ...]:
        """Take the classes for those of the same labels that were learned, and return what the user should know.

        Parameters
        ----------
        learned, classes
            What was learned from, and its number of classes.
        learner
            What to call it in messages.
        targets
            Whether the targets are used.

        Raises
        ------
        UserError
            If the samples are other things than those that were learned from.
        """
        targets = targets and self.has_targets
        both = (classes, self.classes) if targets and classes and self.classes else None
        found = agree(learned, self.meaning, learner=learner, file=str(self.path), classes=both, targets=targets)
        self._codes = None if found.codes is None else np.array(found.codes, np.int32)
        return found.notices

    def _kind(self) -> str:
        return f"{self.classes} classes" if self.target_size is None else f"{self.target_size} values a sample"
