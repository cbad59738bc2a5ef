from __future__ import annotations

import pytest

from cni.install import errors
from ztunnel.errors import ConfigError, ZtunnelError


@pytest.mark.parametrize(
    "kind", [errors.BundleError, errors.ElfError, errors.KubeconfigError, errors.ConflistError]
)
def test_a_failed_pass_is_foreseen_and_says_which_part_failed(kind: type[ZtunnelError]) -> None:
    assert issubclass(kind, errors.InstallError)
    assert kind.reason not in (ZtunnelError.reason, errors.InstallError.reason)


def test_bad_settings_end_the_start() -> None:
    assert issubclass(errors.InstallConfigError, ConfigError)
    assert not issubclass(errors.InstallConfigError, errors.InstallError)
