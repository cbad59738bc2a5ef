from __future__ import annotations

import pytest

from tests.support.builders import a_flow, an_identity
from ztunnel.decide.admit import Admission
from ztunnel.decide.authorize import Permit, authorize
from ztunnel.model.network import Endpoint, parse_ip
from ztunnel.proxy.entrances import ENTRANCES_MAX, HEADERS_BYTES_MAX, Entrance, Entrances, Question
from ztunnel.proxy.labels import Description
from ztunnel.telemetry.access_log import Ends
from ztunnel.telemetry.traffic import Labels, Reporter

LOCAL = Endpoint.parse("192.0.2.10:15008")
ASKED = Question(
    caller=an_identity("shop"),
    caller_ip=parse_ip("192.0.2.1"),
    local=LOCAL,
    service=None,
    headers=((b":method", b"CONNECT"), (b":authority", b"192.0.2.10:80")),
)


def an_entrance() -> Entrance:
    flow = a_flow()
    permit = authorize(flow, [])
    assert isinstance(permit, Permit)
    admission = Admission(destination=flow.destination, dial=flow.destination)
    return Entrance(admission, Description(Ends(), Labels(Reporter.DESTINATION)), permit)


@pytest.mark.parametrize(
    "other",
    [
        {"caller": an_identity("stranger")},
        {"caller": None},
        {"caller_ip": parse_ip("192.0.2.2")},
        {"local": Endpoint.parse("192.0.2.11:15008")},
        {"service": "cart.shop.svc.cluster.local"},
        {"headers": ((b":method", b"CONNECT"), (b":authority", b"192.0.2.10:81"))},
        {"headers": (*ASKED.headers, (b"x-forwarded-network", b"far"))},
    ],
)
def test_only_the_same_question_has_the_same_answer(other: dict[str, object]) -> None:
    entrances, entrance = Entrances(), an_entrance()
    entrances.keep(ASKED, 1, entrance)
    assert entrances.find(ASKED, 1) is entrance
    assert entrances.find(ASKED._replace(**other), 1) is None


def test_a_change_of_the_state_voids_all_answers() -> None:
    entrances = Entrances()
    entrances.keep(ASKED, 1, an_entrance())
    assert entrances.find(ASKED, 2) is None
    entrances.keep(ASKED._replace(service="x"), 2, an_entrance())
    assert entrances.find(ASKED, 2) is None


def test_many_questions_do_not_fill_the_memory() -> None:
    entrances = Entrances()
    questions = [ASKED._replace(service=str(number)) for number in range(3 * ENTRANCES_MAX)]
    for question in questions:
        entrances.keep(question, 1, an_entrance())
    assert sum(entrances.find(question, 1) is not None for question in questions) <= ENTRANCES_MAX


def test_long_questions_are_not_remembered() -> None:
    entrances = Entrances()
    long = ASKED._replace(headers=((b"baggage", b"x" * HEADERS_BYTES_MAX),))
    entrances.keep(long, 1, an_entrance())
    assert entrances.find(long, 1) is None
