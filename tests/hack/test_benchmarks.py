"""The benchmarks count right: what they say of packets is exact, and what they say of goals follows from the numbers.

Nothing here is timed, and the runs are as small as they can be.
"""

import asyncio
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from agent.capturer.protocol import State
from api.capturenode import NodeCapture
from api.packetcapture import PacketCaptureStatus, Phase
from hack.benchmarks import api, capture, engines, process, scale, webhook
from hack.benchmarks.admission import PATH
from hack.benchmarks.caller import Calls, call
from hack.benchmarks.machine import Machine
from hack.benchmarks.outcome import Cell, Goal, Outcome, Spread, table
from hack.benchmarks.reviewer import Reviews, send
from hack.benchmarks.wire import Counted, Sent, count, wire
from hack.clusters.failure import Failure
from hack.clusters.pki import Authority
from kube.certificates import KeyPair, ServerTLS
from kube.client import CAPTUREPOLICIES
from kube.serve import health, listening
from tests.agent.world import Capturer
from tests.faults import scenario
from tests.faults.scenario import Round, Victim
from tests.webhook.standin import KubeApiserver
from webhook.admission import Admission
from webhook.server import application

PACKETS = 5_000
RUN = capture.Run(
    sent=100,
    refused=0,
    rate=1000.0,
    written=100,
    dropped=0,
    in_files=100,
    torn=0,
    twice=0,
    cpu=0.1,
    peak_rss=1 << 20,
    rotated=False,
)


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    engines.require()


@pytest.mark.parametrize("engine", list(capture.ENGINES))
def test_every_engine_is_accounted_for_to_the_packet(engine: str, tmp_path: Path) -> None:
    case = capture.Case(64, 20_000, "tmpfs")
    with wire() as line:
        run = capture.measure(line, case, engine, seconds=PACKETS / case.rate, directory=tmp_path)
    assert run.sent == PACKETS
    assert run.is_exact, run
    assert run.cpu > 0
    assert list(tmp_path.iterdir()) == []


def test_engines_take_turns_at_being_first() -> None:
    assert list(capture.turns("abc", repeats=4)) == list("abcbcacababc")


def test_the_cpu_time_of_a_process_is_of_its_whole_life() -> None:
    program = """
import sys, time
while time.process_time() < 0.2: pass
print(flush=True)
sys.stdin.read()
while time.process_time() < 0.4: pass
"""
    started = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with started:
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdout.readline()
        assert process.cpu_seconds(started.pid) >= 0.2
        started.stdin.close()
        assert process.ended(started, timeout=30) >= 0.4
    assert started.returncode == 0


def test_of_rotating_files_the_rest_is_counted(tmp_path: Path) -> None:
    case = capture.Case(1514, 20_000, "disk", ring_mib=16, rotating=True)
    with wire() as line:
        run = capture.measure(line, case, capture.OURS, seconds=2, directory=tmp_path)
    assert run.sent == run.written + run.dropped == 40_000
    assert run.is_exact, run
    assert 0 < run.in_files < run.written  # four files of 10 MB hold 26 thousand at most


def test_what_is_missing_from_files_is_named(tmp_path: Path, capturer: Capturer) -> None:
    with wire() as line:
        target = line.pod.target(snap_length=262144, max_file_bytes=1 << 40)
        assert capturer.start(target).state is State.CAPTURING
        for first, packets in ((10, 100), (200, 50), (240, 20)):
            with line.traffic(size=64, rate=50_000, packets=packets, first=first) as traffic:
                sent = traffic.wait()
            assert (sent.first, sent.sent) == (first, packets)
        capturer.stop(target)
        (file,) = capturer.files(target)
    whole = count([file])
    assert (whole.numbered, whole.lowest, whole.highest, whole.missing) == (170, 10, 259, [(110, 199)])
    assert (whole.twice, whole.torn, whole.headless) == (10, 0, 0)
    torn = tmp_path / "torn.pcap"
    torn.write_bytes(file.read_bytes()[:-1])
    assert (count([torn]).numbered, count([torn]).torn) == (169, 16 + 64 - 1)
    torn.write_bytes(b"\xd4\xc3")
    assert count([torn]).headless == 1
    torn.write_bytes(b"no pcap file".ljust(100))
    with pytest.raises(Failure, match="not a pcap file"):
        count([torn])


@pytest.fixture
def capturer(tmp_path: Path) -> object:
    place = tmp_path / "capturer"
    place.mkdir()
    made = Capturer(place)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        ({}, True),
        ({"written": 90, "in_files": 90, "dropped": 10}, True),
        ({"written": 90, "in_files": 90, "dropped": 9}, False),
        ({"in_files": 99}, False),
        ({"in_files": 99, "rotated": True}, True),
        ({"in_files": 0, "rotated": True}, False),
        ({"torn": 3}, False),
        ({"twice": 1}, False),
    ],
)
def test_a_run_is_exact_only_if_nothing_is_unaccounted_for(change: dict[str, int], exact: bool) -> None:
    assert replace(RUN, **change).is_exact is exact  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "engine", "cpu", "reached"),
    [
        (capture.Case(64, 400_000, "tmpfs"), capture.OURS, 0.1, [True, True, True]),
        (capture.Case(64, 400_000, "tmpfs"), capture.OURS, 0.11, [True, True, False]),
        (capture.Case(64, 100_000, "tmpfs"), capture.OURS, 0.5, [True, True]),
        (capture.Case(1514, 400_000, "disk"), capture.OURS, 0.06, [True, True, True]),
        (capture.Case(1514, 400_000, "disk"), capture.DIRECT, 0.06, [True, True, False]),
        (capture.Case(1514, 400_000, "tmpfs"), capture.OURS, 0.5, [True, True]),
        (capture.Case(64, 400_000, "tmpfs"), capture.DUMPCAP, 0.5, []),
    ],
)
def test_goals_follow_from_the_runs(case: capture.Case, engine: str, cpu: float, reached: list[bool]) -> None:
    goals = capture.goals(case, engine, [replace(RUN, cpu=cpu)], [RUN])
    assert [goal.reached for goal in goals] == reached


def test_what_tools_say_at_their_end_is_understood() -> None:
    said = "12 packets captured\n14 packets received by filter\n2 packets dropped by kernel\n"
    assert engines.totals(said, engines.TCPDUMP_TOTALS) == engines.Total(written=12, dropped=2)
    said = "Packets received/dropped on interface 'eth0': 31/4 (pcap:4/dumpcap:0/flushed:0/ps_ifdrop:0) (88.6%)"
    assert engines.totals(said, engines.DUMPCAP_TOTALS) == engines.Total(written=31, dropped=4)
    with pytest.raises(Failure, match="no totals"):
        engines.totals("tcpdump: eth0: no such device", engines.TCPDUMP_TOTALS)


def test_writes_are_those_of_kubepcap_whatever_came_of_them() -> None:
    def line(verb: str, resource: str, subresource: str, code: int, value: float) -> str:
        labels = f'code="{code}",resource="{resource}",subresource="{subresource}",verb="{verb}"'
        return f"apiserver_request_total{{{labels}}} {value}\n"

    metrics = (
        line("APPLY", "capturenodes", "", 200, 7)
        + line("APPLY", "capturenodes", "", 201, 1)
        + line("APPLY", "capturenodes", "", 504, 5)
        + line("PUT", "packetcaptures", "status", 200, 3)
        + line("POST", "packetcaptures", "", 201, 100)
        + line("PATCH", "pods", "status", 200, 9)
        + line("GET", "capturenodes", "", 200, 9)
    )
    assert scale.writes(metrics) == {
        ("capturenodes", "200"): 7,
        ("capturenodes", "201"): 1,
        ("capturenodes", "504"): 5,
        ("packetcaptures/status", "200"): 3,
    }


def test_refused_writes_are_writes_and_told_apart() -> None:
    before = {("capturenodes", "200"): 10, ("capturenodes", "429"): 1}
    after = {("capturenodes", "200"): 30, ("capturenodes", "429"): 1, ("packetcaptures/status", "504"): 7}
    written = scale.Written.of([(0.0, before), (1.0, after)])
    assert written.by_resource == {"capturenodes": 20, "packetcaptures/status": 7}
    assert written.refused == {"packetcaptures/status 504": 7}
    assert written.peak == scale.Peak(27, 27)


@pytest.mark.parametrize(
    ("samples", "at_least", "at_most"),
    [
        ([(0, 0)], 0, 0),
        ([(0, 0), (1, 50), (2, 250), (3, 260)], 200, 200),
        ([(0, 0), (1.25, 250)], 200, 200),
        ([(0, 0), (0.1, 90)], 90, 90),  # of the rest of that second nothing is known but what the next sample says
        ([(0, 0), (1, 150), (5, 550), (6, 600)], 150, 400),  # a hole: all 400 may have come in one second
        ([(0, 0), (1, 250), (5, 450)], 250, 250),
    ],
)
def test_a_second_without_a_sample_hides_no_peak(samples: list[tuple[float, int]], at_least: int, at_most: int) -> None:
    written = scale.Written.of([(at, {("capturenodes", "200"): number}) for at, number in samples])
    assert written.peak == scale.Peak(at_least, at_most)


@pytest.mark.parametrize(
    ("peaks", "reached"),
    [
        ([scale.Peak(100, 100), scale.Peak(199, 199)], True),
        ([scale.Peak(200, 200), scale.Peak(10, 10)], False),
        ([scale.Peak(100, 200), scale.Peak(10, 10)], None),
        ([scale.Peak(100, 300), scale.Peak(250, 250)], False),
    ],
)
def test_a_goal_is_unknown_where_kube_apiserver_was_silent_for_too_long(
    peaks: list[scale.Peak], reached: bool | None
) -> None:
    rows: list[dict[str, Cell]] = [{"phase": name, "seconds": 1.0} for name in ("create", "count", "change")]
    goal = next(goal for goal in scale.goals(rows, peaks, leader_memory=1) if "writes" in goal.text)
    assert goal.reached is reached
    assert str(goal).startswith({True: "reached", False: "MISSED", None: "UNKNOWN"}[reached])


def status(*, phase: Phase = "Capturing", pods: int = 1_000, **conditions: str) -> PacketCaptureStatus:
    matched = conditions.pop("matched", f"{pods:,} pods match on 500 nodes")
    said = {"Admitted": "True", "Capturing": "True", "PodsMatched": "True", "Degraded": "False"} | conditions
    return PacketCaptureStatus.model_validate(
        {
            "phase": phase,
            "pods": pods,
            "nodes": [{"node": "node-0000", "state": "Capturing"}],
            "moreNodes": 499,
            "conditions": [
                {
                    "type": kind,
                    "status": value,
                    "reason": "R",
                    "message": matched if kind == "PodsMatched" else "",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
                for kind, value in said.items()
            ],
        }
    )


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (status(), True),
        (status(pods=999), False),
        (status(phase="WaitingForTraffic"), False),
        (status(Degraded="True"), False),
        (status(PodsMatched="Unknown"), False),
        (status(matched="999 pods match on 500 nodes"), False),
        (PacketCaptureStatus(), False),
    ],
)
def test_a_status_is_right_when_its_conditions_are(said: PacketCaptureStatus, right: bool) -> None:
    assert scale.Right(pods=1_000, nodes=500).fits(said) is right


def test_rings_are_told_from_other_memory(tmp_path: Path) -> None:
    place = tmp_path / "capturer"
    place.mkdir()
    made = Capturer(place)
    try:
        with wire() as line:
            before = process.ring_rss(made.worker_pid())
            made.start(line.pod.target(ring_bytes=2 << 20))
            rings = process.ring_rss(made.worker_pid())
            assert before == 0
            assert 1 << 20 <= rings <= 2 << 20
            assert rings < process.rss(made.worker_pid()) <= process.peak_rss(made.worker_pid())
    finally:
        made.close()


def test_an_outcome_is_a_table_and_a_document() -> None:
    outcome = Outcome("hack/bench test", Machine.describe(), "how", goals=[Goal("be quick", "3 s", reached=False)])
    outcome.rows += [{"what": "a", "s": Spread.of([3, 1, 2]), "n": 1234}, {"what": "bb", "s": 0.12345, "n": None}]
    assert table(outcome.rows) == ["what        s      n", "a     2 (1–3)  1,234", "bb      0.123      –"]
    assert outcome.text().endswith("MISSED: be quick, measured 3 s")
    document = json.loads(outcome.json())
    assert document["rows"][0]["s"] == {"median": 2, "lowest": 1, "highest": 3, "p90": 3, "count": 3}


SENT = Sent(first=0, sent=600_000, refused=0, seconds=6.0)
NOTHING = Counted(0, 0, 0, 0, 0, 0, None, None, [])


def counted(*missing: tuple[int, int], lowest: int = 0, highest: int = 599_999) -> Counted:
    numbered = highest - lowest + 1 - sum(last - first + 1 for first, last in missing)
    return Counted(numbered, numbered, 0, 0, 0, 0, lowest, highest, list(missing))


@pytest.mark.parametrize(
    ("victim", "found", "dropped", "interruptions", "right"),
    [
        (Victim.AGENT, counted(), 0, 0, True),
        (Victim.AGENT, counted(), 0, 1, False),
        (Victim.AGENT, counted((5, 5)), 0, 0, False),
        (Victim.AGENT, counted((5, 5)), 1, 0, True),
        (Victim.AGENT, counted((1000, 590_000)), 589_001, 0, False),
        (Victim.AGENT, NOTHING, 600_000, 0, False),
        (Victim.WORKER, counted((110_000, 220_000)), 0, 1, True),
        (Victim.WORKER, counted((110_000, 220_000)), 0, 0, False),
        (Victim.WORKER, counted((110_000, 220_000)), 0, 2, False),
        (Victim.WORKER, counted((40_000, 220_000)), 0, 1, False),  # more than a flush before the kill
        (Victim.WORKER, counted((110_000, 590_000)), 0, 1, False),  # back too late
        (Victim.WORKER, counted((110_000, 220_000), (300_000, 300_009)), 10, 1, True),
        (
            Victim.WORKER,
            counted((110_000, 220_000), (300_000, 300_009)),
            9,
            1,
            True,
        ),
        (Victim.WORKER, counted((110_000, 220_000), (500_000, 500_009)), 10, 1, True),
        (Victim.WORKER, counted((110_000, 220_000), (500_000, 500_009)), 9, 1, False),
        (Victim.WORKER, counted(highest=190_000), 0, 1, False),  # it never captured again
        (Victim.WORKER, counted(highest=190_000), 600_000, 1, False),  # nor is that excused by what is called dropped
        (Victim.WORKER, counted(lowest=190_000), 600_000, 1, False),
        (Victim.WORKER, counted((1000, 590_000)), 600_000, 1, False),
        (Victim.WORKER, NOTHING, 0, 1, False),
        (Victim.CAPTURER, counted((110_000, 220_000)), 0, 1, True),
        (Victim.CAPTURER, counted((110_000, 220_000)), 0, 0, False),
        (Victim.CAPTURER, counted((110_000, 220_000)), 110_001, 0, False),  # an interruption is no drop
        (Victim.CAPTURER, NOTHING, 0, 1, False),
    ],
)
def test_a_round_is_right_when_only_what_the_kill_may_lose_is_lost(
    victim: Victim, found: Counted, dropped: int, interruptions: int, right: bool
) -> None:
    said = NodeCapture(
        namespace="n",
        name="c",
        uid="u",
        state="Scheduled",
        packets=found.packets,
        dropped=dropped,
        interruptions=interruptions,
        interrupted_at=datetime(2026, 1, 1, tzinfo=UTC) if interruptions else None,
    )
    outcome = Round(victim, killed_after=2.0, back_after=2.2, sent=SENT, counted=found, said=said, unreadable=())
    assert (outcome.complaints() == []) is right, outcome.complaints()


def test_traffic_goes_on_longer_than_any_kill_may_take_packets_away() -> None:
    assert scenario.BEFORE_SECONDS[0] > scenario.FLUSH_SECONDS + scenario.MARGIN_SECONDS
    assert scenario.AFTER_SECONDS > scenario.BACK_SECONDS + 2 * scenario.MARGIN_SECONDS


async def test_every_call_of_an_api_is_timed_and_its_answer_counted(tmp_path: Path) -> None:
    authority = Authority.create("bench")
    served = authority.issue("server", hosts=["api.test"])
    authority.issue("client").write(tmp_path, "client")
    tls = ServerTLS(client_certificates="required")
    tls.use(key_pair=KeyPair.of(certificate=served.certificate, key=served.key), client_ca=authority.certificate)
    async with listening(health({}), host="127.0.0.1", port=0, tls=tls) as port:
        calls = Calls(
            address="127.0.0.1",
            port=port,
            name="api.test",
            ca=authority.certificate.decode(),
            certificate=tmp_path / "client.crt",
            key=tmp_path / "client.key",
            path="/healthz",
            connections=2,
            count=10,
        )
        called = await asyncio.to_thread(call, Calls.parse(calls.to_json()))
        missed = await asyncio.to_thread(call, replace(calls, path="/none"))
    assert (len(called.times), called.codes) == (10, {"200": 10})
    assert missed.codes == {"404": 10}


async def test_every_review_is_timed_and_its_verdict_counted() -> None:
    authority = Authority.create("bench")
    pair = authority.issue("webhook", hosts=["127.0.0.1"])
    tls = ServerTLS(client_certificates="none")
    tls.use(key_pair=KeyPair.of(certificate=pair.certificate, key=pair.key))
    api = KubeApiserver()
    api.add(CAPTUREPOLICIES, "p4", spec={"filters": {"deniedPorts": [22]}})
    admission = Admission(api.client)
    following = asyncio.create_task(admission.policies.run(), name="policies")
    await admission.policies.synced()
    app = application(admission, paths=lambda: frozenset({PATH}))
    given = list(itertools.islice(webhook.bodies(), 4))
    async with listening(app, host="127.0.0.1", port=0, tls=tls, grace=0) as port:
        reviews = Reviews(
            url=f"https://127.0.0.1:{port}",
            ca=authority.certificate.decode(),
            rate=100,
            seconds=0.06,
            bodies=[*given, ("/judge/elsewhere", "{}"), (f"/judge/{PATH}", given[0][1])],
        )
        made = await send(Reviews.parse(reviews.to_json()))
    following.cancel()
    assert len(made.times) == 6
    # The last is judged without having been stamped.
    assert made.verdicts == {"allowed": 4, "refused with 404": 1, "refused with 500": 1}


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(200, 0, -1)]
    assert [api.percentile(values, percent) for percent in (50, 99, 100)] == [100, 198, 200]
    assert api.percentile([7.0], 99) == 7


@pytest.mark.parametrize(("median", "reached"), [(0.0009, True), (0.0011, False)])
def test_the_goal_for_authentication_and_authorization_is_of_the_median(median: float, reached: bool) -> None:
    goal = api.added([0.0001, median, 0.9])
    assert goal.reached is reached
    assert f"{1000 * median:.3f} ms" in goal.measured
