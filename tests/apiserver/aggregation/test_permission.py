"""Permissions, on a loop whose clock runs ahead to whatever comes next: what takes half a minute takes no time here."""

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apiserver.aggregation.authentication import Authenticated, Authenticator, User
from apiserver.aggregation.authorization import Authorizer
from apiserver.aggregation.permission import REVOKED_WITHIN, Permissions
from apiserver.aggregation.requestinfo import parse
from kube.client import Client, Json
from kube.status import StatusError
from tests.ahead import run

ALICE = Authenticated(user=User(name="alice"))
FILE = parse("GET", "/apis/subresources.kubepcap.io/v1/namespaces/dev/packetcaptures/x/files/n/f.pcap")
HOUR = 3600.0
ROUNDING = 1e-6


def now() -> float:
    return asyncio.get_running_loop().time()


class KubeAPIServer(Client):
    """Answers SubjectAccessReviews after some seconds by what `allows` said when it was half way."""

    def __init__(self, allows: Callable[[], bool], seconds: float = 0.0, silent_from: float = math.inf) -> None:
        self.asked = 0
        self._allows = allows
        self._seconds = seconds
        self._silent_from = silent_from

    async def create(self, *_: Any, **__: Any) -> Json:
        self.asked += 1
        if now() >= self._silent_from:
            await asyncio.Event().wait()
        await asyncio.sleep(self._seconds / 2)
        allowed = self._allows()
        await asyncio.sleep(self._seconds / 2)
        return {"status": {"allowed": allowed}}


class FrontProxies(Authenticator):
    """Named whoever is asked for, and stands by it."""

    def __init__(self) -> None:
        pass

    async def confirm(self, authenticated: Authenticated) -> User:
        return authenticated.user


class Tokens(FrontProxies):
    """Confirms a user so many times, and then answers as it is told."""

    def __init__(self, times: int, then: StatusError) -> None:
        self._times = times
        self._then = then

    async def confirm(self, authenticated: Authenticated) -> User:
        self._times -= 1
        if self._times < 0:
            raise self._then
        return authenticated.user


def permissions(client: Client, authenticator: Authenticator | None = None) -> tuple[Permissions, Authorizer]:
    authorizer = Authorizer(client, clock=asyncio.get_running_loop().time)
    return Permissions(authenticator or FrontProxies(), authorizer), authorizer


async def ended(client: Client, authenticator: Authenticator | None = None) -> tuple[float, int]:
    """Let a request that was just allowed go on; gives the time at which it was ended, and the code of the reason."""
    upheld, authorizer = permissions(client, authenticator)
    await authorizer.authorize(ALICE.user, FILE)
    with pytest.raises(StatusError) as raised:
        async with upheld.upheld(ALICE, FILE, since=now()):
            await asyncio.sleep(HOUR)
    assert len(asyncio.all_tasks()) == 1, "nothing is left behind"
    return round(now(), 3), raised.value.code


def test_what_stays_permitted_goes_on() -> None:
    async def main() -> None:
        client = KubeAPIServer(lambda: True)
        upheld, authorizer = permissions(client)
        await authorizer.authorize(ALICE.user, FILE)

        async with upheld.upheld(ALICE, FILE, since=now()):
            await asyncio.sleep(HOUR)

        assert client.asked == pytest.approx(HOUR / 10, abs=2), "what is asked for, is kept for ten seconds"

    run(main())


@settings(deadline=None)
@given(
    revoked=st.floats(0.0, 60.0),
    seconds=st.floats(0.0, 25.0),
    began=st.floats(0.0, 12.0),
    hangs=st.booleans(),
)
def test_what_was_revoked_ends_within_half_a_minute(revoked: float, seconds: float, began: float, hangs: bool) -> None:
    """However slowly kube-apiserver answers, if it does, and however old a kept answer is."""

    async def main() -> None:
        revoked_at = now() + revoked
        client = KubeAPIServer(lambda: now() < revoked_at, seconds, silent_from=revoked_at if hangs else math.inf)
        upheld, authorizer = permissions(client)
        try:
            await authorizer.authorize(ALICE.user, FILE)
            await asyncio.sleep(began)
            await authorizer.authorize(ALICE.user, FILE)
        except StatusError:
            return  # it never began
        with pytest.raises(StatusError):
            async with upheld.upheld(ALICE, FILE, since=now()):
                await asyncio.sleep(HOUR)
        assert now() <= revoked_at + REVOKED_WITHIN + ROUNDING

    run(main())


def test_a_request_with_others_of_its_kind_ends_within_half_a_minute_too() -> None:
    async def main() -> None:
        revoked_at = now() + 42
        client = KubeAPIServer(lambda: now() < revoked_at, 8)
        upheld, authorizer = permissions(client)

        async def download(after: float) -> float:
            await asyncio.sleep(after)
            await authorizer.authorize(ALICE.user, FILE)
            with pytest.raises(StatusError):
                async with upheld.upheld(ALICE, FILE, since=now()):
                    await asyncio.sleep(HOUR)
            return now()

        ends = await asyncio.gather(*(download(after) for after in range(30)))
        assert max(ends) <= revoked_at + REVOKED_WITHIN + ROUNDING

    run(main())


class Broken(Client):
    """Answers one review, and no other."""

    def __init__(self, then: StatusError | None) -> None:
        self.asked = 0
        self._then = then

    async def create(self, *_: Any, **__: Any) -> Json:
        self.asked += 1
        if self.asked == 1:
            return {"status": {"allowed": True}}
        if self._then is None:
            await asyncio.Event().wait()
        raise self._then or AssertionError


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(None, id="no answer"),
        pytest.param(StatusError(403, "may not ask"), id="no right"),
        pytest.param(StatusError(503, "down"), id="down"),
        pytest.param(StatusError(500, "broken"), id="broken"),
    ],
)
def test_without_an_answer_a_request_ends_within_half_a_minute_but_not_at_once(failure: StatusError | None) -> None:
    assert run(ended(Broken(failure))) == (1025, 500), "the only answer was kept for ten seconds, and used at 1005"


def test_a_short_failure_of_kube_apiserver_ends_nothing() -> None:
    class Restarting(Client):
        async def create(self, *_: Any, **__: Any) -> Json:
            if 1005 <= now() < 1015:
                raise StatusError(503, "down")
            return {"status": {"allowed": True}}

    async def main() -> None:
        upheld, authorizer = permissions(Restarting.__new__(Restarting))
        await authorizer.authorize(ALICE.user, FILE)
        async with upheld.upheld(ALICE, FILE, since=now()):
            await asyncio.sleep(HOUR)

    run(main())


def test_a_right_that_is_taken_back_ends_its_request_as_it_would_refuse_another() -> None:
    assert run(ended(KubeAPIServer(lambda: now() < 1007))) == (1010, 403)


def test_a_token_that_is_withdrawn_ends_its_request() -> None:
    withdrawn = Tokens(3, StatusError(401, "Unauthorized"))

    assert run(ended(KubeAPIServer(lambda: True), withdrawn)) == (1020, 401)


def test_a_token_of_which_nothing_can_be_told_ends_its_request_later() -> None:
    unknown = Tokens(3, StatusError(500, "down"))

    assert run(ended(KubeAPIServer(lambda: True), unknown)) == (1035, 500)


def test_a_right_that_took_long_to_be_told_lasts_the_shorter() -> None:
    async def main() -> None:
        began = now()
        await asyncio.sleep(15)
        upheld, _ = permissions(KubeAPIServer(lambda: True, silent_from=0))
        with pytest.raises(StatusError) as raised:
            async with upheld.upheld(ALICE, FILE, since=began):
                await asyncio.sleep(HOUR)
        assert raised.value.code == 500
        assert now() - began == pytest.approx(20)

    run(main())


def test_a_failure_of_the_request_is_passed_on_as_it_is() -> None:
    async def main() -> None:
        upheld, _ = permissions(KubeAPIServer(lambda: True))
        failure = LookupError("of its own")
        with pytest.raises(LookupError) as raised:
            async with upheld.upheld(ALICE, FILE, since=now()):
                raise failure
        assert raised.value is failure
        with pytest.raises(TimeoutError):
            async with upheld.upheld(ALICE, FILE, since=now()), asyncio.timeout(1):
                await asyncio.sleep(2)

    run(main())


def test_a_request_that_is_cancelled_is_cancelled() -> None:
    async def main() -> None:
        upheld, _ = permissions(KubeAPIServer(lambda: True))

        async def request() -> None:
            async with upheld.upheld(ALICE, FILE, since=now()):
                await asyncio.sleep(HOUR)

        task = asyncio.create_task(request())
        await asyncio.sleep(7)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
