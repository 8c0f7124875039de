"""A run in virtual time: replicas and shards, put together and driven."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from dbmpi.checkpoint.lead_saver import LeadSaver
from dbmpi.data.deal import first_share, numbers
from dbmpi.downpour.run import fill
from dbmpi.downpour.turns import most_overlaps
from dbmpi.downpour.warmstart import Warmstart
from dbmpi.errors import UserError
from dbmpi.index.layout import cut
from dbmpi.kernels.memory import aligned_empty
from dbmpi.monitor import verdict
from dbmpi.mpi.topology import Plan
from dbmpi.mpi.world import together
from dbmpi.objective import Outcome
from dbmpi.paramserver import bottleneck
from dbmpi.paramserver.rules import rule
from dbmpi.replica.arrangement import equal
from dbmpi.replica.own_objective import OwnReplica
from dbmpi.replica.replica import Replica
from dbmpi.result import Result
from dbmpi.session import DTYPE, Session
from dbmpi.simulation.cluster import ClusterTimes, VirtualCluster
from dbmpi.simulation.gradients import VirtualGradients
from dbmpi.simulation.lead import VirtualLead
from dbmpi.simulation.replica import VirtualReplica
from dbmpi.simulation.shard import VirtualShard
from dbmpi.simulation.times import VirtualClock

_FEWEST_STEPS = 100
"""Fewer, or less than an epoch, may be too few to learn anything."""


def learn(session: Session, stack: ExitStack) -> Result:
    """Learn with virtual replicas and shards; this process is the only rank.

    Parameters
    ----------
    session
        Everything that is known when the run begins; its replica computes for all.
    stack
        Closes what is opened here when the run has ended.
    """
    run, begin, objective, batches = session.run, session.begin, session.replica, session.batches
    assert objective is not None
    assert batches is not None
    section, topology = run.optimizer, run.topology
    plan = Plan(topology.shards or 1, topology.replicas or 1)
    done = begin.done if len(begin.done) == plan.replicas else ()
    session = replace(session, plan=plan, begin=replace(begin, done=done))
    if isinstance(objective, OwnReplica):
        stack.callback(objective.free)
    state = session.objective_state
    if state is not None and state.nbytes and plan.replicas > 1:
        raise UserError(
            f"topology.replicas = {plan.replicas}: the objective has a state that learning changes, and each replica "
            "would need its own; simulate it with topology.replicas = 1"
        )
    session.compile_kernels()
    layout, clock = session.model.layout, VirtualClock()
    times = ClusterTimes.from_config(run.simulation, run.run.seed, begin.step)
    shards = []
    with together(session.comms.world, "preparing the shards"):
        applied_rule = rule(section, session.order.samples, run.network.code)
        arrangement = equal(layout, plan.shards)
        discard_above = run.server.max_staleness if run.server.on_stale == "discard" else 0
        for number, held in enumerate(cut(layout.size, plan.shards)):
            shard = VirtualShard(
                number, held, applied_rule, aligned_empty(len(held), DTYPE), times.service, discard_above
            )
            fill(shard, arrangement, held, session.initial, session.checkpoint, applied_rule)
            shards.append(shard)
    # One process writes, so that a single file is enough.
    alone = replace(session, plan=replace(plan, shards=1))
    saver = alone.saver(equal(layout, 1), stack, f"lower optimizer.learning_rate ({section.learning_rate:g})")
    assert isinstance(saver, LeadSaver)
    simulated = run.simulation
    note = (
        f"simulated, in virtual seconds: compute {simulated.compute}; network {simulated.network}; service "
        f"{simulated.service}"
    )
    progress = session.progress(stack, (note,), f", {len(begin.stream):,} batches are left")
    for name in begin.fresh:
        progress.message(f"the checkpoint has no {name!r}: the rule {section.rule!r} starts it afresh")

    def gradients(computed: Callable[[VirtualReplica, Outcome], object]) -> VirtualGradients:
        parts = [shard.held for shard in shards]
        # A user's code may keep what it is given.
        in_place = isinstance(objective, Replica)
        layers = objective.parameters.parts
        return VirtualGradients(objective, batches, parts, layers, section, in_place=in_place, computed=computed)

    warmstart = Warmstart.of(session).batches
    share = partial(first_share, begin.stream, replicas=plan.replicas, warmstart=warmstart)
    lead = VirtualLead(session, shards, saver, progress, clock, warmstart)
    cluster = VirtualCluster(
        shards,
        [numbers(begin.stream, share(number)) for number in range(plan.replicas)],
        gradients,
        section,
        times,
        clock,
        lead,
        steps=done,
        warmstart=warmstart,
        most_overlaps=most_overlaps(run.server, section),
    )
    cluster.run()
    lead.conclude()
    return _result(session, lead, clock.seconds)


def _result(session: Session, lead: VirtualLead, seconds: float) -> Result:
    """Return the result, in so many virtual `seconds`."""
    run, totals = session.run, lead.totals
    warning = verdict.warning(
        session.data.guessing,
        totals.recent.mean_loss,
        lead.test,
        enough=totals.steps >= _FEWEST_STEPS and totals.samples >= session.data.samples,
        remedy=f"another optimizer.learning_rate ({run.optimizer.learning_rate:g})",
    )
    checkpoint = lead.checkpoint or session.checkpoint
    assert checkpoint is not None or lead.rolls_back
    result = Result(
        steps=totals.steps,
        samples=totals.samples,
        seconds=seconds,
        test=lead.test,
        stopped_by=lead.stopped_by,
        ended=lead.ended_by,
        checkpoint=checkpoint or run.run.directory,
        staleness=totals.staleness.mean,
        advice=bottleneck.advice(lead.busiest, lead.waited),
        warning=warning,
        withheld=totals.withheld,
        discarded=totals.discarded,
        rolled_back=lead.rolls_back,
    )
    return session.conclude(result, seconds)
