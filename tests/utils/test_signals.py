"""Stop signals are handled alike, and nohup is respected."""

from __future__ import annotations

import signal

import pytest

from solo_vlm.utils.signals import STOP_SIGNALS, handle_stop_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signals_call_the_handler_and_are_restored(number):
    received = []
    before = signal.getsignal(number)
    with handle_stop_signals(lambda number, frame: received.append(number)):
        signal.raise_signal(number)
    assert received == [number]
    assert signal.getsignal(number) == before


def test_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_stop_signals(lambda number, frame: pytest.fail("called")):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
