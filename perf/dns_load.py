"""One pod that asks a lot: `python -P dns_load.py NAME ...` prints what came of it, as JSON.

One UDP socket keeps a window of queries under way, as a busy resolver library does. Standard
library only, so that it starts at once in whatever namespace.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import socket
import struct
import time

WARM_UP_SECONDS = 0.3
PATIENCE_SECONDS = 5.0  # what has not come by then is lost; a lost one is sent again before
RECEIVE_BYTES = 4096


def query(name: str, cookie: bytes = b"") -> bytes:
    """Make an A query with EDNS, without its id."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    option = struct.pack("!HH", 10, len(cookie)) + cookie if cookie else b""
    opt = b"\0" + struct.pack("!HHIH", 41, 1232, 0, len(option)) + option
    return struct.pack("!HHHHH", 0x0100, 1, 0, 0, 1) + labels + b"\0" + b"\0\1\0\1" + opt


class Load:
    """The queries under way, and what has come of all others."""

    def __init__(self, name: str, server: str, *, window: int, fresh: bool) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.connect((server, 53))
        self.sock.settimeout(0)
        self.name = name
        self.fresh = fresh
        self.window = window
        self.plain = query(name)
        self.rng = random.Random(1)
        self.sent: dict[int, float] = {}
        self.asked = self.lost = self.answers = self.wrong = 0
        self.times: list[float] = []

    def fill(self, most: float) -> None:
        """Send until the window is full, or `most` have been sent in all."""
        while len(self.sent) < self.window and self.asked < most:
            self.asked += 1
            number = self.asked & 0xFFFF
            rest = query(self.name, self.rng.randbytes(8)) if self.fresh else self.plain
            try:
                self.sock.send(number.to_bytes(2, "big") + rest)
            except (BlockingIOError, ConnectionRefusedError):
                self.asked -= 1
                return
            self.sent[number] = time.perf_counter()

    def take(self, *, counts: bool) -> None:
        """Wait for answers; when none come for long, or nobody is there, all of them are lost."""
        if not select.select([self.sock], [], [], PATIENCE_SECONDS)[0]:
            self.give_up()
            return
        try:
            while True:
                data = self.sock.recv(RECEIVE_BYTES)
                asked = self.sent.pop(int.from_bytes(data[:2], "big"), None)
                # Wanted: a response that says NOERROR and has a record.
                if asked is None or not data[2] & 0x80 or data[3] & 15 or data[6:8] == b"\0\0":
                    self.wrong += 1
                    continue
                self.answers += 1
                if counts:
                    self.times.append(time.perf_counter() - asked)
        except BlockingIOError:
            pass
        except ConnectionRefusedError:
            self.give_up()

    def give_up(self) -> None:
        """Wait no longer for what is under way."""
        self.lost += len(self.sent)
        self.sent.clear()


def run(load: Load, *, seconds: float, queries: int) -> dict[str, float]:
    """Ask `queries` times, or if that is 0, for some seconds."""
    start = time.perf_counter()
    measured_from = start if queries else start + WARM_UP_SECONDS
    end = float("inf") if queries else measured_from + seconds
    most = queries or float("inf")
    while (now := time.perf_counter()) < end:
        load.fill(most)
        if not load.sent:
            break
        load.take(counts=now >= measured_from)
    times = sorted(load.times)
    return {
        "per_second": len(times) / (time.perf_counter() - measured_from),
        "p50_us": times[len(times) // 2] * 1e6 if times else 0,
        "p99_us": times[len(times) * 99 // 100] * 1e6 if times else 0,
        "lost": load.lost,
        "wrong": load.wrong,
        "answers": load.answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--server", required=True)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument(
        "--queries", type=int, default=0, help="ask so often, however long it takes"
    )
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--fresh", action="store_true", help="each query differs from all others")
    options = parser.parse_args()
    load = Load(options.name, options.server, window=options.window, fresh=options.fresh)
    print(json.dumps(run(load, seconds=options.seconds, queries=options.queries)))


if __name__ == "__main__":
    main()
