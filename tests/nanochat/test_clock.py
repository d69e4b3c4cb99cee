"""Laps are what training took, and nothing else; and nothing waits for the GPU but what is no training."""

import time

import pytest
import torch

from nanochat.clock import Clock


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its one element."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_laps_leave_out_what_is_no_training(passing: list[float]) -> None:
    clock = Clock(torch.device("cpu"))
    passing[0] += 3
    assert clock.lap() == 3
    passing[0] += 1
    with clock.stopped():
        passing[0] += 50
    passing[0] += 1
    with clock.stopped():
        passing[0] += 7
    passing[0] += 2
    assert clock.lap() == 4
    passing[0] += 9
    clock.restart()
    passing[0] += 1
    assert clock.lap() == 1
    assert clock.lap() == 0


def test_an_estimate_counts_from_the_end_of_warm_up_and_whatever_lies_between_steps(passing: list[float]) -> None:
    clock = Clock(torch.device("cpu"))
    for done in (-1, 0):
        passing[0] += 60
        assert clock.estimate(done, 10) is None
    passing[0] += 2
    assert clock.estimate(1, 8) == 16
    with clock.stopped():
        passing[0] += 4
    assert clock.estimate(2, 7) == 21


@pytest.mark.gpu
def test_only_a_clock_that_is_stopped_waits_for_the_gpu() -> None:
    clock = Clock(torch.device("cuda"))
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)  # cycles, a twentieth of a second
    done = torch.cuda.Event()
    done.record()
    clock.lap()
    assert not done.query()
    with clock.stopped():
        assert done.query()
        time.sleep(1)
    assert 0.01 < clock.lap() < 1
