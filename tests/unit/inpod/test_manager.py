from __future__ import annotations

import pytest
import trio

from tests.support.flow import a_mesh
from ztunnel.errors import ConfigError
from ztunnel.inpod import manager as module
from ztunnel.inpod.manager import PodManager
from ztunnel.linux.netns import PodNetns
from ztunnel.model.identity import Namespace, ServiceAccount
from ztunnel.model.workload import PodUid
from ztunnel.proxy.workload_proxy import WorkloadProxy
from ztunnel.wire.zds import PodInfo

BROKEN, SOUND = (PodUid(name) for name in ("broken", "sound"))


def a_pod(name: str) -> PodInfo:
    return PodInfo(name, Namespace("shop"), ServiceAccount(name))


class Scene:
    """Proxies that bind nothing; those of the pod `broken` fail a number of times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, failures: int, taken: int) -> None:
        self.failures = failures
        self.taken = taken  # how often the port cannot be bound again
        self.recovered = trio.Event()
        self.started: list[WorkloadProxy] = []
        monkeypatch.setattr(WorkloadProxy, "start", lambda proxy: self._start(proxy))  # noqa: PLW0108 - functions bind, methods do not
        monkeypatch.setattr(WorkloadProxy, "run", lambda proxy: self._run(proxy))  # noqa: PLW0108
        monkeypatch.setattr(module, "REPLACE_SECONDS", 0.001)

    def _start(self, proxy: WorkloadProxy) -> None:
        if self.started and self.taken and is_broken(proxy):
            self.taken -= 1
            raise ConfigError("failed to bind")
        self.started.append(proxy)

    async def _run(self, proxy: WorkloadProxy) -> None:
        await trio.lowlevel.checkpoint()
        if is_broken(proxy):
            if self.failures:
                self.failures -= 1
                raise ExceptionGroup("a nursery's", [RuntimeError("a bug")])
            self.recovered.set()
        await trio.sleep_forever()


def is_broken(proxy: WorkloadProxy) -> bool:
    return proxy.context.info.name == "broken"


@pytest.mark.parametrize("taken", [0, 2])
async def test_a_proxy_that_fails_is_replaced_and_no_other_pod_notices(
    taken: int, monkeypatch
) -> None:
    async with a_mesh() as mesh, trio.open_nursery() as nursery:
        scene = Scene(monkeypatch, failures=2, taken=taken)
        manager = PodManager(mesh.node)
        await nursery.start(manager.run)
        namespace = PodNetns.open("/proc/self/ns/net")
        await manager.add(BROKEN, a_pod("broken"), namespace)
        await manager.add(SOUND, a_pod("sound"), namespace.duplicate())
        with trio.fail_after(5):
            await scene.recovered.wait()
        assert set(manager.pods) == {BROKEN, SOUND}
        assert manager.pods[BROKEN].proxy is scene.started[-1]
        assert [is_broken(proxy) for proxy in scene.started].count(True) == 3
        assert manager.pods[SOUND].proxy in scene.started
        await manager.remove(BROKEN)
        with pytest.raises(ValueError, match="closed"):
            namespace.fileno()
        assert mesh.lines.take_bugs() == 2
        nursery.cancel_scope.cancel()
