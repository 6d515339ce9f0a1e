"""A ServerApp that takes longer to start than Flower waits is not taken for dead."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from fedspan.flower import server_app_starter
from fedspan.flower.server_app_starter import Starter


@dataclass
class Clock:
    """The time of the SuperLink's state."""

    passed: float = 0.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.passed)


def claimed(state: LinkState) -> str:
    """The token of whoever has claimed a task that is to be started."""
    task = state.create_task("flwr-serverapp", 1)
    assert task is not None
    token = state.claim_task(task)
    assert token is not None
    return token


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_claim_of_a_slow_start_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """While its process lives and no longer; without a sign of life the claim is lost, and another is started."""
    clock, beats, closed = Clock(), [], []
    monkeypatch.setattr(in_memory_corestate, "now", clock.now)
    state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()).state()

    class Direct:
        """The call for a heartbeat, straight to the state."""

        def __init__(self, address: str, certificates: str) -> None:
            assert (address, certificates) == ("127.0.0.1:1", "none")

        def take_over(self, token: str) -> None:
            self.token = token

        def heartbeat(self) -> None:
            task = state.get_task_by_token(self.token)
            beats.append(task is not None and state.acknowledge_task_heartbeat(task.task_id))

        def close(self) -> None:
            closed.append(self.token)

    monkeypatch.setattr(server_app_starter, "Runtime", Direct)
    monkeypatch.setattr(server_app_starter, "HEARTBEAT", 0.02)
    lost, token = claimed(state), claimed(state)
    slow = [sys.executable, "-c", "input()", "--token", token, "--runtime-api-address", "127.0.0.1:1"]
    process = Starter().Popen([*slow, "--root-certificates", "none"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(4):
        count = len(beats)
        until(lambda count=count: len(beats) > count + 1)
        clock.passed += 25
        assert state.get_task_by_token(token) is not None
    assert state.get_task_by_token(lost) is None
    assert all(beats)
    assert process.stdin is not None
    process.stdin.close()
    until(lambda: closed == [token])
    clock.passed += 61
    assert state.get_task_by_token(token) is None
