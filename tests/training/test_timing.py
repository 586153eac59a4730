"""Time that counts as waiting for data, on a simulated clock."""

import types

import pytest

from alexnet_jax.training import timing


class SimulatedClock:
    """Simulate a loader and devices, with given durations on a clock of their own."""

    def __init__(self, monkeypatch):
        self.now = self.batch_at = self.devices_until = self.wait_seconds = 0.0
        fake = types.SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(timing, "time", fake)

    def next_batch(self, fetch, busy):
        """Take a batch that comes after `fetch` seconds, with devices busy for `busy`."""
        self.batch_at, self.devices_until = self.now + fetch, self.now + busy
        return timing.next_batch(self, self)

    def is_ready(self):
        return self.now >= self.devices_until

    def wait(self, timeout):
        self.now = min(self.now + timeout, max(self.now, self.batch_at))
        return self.now >= self.batch_at

    def __next__(self):
        self.wait_seconds += max(0.0, self.batch_at - self.now)
        self.now = max(self.now, self.batch_at)
        return {}


@pytest.mark.parametrize(("busy", "least", "most"), [(0.2, 0.19, 0.2), (9.0, 0.0, 0.0)])
def test_waiting_counts_from_when_the_devices_are_idle(busy, least, most, monkeypatch):
    clock = SimulatedClock(monkeypatch)
    clock.next_batch(fetch=0.4, busy=busy)
    assert clock.now == 0.4
    assert least <= clock.wait_seconds <= most


def test_waiting_counts_in_steps_of_less_than_a_millisecond(monkeypatch):
    clock = SimulatedClock(monkeypatch)
    for _ in range(50):
        clock.next_batch(fetch=0.005, busy=0.0005)
    assert 0.0043 < clock.wait_seconds / 50 <= 0.0045
