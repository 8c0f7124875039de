"""The plan of a warmstart: who learns when, also where a run resumes in the middle of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from unit.checkpoint_files import make_info

from dbmpi.config import Run
from dbmpi.data.deal import DealPhase, first_share
from dbmpi.data.stream import Order, Stream
from dbmpi.downpour.warmstart import Warmstart
from dbmpi.errors import UserError
from dbmpi.mpi.topology import Plan
from dbmpi.session import StartingPoint

ORDER = Order(40, 6, 100.0, 1)
"""Seven batches an epoch, the last one of four samples."""


def planned(replicas: int, learned: int = 0, warm_samples: int = 0, spares: int = 0, **optimizer: object) -> Warmstart:
    """Return the plan of a session that begins after so many batches."""
    samples = ORDER.before(learned)
    info = make_info(step=learned, samples=samples, warm_samples=warm_samples) if learned else None
    begin = StartingPoint(Stream(ORDER.batches, learned), learned, samples, earlier=info)
    run, plan = Run(optimizer=optimizer), Plan(1, replicas + spares, spares=spares)
    return Warmstart.of(SimpleNamespace(run=run, order=ORDER, begin=begin, plan=plan))


def test_without_one_all_begin_at_once() -> None:
    assert planned(4) == Warmstart(0, 4)
    assert planned(4, spares=2) == Warmstart(0, 4)
    for given in ({"warmstart": 5}, {"warmstart_samples": 30}, {"warmstart_loss": 1.0}):
        assert planned(1, **given).joined == 1
        assert planned(1, **given).phases == ()


def test_the_others_join_at_once_or_one_after_the_other() -> None:
    assert planned(3, warmstart=5) == Warmstart(5, 1, (), 30)
    assert planned(3, warmstart=8) == Warmstart(8, 1, (), 46)
    assert planned(3, warmstart_samples=40) == Warmstart(7, 1, (), 40)
    assert planned(3, warmstart_samples=41) == Warmstart(8, 1, (), 41)
    phases = (DealPhase(4, 2), DealPhase(4, 3))
    assert planned(4, warmstart=5, release_samples=20) == Warmstart(5, 1, phases, 30, 20)
    assert planned(2, warmstart=5, release_samples=20) == Warmstart(5, 1, (), 30, 20)
    assert planned(4, warmstart_loss=0.5, release_samples=20) == Warmstart(700, 1, phases, None, 20)


def test_a_run_resumes_in_the_middle() -> None:
    given = {"warmstart_samples": 40, "release_samples": 20}
    assert planned(5, 3, **given) == Warmstart(4, 1, (DealPhase(4, 2), DealPhase(4, 3), DealPhase(4, 4)), 40, 20)
    assert planned(5, 7, **given) == Warmstart(0, 2, (DealPhase(4, 2), DealPhase(4, 3), DealPhase(4, 4)), 40, 20)
    assert planned(5, 9, **given) == Warmstart(0, 2, (DealPhase(2, 2), DealPhase(4, 3), DealPhase(4, 4)), 40, 20)
    assert planned(5, 11, **given) == Warmstart(0, 3, (DealPhase(3, 3), DealPhase(4, 4)), 40, 20)
    assert planned(5, 70, **given) == Warmstart(0, 5, (), 40, 20)
    by_loss = {"warmstart_loss": 0.5, "release_samples": 20}
    assert planned(5, 9, **by_loss) == Warmstart(691, 1, (DealPhase(4, 2), DealPhase(4, 3), DealPhase(4, 4)), None, 20)
    assert planned(5, 9, 40, **by_loss) == Warmstart(0, 2, (DealPhase(2, 2), DealPhase(4, 3), DealPhase(4, 4)), 40, 20)
    assert planned(5, 70, 40, **by_loss) == Warmstart(0, 5, (), 40, 20)


@pytest.mark.parametrize("learned", [0, 3, 9, 20, 60])
@pytest.mark.parametrize("end", [{"warmstart": 12}, {"warmstart_samples": 70}, {"warmstart_loss": 1.0}])
@pytest.mark.parametrize("release", [0, 1, 45])
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_each_batch_belongs_to_one_replica(learned, end, release, replicas) -> None:
    plan = planned(replicas, learned, **end, release_samples=release)
    stream = Stream(ORDER.batches, learned)
    shares = [first_share(stream, one, replicas, plan.batches, plan.phases) for one in range(replicas)]
    positions = sorted(position for share in shares for part in share for position in part)
    assert positions == list(range(len(stream)))
    assert all(min(part.start for part in share) >= plan.batches for share in shares[1:] if share)


def test_settings_that_contradict_one_another_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.warmstart = 5 and optimizer\.warmstart_loss = 0\.1 are two ends"):
        Run(optimizer={"warmstart": 5, "warmstart_loss": 0.1})
    with pytest.raises(UserError, match=r"optimizer\.release_samples = 5 is about what follows a warmstart"):
        Run(optimizer={"release_samples": 5})
    with pytest.raises(UserError, match=r"optimizer\.warmstart is for the method 'downpour'"):
        Run(optimizer={"warmstart_loss": 0.1, "method": "sandblaster"})
