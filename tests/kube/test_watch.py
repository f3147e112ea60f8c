"""The signal that wakes a waiter; the cache itself is tested on a real kube-apiserver."""

from kube.watch import Signal


async def test_a_signal_set_before_it_is_waited_for_is_not_lost() -> None:
    signal = Signal()
    signal.set()
    signal.set()
    assert await signal.wait(0) is True
    assert await signal.wait(0) is False, "setting it twice is the same as once"


async def test_waiting_ends_without_a_signal_after_the_timeout() -> None:
    assert await Signal().wait(0.01) is False
