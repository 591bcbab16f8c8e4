from __future__ import annotations

import os
import signal

import pytest

from solo_vlm.train.failures import catch_signals


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)], ids=str
)
def test_repeated_signals_are_noted_once(numbers):
    with catch_signals() as stop:
        send(*numbers)
        assert stop.signal == numbers[0]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_sigint_stops_at_once(first):
    with catch_signals(), pytest.raises(KeyboardInterrupt):
        send(first, signal.SIGINT)


def test_nothing_interrupts_a_save():
    with catch_signals() as stop:
        with stop.uninterrupted():
            with stop.uninterrupted():
                send(signal.SIGINT)
            send(signal.SIGINT, signal.SIGINT, signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with catch_signals():
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) != before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
