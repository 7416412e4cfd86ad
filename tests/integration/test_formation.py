"""Forming the process group again within the attempt, where something was in its way only for a moment."""

from __future__ import annotations

import contextlib
import socket

import pytest

from starcoder_trainer.process_group import TRIES, spans
from tests.support.formation import Ranks
from tests.support.trainer import listen

pytestmark = pytest.mark.slow


def ends(ranks: Ranks, count: int) -> dict[int, object]:
    return dict(ranks.until("end") for _ in range(count))


def test_where_one_rank_can_t_join_all_try_again_and_form() -> None:
    with listen() as listener, contextlib.closing(Ranks(3, listener, faulty=1, failures=1)) as ranks:
        told = {ranks.until("log") for _ in range(3)}
        assert {rank for rank, _ in told} == {0, 1, 2}
        assert all(f"try 1 of {TRIES} to form the process group failed" in line for _, line in told)
        assert any("connection reset by peer" in line for rank, line in told if rank == 1)
        assert ends(ranks, 3) == {0: 3.0, 1: 3.0, 2: 3.0}


def test_a_rank_that_never_can_join_is_named_when_the_tries_are_used_up() -> None:
    with listen() as listener, contextlib.closing(Ranks(2, listener, faulty=1, failures=TRIES)) as ranks:
        rank, outcome = ranks.until("end")
    assert str(outcome).startswith(f"FormationError: rank {rank} of 2 did not join at 127.0.0.1:")
    assert "connection reset by peer" in str(outcome)


def test_ranks_that_never_come_are_named() -> None:
    with listen() as listener, contextlib.closing(Ranks(6, listener, absent=(1, 3, 4, 5), seconds=15.0)) as ranks:
        said = dict(ranks.until("end") for _ in range(2))
    assert "2 of 6 ranks came, not 1, 3-5; look at" in str(said[0])
    assert str(said[2]).startswith("FormationError: rank 2 of 6 did not join")


def test_many_ranks_are_told_in_few_words() -> None:
    assert spans([3, 8, 9, 10, 15]) == "3, 8-10, 15"
    assert spans(list(range(0, 40, 2))) == "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, …"


def test_a_port_that_is_taken_is_waited_for() -> None:
    taken = listen()
    with contextlib.closing(Ranks(1, taken, hand_over=False)) as ranks:
        _, line = ranks.until("log")
        assert "is taken; tried again" in line
        taken.shutdown(socket.SHUT_RDWR)
        taken.close()
        assert ends(ranks, 1) == {0: 1.0}
