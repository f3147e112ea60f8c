"""The agent as a whole: what Kubernetes says becomes a plan, the plan becomes captures, and these become reports."""

import asyncio
import functools
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from agent import disk, reconcile
from agent.capturer.protocol import TargetStatus
from agent.capturing import Capturer, CapturerError
from agent.lock import NodeLock
from agent.metrics import Metrics
from agent.pods import namespaces_opted_out, pods_of
from agent.report import Intervals, Reporter
from agent.serve import application
from agent.store import FileRecord, Store, StoredFile
from agent.summary import Files, summarize
from agent.tally import CountersError, Tally, parse
from api.capturenode import Capturer as CapturerFacts
from api.capturenode import Disk, NodeCapture
from api.names import agent_server_name
from kube.certificates import SERVING_SIGNER, SERVING_USAGES, Identity, KeyPair, ServerTLS, bundle_cache
from kube.client import PACKETCAPTURES, Client
from kube.serve import HEALTH_LIMITS, health, listening
from kube.status import StatusError
from kube.watch import Cache, Signal

NAME: Final = "kubepcap-agent"
VERSION: Final = "v0.1.0"

_BURST_SECONDS: Final = 0.02
_LONGEST_BURST_SECONDS: Final = 1.0
_GLANCE_SECONDS: Final = 0.25
_LONGEST_SLEEP: Final = 30.0
_STORE_SECONDS: Final = 30.0  # news wake it earlier
_DISK_SECONDS: Final = 5.0
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
    direct: bool
    node_limits: reconcile.NodeLimits
    limits: disk.Limits
    intervals: Intervals


class Agent:
    """One node's agent."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self._settings = settings
        self._plan_changed = Signal()
        self._facts_changed = Signal()
        self._store_changed = Signal()
        self._files_changed = Signal()
        self._run_ended = Signal()
        self._counted = asyncio.Event()
        self._guarded = asyncio.Event()
        self._planned = asyncio.Event()
        self._metrics = Metrics()
        self._captures = Cache(
            client,
            PACKETCAPTURES,
            functools.partial(reconcile.parse_capture, direct=settings.direct),
            on_change=lambda _: self._plan_changed.set(),
        )
        self._pods = pods_of(settings.node, client, self._plan_changed)
        self._opted_out = namespaces_opted_out(client, self._plan_changed)
        self._capturer = Capturer(settings.socket, on_status=self._told, on_end=self._ended, on_lost=self._lost)
        self._lock = NodeLock(settings.directory / "captures")
        self._store = Store(
            settings.directory / "captures",
            node=settings.node,
            engaged=self._engaged,
            on_error=self._metrics.storage_errors.inc,
        )
        self._tally = Tally()
        self._keeping = asyncio.Lock()
        self._plan = reconcile.Plan()
        self._files: dict[str, Files] = {}
        self._disk: Disk | None = None
        self._paused = reconcile.Pauses()
        self._reporter = Reporter(
            client,
            node=settings.node,
            pod=settings.pod,
            version=VERSION,
            intervals=settings.intervals,
            on_write=self._reported,
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
            "node": lambda: self._lock.waits_for,
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
            "disk": self._guard_disk,
            "facts": self._describe,
            "report": self._reporter.run,
        }
        app = application(self._store, self._capturer)
        async with (
            listening(
                health(checks, metrics=self._metrics.exposition), port=self._settings.health_port, limits=HEALTH_LIMITS
            ),
            self._lock.held(),
            asyncio.TaskGroup() as tasks,
            listening(app, port=self._settings.port, tls=self._tls),
        ):
            for name, task in background.items():
                tasks.create_task(task(), name=name)
            planning = tasks.create_task(self._reconcile(), name="plan")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                planning.cancel()
                # A task of its own: before Python 3.11.4 a timeout does not work in a task that was cancelled.
                await asyncio.create_task(self._say_farewell(), name="farewell")
                raise

    async def _reconcile(self) -> NoReturn:
        """Keep the plan in step with captures, pods and time."""
        for cache in (self._captures, self._pods, self._opted_out):
            await cache.synced()
        await self._capturer.known()
        await self._load_counters()
        self._counted.set()
        await self._guarded.wait()  # nothing is begun on a full disk
        while True:
            now, began = datetime.now(UTC), time.monotonic()
            self._plan = reconcile.plan(
                self._captures.objects.values(),
                list(self._pods.objects.values()),
                namespaces_opted_out=set(self._opted_out.objects.values()),
                now=now,
                limits=self._settings.node_limits,
                running=self._places(),
                paused=self._paused,
            )
            self._planned.set()
            self._capturer.want(self._plan.targets)
            self._facts_changed.set()
            self._store_changed.set()
            until_wake = (self._plan.wake_at - now).total_seconds() if self._plan.wake_at else _LONGEST_SLEEP
            pause = _pause(began)
            # Not slept through in one piece: the clock may be set meanwhile.
            await self._plan_changed.wait(min(until_wake, _LONGEST_SLEEP))
            await asyncio.sleep(pause)

    def _places(self) -> dict[str, int]:
        """The targets that were to be captured already, or are, with how many interfaces they take."""
        planned = dict.fromkeys(self._plan.targets, 1)
        return planned | {run.target.id: max(1, len(run.interfaces)) for run in self._capturer.running()}

    async def _describe(self) -> NoReturn:
        """Keep the report in step with the plan, what the capturer makes of it, and the files."""
        await self._planned.wait()  # a report without captures would say that their files and packets are gone
        while True:
            await self._facts_changed.wait()
            began = time.monotonic()
            captures = [fact for plan in self._plan.captures if (fact := self._summarize(plan)) is not None]
            capturer = self._capturer_facts()
            self._reporter.update(captures, disk=self._disk, capturer=capturer, agents=self._plan.agents)
            self._metrics.report(
                captures,
                targets=len(self._plan.targets),
                capturer=capturer,
                disk=self._disk,
                files=sum(files.count for files in self._files.values()),
            )
            await asyncio.sleep(_pause(began))

    def _summarize(self, plan: reconcile.CapturePlan) -> NodeCapture | None:
        uid = plan.capture.uid
        return summarize(
            plan,
            status=self._capturer.status,
            counters=self._tally.of(uid),
            files=self._files.get(uid, Files()),
        )

    def _capturer_facts(self) -> CapturerFacts | None:
        if not self._capturer.is_known:
            return None
        captured = [
            run.target for run in self._capturer.running() for interface in run.interfaces if not interface.state.ended
        ]
        return CapturerFacts(
            restarts=self._capturer.restarts,
            interfaces=len(captured),
            ring_bytes=sum(target.ring_bytes for target in captured),
        )

    async def _refresh(self) -> NoReturn:
        """Ask for counters now and then, and keep them; changes of state come by themselves."""
        while True:
            await asyncio.sleep(self._settings.intervals.counters)
            if self._capturer.is_known:
                try:
                    await self._capturer.refresh()
                except CapturerError as error:
                    log.info("no counters: %s", error)
            await self._keep_counters(urgent=False)

    async def _keep_store(self) -> NoReturn:
        """Write records and counters, remove what belongs to no capture."""
        await self._captures.synced()
        await self._counted.wait()  # else packets of files that are recorded meanwhile would count twice
        while True:
            try:
                await self._store.finish(on_record=self._recorded)
                await self._remove_orphans()
                await self._keep_counters(urgent=True)
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

    async def _guard_disk(self) -> NoReturn:
        """Keep the disk's limits, looking the more often the faster it fills."""
        await self._captures.synced()
        await self._counted.wait()
        while True:
            try:
                allowance = await self._keep_limits()
                self._guarded.set()
                await self._until_disk_is_due(allowance)
            except OSError as error:
                log.warning("guarding the disk: %s", error)
                self._guarded.set()
                await asyncio.sleep(_GLANCE_SECONDS)

    async def _keep_limits(self) -> int:
        """Remove files and pause captures as must be. Returns how much may be written until the next time."""
        ended = self._tally.ended()
        files = await self._store.usage()
        self._disk = disk.measure(self._settings.directory, files)
        decision = disk.decide(
            self._disk,
            files,
            self._settings.limits,
            owners=self._owners(),
            paused=self._paused,
            inodes=disk.measure_inodes(self._settings.directory),
        )
        removed = {file for file in decision.remove if await self._evict(file)}
        left = [file for file in files if file not in removed]
        self._files = _by_capture(left)
        self._tally.fold(ended, _names_by_capture(left))
        if decision.paused != self._paused:
            for verdict in decision.paused.verdicts - self._paused.verdicts:
                log.warning("%s", verdict.message)
            self._lost(self._running_of(decision.paused))
            self._paused = decision.paused
            self._plan_changed.set()
        if removed:
            self._store_changed.set()
        self._facts_changed.set()
        return decision.allowance if len(removed) == len(decision.remove) else 0

    async def _evict(self, file: StoredFile) -> bool:
        log.warning("removing %s of capture %s to keep the disk's limits", file.name, file.capture_uid)
        try:
            await self._store.remove(file.capture_uid, file.name)
        except OSError as error:
            log.warning("removing %s of capture %s: %s", file.name, file.capture_uid, error)
            self._metrics.storage_errors.inc()
            return False
        self._tally.evict(file.capture_uid)
        self._metrics.evicted.inc()
        return True

    def _running_of(self, paused: reconcile.Pauses) -> list[TargetStatus]:
        """The runs that a pause ends."""
        captures = self._captures.objects.values()
        new = {each.uid for each in captures if paused.of(each.metadata) and not self._paused.of(each.metadata)}
        return [run for run in self._capturer.running() if run.target.capture_uid in new]

    async def _until_disk_is_due(self, allowance: int) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + _DISK_SECONDS
        before = self._disk.free if self._disk is not None else 0
        changed = False
        while not changed and loop.time() < due:
            await asyncio.sleep(_GLANCE_SECONDS)
            free = await asyncio.to_thread(disk.free_bytes, self._settings.directory)
            if before - free > allowance:
                return
            changed = await self._files_changed.wait(0)

    def _owners(self) -> dict[str, disk.Owner]:
        return {
            capture.uid: disk.Owner(
                capture.metadata.namespace or "",
                capture.order.limits.max_bytes_per_node if isinstance(capture.order, reconcile.Order) else None,
            )
            for capture in self._captures.objects.values()
        }

    async def _load_counters(self) -> None:
        """Go on from what earlier agents counted and recorded."""
        kept = await self._store.counters()
        records: defaultdict[str, list[FileRecord]] = defaultdict(list)
        for capture_uid, record in await self._store.records():
            records[capture_uid].append(record)
        for capture_uid in kept.keys() | records.keys():
            counters = None
            if capture_uid in kept:
                try:
                    counters = parse(kept[capture_uid])
                except CountersError as error:
                    log.warning("counters of capture %s: %s", capture_uid, error)
            if self._tally.load(capture_uid, counters, records[capture_uid], now=datetime.now(UTC)):
                self._metrics.interruptions.inc()

    async def _keep_counters(self, *, urgent: bool) -> None:
        if self._counted.is_set():  # else those of before would be lost
            async with self._keeping:  # else what is older may be written last
                contents = self._tally.unsaved(urgent=urgent)
                self._tally.not_kept(await self._store.keep_counters(contents))

    async def _say_farewell(self) -> None:
        """Stop everything and write the records while there is time; the next agent would know less of the files."""
        log.info("stopping all captures")
        if self._counted.is_set():
            self._lost([run for run in self._capturer.running() if run.target.id in self._plan.targets])
        self._capturer.want({})
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                while self._capturer.is_known and self._capturer.running():
                    await self._run_ended.wait(_BURST_SECONDS)
                if self._counted.is_set():
                    await self._store.finish(on_record=self._recorded)
                await self._keep_counters(urgent=False)
        except (TimeoutError, OSError) as error:
            log.warning("not all records were written: %r", error)

    def _engaged(self) -> frozenset[str] | None:
        return self._capturer.engaged if self._capturer.is_known else None

    def _told(self, status: TargetStatus) -> None:
        rise = self._tally.observe(status)
        if self._counted.is_set():  # before, it is what an earlier agent counted
            self._metrics.count(rise)
        if self._store.observe(status):
            self._store_changed.set()
            self._files_changed.set()
        if status.state.ended:
            self._plan_changed.set()  # at its end: the clock may have been set
        self._facts_changed.set()

    def _ended(self, status: TargetStatus) -> None:
        self._tally.end(status)
        self._metrics.ended(status)
        self._store_changed.set()
        self._run_ended.set()

    def _lost(self, statuses: Sequence[TargetStatus]) -> None:
        now = datetime.now(UTC)
        for capture_uid in {status.target.capture_uid for status in statuses}:
            log.warning("capture %s was interrupted", capture_uid)
            self._tally.interrupt(capture_uid, now=now)
            self._metrics.interruptions.inc()

    def _recorded(self, capture_uid: str, record: FileRecord) -> None:
        self._tally.settle(capture_uid, record)
        if record.write_error:
            self._tally.interrupt(capture_uid, now=datetime.now(UTC))
            self._metrics.interruptions.inc()
        if record.recovered:
            self._metrics.recovered.inc()
            self._metrics.torn.inc(record.torn_bytes)

    def _reported(self, error: StatusError | None) -> None:
        if error is None:
            self._metrics.report_writes.inc()
            self._metrics.heartbeat.set_to_current_time()
        else:
            self._metrics.report_errors.inc()

    def _use_key_pair(self, key_pair: KeyPair) -> None:
        self._tls.use(key_pair=key_pair)


def _by_capture(files: Sequence[StoredFile]) -> dict[str, Files]:
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for file in files:
        sizes[file.capture_uid].append(file.size)
    return {capture_uid: Files(len(each), sum(each)) for capture_uid, each in sizes.items()}


def _names_by_capture(files: Sequence[StoredFile]) -> dict[str, set[str]]:
    names: defaultdict[str, set[str]] = defaultdict(set)
    for file in files:
        names[file.capture_uid].add(file.name)
    return names


def _pause(began: float) -> float:
    """So long after work that began then that it takes a tenth of the time at most, however much changes."""
    return min(max(_BURST_SECONDS, 9 * (time.monotonic() - began)), _LONGEST_BURST_SECONDS)
