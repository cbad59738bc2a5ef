from __future__ import annotations

from cni.redirect.errors import RedirectError, RedirectPrivilegeError
from ztunnel.errors import PrivilegeError, ZtunnelError


def test_a_missing_privilege_is_a_refusal_that_concerns_all_pods() -> None:
    assert issubclass(RedirectPrivilegeError, RedirectError)
    assert issubclass(RedirectPrivilegeError, PrivilegeError)
    assert issubclass(RedirectError, ZtunnelError)
    assert not issubclass(RedirectError, PrivilegeError)
