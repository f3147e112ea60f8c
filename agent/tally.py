"""What each capture has counted on this node, kept so that it survives the agent, the capturer and the node.

Counted by run: one pod's capture from its start to its end. What the capturer tells of a run replaces what it told
before, and what it told last stays: so nothing counts twice, whoever was restarted in between. A run also remembers how
much of each file is in its count, so that whatever a file turns out to hold after a crash puts the count right.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from agent.capturer.protocol import State, TargetStatus
from agent.store import FileRecord


@dataclass(frozen=True, slots=True)
class Count:
    """Packets written, those that passed the filter and were lost, and those that the interfaces counted at all.

    `size` is in bytes, and only told of files.
    """

    packets: int = 0
    dropped: int = 0
    seen: int = 0
    size: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.packets + other.packets, self.dropped + other.dropped, self.seen + other.seen, self.size + other.size
        )

    def rise(self, earlier: "Count") -> "Count":
        """By how much each number is above the earlier one; none is below 0."""
        return Count(
            max(0, self.packets - earlier.packets),
            max(0, self.dropped - earlier.dropped),
            max(0, self.seen - earlier.seen),
            max(0, self.size - earlier.size),
        )


@dataclass(slots=True)
class Run:
    """One run. `files` tells, of each of its files, what is in `count` because of it."""

    count: Count = field(default_factory=Count)
    ended: bool = False
    files: dict[str, Count] = field(default_factory=dict)


@dataclass(slots=True)
class Counters:
    """All that is counted of a capture. `earlier` is the sum of runs of which no file is left."""

    runs: dict[str, Run] = field(default_factory=dict)
    earlier: Count = field(default_factory=Count)
    evicted: int = 0
    interruptions: int = 0
    interrupted_at: datetime | None = None

    @property
    def total(self) -> Count:
        return sum((run.count for run in self.runs.values()), self.earlier)


class RunKey(NamedTuple):
    """Names a run: the capture's UID, and the run within it."""

    capture_uid: str
    run: str


_FORMAT: Final = TypeAdapter(Counters)


class CountersError(ValueError):
    """Counters that were kept can't be read."""


def parse(content: bytes) -> Counters:
    """Read what `Tally.unsaved` gave. Raises CountersError."""
    try:
        return _FORMAT.validate_json(content)
    except ValidationError as error:
        raise CountersError(f"not counters of ours: {error.errors()[0]['msg']}") from error


class Tally:
    """The counters of all captures of this node."""

    def __init__(self) -> None:
        self._captures: defaultdict[str, Counters] = defaultdict(Counters)
        self._live: set[RunKey] = set()
        self._unsaved: set[str] = set()
        self._urgent: set[str] = set()

    def of(self, capture_uid: str) -> Counters:
        """The capture's counters now."""
        return self._captures.get(capture_uid, Counters())

    def observe(self, status: TargetStatus) -> Count:
        """Take what the capturer tells of a run, with all of its files. Returns by how much the counts rose."""
        uid, key = _run_key(status)
        self._live.add(RunKey(uid, key))
        runs = self._captures[uid].runs
        known = runs.get(key)
        if known is not None and status.state is State.STOPPING:
            return Count()  # it may count packets that no file is known to hold yet; its end is told soon
        run = runs.setdefault(key, Run())
        before, files_before = run.count, run.files
        files = [file for interface in status.interfaces for file in interface.files]
        run.files = {file.name: Count(file.packets, file.dropped, size=file.size) for file in files}
        run.count = Count(
            sum(interface.packets for interface in status.interfaces),
            sum(interface.dropped for interface in status.interfaces),
            sum(interface.seen for interface in status.interfaces),
        )
        self._unsaved.add(uid)
        if (known is None and files) or status.state.ended > run.ended:
            self._urgent.add(uid)
        run.ended = status.state.ended
        written = sum(file.rise(files_before.get(name, Count())).size for name, file in run.files.items())
        return run.count.rise(before) + Count(size=written)

    def end(self, status: TargetStatus) -> None:
        """A run is over; what was told of it last stays."""
        key = _run_key(status)
        self._live.discard(key)
        run = self._captures[key.capture_uid].runs.get(key.run)
        if run is not None:
            run.ended = True
            self._urgent.add(key.capture_uid)

    def settle(self, capture_uid: str, record: FileRecord) -> None:
        """A file turned out to hold this. Of a run that goes on the capturer knows better.

        Packets that were told and are not in the file were lost with the node's page cache: they count as dropped.
        """
        runs = self._captures[capture_uid].runs
        # Whoever recovers a file after an agent's death does not know its run, but counters that were kept do.
        told_of = (key for key, run in runs.items() if record.name in run.files)
        key = next(told_of, _key(record.pod_uid, record.run))
        run = runs.setdefault(key, Run(ended=True))
        if RunKey(capture_uid, key) in self._live:
            return
        told = run.files.get(record.name, Count())
        found = Count(record.packets, max(record.dropped, told.dropped + max(0, told.packets - record.packets)))
        run.files[record.name] = found
        if (found.packets, found.dropped) != (told.packets, told.dropped):
            run.count = Count(
                run.count.packets + found.packets - told.packets,
                run.count.dropped + found.dropped - told.dropped,
                run.count.seen,
            )
            self._urgent.add(capture_uid)

    def load(self, capture_uid: str, kept: Counters | None, records: Iterable[FileRecord], *, now: datetime) -> bool:
        """Go on from what an earlier agent kept, and from the files. To be called once the capturer's runs are known.

        Runs that were not over and that the capturer does not know any more died with it. Returns whether there were.
        """
        current = self._captures[capture_uid]
        lost = False
        if kept is not None:
            for key, run in kept.runs.items():
                if key not in current.runs:
                    lost |= not run.ended
                    run.ended = True
                    current.runs[key] = run
            current.earlier += kept.earlier
            current.evicted += kept.evicted
            current.interruptions += kept.interruptions
            current.interrupted_at = current.interrupted_at or kept.interrupted_at
        if lost:
            self.interrupt(capture_uid, now=now)
        for record in records:
            self.settle(capture_uid, record)
        return lost

    def evict(self, capture_uid: str) -> None:
        """A file was removed to keep the disk's limits."""
        self._captures[capture_uid].evicted += 1
        self._urgent.add(capture_uid)

    def interrupt(self, capture_uid: str, *, now: datetime) -> None:
        """Packets of this capture may be missing: it stopped, or could not be written, though it should go on."""
        counters = self._captures[capture_uid]
        counters.interruptions += 1
        counters.interrupted_at = now
        self._urgent.add(capture_uid)

    def ended(self) -> set[RunKey]:
        """The runs that are over: no new file of theirs can appear."""
        return {
            RunKey(uid, key)
            for uid, counters in self._captures.items()
            for key, run in counters.runs.items()
            if RunKey(uid, key) not in self._live
        }

    def fold(self, ended: Collection[RunKey], present: Mapping[str, Collection[str]]) -> None:
        """Put the runs of which no file is left into one, so that what is kept stays small.

        `ended` is what `ended()` gave before the files, by the capture's UID, were listed.
        """
        for uid, key in ended:
            counters = self._captures.get(uid)
            run = counters.runs.get(key) if counters is not None else None
            if counters is None or run is None:
                continue
            names = present.get(uid, ())
            run.files = {name: count for name, count in run.files.items() if name in names}
            if not run.files:
                counters.earlier += run.count
                del counters.runs[key]

    def forget(self, capture_uid: str) -> None:
        self._captures.pop(capture_uid, None)
        self._live = {key for key in self._live if key.capture_uid != capture_uid}
        self._unsaved.discard(capture_uid)
        self._urgent.discard(capture_uid)

    def unsaved(self, *, urgent: bool) -> dict[str, bytes]:
        """What is to be kept, by the capture's UID; each change is given once. `urgent`: mere counters can wait."""
        chosen = self._urgent if urgent else self._unsaved | self._urgent
        content = {uid: _FORMAT.dump_json(self._captures[uid]) for uid in chosen if uid in self._captures}
        self._unsaved -= content.keys()
        self._urgent.clear()
        return content

    def not_kept(self, capture_uids: Iterable[str]) -> None:
        """Of what `unsaved` gave this could not be written: it is given again, as urgent."""
        self._urgent |= self._captures.keys() & set(capture_uids)


def _run_key(status: TargetStatus) -> RunKey:
    return RunKey(status.target.capture_uid, _key(status.target.pod_uid, status.started))


def _key(pod_uid: str, started: int) -> str:
    """Of the pod's UID a file's name has the first 8 digits."""
    return f"{pod_uid[:8]}-{started}"
