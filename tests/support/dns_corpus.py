"""DNS messages that broke others: the header of each is good, what follows is not."""

from __future__ import annotations

HEAD = b"\x12\x67\1\0"
ONE_QUESTION = HEAD + b"\0\1\0\0\0\0\0\0"
WITH_RECORD = HEAD + b"\0\1\0\0\0\0\0\1"
TAIL = b"\0\1\0\1"
QUESTION = b"\1a\0" + TAIL

MALFORMED = {
    "a pointer to itself": ONE_QUESTION + b"\xc0\x0c" + TAIL,
    "a pointer to the name's own start": ONE_QUESTION + b"\1a\xc0\x0c" + TAIL,
    "a pointer into the header": ONE_QUESTION + b"\xc0\x00" + TAIL,
    "a pointer beyond the message": ONE_QUESTION + b"\xff\xff" + TAIL,
    "half a pointer": ONE_QUESTION + b"\xc0",
    "an extended label type": ONE_QUESTION + b"\x41" + b"a" * 65 + b"\0" + TAIL,
    "a reserved label type": ONE_QUESTION + b"\x80" + b"a" * 128 + b"\0" + TAIL,
    "a label beyond the end": ONE_QUESTION + b"\x3f" + b"a" * 62,
    "a label cut short": ONE_QUESTION + b"\x3faaa",
    "a name of 257": ONE_QUESTION + (b"\x3f" + b"a" * 63) * 4 + b"\0" + TAIL,
    "200 labels": ONE_QUESTION + b"\1a" * 200 + b"\0" + TAIL,
    "a name without an end": ONE_QUESTION + b"\1a",
    "half a class": ONE_QUESTION + b"\1a\0\0\1\0",
    "every count at its most": HEAD + b"\xff\xff" * 4,
    "answers that are not there": HEAD + b"\0\1\xff\xff\0\0\0\0" + QUESTION,
    "a long OPT": WITH_RECORD + QUESTION + b"\0\0\x29\4\xd0\0\0\0\0\xff\xff",
    "a record with half a pointer": WITH_RECORD + QUESTION + b"\xc0",
    "a record with an odd label": WITH_RECORD + QUESTION + b"\x40" + bytes(99),
    "a record that is not there": WITH_RECORD + QUESTION,
}
