from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, strategies as st

from ztunnel.model.proxy_config import ProxyConfig
from ztunnel.model.settings import ServerUrl


def test_the_keys_we_read() -> None:
    text = """
discoveryAddress: istiod:15012
proxyAdminPort: 1
statsPort: 2
concurrency: 0
proxyMetadata: {ISTIO_META_A: x, B: true, C: 3, D: null}
drainDuration: 45s
"""
    assert ProxyConfig.parse(text) == ProxyConfig(
        discovery_address=ServerUrl("istiod", 15012),
        admin_port=1,
        stats_port=2,
        concurrency=0,
        metadata={"A": "x", "B": "true", "C": "3", "D": ""},
    )


def test_a_mesh_config_holds_one() -> None:
    assert ProxyConfig.parse_mesh("defaultConfig: {statsPort: 2}").stats_port == 2
    assert ProxyConfig.parse_mesh("rootNamespace: a") == ProxyConfig()


def test_nothing_is_an_empty_one() -> None:
    assert ProxyConfig.parse("") == ProxyConfig()


def test_the_later_one_wins_also_with_a_zero() -> None:
    base = ProxyConfig(concurrency=4, stats_port=1, metadata={"a": "1", "b": "1"})
    over = ProxyConfig(concurrency=0, metadata={"b": "2"})
    merged = base.merged(over)
    assert (merged.concurrency, merged.stats_port) == (0, 1)
    assert merged.metadata == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    "text",
    ["[", "- a", "3", "statsPort: 0", "statsPort: 65536", "statsPort: x", "concurrency: true",
     "concurrency: -1", "proxyMetadata: []x", "proxyMetadata: {a: {b: c}}", "proxyMetadata: 3",
     "discoveryAddress: http://x", "a: b: c"],
)  # fmt: skip
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        ProxyConfig.parse(text)


@given(st.text(alphabet="{}[]:, \nab1'\"&*!|>-", max_size=40))
def test_any_text_is_a_proxy_config_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        ProxyConfig.parse(text)
