"""A small Kubernetes API (list, watch, status patches, faults), and the processes of a node."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import h11
import trio

from cni.agent.kube_http import ApiServer
from ztunnel.linux.netns import PodNetns

GONE = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
NO_STREAMED_LIST = {  # what a server says that does not know `sendInitialEvents`
    "kind": "Status",
    "apiVersion": "v1",
    "status": "Failure",
    "reason": "Invalid",
    "message": "sendInitialEvents: Forbidden: sendInitialEvents is forbidden",
    "code": 422,
}
KINDS = {"pods": "Pod", "namespaces": "Namespace"}


def a_pod(name: str = "a", ns: str = "shop", **more: Any) -> dict[str, Any]:
    """A pod as the server keeps it; `ip=None` has none yet."""
    ips = [ip for ip in (more.pop("ip", "10.1.0.1"), more.pop("ipv6", None)) if ip]
    return {
        "metadata": {
            "name": name,
            "namespace": ns,
            "uid": more.pop("uid", f"uid-{ns}-{name}"),
            "labels": more.pop("labels", {}),
            "annotations": more.pop("annotations", {}),
        },
        "spec": {
            "nodeName": more.pop("node", "node"),
            "serviceAccountName": more.pop("account", "default"),
            "hostNetwork": more.pop("host_network", False),
        },
        "status": {
            "phase": more.pop("phase", "Running"),
            "podIPs": [{"ip": ip} for ip in ips],
            **({"podIP": ips[0]} if ips else {}),
            **more,
        },
    }


def a_namespace(name: str = "shop", **labels: str) -> dict[str, Any]:
    """A namespace; underscores in the label `mode` stand for themselves."""
    mode = labels.pop("mode", None)
    shown = {**labels, **({"istio.io/dataplane-mode": mode} if mode else {})}
    return {"metadata": {"name": name, "uid": f"uid-{name}", "labels": shown}}


@dataclass
class FakeKube:
    """What the server has; change it with the methods, which wake the watches."""

    token: str | None = None
    page: int = 2  # objects on a page, whatever the client asks for
    is_down: bool = False  # every connection is cut
    refuse: list[int] = field(default_factory=list)  # statuses of the next answers
    fail_patches: int = 0
    requests: list[str] = field(default_factory=list)
    patches: list[tuple[str, str | None]] = field(default_factory=list)
    objects: dict[str, dict[tuple[str, str], dict[str, Any]]] = field(
        default_factory=lambda: {kind: {} for kind in KINDS}
    )
    server: ApiServer | None = None

    def __post_init__(self) -> None:
        self._versions = itertools.count(101)
        self._version = 100
        self._oldest = 0
        self._log: list[tuple[int, str, str, dict[str, Any]]] = []
        self._changed = trio.Event()
        self._cut = trio.Event()

    def put(self, *objects: dict[str, Any]) -> None:
        """Create or replace pods and namespaces."""
        for item in objects:
            kind = "pods" if "spec" in item else "namespaces"
            key = item["metadata"].get("namespace", ""), item["metadata"]["name"]
            known = key in self.objects[kind]
            self._record(kind, "MODIFIED" if known else "ADDED", item)
            self.objects[kind][key] = item

    def pod(self, name: str = "a", ns: str = "shop") -> dict[str, Any]:
        """A copy of a pod, to change and put."""
        return _copy(self.objects["pods"][ns, name])

    def status(self, name: str = "a", ns: str = "shop") -> str | None:
        """What a pod's status annotation says."""
        annotations = self.objects["pods"][ns, name]["metadata"].get("annotations") or {}
        return annotations.get("ambient.istio.io/redirection")

    def label(self, ns: str, mode: str | None) -> None:
        """Put a namespace into the mesh, or take it out."""
        self.put(a_namespace(ns, **({"mode": mode} if mode else {})))

    def remove(self, name: str, ns: str = "shop") -> None:
        """Delete a pod."""
        self._record("pods", "DELETED", self.objects["pods"].pop((ns, name)))

    def bookmark(self) -> None:
        """Tell all watches a newer version."""
        for kind in KINDS:
            self._record(kind, "BOOKMARK", {"metadata": {}})

    def compact(self) -> None:
        """End all watches, and forget what was before."""
        self._oldest = self._version
        self._log.clear()
        self.cut()

    def cut(self) -> None:
        """End all watches."""
        self._cut.set()
        self._cut = trio.Event()

    def stop(self) -> None:
        """Answer nobody any more."""
        self.is_down = True
        self.cut()

    async def until(self, condition: Any, seconds: float = 10.0) -> None:
        """Wait until something holds, looking after each change."""
        with trio.fail_after(seconds):
            while not condition():
                await self._changed.wait()

    def _record(self, kind: str, event: str, item: dict[str, Any]) -> None:
        self._version = next(self._versions)
        item["metadata"]["resourceVersion"] = str(self._version)
        self._log.append((self._version, kind, event, _copy(item)))
        self._changed.set()
        self._changed = trio.Event()

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Answer one request."""
        connection = h11.Connection(h11.SERVER)
        body = b""
        head: h11.Request | None = None
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some(65536)))
                elif isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    break
            if head is not None and not self.is_down:
                await self._answer(_Exchange(stream, connection), head, body)
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError, ssl.SSLError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    async def _answer(self, exchange: _Exchange, head: h11.Request, body: bytes) -> None:
        target = head.target.decode()
        self.requests.append(f"{head.method.decode()} {target}")
        if self.token is not None and (
            dict(head.headers).get(b"authorization") != f"Bearer {self.token}".encode()
        ):
            await exchange.send(401, {"message": "Unauthorized"})
            return
        if self.refuse:
            await exchange.send(self.refuse.pop(0), {"message": "asked to fail"})
            return
        path, _, text = target.partition("?")
        query = {key: values[-1] for key, values in parse_qs(text).items()}
        parts = path.strip("/").split("/")
        if head.method == b"PATCH":
            await self._patch(exchange, parts, json.loads(body))
        elif query.get("sendInitialEvents") == "true":
            await exchange.send(422, NO_STREAMED_LIST)
        elif parts[-1] in KINDS and "watch" in query:
            await self._watch(exchange, parts[-1], query)
        elif parts[-1] in KINDS:
            await self._list(exchange, parts[-1], query)
        else:
            kind = parts[-2]
            item = self.objects.get(kind, {}).get((parts[3] if len(parts) == 6 else "", parts[-1]))
            found = (200, _typed(kind, item)) if item else (404, {"message": "not found"})
            await exchange.send(*found)

    async def _patch(self, exchange: _Exchange, parts: list[str], change: dict[str, Any]) -> None:
        ns, name = parts[3], parts[5]
        item = self.objects["pods"].get((ns, name))
        wanted = change["metadata"]
        if self.fail_patches:
            self.fail_patches -= 1
            await exchange.send(500, {"message": "asked to fail"})
        elif item is None:
            await exchange.send(404, {"message": "not found"})
        elif wanted.get("uid", item["metadata"]["uid"]) != item["metadata"]["uid"]:
            await exchange.send(409, {"message": "Precondition failed: UID in precondition"})
        else:
            item = _copy(item)
            annotations = item["metadata"]["annotations"] = {**item["metadata"]["annotations"]}
            for key, value in wanted["annotations"].items():
                annotations.pop(key, None)
                if value is not None:
                    annotations[key] = value
                self.patches.append((f"{ns}/{name}", value))
            self.put(item)
            await exchange.send(200, _typed("pods", item))

    async def _list(self, exchange: _Exchange, kind: str, query: dict[str, str]) -> None:
        items = [item for _, item in sorted(self.objects[kind].items()) if _on_node(item, query)]
        start = int(query.get("continue", "0"))
        limit = min(self.page, int(query.get("limit", "500")))
        rest = str(start + limit) if start + limit < len(items) else ""
        metadata = {"resourceVersion": str(self._version), "continue": rest}
        page = items[start : start + limit]
        shown = {"kind": f"{KINDS[kind]}List", "apiVersion": "v1", "metadata": metadata}
        await exchange.send(200, {**shown, "items": page})

    async def _watch(self, exchange: _Exchange, kind: str, query: dict[str, str]) -> None:
        seen = int(query["resourceVersion"])
        await exchange.begin()
        cut = self._cut
        if seen < self._oldest:
            await exchange.line({"type": "ERROR", "object": GONE})
            return
        async with trio.open_nursery() as nursery:

            async def until_cut() -> None:
                await cut.wait()
                nursery.cancel_scope.cancel()

            async def until_left() -> None:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while await exchange.stream.receive_some(100):
                        pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_cut)
            nursery.start_soon(until_left)
            while True:
                changed = self._changed
                entries = list(self._log)
                for version, of, event, item in entries:
                    if (
                        version > seen
                        and of == kind
                        and (event == "BOOKMARK" or _on_node(item, query))
                    ):
                        await exchange.line({"type": event, "object": _typed(kind, item)})
                seen = max([seen, *(entry[0] for entry in entries)])
                await changed.wait()


@dataclass
class _Exchange:
    stream: trio.abc.Stream
    connection: h11.Connection

    async def send(self, status: int, item: object) -> None:
        body = json.dumps(item).encode()
        await self.begin(status, [("content-length", str(len(body)))])
        await self._write(h11.Data(data=body), h11.EndOfMessage())

    async def begin(self, status: int = 200, headers: Any = ()) -> None:
        # One request each: who kept the connection would find it cut under its next one.
        shown = [("content-type", "application/json"), ("connection", "close"), *headers]
        await self._write(h11.Response(status_code=status, headers=shown))

    async def line(self, item: object) -> None:
        await self._write(h11.Data(data=json.dumps(item).encode() + b"\n"))

    async def _write(self, *events: Any) -> None:
        await self.stream.send_all(b"".join(self.connection.send(event) or b"" for event in events))


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something holds that another thread, program or task brings about."""
    with trio.fail_after(seconds):
        while True:
            if condition():
                return
            await trio.sleep(0.005)


def _typed(kind: str, item: dict[str, Any]) -> dict[str, Any]:
    """Show an object alone: only within a list it goes without saying what it is."""
    return {"kind": KINDS[kind], "apiVersion": "v1", **item}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(item))
    return copied


@dataclass
class FakeProc:
    """A folder like `/proc`, with processes whose namespaces are real."""

    root: Path
    _pids: Iterator[int] = field(default_factory=lambda: itertools.count(100))

    def add(self, uid: str, netns: PodNetns, *, started: int = 1000, name: str = "app") -> Path:
        """Add a process of a pod; its folder may be changed, or removed to end it."""
        return self.add_raw(f"0::/kubepods.slice/pod{uid}.slice/cri-c1.scope", netns.fileno(),
                            started=started, name=name)  # fmt: skip

    def add_raw(self, cgroup: str, fd: int, *, started: int = 1000, name: str = "app") -> Path:
        """Add any process."""
        folder = self.root / str(next(self._pids))
        (folder / "ns").mkdir(parents=True)
        (folder / "ns/net").symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
        (folder / "cgroup").write_text(cgroup + "\n")
        fields = " ".join(["S", *["0"] * 18, str(started), "0"])
        (folder / "stat").write_text(f"{folder.name} (a (b) c) {fields}\n")
        (folder / "comm").write_text(f"{name}\n")
        (folder / "cmdline").write_bytes(name.encode() + b"\0")
        return folder

    def end_all(self) -> None:
        """Have no processes."""
        for folder in self.root.iterdir():
            shutil.rmtree(folder)


def _on_node(item: dict[str, Any], query: dict[str, str]) -> bool:
    wanted = query.get("fieldSelector", "").removeprefix("spec.nodeName=")
    return not wanted or item["spec"]["nodeName"] == wanted


@asynccontextmanager
async def running(
    kube: FakeKube, *, tls: ssl.SSLContext | None = None, port: int = 0, **more: Any
) -> AsyncIterator[FakeKube]:
    """Serve on a port of 127.0.0.1 while the block runs; `kube.server` says where."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        taken = listeners[0].socket.getsockname()[1]
        kube.server = ApiServer(
            host="127.0.0.1", port=taken, tls=tls is not None, **{"token": None, **more}
        )

        async def handle(stream: trio.SocketStream) -> None:
            if tls is None:
                await kube.serve(stream)
            else:
                await kube.serve(trio.SSLStream(stream, tls, server_side=True))

        nursery.start_soon(partial(trio.serve_listeners, handle, listeners))
        yield kube
        nursery.cancel_scope.cancel()
