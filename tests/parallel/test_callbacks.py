"""A user's own code that follows a run: on which ranks it is called, with what, and how it ends a run."""

from __future__ import annotations

import math

import pytest
from parallel import tiny

from dbmpi.errors import UserError
from dbmpi.monitor.callbacks import Callbacks
from dbmpi.runs.training import train


class Listener:
    """Notes what it hears; asks for the end after so many events of one kind."""

    def __init__(self, kind: str = "", count: int = 0) -> None:
        self.heard, self._kind, self._count = [], kind, count

    def _note(self, kind, event):
        self.heard.append((kind, event))
        return kind == self._kind and len(self.of(kind)) == self._count

    def of(self, kind):
        return [event for name, event in self.heard if name == kind]

    def on_step(self, event):
        return self._note("step", event)

    def on_evaluation(self, event):
        return self._note("evaluation", event)

    def on_checkpoint(self, event):
        return self._note("checkpoint", event)

    def on_end(self, event):
        return self._note("end", event)


def described(place, comm, method, **sections):
    return tiny.describe(
        place,
        topology={"colocate": comm.size == 1},
        optimizer={"method": method, "epochs": 12 if method == "sandblaster" else 3},
        monitor={"evaluate_epochs": 1},
        **sections,
    )


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_each_is_called_where_it_happens(comm, place, method) -> None:
    listener = Listener()
    result = train(described(place, comm, method), comm, callbacks=[listener, Listener()])
    (end,) = listener.of("end")
    assert (end.step, end.samples, end.path) == (result.steps, result.samples, result.checkpoint)
    assert (end.loss, end.accuracy) == (result.test.mean_loss, result.test.accuracy)
    assert end.epoch == pytest.approx(result.samples / tiny.SAMPLES)
    first = comm.rank == 0
    assert bool(listener.of("checkpoint")) == first
    assert bool(listener.of("evaluation")) == first
    steps = listener.of("step")
    if method == "downpour":
        assert bool(steps) == (comm.size == 1 or not first), "on the ranks that learn"
        assert comm.allreduce(len(steps)) == result.steps
        assert [event.step for event in steps] == [*range(1, len(steps) + 1)]
        assert {event.replica for event in steps} <= {max(comm.rank - 1, 0)}
        assert all(1 <= event.samples <= 6 for event in steps)
    else:
        assert bool(steps) == first
        assert all(event.samples == tiny.SAMPLES for event in steps)
    assert all(math.isfinite(event.loss) and 0 <= event.accuracy <= 1 for event in steps)
    if first:
        assert listener.of("evaluation")[-1].loss == result.test.mean_loss
        assert listener.of("evaluation")[0].samples == tiny.TEST_SAMPLES
        assert len(listener.of("evaluation")) > 2
        assert listener.of("checkpoint")[-1].path == result.checkpoint


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("method", "kind"), [("downpour", "step"), ("downpour", "evaluation"), ("sandblaster", "step")]
)
def test_one_that_returns_true_ends_the_run_which_may_resume(comm, place, method, kind) -> None:
    whole = 3 * math.ceil(tiny.SAMPLES / 6)
    # A later evaluation than the first: there are others after the end, and the run must be at work still.
    result = train(described(place, comm, method), comm, callbacks=Listener(kind, 1))
    assert result.stopped_by == 0
    assert result.test is not None
    assert result.checkpoint.exists()
    if comm.size == 1 and kind == "step":
        assert result.steps == (1 if method == "downpour" else math.ceil(tiny.SAMPLES / 6) * 2)
    if method == "downpour":
        rest = train(described(place, comm, method), comm)
        assert result.steps + rest.steps == whole, "every batch once"
        if comm.size == 1:
            assert rest.steps > 0


def test_what_is_no_callback_is_refused() -> None:
    class Epochs:
        def on_epoch(self, event):
            """Nothing calls this."""

    for given, words in ((Epochs(), "has 'on_epoch', which is never called"), ([object()], "has none of the methods")):
        with pytest.raises(UserError, match=words):
            Callbacks(given)


def test_none_is_called_after_one_has_failed() -> None:
    class Failing(Listener):
        def on_step(self, event):
            raise ZeroDivisionError("one event too many")

    listener = Listener()
    callbacks = Callbacks([listener, Failing()])
    with pytest.raises(ZeroDivisionError):
        callbacks.call("on_step", None)
    assert not callbacks.call("on_end", None)
    assert [kind for kind, _ in listener.heard] == ["step"]
