from __future__ import annotations

from ztunnel.transport.heartbeat import Heartbeat, Pulse


def test_a_silent_peer_is_asked_once_and_given_up_two_ticks_later() -> None:
    heartbeat = Heartbeat()
    assert [heartbeat.tick() for _ in range(4)] == [
        Pulse.FINE,
        Pulse.ASK,
        Pulse.WAIT,
        Pulse.GONE,
    ]


def test_an_answer_makes_it_alive_again() -> None:
    heartbeat = Heartbeat()
    heartbeat.tick()
    assert heartbeat.tick() is Pulse.ASK
    heartbeat.heard = True
    assert [heartbeat.tick() for _ in range(2)] == [Pulse.FINE, Pulse.ASK]


def test_a_busy_peer_is_never_asked() -> None:
    heartbeat = Heartbeat()
    for _ in range(5):
        heartbeat.heard = True
        assert heartbeat.tick() is Pulse.FINE
