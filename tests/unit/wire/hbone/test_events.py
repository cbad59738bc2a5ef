from __future__ import annotations

from ztunnel.wire.hbone.events import SettingsReceived, StreamEnded, StreamReset
from ztunnel.wire.hbone.stream import Stream


def a_stream() -> Stream:
    return Stream(1, send_window=0, receive_window=0, readable=True)


def test_a_reset_is_the_peers_unless_we_say_it_is_ours():
    assert StreamReset(a_stream(), 8).by_peer
    assert not StreamReset(a_stream(), 8, by_peer=False).by_peer


def test_events_about_the_same_stream_are_equal():
    stream = a_stream()
    assert StreamEnded(stream) == StreamEnded(stream)
    assert StreamEnded(stream) != StreamEnded(a_stream())
    assert SettingsReceived() == SettingsReceived()
