"""libcurl as an HBONE client: HTTP through CONNECT tunnels over mTLS, all at the same time.

Run by path in a pod, with pycurl in PYTHONPATH: `curl_peer.py CONFIG`, CONFIG being JSON: `proxy`
(URL), `chain` and `key` (files, or empty), `roots` (file), `baggage`, `posts` (URLs, each with the
seed of a random body of `size` bytes), `gets` (URLs), `milliseconds` (for each transfer). Writes
one line of JSON for each transfer, in that order, and one with the version.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import sys
from functools import partial
from typing import Any

import pycurl  # type: ignore[import-untyped] # installed apart from all else

PROXYTYPE_HTTPS2 = 3  # CURLPROXY_HTTPS2, for which pycurl has no name
STATUS = re.compile(r"CONNECT Response Status (\d+)")


def a_transfer(config: dict[str, Any], url: str, body: bytes | None) -> Any:
    """Make a handle that has not begun."""
    handle = pycurl.Curl()
    handle.url, handle.received = url, io.BytesIO()
    handle.notes = []
    options = {
        pycurl.URL: url,
        pycurl.PROXY: config["proxy"],
        pycurl.PROXYTYPE: PROXYTYPE_HTTPS2,
        pycurl.HTTPPROXYTUNNEL: 1,
        pycurl.PROXY_CAINFO: config["roots"],
        pycurl.PROXY_SSL_VERIFYHOST: 0,  # SPIFFE certificates have no DNS name
        pycurl.HEADEROPT: pycurl.HEADER_SEPARATE,
        pycurl.PROXYHEADER: [f"baggage: {config['baggage']}", "User-Agent:"],
        pycurl.HTTPHEADER: ["Expect:"],
        pycurl.VERBOSE: 1,
        pycurl.DEBUGFUNCTION: partial(note_text, handle.notes),
        pycurl.WRITEDATA: handle.received,
        pycurl.TIMEOUT_MS: config.get("milliseconds", 15_000),
        pycurl.NOSIGNAL: 1,
    }
    if config["chain"]:
        options |= {pycurl.PROXY_SSLCERT: config["chain"], pycurl.PROXY_SSLKEY: config["key"]}
    if body is not None:
        options |= {
            pycurl.POST: 1,
            pycurl.POSTFIELDSIZE_LARGE: len(body),
            pycurl.READDATA: io.BytesIO(body),
        }
    for option, value in options.items():
        handle.setopt(option, value)
    return handle


def note_text(notes: list[str], kind: int, text: bytes) -> None:
    """Keep what libcurl tells in words."""
    if kind == pycurl.INFOTYPE_TEXT:
        notes.append(text.decode().strip())


def answer_to_connect(notes: list[str]) -> int:
    """Find the status, which libcurl tells in words only; 0 if there was no answer."""
    found = [STATUS.fullmatch(note) for note in notes]
    return next((int(match[1]) for match in found if match), 0)


def run(handles: list[Any]) -> dict[Any, str]:
    """Carry out all transfers together; give the errors of those that failed."""
    errors: dict[Any, str] = {}
    multi = pycurl.CurlMulti()
    for handle in handles:
        multi.add_handle(handle)
    running = len(handles)
    while running:
        _, running = multi.perform()
        if running:
            multi.select(1.0)
    waiting = 1
    while waiting:
        waiting, _, failed = multi.info_read()
        errors.update({handle: f"{code} {message}" for handle, code, message in failed})
    return errors


def main(config: dict[str, Any]) -> None:
    """Do what `config` says."""
    bodies = {
        url_and_seed: random.Random(url_and_seed[1]).randbytes(config["size"])
        for url_and_seed in map(tuple, config.get("posts", []))
    }
    handles = [a_transfer(config, url, body) for (url, _), body in bodies.items()]
    handles += [a_transfer(config, url, None) for url in config.get("gets", [])]
    errors = run(handles)
    for handle in handles:
        result = {
            "url": handle.url,
            "error": errors.get(handle, ""),
            "status": handle.getinfo(pycurl.RESPONSE_CODE),
            "connect_status": answer_to_connect(handle.notes),
            "size": len(handle.received.getvalue()),
            "sha256": hashlib.sha256(handle.received.getvalue()).hexdigest(),
            "connections": handle.getinfo(pycurl.NUM_CONNECTS),
        }
        print(json.dumps(result), flush=True)  # noqa: T201 - its output
    print(json.dumps({"version": pycurl.version}), flush=True)  # noqa: T201 - its output


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
