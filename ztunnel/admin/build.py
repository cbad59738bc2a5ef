"""What this build is (dns-and-observability.md 4.6)."""

from __future__ import annotations

import platform
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztunnel.config import Config


def build_info(config: Config) -> dict[str, object]:
    """Show it as the configuration dump does."""
    # With what it needs to read e-mail headers it takes a mebibyte, and few ask.
    from importlib.metadata import version as package_version  # noqa: PLC0415

    return {
        "version": package_version("ztunnel"),
        "gitRevision": "unknown",
        "pythonVersion": platform.python_version(),
        "buildProfile": "release",
        "buildStatus": "unknown",
        "istioVersion": config.istio_version,
        "cryptoProvider": ssl.OPENSSL_VERSION,
    }
