from __future__ import annotations

import os
import pickle

import pytest
from hypothesis import given, strategies as st

from ztunnel.errors import TlsError
from ztunnel.tls.opener import Opener
from ztunnel.tls.sealer import (
    BULK_BYTES_MAX,
    MAX_PLAINTEXT,
    REKEY_RECORDS,
    REKEYS_MAX,
    SealBuffer,
    Sealer,
)

SUITE = "TLS_AES_256_GCM_SHA384"
SECRET = bytes(range(48))
BUFFER = SealBuffer()
OUT = memoryview(bytearray(BULK_BYTES_MAX * 2))
RANDOM = os.urandom(BULK_BYTES_MAX + 1)
SIZES = [1, 2, 16383, 16384, 16385, 32768, 40_000, 1 << 20, BULK_BYTES_MAX]


def opened(opener: Opener, sealed: bytes | memoryview) -> bytes:
    raw = memoryview(sealed)
    consumed, produced = opener.open(raw, OUT)
    assert consumed == len(raw)
    return bytes(OUT[:produced])


@pytest.mark.parametrize("size", [0, *SIZES])
def test_small_path_seals_any_length(size: int) -> None:
    assert opened(Opener(SECRET, SUITE), Sealer(SECRET, SUITE).seal(RANDOM[:size])) == RANDOM[:size]


@pytest.mark.parametrize("size", SIZES)
def test_bulk_seals_what_it_is_given_and_leaves_it_alone(size: int) -> None:
    plaintext = bytearray(RANDOM[: size + 1])
    sealed = Sealer(SECRET, SUITE).seal_bulk(memoryview(plaintext), size, BUFFER)
    assert plaintext == RANDOM[: size + 1]
    assert opened(Opener(SECRET, SUITE), sealed) == RANDOM[:size]


def test_bulk_and_small_paths_give_the_same_bytes() -> None:
    one, other = Sealer(SECRET, SUITE), Sealer(SECRET, SUITE)
    for size in (100, 20_000, MAX_PLAINTEXT):
        plaintext = RANDOM[:size]
        sealed = one.seal_bulk(memoryview(bytearray(plaintext + b"!")), size, BUFFER)
        assert sealed == other.seal(plaintext)
    assert one.sequence == other.sequence == 4


@given(st.lists(st.integers(1, 6 * MAX_PLAINTEXT), max_size=6))
def test_one_buffer_is_sealed_from_again_and_again(sizes: list[int]) -> None:
    sealer, opener = Sealer(SECRET, SUITE), Opener(SECRET, SUITE)
    plaintext = memoryview(bytearray(len(RANDOM)))
    for start, size in enumerate(sizes):
        plaintext[: size + 1] = RANDOM[start : start + size + 1]
        assert opened(opener, sealer.seal_bulk(plaintext, size, BUFFER)) == plaintext[:size]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 70_000)), max_size=8))
def test_every_mix_of_paths_arrives(parts: list[tuple[bool, int]]) -> None:
    sealer, opener = Sealer(SECRET, SUITE), Opener(SECRET, SUITE)
    for is_bulk, size in parts:
        plaintext = RANDOM[:size]
        if is_bulk:
            spacious = memoryview(bytearray(RANDOM[: size + 1]))
            assert opened(opener, sealer.seal_bulk(spacious, size, BUFFER)) == plaintext
        else:
            assert opened(opener, sealer.seal(plaintext)) == plaintext


@pytest.mark.parametrize("is_bulk", [False, True])
@pytest.mark.parametrize("size", [10, 40_000])
def test_a_worn_key_is_replaced_before_the_next_record(is_bulk: bool, size: int) -> None:
    sealer = Sealer(SECRET, SUITE, REKEY_RECORDS)
    opener = Opener(SECRET, SUITE, REKEY_RECORDS)
    if is_bulk:
        sealed = bytes(sealer.seal_bulk(memoryview(bytearray(RANDOM[: size + 1])), size, BUFFER))
    else:
        sealed = sealer.seal(RANDOM[:size])
    assert opened(opener, sealed) == RANDOM[:size]
    assert opener.updates == sealer.rekeys == 1
    assert not opener.update_requested
    assert sealer.sequence == opener.sequence < 4


def test_after_some_key_updates_the_connection_is_worn() -> None:
    sealer = Sealer(SECRET, SUITE)
    for _ in range(REKEYS_MAX):
        assert not sealer.is_worn
        sealer.key_update()
    assert sealer.is_worn


def test_a_successor_goes_on_where_the_sealer_stopped() -> None:
    sealer, opener = Sealer(SECRET, SUITE), Opener(SECRET, SUITE)
    assert opened(opener, sealer.seal(b"one")) == b"one"
    sealer.key_update()
    opener.advance()
    successor = pickle.loads(pickle.dumps(sealer))
    assert opened(opener, successor.seal(b"two")) == b"two"
    assert successor.rekeys == 1


def test_keys_that_were_handed_over_seal_nothing() -> None:
    sealer = Sealer(SECRET, SUITE)
    sealer.seal(b"x")
    pickle.dumps(sealer)
    with pytest.raises(TlsError, match="handed over"):
        sealer.seal(b"two owners of one nonce")
    with pytest.raises(TlsError, match="handed over"):
        pickle.dumps(sealer)


def test_state_is_small() -> None:
    assert len(pickle.dumps(Sealer(SECRET, SUITE))) < 250
