"""Which key exchange is used: the reference's choice, or post-quantum only (dataplane.md 7.1).

Python has no call for a list of groups before 3.15, and `set_ecdh_curve` takes only one. OpenSSL's
own configuration can name them for every context made afterwards in this process; it is loaded from
a memfd by OpenSSL's public function. Whether that worked is not believed but looked at, in the
ClientHello of a throw-away context. It holds between workloads and towards the control plane alike,
as in the reference.

X25519MLKEM768 came with OpenSSL 3.5. With an older one the operator's demand for it cannot be met,
and we do not start. From 3.5 on OpenSSL offers it unasked, with a key share, and a server of ours
would have a client that sent none begin again. The reference takes it from whoever has nothing
else, and so do we: it costs a handshake a quarter of its CPU and 1.2 KiB more each way.
"""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import os
import ssl
from collections.abc import Sequence

from ztunnel.errors import ConfigError
from ztunnel.tls.client_hello import parse_client_hello

POST_QUANTUM = "X25519MLKEM768"
# IANA's numbers of the groups, RFC 8446 s4.2.7 and draft-ietf-tls-ecdhe-mlkem.
GROUPS = {POST_QUANTUM: 0x11EC, "X25519": 0x001D, "P-256": 0x0017, "P-384": 0x0018}
RECORD_HEADER_BYTES = 5
USUAL = ("X25519", "P-256", "P-384", POST_QUANTUM)
"""What the reference offers, in its order; a client sends a share of the first alone."""
# A compressed certificate costs a client 40 us and saves a third of a KiB; the reference has none.
CONFIGURATION = """\
openssl_conf = process
[process]
ssl_conf = settings
[settings]
system_default = groups
[groups]
Groups = {groups}
"""
PLAIN_CERTIFICATES = "Options = -TxCertificateCompression,-RxCertificateCompression\n"
COMPRESSION_SINCE = (3, 2)  # OpenSSL; an older one does not know the names


def restrict_groups(group: str, *, why: str) -> None:
    """Have every context made from now on in this process use only `group`; no way back.

    Raises:
        ConfigError: this OpenSSL does not know the group, or cannot be told; begins with `why`.
    """
    reason = f"{why}: {ssl.OPENSSL_VERSION} cannot be restricted to {group}"
    mend = "run a build with OpenSSL 3.5 or later, or remove the setting"
    try:
        _configure((group,))
        offered = offered_groups(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    except (OSError, AttributeError, ssl.SSLError) as exc:
        raise ConfigError(f"{reason} ({exc}); {mend}") from exc
    if offered != (GROUPS[group],):
        raise ConfigError(f"{reason}; {mend}")


def prefer_usual_groups() -> bool:
    """Have every context made from now on offer what the reference does; say whether it is so.

    Only OpenSSL's own default is changed, not what an operator has configured there, and not that
    of a version which offers no post-quantum group unasked. A failure leaves what was: as safe.
    """
    wanted = tuple(GROUPS[name] for name in USUAL)
    try:
        found = offered_groups(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        if found[:1] != (GROUPS[POST_QUANTUM],) or not set(wanted) < set(found):
            return found == wanted
        _configure(USUAL)
        return offered_groups(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)) == wanted
    except (OSError, AttributeError, ssl.SSLError):
        return False


def offered_groups(context: ssl.SSLContext) -> tuple[int, ...]:
    """List the groups that a client with these settings offers, by number."""
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()  # it speaks and waits for the answer
    return parse_client_hello(outgoing.read()[RECORD_HEADER_BYTES:]).groups


def _configure(groups: Sequence[str]) -> None:
    """Load configuration into the OpenSSL that `ssl` uses.

    Raises:
        OSError: OpenSSL refused it, or the library cannot be found.
        AttributeError: the function is not exported, as in a statically linked Python.
    """
    text = CONFIGURATION.format(groups=":".join(groups))
    if ssl.OPENSSL_VERSION_INFO >= COMPRESSION_SINCE:
        text += PLAIN_CERTIFICATES
    library = ctypes.CDLL(getattr(_ssl, "__file__", None))
    load = library.CONF_modules_load_file
    load.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong]
    load.restype = ctypes.c_int
    fd = os.memfd_create("openssl.cnf", os.MFD_CLOEXEC)
    try:
        os.write(fd, text.encode())
        if load(f"/proc/self/fd/{fd}".encode(), None, 0) <= 0:
            raise OSError("OpenSSL refused the configuration")
    finally:
        os.close(fd)
