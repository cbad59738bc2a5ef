from __future__ import annotations

import errno

import pytest

from cni.redirect import nft
from cni.redirect.errors import RedirectError, RedirectPrivilegeError
from cni.redirect.nft import Batch, commit, removal, replacement, stamped, table_steps
from cni.redirect.plan import RedirectPlan
from ztunnel.linux.netlink import Failure, NetlinkSocket, messages_in

BEGIN, END = 0x10, 0x11


class Kernel(NetlinkSocket):
    """Refuses what it is told to."""

    def __init__(self, *failures: Failure, error: OSError | None = None) -> None:
        self.failures = list(failures)
        self.error = error

    def exchange(self, data: bytes, *, acks: int) -> list[Failure]:
        if self.error:
            raise self.error
        return self.failures


@pytest.mark.parametrize("batch", [replacement(RedirectPlan(dns=True)), removal()])
def test_a_batch_is_one_transaction_that_numbers_its_messages(batch: Batch) -> None:
    messages = list(messages_in(batch.data))
    assert [messages[0][0], messages[-1][0]] == [BEGIN, END]
    assert [sequence for _, _, sequence, _ in messages[1:-1]] == [
        number for number, _ in enumerate(batch.labels, 1)
    ]


def test_a_table_is_emptied_before_it_is_filled() -> None:
    labels = replacement(RedirectPlan()).labels
    nat = [label for label in labels if "istio-ambient-nat" in label]
    assert nat[:4] == [
        "add table inet istio-ambient-nat",
        "flush table inet istio-ambient-nat",
        "add chain inet istio-ambient-nat istio-prerouting",
        "add chain inet istio-ambient-nat istio-output",
    ]
    assert nat[4:6] == [
        "add chain inet istio-ambient-nat prerouting",
        "add chain inet istio-ambient-nat output",
    ]
    assert all(label.startswith("add rule") for label in nat[6:])


def test_without_dns_its_table_is_removed() -> None:
    assert "delete table inet istio-ambient-raw" in replacement(RedirectPlan()).labels
    assert "delete table inet istio-ambient-raw" not in replacement(RedirectPlan(dns=True)).labels


def test_removal_first_adds_so_that_it_always_works() -> None:
    tables = ("nat", "mangle", "raw")
    assert removal().labels == tuple(
        f"{verb} table inet istio-ambient-{table}" for table in tables for verb in ("add", "delete")
    )


def test_a_stamped_batch_makes_the_first_table_anew_and_numbers_all_messages() -> None:
    plain, batch = replacement(RedirectPlan()), stamped(RedirectPlan(), "pod x")
    messages = list(messages_in(batch.data))
    assert [messages[0][0], messages[-1][0]] == [BEGIN, END]
    sequences = [sequence for _, _, sequence, _ in messages[1:-1]]
    assert sorted(sequences) == list(range(1, len(batch.labels) + 1))
    named = [batch.labels[sequence - 1] for sequence in sequences]
    assert named[:3] == [
        "add table inet istio-ambient-nat",
        "delete table inet istio-ambient-nat",
        "add table inet istio-ambient-nat",
    ]
    assert tuple(named[3:]) == plain.labels


def test_sets_come_before_the_rules_that_name_them() -> None:
    table = RedirectPlan().tables[0]
    a_set = ("add set", 9, [("NFTA_SET_TABLE", table.name), ("NFTA_SET_NAME", "s")])
    labels = table_steps(table, before_rules=[a_set]).labels
    assert labels[2] == "add set"
    assert labels[3].startswith("add chain")


def test_equal_plans_share_their_bytes() -> None:
    assert replacement(RedirectPlan()) is replacement(RedirectPlan())
    assert replacement(RedirectPlan()) != replacement(RedirectPlan(ipv6=False))


def test_an_accepted_batch_raises_nothing() -> None:
    commit(Kernel(), removal())


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        pytest.param(
            Failure(0, errno.EPERM, "Operation not permitted"),
            RedirectPrivilegeError,
            "begin transaction: Operation not permitted; .*CAP_NET_ADMIN",
            id="no capability",
        ),
        pytest.param(
            Failure(0, errno.EOPNOTSUPP, "Operation not supported"),
            RedirectPrivilegeError,
            "begin transaction: .*nftables",
            id="no nftables",
        ),
        pytest.param(
            Failure(1, errno.ENOENT, "No such file or directory"),
            RedirectPrivilegeError,
            "add table inet istio-ambient-nat: .*module",
            id="no module",
        ),
        pytest.param(
            Failure(2, errno.EBUSY, "Device or resource busy"),
            RedirectError,
            "delete table inet istio-ambient-nat: Device or resource busy$",
            id="something else",
        ),
    ],
)
def test_a_refusal_names_the_message_and_hints_at_the_cause(
    failure: Failure, kind: type[RedirectError], text: str
) -> None:
    with pytest.raises(RedirectError, match=text) as raised:
        commit(Kernel(failure), removal())
    assert type(raised.value) is kind


def test_a_broken_socket_is_reported() -> None:
    with pytest.raises(RedirectError, match="no buffer"):
        commit(Kernel(error=OSError(errno.ENOBUFS, "no buffer")), removal())


def test_rules_are_for_both_families() -> None:
    families = {body[0] for _, _, _, body in list(messages_in(removal().data))[1:-1]}
    assert families == {nft._FAMILY_INET}
