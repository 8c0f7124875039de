"""Small orders: what arrives is what was sent, in order, for the right role, and nobody waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.mpi.mailbox import Mailbox, Message, MessageKind, Role

int64 = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def comm():
    from mpi4py import MPI

    own = MPI.COMM_SELF.Dup()
    yield own
    own.Free()


def drain(mailbox: Mailbox) -> list[Message]:
    found = []
    while (message := mailbox.receive()) is not None:
        found.append(message)
    return found


def test_an_empty_mailbox_gives_nothing_at_once(comm) -> None:
    assert Mailbox(comm, Role.SHARD).receive() is None


@given(orders=st.lists(st.tuples(st.sampled_from(MessageKind), st.lists(int64, max_size=7)), max_size=10))
def test_orders_arrive_whole_and_in_order(comm, orders) -> None:
    mailbox = Mailbox(comm, Role.WORKER)
    for kind, values in orders:
        mailbox.send(0, Role.WORKER, kind, *values)
    found = drain(mailbox)
    assert [
        (message.kind, list(message.values[: len(values)])) for message, (_, values) in zip(found, orders, strict=True)
    ] == orders
    assert all(
        message.source == 0 and not any(message.values[len(values) :])
        for message, (_, values) in zip(found, orders, strict=True)
    )
    mailbox.close()


def test_each_role_has_its_own_mailbox(comm) -> None:
    shard, worker = Mailbox(comm, Role.SHARD), Mailbox(comm, Role.WORKER)
    worker.send(0, Role.SHARD, MessageKind.PAUSED, 5)
    shard.send(0, Role.WORKER, MessageKind.GO)
    shard.send(0, Role.SHARD, MessageKind.END)
    assert [message.kind for message in drain(worker)] == [MessageKind.GO]
    assert [(message.kind, message.values[0]) for message in drain(shard)] == [
        (MessageKind.PAUSED, 5),
        (MessageKind.END, 0),
    ]
    shard.close()
    worker.close()


def test_kinds_and_roles_have_numbers_of_their_own() -> None:
    for numbers in (MessageKind, Role):  # a second name for a number would be an alias, which iteration leaves out
        assert [member.name for member in numbers] == list(numbers.__members__)
