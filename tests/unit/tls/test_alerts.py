from __future__ import annotations

import pytest

from ztunnel.tls.alerts import Alert, alert_body, describe_alert, plaintext_alert


@pytest.mark.parametrize(
    ("code", "level"),
    [(Alert.CLOSE_NOTIFY, 1), (Alert.USER_CANCELED, 1), (Alert.BAD_RECORD_MAC, 2), (99, 2)],
)
def test_only_closing_alerts_are_warnings(code: int, level: int) -> None:
    assert alert_body(code) == bytes((level, code))


def test_a_plaintext_alert_is_a_whole_record() -> None:
    assert plaintext_alert(Alert.NO_APPLICATION_PROTOCOL).hex() == "15030300020278"


def test_a_peers_alert_is_named() -> None:
    assert describe_alert(42) == "peer sent alert: bad certificate (42)"
    assert describe_alert(200) == "peer sent alert: unknown (200)"
