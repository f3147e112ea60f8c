"""Which captures are to be looked at, and when: so that a pass costs what has changed, not all that there is."""

from collections.abc import Collection, Iterable
from datetime import datetime


class Agenda:
    """UIDs of captures with the next moment at which something about them may be due."""

    def __init__(self) -> None:
        self._due: dict[str, datetime | None] = {}
        self._now: datetime | None = None

    def touch(self, uids: Iterable[str]) -> None:
        """Look at these the next time."""
        for uid in uids:
            self._due[uid] = None

    def schedule(self, uid: str, moment: datetime) -> None:
        """Look at this one at that moment, if not before."""
        if uid not in self._due:
            self._due[uid] = moment
        elif (due := self._due[uid]) is not None:
            self._due[uid] = min(due, moment)

    def take(self, known: Collection[str], now: datetime) -> set[str]:
        """Those of the `known` ones that are due. When the clock was set back, all: no moment is right any more."""
        stepped_back = self._now is not None and now < self._now
        self._now = now
        self._due = {uid: moment for uid, moment in self._due.items() if uid in known}
        if stepped_back:
            taken = set(known)
        else:
            taken = {uid for uid, moment in self._due.items() if moment is None or moment <= now}
        for uid in taken:
            self._due.pop(uid, None)
        return taken

    def pause(self, now: datetime, *, longest: float) -> float:
        """Seconds until something is due, at most `longest`."""
        moments = [moment or now for moment in self._due.values()]
        return min([longest, *(max(0.0, (moment - now).total_seconds()) for moment in moments)])
