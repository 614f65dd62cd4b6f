"""Ranks: what they add up, and what is said of one that is lost."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta

import pytest
import torch
from torch.multiprocessing import active_children

import ao.distributed
from ao.distributed import PATIENCE, launch, ranks


def add_up(failing: int | None) -> tuple[int, list[float], int]:
    """World size, the ranks' sum of 10 ** rank, threads; one rank may fail before the sum, and 2 fails after it."""
    with ranks(torch.device("cpu")) as here:
        if here.rank == failing:
            raise ValueError("this rank has had enough")
        found = here.sum_(torch.tensor([10.0**here.rank])).tolist()
        threads = torch.get_num_threads()
    if failing == 2 and not here.first:
        raise ValueError("this rank has had enough")
    return here.world, found, threads


def test_one_process_is_one_rank_and_needs_no_group():
    assert add_up(None) == (1, [1.0], torch.get_num_threads())


METHODS = [name for name in ("spawn", "forkserver") if name in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("start_method", METHODS)
def test_ranks_add_up_and_leave_nothing_behind(start_method, monkeypatch):
    monkeypatch.setattr(ao.distributed, "START_METHOD", start_method)
    threads = torch.get_num_threads()
    world, found, each = launch(add_up, None, processes=2)
    assert (world, found) == (2, [11.0])
    assert each == max(1, (os.cpu_count() or 1) // 2)
    assert torch.get_num_threads() == threads
    assert "RANK" not in os.environ
    assert active_children() == []


def threads_of_all(num_cores: int) -> list[float]:
    """Threads of rank 0 and rank 1, on a machine of so many cores."""
    os.cpu_count = lambda: num_cores
    with ranks(torch.device("cpu")) as here:
        return here.sum_(torch.tensor([float(torch.get_num_threads())] * 2) * torch.eye(2)[here.rank]).tolist()


def test_ranks_take_no_more_threads_than_they_were_given(monkeypatch):
    """A tiny model on many cores is slowed down by threads: the caller's word reaches every rank."""
    monkeypatch.setattr(os, "cpu_count", os.cpu_count)  # put back afterwards
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert launch(threads_of_all, 16, processes=2) == [1.0, 1.0]
        torch.set_num_threads(3)
        assert launch(threads_of_all, 16, processes=2) == [3.0, 3.0]
    finally:
        torch.set_num_threads(before)


def timeout(patient: bool) -> timedelta:
    """How long these ranks wait for each other, of which one sum is proof that they do."""
    with ranks(torch.device("cpu"), patient=patient) as here:
        assert here.sum_(torch.ones(1)).tolist() == [2.0]
        group = torch.distributed.group.WORLD
        return group._get_backend(torch.device("cpu")).options._timeout


def test_patient_ranks_wait_for_days_and_others_for_the_librarys_minutes():
    assert launch(timeout, True, processes=2) == PATIENCE
    assert timedelta(days=1) < PATIENCE < timedelta(milliseconds=2**31)  # a system call takes it as 32 bits
    assert launch(timeout, False, processes=2) <= timedelta(minutes=30)


@pytest.mark.parametrize("failing", [1, 2], ids=["in the middle", "at the end"])
def test_a_lost_rank_is_an_error_with_its_reason(failing):
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*this rank has had enough"):
        launch(add_up, failing, processes=2)
    assert active_children() == []


def test_an_error_of_the_first_rank_is_its_own_and_ends_the_others():
    with pytest.raises(ValueError, match="this rank has had enough"):
        launch(add_up, 0, processes=2)
    assert active_children() == []
