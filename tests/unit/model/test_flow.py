from __future__ import annotations

import dataclasses

import pytest

from tests.support.builders import NOBODY, a_flow, an_identity


def test_a_flow_without_mutual_tls_has_no_identity() -> None:
    assert a_flow(by=NOBODY).source is None
    assert a_flow(by=an_identity("cart")).source == an_identity("cart")


def test_the_facts_of_a_flow_cannot_be_changed() -> None:
    flow = a_flow()
    with pytest.raises(dataclasses.FrozenInstanceError):
        flow.source = None  # type: ignore[misc]
