from __future__ import annotations

import struct

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hypothesis import given, strategies as st

from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.settings import HboneSettings, parse_settings


def entry(code: int, value: int) -> bytes:
    return struct.pack(">HI", code, value)


def test_a_client_announces_what_the_reference_does():
    assert HboneSettings().announced(client=True) == {
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.INITIAL_WINDOW_SIZE: 4 * 2**20,
        SettingCodes.MAX_FRAME_SIZE: 2**20,
        SettingCodes.MAX_HEADER_LIST_SIZE: 16 * 2**10,
    }


def test_a_server_announces_what_the_reference_does():
    assert HboneSettings().announced(client=False) == {
        SettingCodes.MAX_CONCURRENT_STREAMS: 200,
        SettingCodes.INITIAL_WINDOW_SIZE: 4 * 2**20,
        SettingCodes.MAX_FRAME_SIZE: 2**20,
        SettingCodes.MAX_HEADER_LIST_SIZE: 64 * 2**10,
    }


def test_a_chosen_header_list_size_goes_for_both_roles():
    chosen = HboneSettings(max_header_list_size=5000)
    assert chosen.header_list_size(client=True) == 5000
    assert chosen.header_list_size(client=False) == 5000


@pytest.mark.parametrize(
    "wrong",
    [
        {"stream_window": 0},
        {"stream_window": 2**31},
        {"connection_window": 65_534},
        {"connection_window": 2**31},
        {"max_frame_size": 16_383},
        {"max_frame_size": 2**24},
        {"max_concurrent_streams": -1},
        {"max_concurrent_streams": 2**31},
    ],
    ids=str,
)
def test_settings_the_protocol_does_not_know_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        HboneSettings(**wrong)


def test_a_later_entry_wins_and_an_unknown_one_is_harmless():
    payload = entry(4, 1) + entry(0x99, 7) + entry(4, 2)
    assert parse_settings(payload, client=True) == ((4, 2), (0x99, 7))


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(b"12345", ErrorCodes.FRAME_SIZE_ERROR, id="a part of an entry"),
        pytest.param(entry(2, 2), ErrorCodes.PROTOCOL_ERROR, id="push neither on nor off"),
        pytest.param(entry(2, 1), ErrorCodes.PROTOCOL_ERROR, id="a server that wants push"),
        pytest.param(entry(8, 2), ErrorCodes.PROTOCOL_ERROR, id="extended CONNECT of two"),
        pytest.param(entry(4, 2**31), ErrorCodes.FLOW_CONTROL_ERROR, id="window too large"),
        pytest.param(entry(5, 16_383), ErrorCodes.PROTOCOL_ERROR, id="frames too small"),
        pytest.param(entry(5, 2**24), ErrorCodes.PROTOCOL_ERROR, id="frames too large"),
        pytest.param(entry(1, 0) * 33, ErrorCodes.ENHANCE_YOUR_CALM, id="too many entries"),
    ],
)
def test_settings_that_may_not_be_end_the_connection(payload: bytes, code: int):
    with pytest.raises(TunnelError) as caught:
        parse_settings(payload, client=True)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "payload",
    [entry(2, 0), entry(8, 1), entry(4, 2**31 - 1), entry(5, 16_384), entry(5, 2**24 - 1)],
)
def test_settings_at_the_edge_are_taken(payload: bytes):
    assert len(parse_settings(payload, client=True)) == 1


def test_a_client_may_allow_push():
    assert parse_settings(entry(2, 1), client=False) == ((2, 1),)


@given(payload=st.binary(max_size=400), client=st.booleans())
def test_any_bytes_are_settings_or_a_tunnel_error(payload: bytes, client: bool):
    try:
        values = parse_settings(payload, client=client)
    except TunnelError:
        return
    assert len(values) <= len(payload) // 6
