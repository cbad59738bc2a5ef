"""The control plane of the bench, run by itself in a node's namespace: `python -m perf.plane
WORKLOADS SERVICES POLICIES`.

It reads root certificate and key from stdin and serves a mesh that is empty until SIGUSR1 comes.
Then it publishes one of these sizes, all addresses in one response as istiod does, and says on
stdout, in one line, when the client has it all.
"""

from __future__ import annotations

import gc
import signal
import sys

from perf.xds import a_mesh
from ztunnel.devmesh.control_plane import ControlPlane
from ztunnel.identity.dev_ca import DevelopmentCa
from ztunnel.wire import delta_server

PORT = 15010
PATIENCE_SECONDS = 60.0
READY, TAKEN = "ready", "taken"


def main() -> None:
    workloads, services, policies = map(int, sys.argv[1:])
    delta_server.RESOURCES_PER_RESPONSE = workloads + services
    told = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, told)  # before there are threads to take them
    plane = ControlPlane(DevelopmentCa.from_pem(sys.stdin.buffer.read()))
    plane.be_stale(stale=True)
    plane.publish(a_mesh(workloads, services, policies))
    gc.freeze()
    plane.start(f"127.0.0.1:{PORT}")
    print(READY, flush=True)
    if signal.sigwait(told) == signal.SIGUSR1:
        acks = plane.counts.acks + 1 + (policies > 0)  # one for each type with anything to say
        plane.be_stale(stale=False)
        if not plane.wait_for(lambda: plane.counts.acks >= acks, seconds=PATIENCE_SECONDS):
            sys.exit("the client did not take it all in time")
        print(TAKEN, flush=True)
        signal.sigwait(told)
    plane.stop()


if __name__ == "__main__":
    main()
