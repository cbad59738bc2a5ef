"""What a worker prints, as whole lines. No I/O.

Workers write their log to a pipe of their own, and one process writes all lines to the real output:
so no line is torn, however long it is, and the last words of a worker that dies are not lost.
"""

from __future__ import annotations

LINE_BYTES_MAX = 256 * 1024  # a traceback is a tenth of that; what is longer is cut into lines


class Lines:
    """Cuts bytes into lines that end in a newline."""

    def __init__(self) -> None:
        self._rest = b""

    def receive(self, data: bytes) -> list[str]:
        """Take bytes, and give the lines that are complete."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > LINE_BYTES_MAX:
            whole.append(self._rest[:LINE_BYTES_MAX])
            self._rest = self._rest[LINE_BYTES_MAX:]
        return [_text(line) for line in whole]

    def end(self) -> list[str]:
        """Give what was not ended by a newline."""
        rest, self._rest = self._rest, b""
        return [_text(rest)] if rest else []


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace") + "\n"
