"""Inbound plaintext: what reaches a pod outside any tunnel (dataplane.md 4, port 15006).

STRICT mutual TLS has no code here: it is a policy that denies whoever has no identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ztunnel.decide.admit import Admission, Rejection, admit_plaintext
from ztunnel.errors import RejectedError
from ztunnel.linux.sockopt import original_destination
from ztunnel.model.flow import Flow
from ztunnel.proxy.captured import CapturedConnection
from ztunnel.proxy.judgement import judge
from ztunnel.proxy.labels import describe_admission
from ztunnel.telemetry.access_log import Direction
from ztunnel.transport.dial import Dial

if TYPE_CHECKING:
    from ztunnel.decide.authorize import Permit
    from ztunnel.model.network import Endpoint
    from ztunnel.model.workload import Workload
    from ztunnel.proxy.context import ProxyContext
    from ztunnel.transport.sockets import Socket


class PlaintextConnection(CapturedConnection):
    """One captured connection without a tunnel."""

    __slots__ = ("_original",)

    direction = Direction.INBOUND
    trouble = "connection failed"

    def __init__(self, context: ProxyContext, sock: Socket, source: Endpoint) -> None:
        super().__init__(context, sock, source)
        self._original: Endpoint | None = None

    # Rooms 1 and 2: accept, classify.

    def serve(self) -> None:
        """Begin; returns at once."""
        self.context.live.inbound[self] = None
        self.attempt(self._begin, trouble=self.trouble)

    def _begin(self) -> None:
        original = self._original = original_destination(self._sock)
        self.record.destination = original
        workload = self.context.workload()
        if workload is None:
            self.wait_for(self._serve_when_known)
        else:
            self._classify(original, workload)

    async def _serve_when_known(self) -> None:
        workload = await self.context.known_workload()
        assert self._original is not None
        if not self.is_over:
            self._classify(self._original, workload)

    def _classify(self, original: Endpoint, workload: Workload) -> None:
        node = self.context.node
        answer = admit_plaintext(
            original,
            source=self.source,
            workload=workload,
            store=node.store,
            illegal=node.illegal_ports,
        )
        if isinstance(answer, Rejection):
            raise RejectedError(answer.message, status=answer.status)
        if self.context.lacks_policy(workload):
            self.wait_for(lambda: self._authorize_when_told(answer))
        else:
            self._authorize(answer, workload)

    # Room 3: authorize.

    async def _authorize_when_told(self, admission: Admission) -> None:
        workload = await self.context.known_policies()
        if not self.is_over:
            self._authorize(admission, workload)

    def _authorize(self, admission: Admission, workload: Workload) -> None:
        node = self.context.node
        flow = self.flow = Flow(
            source=None, source_endpoint=self.source, destination=admission.destination
        )
        self.actual = admission.destination
        assert self._original is not None
        description = describe_admission(
            node,
            admission,
            workload=workload,
            identity=self.context.identity(workload),
            flow=flow,
            local=self._original,
        )
        self.opened(description)
        self._connect(admission, judge(node, flow, workload, self.record))

    # Room 4: connect.

    def _connect(self, admission: Admission, permit: Permit) -> None:
        source = self.source.ip if self.context.original_source else None
        sock = self.context.sockets.dial(permit, admission.dial, source=source)
        self._dial = Dial(self.context.node.reactor, sock, self)
