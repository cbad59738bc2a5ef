"""Sessions that a client may resume, so that a second handshake with a peer costs half.

How it works: a server with resumption on sends one ticket behind its handshake. Our own record
layer has taken over by then, so the records that come first are also shown to the `ssl` object,
which is kept just for that; what it makes of them is a session. A session belongs to the context it
was made with, and a context to one certificate: a renewed certificate, or other roots, begin anew
on both sides, because a server's tickets are sealed with a key of its context.

Who the peer is always comes from the session itself: OpenSSL keeps the certificate in it, gives it
out as that of the resumed connection, and it is judged like any other. What a resumed handshake
does not do is verify again: so revocation lists and resumption exclude each other, and that a
certificate has expired meanwhile is found when a stream is to be opened, as on any old tunnel.

Off by default. Measured in memory, in pairs, OpenSSL 3.0, a busy core: a resumed handshake costs
the client 0.76 ms instead of 1.04 and the server 0.80 instead of 1.05, but a ticket that nobody
uses costs the server 0.2 ms more; and as tunnels are pooled, few handshakes have one to follow.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Hashable

SESSIONS_MAX = 1024  # of one certificate; a session takes about 3 KiB
TICKET_BYTES_MAX = 32 * 1024  # shown to OpenSSL at most: a ticket with a chain in it, with room


class Sessions:
    """The newest session for each kind of peer, of one context."""

    __slots__ = ("_by_key",)

    def __init__(self) -> None:
        self._by_key: dict[Hashable, ssl.SSLSession] = {}

    def get(self, key: Hashable) -> ssl.SSLSession | None:
        """Give the session to resume, if there is one."""
        return self._by_key.get(key)

    def put(self, key: Hashable, session: ssl.SSLSession) -> None:
        """Keep a session; the oldest goes when there are too many."""
        self._by_key.pop(key, None)
        while len(self._by_key) >= SESSIONS_MAX:
            del self._by_key[next(iter(self._by_key))]
        self._by_key[key] = session


class TicketTaker:
    """Shows the first records of a client's connection to its `ssl` object."""

    __slots__ = ("_incoming", "_key", "_object", "_sessions")

    def __init__(
        self,
        ssl_object: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        sessions: Sessions,
        key: Hashable,
    ) -> None:
        self._object = ssl_object
        self._incoming = incoming
        self._sessions = sessions
        self._key = key

    def take(self, raw: memoryview) -> None:
        """Look for a ticket in the first bytes behind the handshake; call it once.

        A peer that sends anything else first, or half a ticket, simply is not resumed.
        """
        self._incoming.write(raw[:TICKET_BYTES_MAX])
        # It wants more, or makes nothing of it: either way there is a ticket now, or there is not.
        with contextlib.suppress(ssl.SSLError):
            self._object.read(1)
        session = self._object.session
        if session is not None and session.has_ticket:
            self._sessions.put(self._key, session)
