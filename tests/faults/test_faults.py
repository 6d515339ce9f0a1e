"""Whole deployments that are made to fail: what the run does, what the server says, and that the bits are right.

One SuperLink, one proxy and three sites are brought up once; every test does one thing wrong and leaves them as they
were. The result of every run is compared, bit for bit, with a federation in this process in which the answers that were
lost are missing.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Outcome
from deployed import SITES, SLACK, Deployed, Run, deployed, lost, until

from fedspan.config import Config

pytestmark = pytest.mark.faults

SEEDS = itertools.count(1)
WAIT, DEADLINE = 900, 120
"""Seconds; a worker that was killed is back within the deadline, on a busy machine too."""

PAUSE = 1800
"""Longest time that a site takes for an answer that a test lets it give."""


def settings(base: Path, texts: Path, method: str, **privacy: Any) -> Config:
    return tiny.config(
        base,
        texts,
        method,
        federation={"num_clients": len(SITES), "rounds": 3, "participation": 1.0},
        evaluation={"every": 99, "diagnostics": False, "per_rank": False, "base": False},
        engine={"name": "sequential"},
        deployment={"wait": WAIT, "deadline": DEADLINE, "patience": 3},
        privacy=privacy,
    )


@pytest.fixture(scope="module")
def there(bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """SuperLink and proxy; SCAFFOLD, so that every site has a state of its own that must come out right too."""
    folder = tmp_path_factory.mktemp("faults") / "federation"
    with deployed(folder, settings(bases["bert"], texts, "scaffold")) as made:
        yield made


@pytest.fixture
def up(there: Deployed) -> Deployed:
    """With whatever an earlier test left dead started again, and nothing of its run left."""
    for pid_words in (("flwr-serverapp",), ("flwr", "run", "app")):
        if there.pids(*pid_words):
            there.kill(*pid_words)
    for path in (*there.mishaps.glob("*.json"), there.mishaps / "go on"):
        path.unlink(missing_ok=True)
    for part in ("superlink", "proxy", *SITES):
        if part not in there._named or there.ended(part) is not None:
            there.start(part)
    there.configure()
    return there


def same_as_reference(up: Deployed, run: Run, folder: Path, **sections: Any) -> None:
    tiny.same(run.state(), up.reference(folder / "reference", lost(run), **sections))


def rejections(run: Run) -> str:
    """Return the rejected clients with round and reason."""
    rejected = [(r["round_num"], who, why) for r in run.records() for who, why in r["rejected"].items()]
    return "; ".join(f"round {number}: {who}: {why}" for number, who, why in rejected) or "nothing"


def counts(run: Run) -> list[int]:
    return [record["num_clients"] for record in run.records()]


def test_a_site_that_is_started_late(there: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    """The first test, for which the sites come up anyway: the last one once the run is waiting for it."""
    for site in SITES[:2]:
        there.start(site)
    run = there.begin("late")
    until(lambda: len(run.said("is here")) == 2, 120, "two sites")
    time.sleep(3)
    there.start(SITES[2])
    started = time.monotonic()
    until(lambda: len(run.said("is here")) == 3, 120, "the late site")
    taken = time.monotonic() - started
    there.end(run)
    assert counts(run) == [3, 3, 3]
    same_as_reference(there, run, tmp_path)
    outcomes(
        "a site is started after the run has begun to wait",
        f"waited, and took it in {taken:.0f} s after its start; 3 sites in every round",
        "; ".join(run.said("is here")[-1:]),
        time.monotonic() - run.began,
    )


ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "its client app raises an exception": ({"where": "client app", "do": "raise"}, "an error of its own (incident"),
    "its worker raises an exception": ({"do": "raise"}, "cannot be reached (incident"),
    "its worker exits in the middle of training": ({"do": "exit while training"}, "cannot be reached"),
    "it sends an update with NaN": ({"do": "NaN"}, "NaN or infinity"),
    "it sends an update with a wrong shape": ({"do": "shape"}, "has shape"),
    "it sends its answer of the round before again": ({"do": "replay", "of": "client-1"}, "answered for round"),
    "it sends another client's answer": ({"do": "replay", "of": "client-0"}, "answered as 'client-0'"),
}


def test_a_wrong_answer(up: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    """One a round, all of client-1, each in a round that is followed by one in which it is back."""
    up.configure(federation={"rounds": 2 * len(ANSWERS) + 1})
    for number, (order, _) in enumerate(ANSWERS.values()):
        round_num = 2 * number + 1
        # What another client answers in the same round, its own of the one before.
        source = round_num - (order.get("of") == "client-1")
        up.order("client-1", round=round_num, **order, **{"from": source})
    run = up.begin("answers")
    up.end(run, 300)
    records = run.records()
    assert run.finished(), run.said()
    assert counts(run) == [3, *(2, 3) * len(ANSWERS)]
    for number, (fault, (_, expected)) in enumerate(ANSWERS.items()):
        record = records[2 * number + 1]
        assert list(record["rejected"]) == ["client-1"]
        assert expected in record["rejected"]["client-1"]
        outcomes(
            f"a site: {fault}",
            "went on with the others; the site is in the next round",
            record["rejected"]["client-1"],
            record["waited_seconds"],
        )
    same_as_reference(up, run, tmp_path)


def test_another_base(up: Deployed, bases: dict[str, Path], tmp_path: Path, outcomes: Outcome) -> None:
    """A site's base folder holds other weights of the same shapes."""
    other = tmp_path / "other"
    tiny.save("bert", other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    first = sorted(weights)[0]
    weights[first] = weights[first] + 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    toml = up.folder / "sites" / "client-2" / "site.toml"
    before = toml.read_text()
    try:
        toml.write_text(f'{before}\n[model]\nname = "{other}"\n')
        up.kill("fedspan.site.worker", site="client-2")
        run = up.begin("base")
        up.end(run)
    finally:
        toml.write_text(before)
        up.kill("fedspan.site.worker", site="client-2")
    assert run.finished(), run.said()
    assert counts(run) == [2, 2, 2]
    (line,) = run.said("left out")
    assert "base weights differ from the server's" in line
    outcomes("a site has another base", "asked it nothing, went on with the others", line, time.monotonic() - run.began)


def test_a_worker_that_hangs(up: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    up.order("client-1", round=1, do="hang")
    before = up.pids("fedspan.site.worker", site="client-1")
    run = up.begin("hang")
    up.end(run)
    assert run.finished(), run.said()
    assert counts(run) == [3, 2, 3]
    record = run.records()[1]
    assert "did not answer within the time" in record["rejected"]["client-1"]
    assert not set(before) & set(up.pids("fedspan.site.worker", site="client-1"))
    same_as_reference(up, run, tmp_path)
    outcomes(
        f"a site's worker hangs (deadline {DEADLINE} s)",
        "the site's ClientApp process answered in its place, ended the worker and started another; went on with the "
        "others; the site is in the next round",
        record["rejected"]["client-1"],
        record["waited_seconds"],
    )


def in_round_2(up: Deployed, name: str) -> Run:
    """A run whose second round is under way: client-1 takes its time over it, until `go_on` where it is not killed."""
    before = up.happened()
    up.order("client-1", round=1, do="wait", seconds=PAUSE)
    run = up.begin(name)
    until(lambda: up.happened() > before, 120, "the second round")
    time.sleep(1)
    return run


def go_on(up: Deployed) -> None:
    """Let client-1 answer."""
    (up.mishaps / "go on").touch()


def start_again(up: Deployed, site: str, pause: float = 5) -> tuple[int, float]:
    """Start a site as a service manager does, until it stays; how often it was refused, and for how long."""
    refused, began = 0, time.monotonic()
    while True:
        name = up.start(site)
        until(
            lambda n=name: up.tree.ended(n) is not None or "is ready" in up.log(site), 120, f"{site} is ready or ends"
        )
        end = time.monotonic() + 4
        while up.tree.ended(name) is None and time.monotonic() < end:
            time.sleep(0.1)
        if up.tree.ended(name) is None:
            return refused, time.monotonic() - began
        refused += 1
        assert time.monotonic() - began < SLACK * 150, up.log(site)
        time.sleep(pause)


@pytest.mark.parametrize("what", ["SuperNode", "ClientApp process"])
def test_a_sites_process_is_killed(up: Deployed, tmp_path: Path, outcomes: Outcome, what: str) -> None:
    """The script that started both ends when either does; it is started again, as a service manager would."""
    up.configure(federation={"rounds": 4})
    run = in_round_2(up, f"killed-{what.split()[0].lower()}")
    worker = up.pids("fedspan.site.worker", site="client-1")
    up.kill(f"fedspan.flower.{'node' if what == 'SuperNode' else 'client_app_process'}", site="client-1")
    until(lambda: up.ended("client-1") is not None, 20, "start.sh ends")
    until(lambda: not set(worker) & set(up.pids("fedspan.site.worker", site="client-1")), 20, "the worker ends")
    refused, taken = start_again(up, "client-1")
    up.end(run, 400)
    assert run.finished(), run.said()
    assert lost(run).keys() <= {"client-1"}
    assert counts(run)[-1] == 3
    same_as_reference(up, run, tmp_path)
    waited = [round(record["waited_seconds"]) for record in run.records()]
    outcomes(
        f"a site's {what} is killed (kill -9) in round 2, the site started again",
        f"the SuperLink refused {refused} of its starts (Flower's exit 305); it ran {taken:.0f} s after the first; "
        f"{counts(run)} sites in the rounds, which waited {waited} s",
        rejections(run),
        time.monotonic() - run.began,
    )


def test_the_proxy_is_killed(up: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    run = in_round_2(up, "proxy")
    up.tree._processes[up._named["proxy"]].send_signal(signal.SIGKILL)
    until(lambda: up.ended("proxy") is not None, 10, "the proxy ends")
    go_on(up)
    time.sleep(10)
    up.start("proxy")
    up.end(run, 400)
    assert run.finished(), run.said()
    same_as_reference(up, run, tmp_path)
    waited = [round(record["waited_seconds"]) for record in run.records()]
    outcomes(
        "the proxy is killed in round 2 and started again after 10 s",
        f"{counts(run)} sites in the rounds, which waited {waited} s",
        rejections(run),
        time.monotonic() - run.began,
    )


def test_the_server_app_is_killed(up: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    run = in_round_2(up, "server-app")
    up.kill("flwr-serverapp")
    killed = time.monotonic()
    go_on(up)
    assert not run.finished()
    assert len(run.records()) == 1
    again = up.begin("server-app")  # at once; Flower gives the other one up after a minute
    up.end(again)
    assert again.finished(), again.said()
    assert counts(again) == [3, 3, 3]
    same_as_reference(up, again, tmp_path)
    seconds = time.monotonic() - killed
    until(lambda: up.tree.ended(run.process) is not None, 120, "the first `run.sh` ends")
    outcomes(
        "the ServerApp's process is killed (kill -9) in round 2, `run.sh` started again at once",
        "went on from round 1 to the bits of a run that was not disturbed; the first `run.sh` ended "
        f"{time.monotonic() - killed:.0f} s after the kill",
        rejections(again),
        seconds,
    )


def test_a_run_is_started_twice(up: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    up.configure(deployment={"deadline": 2 * PAUSE})
    run = in_round_2(up, "twice")
    second = up.begin("twice")
    until(lambda: up.tree.ended(second.process) is not None, 120, "the second one ends")
    go_on(up)
    taken = time.monotonic() - second.began
    assert "another process leads the run" in second.why()
    assert "Traceback" not in second.log.read_text(errors="replace")
    up.end(run)
    assert run.finished(), run.said()
    same_as_reference(up, run, tmp_path)
    outcomes("`run.sh` is started twice for one run", "the second one ended, the first went on", second.why(), taken)


def test_the_superlink_is_killed(up: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    run = in_round_2(up, "superlink")
    up.kill("fedspan.flower.superlink")
    killed = time.monotonic()
    until(lambda: up.ended("superlink") is not None, 20, "the SuperLink ends")
    go_on(up)
    time.sleep(3)
    up.start("superlink")
    up.tree._processes[run.process].poll()
    again = up.begin("superlink")
    up.end(again)
    assert again.finished(), again.said()
    assert counts(again) == [3, 3, 3]
    same_as_reference(up, again, tmp_path)
    outcomes(
        "the SuperLink is killed (kill -9) in round 2, started again, and `run.sh` too",
        "went on from round 1 to the bits of a run that was not disturbed",
        rejections(again),
        time.monotonic() - killed,
    )


@pytest.fixture
def secure(up: Deployed, bases: dict[str, Path], texts: Path) -> Deployed:
    """The same processes under secure sums, with masks that two of three sites can undo.

    Every test has a seed of its own: with that of an earlier one it would mask the same updates again, and a site that
    has unmasked their sum for two clients never unmasks it for three.
    """
    config = settings(bases["bert"], texts, "ffa_lora", secure_sums=True)
    up.settle(config.model_copy(update={"seed": next(SEEDS)}))
    return up


IN_THE_CLEAR = {"secure_sums": False, "fixed_point": True}


@pytest.mark.parametrize(
    ("at", "when", "stayed"),
    [("ask", "between its shares and its vector", 2), ("unmask", "between its vector and the unmasking", 3)],
)
def test_a_site_drops_out_of_a_secure_sum(
    secure: Deployed, tmp_path: Path, outcomes: Outcome, at: str, when: str, stayed: int
) -> None:
    secure.order("client-1", round=1, do="exit", at=at)
    run = secure.begin(f"drop-{at}")
    secure.end(run)
    assert run.finished(), run.said()
    assert counts(run) == [3, stayed, 3]
    same_as_reference(secure, run, tmp_path, privacy=IN_THE_CLEAR)
    said = run.said("unmask") or [rejections(run)]
    outcomes(
        f"secure sums: a site's worker dies {when}",
        f"the sum of {'the other two' if stayed == 2 else 'all three'} was recovered; the site is in the next round",
        said[0],
        run.records()[1]["waited_seconds"],
    )


def test_too_many_drop_out_of_a_secure_sum(secure: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    for site in ("client-1", "client-2"):
        secure.order(site, round=1, do="exit", at="unmask")
    run = secure.begin("too-many")
    secure.end(run)
    assert not run.finished()
    assert len(run.records()) == 1
    before = run.state()
    assert "Traceback" not in run.log.read_text(errors="replace")
    again = secure.begin("too-many")
    secure.end(again)
    assert again.finished(), again.said()
    assert counts(again) == [3, 3, 3]
    assert any(not torch.equal(x, before[name]) for name, x in again.state().items())
    same_as_reference(secure, again, tmp_path, privacy=IN_THE_CLEAR)
    outcomes(
        "secure sums: two of three sites die between their vectors and the unmasking",
        "ended with nothing unmasked; started again, it went on from round 1 to the bits of an undisturbed run",
        run.why(),
        time.monotonic() - run.began,
    )
