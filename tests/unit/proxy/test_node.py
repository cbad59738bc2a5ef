from __future__ import annotations

from ztunnel.config import Config
from ztunnel.proxy.node import hbone_settings


def test_what_the_operator_chose_is_announced() -> None:
    config = Config(stream_window_bytes=70_000, frame_bytes=20_000, max_streams_per_tunnel=7)
    server = hbone_settings(config, client=False)
    assert (server.stream_window, server.max_frame_size) == (70_000, 20_000)
    assert server.max_concurrent_streams == 7
    assert server.max_header_list_size == config.max_header_bytes


def test_a_client_takes_what_its_peer_sends() -> None:
    assert hbone_settings(Config(), client=True).max_header_list_size is None
