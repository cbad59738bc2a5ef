from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.certs import a_client_context, a_server_context, an_established_pair
from ztunnel.tls.context import TlsContext
from ztunnel.tls.handshake import Handshake
from ztunnel.tls.keylog import KeyLog


def what_another_user_logged(context: TlsContext, text: bytes) -> None:
    with Path(context.ssl_context.keylog_filename).open("ab") as file:
        file.write(text)


def test_three_hundred_handshakes_in_a_row_do_not_block() -> None:
    client, server = a_client_context(), a_server_context()
    for _ in range(300):
        an_established_pair(client, server)


def test_nothing_stays_in_the_log_after_a_handshake() -> None:
    client, server = a_client_context(), a_server_context()
    an_established_pair(client, server)
    for context in (client, server):
        assert Path(context.ssl_context.keylog_filename).read_bytes() == b""


def test_a_log_that_nobody_reads_does_not_block_a_handshake() -> None:
    server = a_server_context()
    what_another_user_logged(server, b"CLIENT_RANDOM 00 00\n" * 50_000)
    client_end, _ = an_established_pair(server=server)
    assert client_end.alpn == "h2"


def test_old_lines_are_not_taken_for_ours() -> None:
    server = a_server_context()
    what_another_user_logged(server, b"CLIENT_TRAFFIC_SECRET_0 00 00\n")
    client_end, server_end = an_established_pair(server=server)
    sealed = memoryview(client_end.records.seal_small(b"hello"))
    out = memoryview(bytearray(100))
    assert server_end.records.open(sealed, out) == (len(sealed), 5)


def test_only_application_traffic_secrets_are_taken() -> None:
    log = KeyLog()
    assert log.drain() == []
    os.write(
        log._fd,
        b"# comment\nEXPORTER_SECRET aa bb\n"
        b"SERVER_TRAFFIC_SECRET_0 aa 0102\nCLIENT_TRAFFIC_SECRET_0 x\n",
    )
    assert log.drain() == [(b"SERVER_TRAFFIC_SECRET_0", b"aa", b"\x01\x02")]
    assert log.drain() == []


def test_the_descriptor_is_not_inherited_and_is_released() -> None:
    log = KeyLog()
    fd = log._fd
    assert not os.get_inheritable(fd)
    log.close()
    log.close()
    with pytest.raises(OSError):  # noqa: PT011  # the descriptor is gone
        os.fstat(fd)


def test_a_log_shared_with_a_stranger_gives_no_keys() -> None:
    client, server = a_client_context(), a_server_context()
    one, other = Handshake(client, server_side=False), Handshake(server, server_side=True)
    flight = other.receive(one.receive(b""))
    what_another_user_logged(server, b"CLIENT_TRAFFIC_SECRET_0 ff 00\n")
    other.receive(one.receive(flight))
    assert one.done
    assert other.done
    with pytest.raises(Exception, match="traffic secrets are not known for sure"):
        other.finish()
