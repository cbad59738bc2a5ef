from __future__ import annotations

import pytest

from ztunnel.wire.hbone.stream import Stream


def test_a_new_stream_is_open_on_both_sides():
    stream = Stream(7, send_window=10, receive_window=20, readable=True)
    assert not any((stream.local_ended, stream.remote_ended, stream.was_reset, stream.answered))
    assert stream.owner is None


def test_it_prints_its_number_its_state_and_its_windows():
    stream = Stream(7, send_window=10, receive_window=20, readable=True)
    stream.answered = stream.remote_ended = True
    assert repr(stream) == "<Stream 7 a-r- send=10 receive=20>"


def test_a_misspelt_attribute_is_refused():
    with pytest.raises(AttributeError):
        Stream(1, send_window=0, receive_window=0, readable=True).ownr = 1
