"""What the numbers of a sample stand for, and whether those of two files stand for the same.

The same numbers may be another thing: classes number labels, which differ from file to file; bytes are multiplied by a
scale; columns have names, and an order.  What a network has learned from is kept with it, and everything that is given
to it afterwards is compared with that here: to be evaluated, predicted, resumed from, or tested on in a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from dbmpi.errors import UserError

_MUCH = 8.0
"""Factor between the largest inputs of two files at which something seems wrong."""
_FAR_TOO_SMALL = 64.0
"""Factor by which inputs are smaller at which no dark picture explains it, but a scale that was not applied."""
_SHOWN = 6


class Meaning(BaseModel):
    """A file's account of its samples, and a look at some of them; empty where it says nothing."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    elements: str = ""
    """How the inputs are stored: as ``bytes``, of one scale for all files, ``floats``, ``integers`` or ``numbers``."""
    scale: float = 1.0
    """Factor on everything stored when it is used."""
    lowest: float = 0.0
    highest: float = 0.0
    """Range of the inputs as they are used, in a sample of the rows."""
    labels: tuple[int, ...] | tuple[str, ...] = ()
    """Labels, or names, in the order of the classes."""
    input_names: tuple[str, ...] = ()
    """Names of the inputs."""
    target_names: tuple[str, ...] = ()
    """Names of the values of a target."""
    axes: tuple[str, ...] = ()
    """Names of the axes of a sample."""
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    """What was subtracted from the inputs, and what they were divided by after that."""
    subtract: tuple[float, ...] = ()
    divide: tuple[float, ...] = ()
    """What is subtracted from the inputs when they are used, and what they are divided by after that."""
    one_hot: int = 0
    """Length of the vector that each input, a whole number, stands for when it is used; 0: none."""
    digest: str = ""
    """Of a sample of the rows, as they are used: the same for a file that was moved, copied or packed."""
    content: str = ""
    """Of all that an importer has written."""

    @property
    def size(self) -> float:
        """Largest magnitude of the inputs, in a sample of the rows."""
        return max(abs(self.lowest), abs(self.highest))


class Agreement(NamedTuple):
    """How to take the samples of a file for a network that has learned from another one."""

    codes: tuple[int, ...] | None = None
    """For each class of the file the one that was learned; None where they are the same."""
    notices: tuple[str, ...] = ()
    """What the user should know."""


def agree(
    learned: Meaning | None,
    given: Meaning,
    *,
    learner: str,
    file: str,
    classes: tuple[int, int] | None = None,
    targets: bool = True,
) -> Agreement:
    """Compare the data that were learned from with other data.

    Parameters
    ----------
    learned
        Of the training data; None where it was not noted.
    learner, file
        What to call both in messages.
    classes
        Numbers of classes: learned, and given; None where there are none to compare.
    targets
        Whether the targets matter.

    Raises
    ------
    UserError
        If the file's samples are other things, or their classes cannot be translated.
    """
    if learned is None:
        return Agreement(
            notices=(f"{learner} does not say what its samples stood for, so {file} is taken as it is",)
            if given.labels and classes is not None and len(given.labels) < classes[0]
            else ()
        )
    _check_inputs(learned, given, learner, file)
    notices = _doubts(learned, given, learner, file)
    codes = None
    if targets:
        _check_names(learned.target_names, given.target_names, "targets", learner, file)
        if classes is not None:
            codes, more = _translate(learned.labels, given.labels, classes, learner, file)
            notices += more
    return Agreement(codes, tuple(notices))


def check_same_data(learned: Meaning | None, given: Meaning | None, *, checkpoint: str, file: str) -> None:
    """Raise UserError unless a run that resumes from a checkpoint has the data that the checkpoint was learned from.

    A file that was moved, copied, or stored in another way is the same.

    Parameters
    ----------
    learned, given
        Of the data of the checkpoint, and of the run; nothing is compared where one is None.
    checkpoint, file
        What to call both in messages.
    """
    if learned is None or given is None:
        return
    agree(learned, given, learner=f"the run that wrote {checkpoint}", file=file)
    others = (
        learned.digest != given.digest
        or (learned.labels and given.labels and learned.labels != given.labels)
        or (learned.content and given.content and learned.content != given.content)
    )
    if others:
        raise UserError(
            f"{checkpoint}: has learned from other data with as many samples as {file} has now; set data.train back, "
            "or start anew in another run.directory"
        )


def _check_inputs(learned: Meaning, given: Meaning, learner: str, file: str) -> None:
    """Refuse inputs that cannot be of the same kind."""
    if learned.elements == given.elements == "bytes" and not _close(learned.scale, given.scale):
        raise UserError(
            f"{file}: its bytes are multiplied by {given.scale:.9g}, but {learner} learned from bytes times "
            f"{learned.scale:.9g}; set the attribute 'scale' of its inputs to {learned.scale:.9g}, or import it again "
            f"with --scale {learned.scale:.9g}"
        )
    if learned.axes and given.axes and learned.axes != given.axes:
        raise UserError(
            f"{file}: the axes of a sample are {_some(given.axes)}, but {learner} learned from {_some(learned.axes)}; "
            "transpose the inputs"
        )
    _check_names(learned.input_names, given.input_names, "inputs", learner, file)
    for what, theirs, mine in (
        ("mean", learned.mean, given.mean),
        ("deviation", learned.deviation, given.deviation),
    ):
        same = len(theirs) == len(mine) and all(map(_close, theirs, mine))
        if theirs and mine and not same:
            raise UserError(
                f"{file}: its inputs were normalised by another {what} than those that {learner} learned from: "
                f"{_some(mine)} instead of {_some(theirs)}; import it again with --like and the training file"
            )
    if learned.elements != given.elements and learned.size and given.size:
        ratio = given.size / learned.size
        if ratio > _MUCH or ratio < 1 / _FAR_TOO_SMALL or _signs_differ(learned, given):
            raise UserError(
                f"{file}: its inputs ({_described(given)}) are not like those that {learner} learned from "
                f"({_described(learned)}); scale them as it was done for the training, or store them as "
                f"{learned.elements}"
            )


def _doubts(learned: Meaning, given: Meaning, learner: str, file: str) -> list[str]:
    """Return what may be wrong with the inputs, but need not be."""
    found = []
    ratio = given.size / learned.size if learned.size and given.size else 1.0
    if ratio > _MUCH or ratio < 1 / _MUCH or _signs_differ(learned, given):
        found.append(
            f"warning: the inputs of {file} ({_described(given)}) are not like those that {learner} learned from "
            f"({_described(learned)}): were they scaled alike?"
        )
    if learned.mean and not given.mean:
        found.append(
            f"{file} does not say by which mean and deviation its inputs were normalised; those of the training were"
        )
    return found


def _check_names(learned: Sequence[str], given: Sequence[str], what: str, learner: str, file: str) -> None:
    if not learned or not given or learned == given:
        return
    if sorted(learned) == sorted(given):
        raise UserError(
            f"{file}: has the same {what} as {learner} learned from, in another order: {_some(given)} instead of "
            f"{_some(learned)}; import it again with the columns in that order"
        )
    others = [name for name in given if name not in learned] or [name for name in learned if name not in given]
    raise UserError(
        f"{file}: its {what} are {_some(given)}, but {learner} learned from {_some(learned)}; {others[0]!r} is not in "
        "both"
    )


def _translate(
    learned: Sequence[int | str], given: Sequence[int | str], classes: tuple[int, int], learner: str, file: str
) -> tuple[tuple[int, ...] | None, list[str]]:
    """Return the learned class for each class of the file, None where they are the same; and what to tell the user."""
    if not given:
        if not learned or learned == tuple(range(len(learned))):
            return None, []
        return None, [f"{file} does not say which labels its classes stand for; they are taken for {_some(learned)}"]
    if not learned and given != tuple(range(classes[1])):
        if set(given) <= set(range(classes[0])):
            notice = f"{learner} does not say which labels it learned: those of {file} are taken for the classes"
            return tuple(int(label) for label in given), [notice]
        if len(given) == classes[0]:
            notice = f"{learner} does not say which labels it learned; they are taken for {_some(given)}"
            return None, [notice]
        raise UserError(
            f"{file}: its classes stand for the {len(given)} labels {_some(given)}, but {learner} learned "
            f"{classes[0]} classes and does not name their labels; number the targets as those of the training were"
        )
    if not learned or given == learned[: len(given)]:
        return None, []
    unknown = [label for label in given if label not in learned]
    if unknown:
        raise UserError(
            f"{file}: its classes stand for the labels {_some(given)}, but those of {learner} for {_some(learned)}; "
            f"{unknown[0]!r} was never learned: leave out the samples with it"
        )
    codes = {label: code for code, label in enumerate(learned)}
    return tuple(codes[label] for label in given), []


def _signs_differ(learned: Meaning, given: Meaning) -> bool:
    """Whether only one of both has clearly negative inputs."""
    low, high = sorted((learned.lowest / (learned.size or 1), given.lowest / (given.size or 1)))
    return low < -0.25 and high >= 0


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * max(abs(one), abs(other))


def _described(meaning: Meaning) -> str:
    scaled = f" times {meaning.scale:.6g}" if meaning.elements == "bytes" else ""
    return f"{meaning.elements}{scaled}, from {meaning.lowest:.4g} to {meaning.highest:.4g}"


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values[:_SHOWN])
    return shown + (" ..." if len(values) > _SHOWN else "")
