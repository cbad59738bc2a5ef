from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from tests.support.builders import an_identity
from ztunnel.model.identity import Identity

parts = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]))


def test_an_identity_prints_as_a_spiffe_uri() -> None:
    identity = an_identity("cart", "shop", "td")
    assert str(identity) == "spiffe://td/ns/shop/sa/cart"
    assert identity.principal == "td/ns/shop/sa/cart"


@given(domain=parts, ns=parts, sa=parts)
def test_what_is_printed_is_read_again(domain: str, ns: str, sa: str) -> None:
    identity = an_identity(sa, ns, domain)
    assert Identity.parse(str(identity)) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://",
        "spiffe://td",
        "spiffe://td/ns/shop/sa",
        "spiffe://td/ns/shop/sa/cart/more",
        "spiffe://td/sa/shop/ns/cart",
        "SPIFFE://td/ns/shop/sa/cart",
        "td/ns/shop/sa/cart",
        "https://td/ns/shop/sa/cart",
        " spiffe://td/ns/shop/sa/cart",
    ],
)
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="not an Istio SPIFFE identity"):
        Identity.parse(uri)


def test_empty_namespace_and_account_are_legal() -> None:
    assert Identity.parse("spiffe://td/ns//sa/") == an_identity("", "", "td")
