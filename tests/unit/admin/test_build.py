from __future__ import annotations

import platform
import ssl
from importlib.metadata import version

from ztunnel.admin.build import build_info
from ztunnel.config import Config


def test_a_build_says_what_it_is_made_of() -> None:
    shown = build_info(Config(istio_version="1.28.0"))
    assert shown["version"] == version("ztunnel")
    assert shown["istioVersion"] == "1.28.0"
    assert shown["pythonVersion"] == platform.python_version()
    assert shown["cryptoProvider"] == ssl.OPENSSL_VERSION
