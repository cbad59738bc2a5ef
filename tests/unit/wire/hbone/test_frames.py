from __future__ import annotations

from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, GoAwayFrame, RstStreamFrame, WindowUpdateFrame
from hypothesis import given, strategies as st

from tests.support.h2_oracle import frames_of
from ztunnel.wire.hbone.frames import (
    FrameKind,
    pack_data_header,
    pack_frame,
    pack_goaway,
    pack_reset,
    pack_settings,
    pack_window_update,
)

stream_ids = st.integers(1, 2**31 - 1)


@given(stream_id=stream_ids, size=st.integers(0, 2**24 - 1), offset=st.integers(0, 20))
def test_a_data_header_is_what_hyperframe_reads(stream_id: int, size: int, offset: int):
    buffer = bytearray(b"\xff" * 40)
    pack_data_header(buffer, offset, stream_id, size)
    frame, length = DataFrame.parse_frame_header(memoryview(buffer)[offset : offset + 9])
    assert isinstance(frame, DataFrame)
    assert (frame.stream_id, length, set(frame.flags)) == (stream_id, size, set())
    assert buffer[:offset] + buffer[offset + 9 :] == b"\xff" * 31


@given(stream_id=stream_ids, payload=st.binary(max_size=70_000))
def test_a_frame_is_what_hyperframe_prints(stream_id: int, payload: bytes):
    theirs = DataFrame(stream_id, payload, flags=["END_STREAM"])
    assert pack_frame(FrameKind.DATA, 1, stream_id, payload) == theirs.serialize()


def test_the_frames_we_print_are_what_hyperframe_prints():
    assert (
        pack_window_update(3, 70_000) == WindowUpdateFrame(3, window_increment=70_000).serialize()
    )
    assert pack_reset(5, 8) == RstStreamFrame(5, error_code=8).serialize()
    theirs = GoAwayFrame(0, last_stream_id=7, error_code=2, additional_data=b"why")
    assert pack_goaway(7, 2, b"why") == theirs.serialize()


def test_settings_carry_every_value():
    values = {SettingCodes.ENABLE_PUSH: 0, SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1}
    (frame,) = frames_of(pack_settings(values))
    assert frame.settings == values
