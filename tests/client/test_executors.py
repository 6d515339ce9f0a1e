"""Laws of the processes that share a run's work: how many there are changes no bit, and none outlives the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from interrupts import interruptible_children
from run_folders import outcome

from fedspan.algebra.lowrank import LowRank
from fedspan.client import cohort, shared_payloads
from fedspan.client.executors import ProcessExecutor, num_worker_processes
from fedspan.client.processes import Processes, ProcessLost, start_method
from fedspan.config import Config, EngineConfig
from fedspan.methods import create
from fedspan.methods.messages import Factors, GaloreOptions, Recipe
from fedspan.runs.context import RunContext
from fedspan.runs.execution import resume, run
from fedspan.runs.loop import MethodRun
from fedspan.support.errors import FedspanError
from fedspan.wire import packing


def gone(pids: list[int], within: float = 10.0) -> list[int]:
    """Return the processes that still run after that many seconds."""
    end = time.monotonic() + within
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def alive(pid: int) -> bool:
    """Return whether it runs: a process that nobody has waited for yet does not."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            return stat.read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def settings(base: Path, data: Path, method: str = "glora", /, workers: int = 2, **sections: Any) -> Config:
    """Dropout on, mixed ranks where the method takes them, everyone takes part."""
    federation = {"participation": 1.0, "ranks": [1, 8, 2, 4]} | sections.pop("federation", {})
    engine = {"workers": workers} | sections.pop("engine", {})
    sections = {"adapter": {"dropout": 0.2}, "evaluation": {"batch_size": 3}, **sections}
    return tiny.config(base, data, method, federation=federation, engine=engine, **sections)


def same_with(config: Callable[[int], Config], tmp_path: Path, *workers: int) -> None:
    runs = []
    for num in (1, *workers):
        run(config(num), tmp_path / f"with-{num}")
        runs.append(outcome(tmp_path / f"with-{num}"))
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        assert [name for name in other if other[name] != runs[0][name]] == []


@pytest.mark.parametrize("engine", ["auto", "sequential"])
def test_how_many_work_on_text_changes_no_bit(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, engine: str
) -> None:
    data = {"field_column": "task", "unseen_values": ["cross"], "client_holdout": 0.2}
    same_with(
        lambda num: settings(
            bases["llama"],
            instructions,
            workers=num,
            data=data,
            engine={"name": engine},
            evaluation={"batch_size": 3, "local": True},
        ),
        tmp_path,
        *((2, 3) if engine == "auto" else (2,)),
    )


def test_how_many_work_on_images_changes_no_bit(bases: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pictures, labels=np.arange(30) % 3)
    same_with(lambda num: settings(bases["vit"], tmp_path / "images.npz", workers=num), tmp_path, 2, 3)


@pytest.mark.parametrize("name", ["flora", "hetlora", "local", "fedavg", "fedftg"])
def test_patches_personal_states_penalties_and_whole_weights_travel_unchanged(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    same_with(lambda num: settings(bases["bert"], texts, name, workers=num), tmp_path, 2)


@pytest.mark.slow
def test_workers_that_share_nothing_but_tensors_work_alike(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New interpreters, as GPUs and other systems need them: the heads are trained in place, the base is shared."""
    federation = {"rounds": 1}
    run(settings(bases["bert"], texts, "flora", workers=1, federation=federation), tmp_path / "one")
    monkeypatch.setattr("fedspan.client.executors.start_method", lambda device, threads: "spawn")
    run(settings(bases["bert"], texts, "flora", workers=2, federation=federation), tmp_path / "two")
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert [name for name in two if two[name] != one[name]] == []


def test_a_run_goes_on_with_another_number_of_processes(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    run(settings(bases["bert"], texts, "hetlora", workers=1), tmp_path / "whole")

    def stop(event: Any) -> None:
        if event.kind == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings(bases["bert"], texts, "hetlora", workers=2), tmp_path / "stopped", stop)
    resume(tmp_path / "stopped", workers=1)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "stopped")


def started(context: RunContext) -> list[int]:
    assert isinstance(context.executor, ProcessExecutor)
    context.executor.processes.start()
    return context.executor.processes.pids()


@pytest.fixture
def context(bases: dict[str, Path], texts: Path, tmp_path: Path) -> Iterator[RunContext]:
    config = settings(bases["bert"], texts, "fedit", federation={"ranks": 4})
    prepared = RunContext.prepare(config, create(**config.method), tmp_path / "run", lambda event: None)
    yield prepared
    prepared.close()


def test_what_is_raised_in_a_process_is_raised_here(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no process is left."""
    raised: list[BaseException] = [
        ValueError("data.max_length = 3: expected more"),
        FedspanError("data.template = '{}': expected another"),
        MemoryError("no more"),
        OSError(28, "No space left on device", "/there"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ]
    for error in raised:

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(cohort, "work", fail)
        pids = started(context)
        main = MethodRun.open(context, "federation", context.method, context.clients)
        with pytest.raises(type(error)) as caught:
            main.advance(1)
        assert str(caught.value) == str(error)
        assert gone(pids) == []


def test_a_killed_process_ends_the_run_and_it_can_be_resumed(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts)
    run(config, tmp_path / "whole")
    for phase in ("client", "round"):
        out = tmp_path / f"killed-{phase}"
        before = set(children())
        killed: list[int] = []

        def kill(event: Any, phase: str = phase, before: set[int] = before, killed: list[int] = killed) -> None:
            if event.kind == phase and not killed:
                killed[:] = sorted(set(children()) - before)
                os.kill(killed[0], signal.SIGKILL)

        with pytest.raises(ProcessLost, match=r"worker process \d+ ended .*SIGKILL.*fewer engine.workers") as caught:
            run(config, out, kill)
        assert "\n" not in str(caught.value)
        assert len(killed) == 2
        assert gone(killed) == []
        resume(out)
        assert outcome(out) == outcome(tmp_path / "whole")
        assert set(children()) <= before


def children() -> list[int]:
    """The processes that this one started."""
    import multiprocessing

    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


COMMAND = [sys.executable, "-m", "fedspan", "run", "--workers", "2", "--set", "local.steps=400"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C reaches all of them, as in a terminal; a kill only the first, while the others are in long work."""
    with interruptible_children():
        process = subprocess.Popen(
            [*COMMAND, "--set", "evaluation.base=false", "--out", str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            text=True,
            start_new_session=True,
        )
    with process:
        try:
            pids = wait_for_workers(process.pid, 2)
            if how == signal.SIGINT:
                os.killpg(process.pid, how)
            else:
                process.send_signal(how)
            _, errors = process.communicate(timeout=60)
            assert gone(pids) == []
        finally:
            process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 130
        # On a busy machine lines on what it waited for come first.
        said = [line for line in errors.splitlines() if not line.endswith(" …")]
        assert said == [f"fedspan: interrupted; continue with: fedspan resume {tmp_path / 'run'}"]


def wait_for_workers(parent: int, num: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    if not Path("/proc/self/task").exists():
        pytest.skip("this system does not tell which processes a process started")
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = [int(pid) for pid in path.read_text().split()]
        if len(found) == num:
            time.sleep(0.5)
            return found
        time.sleep(0.05)
    raise AssertionError(f"{parent} started no {num} processes")


def test_results_of_a_round_given_up_are_not_those_of_the_next(context: RunContext) -> None:
    """Whoever stops taking results ends the processes; the next work starts new ones."""
    main = MethodRun.open(context, "federation", context.method, context.clients)
    context.on_event = stop_at_client
    with pytest.raises(StopEarly):
        main.advance(1)
    assert isinstance(context.executor, ProcessExecutor)
    pids = context.executor.processes.pids()
    context.on_event = lambda event: None
    figures = context.evaluate(
        [context.evaluation_task(main.initial()), context.evaluation_task(main.initial(), whole=False)]
    )
    assert figures[0] == figures[1]
    assert gone(pids) == []
    assert len(context.executor.processes.pids()) == 2


class StopEarly(Exception):
    """What ends a round from outside."""


def stop_at_client(event: Any) -> None:
    if event.kind == "client":
        raise StopEarly


def test_what_clients_share_is_sent_to_a_process_once(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    put = packing.put_factors

    def counted(packed: packing.TensorList, adapter: Mapping[str, Factors]) -> dict[str, Any]:
        sent.append(len(adapter))
        return put(packed, adapter)

    monkeypatch.setitem(shared_payloads._PARTS, "adapter", (counted, packing.get_factors))
    main = MethodRun.open(context, "federation", context.method, context.clients)
    main.advance(1)
    # Four clients of one rank and the evaluation after them, two processes: each is sent each adapter at most once.
    assert 2 <= len(sent) <= 4


def test_auto_is_a_process_a_core_and_no_more_than_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [num_worker_processes(EngineConfig(), 1, cpu, most) for most in (1, 5, 100)] == [1, 5, 8]
    assert num_worker_processes(EngineConfig(), 4, cpu, 100) == 2
    assert num_worker_processes(EngineConfig(), 16, cpu, 100) == 1
    assert num_worker_processes(EngineConfig(workers=3), 1, cpu, 1) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert num_worker_processes(EngineConfig(), 1, cuda, 100) == 4
    assert num_worker_processes(EngineConfig(), 1, torch.device("cuda:1"), 100) == 1
    monkeypatch.setattr("fedspan.client.executors.current_process", lambda: SimpleNamespace(daemon=True))
    assert num_worker_processes(EngineConfig(), 1, cpu, 100) == 1
    assert start_method(cuda, 1) == "spawn"
    assert start_method(cpu, 2) == "spawn"


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    seed=st.integers(0, 99),
    layout=st.sampled_from(["plain", "turned", "sliced", "expanded"]),
)
def test_tensors_arrive_with_their_bits_and_their_layout(
    shapes: list[list[int]], dtypes: list[torch.dtype], seed: int, layout: str
) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors = [(torch.randn(shape, generator=rng) * 100).to(t) for shape, t in zip(shapes, dtypes, strict=False)]
    if layout == "turned":
        tensors = [t.permute(tuple(reversed(range(t.ndim)))) for t in tensors]
    elif layout == "sliced":
        tensors = [t[..., ::2] if t.ndim else t for t in tensors]
    elif layout == "expanded":
        tensors = [t[None].expand(3, *t.shape) for t in tensors]
    head, buffer = packing.pack({"a": [1, None, "ü"]}, tensors)
    message, found = packing.unpack(json.loads(head), buffer)
    assert message == {"a": [1, None, "ü"]}
    assert len(found) == len(tensors)
    for x, y in zip(tensors, found, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if y.numel():
            tiny.same(*({"x": t.clone(memory_format=torch.contiguous_format)} for t in (x, y)))
            assert y.numel() == 1 or x.clone().stride() == y.stride()
            assert y.data_ptr() % 64 == 0
            assert y.untyped_storage().nbytes() == y.numel() * y.element_size()


def test_what_is_said_of_broadcasts_is_heard() -> None:
    rng = torch.Generator().manual_seed(0)
    b, a = torch.randn(6, 2, generator=rng), torch.randn(2, 5, generator=rng)
    adapter = {"one": Factors(b, a, 1 / 3), "two": Factors(b, a * 2, 8.0)}
    patch = {"one": LowRank(b, a), "two": b @ a}
    packed = packing.TensorList()
    headers = [
        packing.put_factors(packed, adapter),
        packing.put_patch(packed, patch),
        packing.put_dense(packed, {"head": b}),
    ]
    assert len(packed.tensors) == 4  # b and a travel once, however often they are named
    head, buffer = packing.pack(headers, packed.tensors)
    (x, y, z), tensors = packing.unpack(json.loads(head), buffer)
    tiny.same_adapter(packing.get_factors(x, tensors), adapter)
    low = packing.get_patch(y, tensors)
    assert isinstance(low["one"], LowRank)
    tiny.same({"b": low["one"].b, "a": low["one"].a, "w": low["two"]}, {"b": b, "a": a, "w": patch["two"]})
    tiny.same(packing.get_dense(z, tensors), {"head": b})
    for recipe in (Recipe(), Recipe(False, True, GaloreOptions(4, 7, 0.5, "exact", "reset"), (0.1, 3))):
        assert packing.get_recipe(json.loads(json.dumps(packing.put_recipe(recipe)))) == recipe


def test_a_channel_carries_messages_of_every_size() -> None:
    """Each process answers what it is asked, and tasks go to the processes that are free, in order."""
    echo = Processes(_echo, [(0,), (1,)], "fork" if sys.platform == "linux" else "spawn")
    sizes = [0, 1, 1_000_000, 3, 70_000]
    try:
        answers = {n: (m, t) for n, m, t in echo.run([_ask(size) for size in sizes])}
        assert [answers[n][0]["size"] for n in range(5)] == sizes
        assert [int(answers[n][1][0].sum()) for n in range(5)] == sizes
        assert {answers[n][0]["who"] for n in (0, 1)} == {0, 1}
        assert list(echo.run([])) == []
    finally:
        pids = echo.pids()
        echo.close()
    assert len(pids) == 2
    assert gone(pids) == []


def _echo(who: int) -> Callable[[Any, list[torch.Tensor]], Any]:
    return lambda message, tensors: ({"size": message, "who": who}, tensors)


def _ask(size: int) -> Callable[[set[int]], Any]:
    return lambda notes: (size, [torch.ones(size, dtype=torch.int64)])
