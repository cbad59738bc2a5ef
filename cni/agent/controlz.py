"""ControlZ: levels of the log, read and changed over HTTP while the agent runs (cni.md 8).

Pages, fields and codes are the reference's, so that `istioctl admin log` and scripts work. What it
takes and ignores, a level it does not know or a request without one, is refused with the reason.
Nobody is asked who they are: that is why it listens on loopback only.
"""

from __future__ import annotations

from http import HTTPStatus

import msgspec
import structlog
import trio

from cni.agent.errors import SocketPathError
from cni.agent.http_server import JSON, Request, Response, Routes, listen_tcp, serve
from cni.agent.scopes import LEVELS, SCOPES, LogScopes, Scope
from ztunnel.model.network import Endpoint, Port, parse_ip

BODY_BYTES_MAX = 4096  # of a request, which is a handful of words
SHOWN_CHARS = 80
NONE = "none"
EXAMPLE = 'send {"output_level": "debug"}'
PAGES = f"""\
ControlZ of ztunnel-cni-agent: levels of the log
GET /scopej/       all scopes and their levels, as JSON
GET /scopej/NAME   one of them: {", ".join(SCOPES)}
PUT /scopej/NAME   with {{"output_level": LEVEL}}, one of {", ".join(LEVELS)}
"""

log = structlog.get_logger(component="controlz")


class ScopeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A scope, with the reference's fields. There are no stack traces by level, nor callers."""

    name: str
    description: str
    output_level: str
    stack_trace_level: str = NONE
    log_callers: bool = False


class _Change(msgspec.Struct, frozen=True):
    output_level: str = ""
    stack_trace_level: str = ""
    log_callers: bool = False


async def serve_controlz(host: str, port: int, scopes: LogScopes) -> None:
    """Serve at an address until cancelled; if it cannot be had, say so: no pod depends on it."""
    try:
        listener = listen_tcp(port, host=host)
    except SocketPathError as exc:
        log.warning("ControlZ not served, --ctrlz_port names another port", error=str(exc))
        await trio.lowlevel.checkpoint()
        return
    with listener:
        ip, bound = listener.getsockname()[:2]
        log.info("ControlZ served", address=Endpoint(parse_ip(ip), Port(bound)))
        await serve(listener, controlz_routes(scopes), body_bytes_max=BODY_BYTES_MAX)


def controlz_routes(scopes: LogScopes) -> Routes:
    """Make the pages."""

    def info(scope: Scope) -> ScopeInfo:
        return ScopeInfo(
            name=scope.name, description=scope.description, output_level=scopes.level_of(scope)
        )

    async def pages(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return _other_method(request) or Response(HTTPStatus.OK, PAGES)

    async def every(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        return _other_method(request) or _json([info(scope) for scope in SCOPES.values()])

    async def one(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        name = request.path.rpartition("/")[2]
        scope = SCOPES.get(name)
        if scope is None:
            known = ", ".join(SCOPES)
            shown = ascii(name[:SHOWN_CHARS])
            return _refused(f"unknown scope name: {shown}; the scopes are {known}")
        if request.method == "PUT":
            return _change(scopes, scope, request.body)
        return _other_method(request, "GET or PUT") or _json(info(scope))

    return {"/": pages, "/scopej": every, "/scopej/": every, "/scopej/*": one}


def _change(scopes: LogScopes, scope: Scope, body: bytes) -> Response:
    try:
        wish = msgspec.json.decode(body, type=_Change)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        return _refused(f"unable to decode request: {exc}; {EXAMPLE}")
    # `istioctl admin log --reset` asks for what is so in any case.
    if wish.stack_trace_level not in ("", NONE) or wish.log_callers:
        return _refused("stack traces and callers cannot be switched on; only output_level changes")
    if wish.output_level in LEVELS:
        before = scopes.level_of(scope)
        log.info("log level changes", scope=scope.name, level=wish.output_level, before=before)
        scopes.change(scope, LEVELS[wish.output_level])
    elif wish.output_level:
        shown = ascii(wish.output_level[:SHOWN_CHARS])
        return _refused(f"unknown output_level {shown}; write one of {', '.join(LEVELS)}")
    elif not wish.stack_trace_level:
        return _refused(f"the request changes nothing; {EXAMPLE}")
    return Response(HTTPStatus.ACCEPTED)


def _other_method(request: Request, allowed: str = "GET") -> Response | None:
    if request.method in ("GET", "HEAD"):
        return None
    text = f"{request.method} is not possible here, {allowed} is\n"
    return Response(HTTPStatus.METHOD_NOT_ALLOWED, text)


def _json(answer: ScopeInfo | list[ScopeInfo]) -> Response:
    return Response(HTTPStatus.OK, msgspec.json.encode(answer).decode() + "\n", JSON)


def _refused(why: str) -> Response:
    return Response(HTTPStatus.BAD_REQUEST, f"{why}\n")
