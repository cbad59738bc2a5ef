"""Our program, and SIGUSR2 makes it collect all garbage: `python perf/collecting.py ARGUMENT...`.

The interpreter chooses the moment of a full collection, and a measurement cannot wait for it. It
is run by its path, so that it works in any checkout that PYTHONPATH names.
"""

from __future__ import annotations

import gc
import signal

from ztunnel.__main__ import main

if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, lambda *_: gc.collect())
    main()
