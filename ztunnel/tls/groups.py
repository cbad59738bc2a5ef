"""Post-quantum key exchange and nothing else, where this OpenSSL can do it (dataplane.md 7.1).

Python has no call for a list of groups before 3.15, and `set_ecdh_curve` knows only elliptic ones.
OpenSSL's own configuration can name them for every context made afterwards in this process; it is
loaded from a memfd by OpenSSL's public function. Whether that worked is not believed but looked at,
in the ClientHello of a throw-away context. X25519MLKEM768 came with OpenSSL 3.5: with an older one
the operator's demand cannot be met, and we do not start. It holds between workloads and towards the
control plane alike, as in the reference.
"""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import os
import ssl

from ztunnel.errors import ConfigError
from ztunnel.tls.client_hello import parse_client_hello

POST_QUANTUM = "X25519MLKEM768"
# IANA's numbers of the groups, RFC 8446 s4.2.7 and draft-ietf-tls-ecdhe-mlkem.
GROUPS = {POST_QUANTUM: 0x11EC, "X25519": 0x001D, "P-256": 0x0017, "P-384": 0x0018}
RECORD_HEADER_BYTES = 5
CONFIGURATION = """\
openssl_conf = process
[process]
ssl_conf = settings
[settings]
system_default = groups
[groups]
Groups = {group}
"""


def restrict_groups(group: str, *, why: str) -> None:
    """Have every context made from now on in this process use only `group`; no way back.

    Raises:
        ConfigError: this OpenSSL does not know the group, or cannot be told; begins with `why`.
    """
    reason = f"{why}: {ssl.OPENSSL_VERSION} cannot be restricted to {group}"
    mend = "run a build with OpenSSL 3.5 or later, or remove the setting"
    try:
        _configure(CONFIGURATION.format(group=group))
        offered = offered_groups(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    except (OSError, AttributeError, ssl.SSLError) as exc:
        raise ConfigError(f"{reason} ({exc}); {mend}") from exc
    if offered != (GROUPS[group],):
        raise ConfigError(f"{reason}; {mend}")


def offered_groups(context: ssl.SSLContext) -> tuple[int, ...]:
    """List the groups that a client with these settings offers, by number."""
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()  # it speaks and waits for the answer
    return parse_client_hello(outgoing.read()[RECORD_HEADER_BYTES:]).groups


def _configure(text: str) -> None:
    """Load configuration into the OpenSSL that `ssl` uses.

    Raises:
        OSError: OpenSSL refused it, or the library cannot be found.
        AttributeError: the function is not exported, as in a statically linked Python.
    """
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
