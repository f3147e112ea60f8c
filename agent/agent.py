"""The agent as a whole: what Kubernetes says becomes a plan, the plan becomes captures, and these become reports."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from agent import disk, reconcile
from agent.capturer.protocol import TargetStatus
from agent.capturing import Capturer, CapturerError
from agent.pods import namespaces_opted_out, pods_of
from agent.report import Intervals, Reporter
from agent.serve import application
from agent.store import Store, StoredFile
from agent.summary import Files, Tally, summarize
from api.capturenode import Disk
from api.names import agent_server_name
from kube.certificates import SERVING_SIGNER, SERVING_USAGES, Identity, KeyPair, ServerTLS, bundle_cache
from kube.client import PACKETCAPTURES, Client
from kube.serve import health, listening
from kube.watch import Cache, Signal

NAME: Final = "kubepcap-agent"
VERSION: Final = "v0.1.0"

_BURST_SECONDS: Final = 0.02
_LONGEST_SLEEP: Final = 30.0
_STORE_SECONDS: Final = 5.0
_FAREWELL_SECONDS: Final = 8.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an installation or a node may want otherwise. Sizes in bytes, times in seconds."""

    node: str
    pod: str
    namespace: str
    socket: Path
    directory: Path
    port: int
    health_port: int
    ring_bytes: int
    limits: disk.Limits
    intervals: Intervals


class Agent:
    """One node's agent."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self._settings = settings
        self._plan_changed = Signal()
        self._facts_changed = Signal()
        self._store_changed = Signal()
        self._run_ended = Signal()
        self._counted = asyncio.Event()
        self._captures = Cache(
            client, PACKETCAPTURES, reconcile.parse_capture, on_change=lambda _: self._plan_changed.set()
        )
        self._pods = pods_of(settings.node, client, self._plan_changed)
        self._opted_out = namespaces_opted_out(client, self._plan_changed)
        self._capturer = Capturer(settings.socket, on_status=self._told, on_end=self._ended)
        self._store = Store(settings.directory / "captures", node=settings.node, engaged=self._engaged)
        self._tally = Tally()
        self._plan = reconcile.Plan()
        self._files: dict[str, Files] = {}
        self._disk: Disk | None = None
        self._paused: reconcile.Verdict | None = None
        self._reporter = Reporter(
            client, node=settings.node, pod=settings.pod, version=VERSION, intervals=settings.intervals
        )
        self._tls = ServerTLS(client_certificates="required")
        self._identity = Identity(
            client,
            signer=SERVING_SIGNER,
            usages=SERVING_USAGES,
            common_name=NAME,
            dns_names=[agent_server_name(settings.node)],
            on_change=self._use_key_pair,
        )
        self._bundle = bundle_cache(
            client, namespace=settings.namespace, on_change=lambda ca: self._tls.use(client_ca=ca)
        )

    async def run(self) -> None:
        """Work until cancelled; then let the captures' last packets reach their files."""
        checks = {
            "capturer": lambda: None if self._capturer.is_known else "it is not connected",
            "packetcaptures": lambda: None if self._captures.is_synced else "not listed yet",
            "pods": lambda: None if self._pods.is_synced else "not listed yet",
            "certificate": lambda: None if self._tls.is_usable else "the certificate or the CA bundle is missing yet",
        }
        background = {
            "captures": self._captures.run,
            "pods": self._pods.run,
            "namespaces": self._opted_out.run,
            "CA bundle": self._bundle.run,
            "certificate": self._identity.run,
            "capturer": self._capturer.run,
            "refresh": self._refresh,
            "store": self._keep_store,
            "facts": self._describe,
            "report": self._reporter.run,
        }
        async with (
            asyncio.TaskGroup() as tasks,
            listening(health(checks), port=self._settings.health_port),
            listening(application(self._store, self._capturer), port=self._settings.port, tls=self._tls),
        ):
            for name, task in background.items():
                tasks.create_task(task(), name=name)
            planning = tasks.create_task(self._reconcile(), name="plan")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                planning.cancel()
                # A task of its own: before Python 3.11.4 a timeout does not work in a task that was cancelled.
                await tasks.create_task(self._say_farewell(), name="farewell")
                raise

    async def _reconcile(self) -> NoReturn:
        """Keep the plan in step with captures, pods and time."""
        for cache in (self._captures, self._pods, self._opted_out):
            await cache.synced()
        await self._capturer.known()
        await self._count_recorded()
        self._counted.set()
        while True:
            now = datetime.now(UTC)
            self._plan = reconcile.plan(
                self._captures.objects.values(),
                list(self._pods.objects.values()),
                namespaces_opted_out=set(self._opted_out.objects.values()),
                now=now,
                ring_bytes=self._settings.ring_bytes,
                paused=self._paused,
            )
            self._capturer.want(self._plan.targets)
            self._facts_changed.set()
            self._store_changed.set()
            until_wake = (self._plan.wake_at - now).total_seconds() if self._plan.wake_at else _LONGEST_SLEEP
            # Not slept through in one piece: the clock may be set meanwhile.
            await self._plan_changed.wait(min(until_wake, _LONGEST_SLEEP))
            await asyncio.sleep(_BURST_SECONDS)

    async def _describe(self) -> NoReturn:
        """Keep the report in step with the plan, what the capturer makes of it, and the files."""
        while True:
            await self._facts_changed.wait()
            running = self._capturer.running()
            facts = [
                summarize(
                    capture,
                    status=self._capturer.status,
                    count=self._tally.total(capture.capture.uid, running),
                    files=self._files.get(capture.capture.uid, Files()),
                )
                for capture in self._plan.captures
            ]
            self._reporter.update([fact for fact in facts if fact is not None], self._disk)
            await asyncio.sleep(_BURST_SECONDS)

    async def _refresh(self) -> NoReturn:
        """Ask for counters now and then; changes of state come by themselves."""
        while True:
            await asyncio.sleep(self._settings.intervals.counters)
            if self._capturer.is_known:
                try:
                    await self._capturer.refresh()
                except CapturerError as error:
                    log.info("no counters: %s", error)

    async def _keep_store(self) -> NoReturn:
        """Write records, remove what is over a limit or belongs to no capture."""
        await self._captures.synced()
        await self._counted.wait()  # else packets of files that are recorded meanwhile would count twice
        while True:
            try:
                await self._store.finish(on_recovered=self._recovered)
                await self._remove_orphans()
                await self._guard_disk()
            except OSError as error:
                log.warning("keeping the files: %s", error)
            self._facts_changed.set()
            await self._store_changed.wait(_STORE_SECONDS)
            await asyncio.sleep(_BURST_SECONDS)

    async def _remove_orphans(self) -> None:
        if self._captures.unparsable or not self._capturer.is_known:
            return  # then it is not known whose files may go
        uids = {capture.uid for capture in self._captures.objects.values()}
        for gone in await self._store.retain(uids, writing=lambda: self._capturer.engaged):
            self._tally.forget(gone)

    async def _guard_disk(self) -> None:
        files = await self._store.usage()
        self._disk = disk.measure(self._settings.directory, files)
        decision = disk.decide(self._disk, files, self._settings.limits, paused=self._paused is not None)
        for file in decision.remove:
            log.warning("removing %s of capture %s to keep the disk's limits", file.name, file.capture_uid)
            await self._store.remove(file.capture_uid, file.name)
        removed = set(decision.remove)
        self._files = _by_capture([file for file in files if file not in removed])
        if decision.paused != self._paused:
            if decision.paused is not None:
                log.warning("captures pause: %s", decision.paused.message)
            self._paused = decision.paused
            self._plan_changed.set()

    async def _count_recorded(self) -> None:
        """Begin the counters at what finished files hold, but for those of runs that go on and count them anyway."""
        running = {
            file.name for run in self._capturer.running() for interface in run.interfaces for file in interface.files
        }
        for capture_uid, record in await self._store.records():
            if record.name not in running:
                self._tally.add(capture_uid, packets=record.packets, dropped=record.dropped)

    async def _say_farewell(self) -> None:
        """Stop everything and write the records while there is time; the next agent would know less of the files."""
        log.info("stopping all captures")
        self._capturer.want({})
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                while self._capturer.is_known and self._capturer.running():
                    await self._run_ended.wait(_BURST_SECONDS)
                await self._store.finish(on_recovered=self._recovered)
        except (TimeoutError, OSError) as error:
            log.warning("not all records were written: %r", error)

    def _engaged(self) -> frozenset[str] | None:
        return self._capturer.engaged if self._capturer.is_known else None

    def _told(self, status: TargetStatus) -> None:
        if self._store.observe(status):
            self._store_changed.set()
        self._facts_changed.set()

    def _ended(self, status: TargetStatus) -> None:
        self._tally.add_run(status)
        self._store_changed.set()
        self._run_ended.set()

    def _recovered(self, capture_uid: str, packets: int) -> None:
        self._tally.add(capture_uid, packets=packets)

    def _use_key_pair(self, key_pair: KeyPair) -> None:
        self._tls.use(key_pair=key_pair)


def _by_capture(files: Sequence[StoredFile]) -> dict[str, Files]:
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for file in files:
        sizes[file.capture_uid].append(file.size)
    return {capture_uid: Files(len(each), sum(each)) for capture_uid, each in sizes.items()}
