import pytest

from hwmodels.errors import MeasurementError
from planner.execute.clock import Clock


def test_the_clock_counts_from_the_runs_zero():
    times = iter([10.0, 12.5])
    clock = Clock(9.0, read=lambda: next(times))
    assert [clock.now(), clock.now()] == [1.0, 3.5]


def test_a_clock_that_goes_back_is_an_error_that_says_by_how_much():
    times = iter([10.0, 9.5])
    clock = Clock(0.0, read=lambda: next(times))
    clock.now()
    with pytest.raises(MeasurementError, match=r"went back by 0\.5 s"):
        clock.now()


def test_waiting_ends_no_earlier_than_asked():
    clock = Clock(0.0)
    begun = clock.now()
    clock.wait_until(begun + 0.002)
    assert clock.now() >= begun + 0.002
