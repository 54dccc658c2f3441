"""When a teacher gets more replicas and when fewer: the policy against queues that are simulated beside it."""

import itertools
import math

import pytest
from schoolhouse_server.pool.config import Autoscale, Bounds
from schoolhouse_server.pool.scaling import Meter, Pressure, Scaler
from schoolhouse_wire.v1 import directory_pb2

SETTINGS = Autoscale(target_delay_s=0.1, up_after_s=3, down_after_s=60, max_busy=0.7)
BOUNDS = Bounds(min=1, max=8)


def simulate(load, seconds, start_s=20.0, count=1, step_s=2.0):
    """Counts over time: `load(t)` is how many replicas the work would keep busy; what is too much queues up."""
    scaler, queued_s, counts, serving_at = Scaler(), 0.0, [], 0.0
    for turn in range(int(seconds / step_s)):
        now = turn * step_s
        wanted = load(now)
        serving = count if now >= serving_at else previous  # noqa: F821  # set when the count changed
        queued_s = max(queued_s + (wanted - serving) * step_s, 0.0)
        busy = min(wanted + queued_s / step_s, serving)
        if now >= serving_at:  # as the keeper does: no decision while replicas are on their way
            new = scaler.decide(SETTINGS, BOUNDS, count, Pressure(queued_s / serving, busy), now)
            if new != count:
                previous, count = count, new
                serving_at = now + (start_s if new > previous else 0.0)
        counts.append(count)
    return counts


def flips(counts):
    moves = [b - a for a, b in itertools.pairwise(counts) if a != b]
    return sum(a * b < 0 for a, b in itertools.pairwise(moves))


@pytest.mark.parametrize("load", [0.3, 0.95, 1.5, 2.2, 3.05, 5.9])
def test_a_constant_load_gets_what_it_needs_and_no_swings(load):
    counts = simulate(lambda _: load, 4 * 3600)
    assert counts[-1] >= math.ceil(load)
    assert counts[-1] <= math.ceil(load / SETTINGS.max_busy) + 1
    assert flips(counts) <= 2
    assert len(set(counts[-1800:])) == 1  # nothing moves in the last hour


def test_it_grows_fast_and_shrinks_slowly():
    counts = simulate(lambda now: 5.5 if 100 <= now < 600 else 0.2, 3600)
    grown = next(i for i, count in enumerate(counts) if count > 5)
    assert 2 * grown - 100 < 120  # seconds, of which starting took most
    shrunk = [i for i in range(1, len(counts)) if counts[i] < counts[i - 1]]
    assert all(counts[i - 1] - counts[i] == 1 for i in shrunk)
    assert min(b - a for a, b in itertools.pairwise(shrunk)) * 2 >= SETTINGS.down_after_s
    assert counts[-1] == 1


def test_a_load_that_comes_and_goes_is_not_followed_back_and_forth():
    counts = simulate(lambda now: 3.5 if now % 150 < 75 else 0.2, 8 * 3600)
    hours = [flips(counts[i : i + 1800]) for i in range(0, len(counts), 1800)]
    assert hours[-1] <= 3  # it tries to shrink ever more rarely
    assert hours[0] > hours[-1]


def test_a_short_burst_changes_nothing():
    scaler = Scaler()
    counts = [
        scaler.decide(SETTINGS, BOUNDS, 2, Pressure(5.0 if t % 3 < 2 else 0.05, 1.9), float(t)) for t in range(60)
    ]
    assert set(counts) == {2}


def test_between_the_thresholds_nothing_moves():
    scaler = Scaler()
    half = Pressure(SETTINGS.target_delay_s / 2, busy=0.1)
    assert {scaler.decide(SETTINGS, BOUNDS, 3, half, float(now)) for now in range(0, 2000, 2)} == {3}
    quiet = Pressure(SETTINGS.target_delay_s / 5, busy=0.1)
    assert {scaler.decide(SETTINGS, BOUNDS, 3, quiet, float(now)) for now in range(2000, 2100, 2)} == {2, 3}
    busy = Pressure(0.0, busy=1.9)  # two would be busy for more than 0.7 of the time
    assert {scaler.decide(SETTINGS, BOUNDS, 3, busy, float(now)) for now in range(3000, 5000, 2)} == {3}


def test_bounds_hold():
    scaler = Scaler()
    assert scaler.decide(SETTINGS, BOUNDS, 12, Pressure(0.0, 0.0), 0.0) == 8
    for now in range(0, 2000, 2):
        assert scaler.decide(SETTINGS, BOUNDS, 1, Pressure(0.0, 0.0), float(now)) == 1
        assert Scaler().decide(SETTINGS, BOUNDS, 8, Pressure(99.0, 8.0), float(now)) == 8


def test_pressure_is_read_from_loads():
    def load(busy_s, **fields):
        return directory_pb2.Load(stage_s={"forward": busy_s}, **fields)

    meter = Meter()
    meter.read([("a", load(10.0)), ("b", load(50.0))], 100.0)
    found = meter.read([("a", load(10.5, queue_delay_s=0.2)), ("b", load(52.0, queue_delay_s=0.4))], 102.0)
    assert found.busy == pytest.approx(0.5 / 2 + 2.0 / 2)
    assert found.delay_s == pytest.approx(0.3)
    found = meter.read([("c", load(9.0, served=90, queued=20))], 104.0)  # one that was not there before
    assert found.busy == 0
    assert found.delay_s == pytest.approx(20 * 0.1)  # each has taken 0.1 s
    assert meter.read([], 106.0) == Pressure(0.0, 0.0)
