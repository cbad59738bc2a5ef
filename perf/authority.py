"""The certificate authority of the bench: istiod's call over gRPC, run by itself in a namespace.

`python -m perf.authority` reads root certificate and key from stdin and serves until it is ended.
"""

from __future__ import annotations

import signal
import sys

from ztunnel.devmesh.ca_server import MeshCa, serving_ca
from ztunnel.identity.dev_ca import DevelopmentCa

PORT = 15012


def main() -> None:
    authority = DevelopmentCa.from_pem(sys.stdin.buffer.read())
    with serving_ca(MeshCa(authority), address=f"127.0.0.1:{PORT}"):
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
