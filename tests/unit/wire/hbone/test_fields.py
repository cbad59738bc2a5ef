from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from h2.errors import ErrorCodes
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError
from hypothesis import given, strategies as st

from ztunnel.errors import TunnelError
from ztunnel.wire.hbone.events import Headers
from ztunnel.wire.hbone.fields import FieldCodec, is_request, is_trailers, status_of

METHOD = (b":method", b"CONNECT")
AUTHORITY = (b":authority", b"10.0.0.1:80")
GET = (b":method", b"GET")
SCHEME = (b":scheme", b"https")
PATH = (b":path", b"/")


def a_codec(*, max_list_size: int = 16_384) -> FieldCodec:
    return FieldCodec(max_list_size=max_list_size)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([METHOD, AUTHORITY], id="plain CONNECT"),
        pytest.param([AUTHORITY, METHOD, (b"baggage", b"")], id="any order, empty value"),
        pytest.param([METHOD, AUTHORITY, (b"te", b"trailers")], id="te trailers"),
        pytest.param([METHOD, AUTHORITY, (b"x", b"\xff\x01a b")], id="odd bytes in a value"),
        pytest.param([GET, SCHEME, PATH], id="GET without authority"),
        pytest.param([GET, SCHEME, PATH, AUTHORITY], id="GET"),
    ],
)
def test_well_formed_requests(headers: Headers):
    assert is_request(headers)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([], id="nothing"),
        pytest.param([METHOD], id="CONNECT to nowhere"),
        pytest.param([METHOD, (b":authority", b"")], id="CONNECT to an empty authority"),
        pytest.param([METHOD, AUTHORITY, PATH], id="CONNECT with a path"),
        pytest.param([METHOD, AUTHORITY, SCHEME], id="CONNECT with a scheme"),
        pytest.param(
            [METHOD, AUTHORITY, SCHEME, PATH, (b":protocol", b"websocket")], id="extended CONNECT"
        ),
        pytest.param([METHOD, AUTHORITY, AUTHORITY], id="two authorities"),
        pytest.param([METHOD, (b"baggage", b"x"), AUTHORITY], id="pseudo field after a regular"),
        pytest.param([METHOD, AUTHORITY, (b":status", b"200")], id="a response's pseudo field"),
        pytest.param([METHOD, AUTHORITY, (b":new", b"1")], id="unknown pseudo field"),
        pytest.param([METHOD, AUTHORITY, (b"Baggage", b"x")], id="upper case"),
        pytest.param([METHOD, AUTHORITY, (b"", b"x")], id="empty name"),
        pytest.param([METHOD, AUTHORITY, (b"a b", b"x")], id="blank in a name"),
        pytest.param([METHOD, AUTHORITY, (b"a:b", b"x")], id="colon in a name"),
        pytest.param([METHOD, AUTHORITY, (b"a\n", b"x")], id="newline at the end of a name"),
        pytest.param([METHOD, AUTHORITY, (b"\xe4", b"x")], id="name beyond ASCII"),
        pytest.param([METHOD, AUTHORITY, (b"a", b"x\r\ny")], id="line break in a value"),
        pytest.param([METHOD, AUTHORITY, (b"a", b"x\n")], id="newline at the end of a value"),
        pytest.param([METHOD, AUTHORITY, (b"a", b"\x00")], id="zero byte in a value"),
        pytest.param([METHOD, AUTHORITY, (b"a", b" x")], id="blank before a value"),
        pytest.param([METHOD, AUTHORITY, (b"a", b"x\t")], id="tab after a value"),
        pytest.param([METHOD, AUTHORITY, (b"a", b" ")], id="nothing but a blank"),
        pytest.param([METHOD, (b":authority", b"a\r\nb")], id="line break in the authority"),
        pytest.param([METHOD, AUTHORITY, (b"connection", b"close")], id="connection"),
        pytest.param([METHOD, AUTHORITY, (b"transfer-encoding", b"chunked")], id="chunked"),
        pytest.param([METHOD, AUTHORITY, (b"te", b"gzip")], id="te of something else"),
        pytest.param([GET, PATH], id="GET without scheme"),
        pytest.param([GET, SCHEME, (b":path", b"")], id="GET of an empty path"),
        pytest.param([SCHEME, PATH], id="no method"),
    ],
)
def test_malformed_requests(headers: Headers):
    assert not is_request(headers)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param([(b":status", b"200")], 200, id="200"),
        pytest.param([(b":status", b"503"), (b"baggage", b"a=b")], 503, id="503 with a field"),
        pytest.param([], None, id="nothing"),
        pytest.param([(b"baggage", b"x")], None, id="no status"),
        pytest.param([(b":status", b"20")], None, id="two digits"),
        pytest.param([(b":status", b"+20")], None, id="a sign"),
        pytest.param([(b":status", b"600")], None, id="out of range"),
        pytest.param([(b":status", "²00".encode())], None, id="a digit of another script"),
        pytest.param([(b":status", b"200"), (b":status", b"200")], None, id="twice"),
        pytest.param([(b":status", b"200"), METHOD], None, id="a request's pseudo field"),
    ],
)
def test_the_status_of_a_response(headers: Headers, status: int | None):
    assert status_of(headers) == status


def test_trailers_have_no_pseudo_fields():
    assert is_trailers([(b"grpc-status", b"0")])
    assert is_trailers([])
    assert not is_trailers([(b":status", b"200")])


fields = st.tuples(
    st.sampled_from([b"baggage", b"forwarded", b"traceparent", b"x"]), st.binary(max_size=60)
)


@given(blocks=st.lists(st.lists(fields, max_size=8), max_size=8))
def test_what_we_encode_hpack_decodes_and_the_other_way_round(blocks: list[Headers]):
    codec, encoder, decoder = a_codec(), Encoder(), Decoder()
    for headers in blocks:
        assert decoder.decode(codec.encode(headers), raw=True) == headers
        assert codec.decode(encoder.encode(headers)) == headers


@given(
    blocks=st.lists(
        st.tuples(st.lists(st.integers(0, 10_000), max_size=6), st.lists(fields, max_size=5)),
        max_size=6,
    )
)
def test_the_peer_may_resize_our_table_at_any_time(blocks: list[tuple[list[int], Headers]]):
    codec, decoder = a_codec(), Decoder()
    for sizes, headers in blocks:
        for size in sizes:
            codec.resize(size)
        block = codec.encode(headers)
        assert decoder.decode(block, raw=True) == headers
        if sizes:
            assert decoder.header_table_size <= sizes[-1]


# Few enough that blocks repeat; one is longer than a short literal can say, one fills a table.
repeated = st.tuples(
    st.sampled_from([b":status", b"baggage", b"forwarded", b"traceparent", b"x"]),
    st.sampled_from([b"", b"200", b"a", b"b", b"long" * 40, b"f" * 2000, b"g" * 3000]),
)


@given(
    blocks=st.lists(st.lists(repeated, max_size=6), max_size=20),
    huffman=st.booleans(),
    size=st.sampled_from([0, 100, 4096]),
)
def test_what_is_remembered_of_a_table_is_never_out_of_date(
    blocks: list[Headers], huffman: bool, size: int
):
    codec, encoder, decoder = a_codec(max_list_size=32_768), Encoder(), Decoder()
    codec.resize(size)
    encoder.header_table_size = size
    for headers in blocks:
        assert decoder.decode(codec.encode(headers), raw=True) == headers
        assert codec.decode(encoder.encode(headers, huffman=huffman)) == headers


def outcome(decode: Callable[[], Any]) -> object:
    try:
        return list(decode())
    except (TunnelError, HPACKError):
        return "refused"


@given(
    blocks=st.lists(
        st.binary(max_size=40) | st.lists(repeated, max_size=4).map(Encoder().encode), max_size=6
    )
)
def test_any_bytes_mean_to_us_what_they_mean_to_hpack(blocks: list[bytes]):
    codec, decoder = a_codec(), Decoder()
    for block in blocks:
        meant = outcome(lambda block=block: decoder.decode(block, raw=True))
        got = outcome(lambda block=block: codec.decode(block))
        if got == "refused" and meant != got:
            return  # we take fewer table updates, and shorter lists
        assert got == meant
        if got == "refused":
            return  # the connection ends here


def test_a_list_of_short_fields_that_is_too_long_is_refused():
    codec = FieldCodec(max_list_size=100)
    block = b"\x00\x01a\x01b"
    assert codec.decode(block * 2) == [(b"a", b"b")] * 2  # 34 each, with the overhead
    with pytest.raises(TunnelError):
        codec.decode(block * 3)


def test_resizing_for_ever_takes_no_memory():
    codec = a_codec()
    for number in range(10_000):
        codec.resize(number % 7)
    assert len(codec.encode([])) <= 4


@pytest.mark.parametrize("length", [126, 127, 254, 255, 5000])
def test_the_first_block_of_a_connection_fills_no_table(length: int):
    ours, theirs = a_codec(), a_codec()
    fields = [METHOD, (b"baggage", b"b" * length), (b"traceparent", b"1" * 55)]
    block = ours.encode(fields)
    assert theirs.decode(block) == fields
    assert Decoder().decode(block, raw=True) == fields
    for table in (ours._ours, theirs._theirs):
        assert table is None or not table.dynamic_entries
    assert len(ours.encode(fields)) < len(block)
    assert len(ours._ours.dynamic_entries) == (2 if length < 4000 else 0)


def test_fields_that_are_never_twice_the_same_stay_out_of_the_table():
    codec = a_codec()
    codec.encode([])  # the first block leaves the table alone in any case
    first = codec.encode([METHOD, (b"baggage", b"a=b"), (b"traceparent", b"1" * 55)])
    again = codec.encode([METHOD, (b"baggage", b"a=b"), (b"traceparent", b"2" * 55)])
    third = codec.encode([METHOD, (b"baggage", b"a=b"), (b"traceparent", b"3" * 55)])
    assert len(first) > len(again) == len(third)
    assert len(codec.encode([(b"baggage", b"a=b")])) == 1


@pytest.mark.parametrize(
    ("block", "code"),
    [
        pytest.param(b"\xff\xff\xff\xff\xff\xff\xff", ErrorCodes.COMPRESSION_ERROR, id="integer"),
        pytest.param(b"\x7f" + b"\xff" * 40, ErrorCodes.COMPRESSION_ERROR, id="endless integer"),
        pytest.param(b"\x80", ErrorCodes.COMPRESSION_ERROR, id="index 0"),
        pytest.param(b"\xc5", ErrorCodes.COMPRESSION_ERROR, id="index beyond the table"),
        pytest.param(b"\x00\x05ab", ErrorCodes.COMPRESSION_ERROR, id="cut short"),
        pytest.param(b"\x3f\xff\xff\x03", ErrorCodes.COMPRESSION_ERROR, id="table too large"),
        pytest.param(b"\x82\x20", ErrorCodes.COMPRESSION_ERROR, id="update after a field"),
        pytest.param(b"\x20\x20\x20", ErrorCodes.COMPRESSION_ERROR, id="three updates"),
        pytest.param(b"\x3f\x00\x20\x3f\x00", ErrorCodes.COMPRESSION_ERROR, id="long updates"),
        pytest.param(
            b"\x40\x01a\x7f\x81\x1e" + b"b" * 3968 + b"\xbe" * 60,
            ErrorCodes.ENHANCE_YOUR_CALM,
            id="HPACK bomb",
        ),
    ],
)
def test_broken_blocks_end_the_connection(block: bytes, code: int):
    with pytest.raises(TunnelError) as caught:
        a_codec().decode(block)
    assert caught.value.code == code
    assert "0x" not in str(caught.value), "the peer learns where something is in our memory"


def test_two_table_updates_are_fine():
    assert a_codec().decode(b"\x20\x3f\xe1\x1f\x82") == [(b":method", b"GET")]


@given(blocks=st.lists(st.binary(max_size=60), max_size=5))
def test_any_bytes_are_fields_or_a_tunnel_error(blocks: list[bytes]):
    codec = a_codec(max_list_size=500)
    for block in blocks:
        try:
            headers = codec.decode(block)
        except TunnelError:
            return
        assert sum(len(name) + len(value) + 32 for name, value in headers) <= 500
        is_request(headers)
        status_of(headers)
        is_trailers(headers)


def test_a_table_that_nobody_fills_is_not_there():
    request = [METHOD, (b":authority", b"192.0.2.1:80"), (b"baggage", b"a=b")]
    client, server = a_codec(), a_codec()
    assert server.decode(client.encode(request)) == request
    assert client.decode(server.encode([(b":status", b"200")])) == [(b":status", b"200")]
    for codec in (client, server):
        assert (codec._ours, codec._theirs) == (None, None)
    assert server.decode(client.encode(request)) == request
    assert client._ours is not None
    assert server._theirs is not None
