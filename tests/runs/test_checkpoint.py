"""A checkpoint comes back bit for bit, or the one before it is still there."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedspan.federation.rounds import RunState
from fedspan.methods import METHODS
from fedspan.methods.base import Method
from fedspan.methods.messages import Template
from fedspan.runs import checkpoint
from fedspan.runs.checkpoint import Checkpoint
from fedspan.support.errors import FedspanError
from fedspan.support.files import write_bytes
from fedspan.support.seeding import generator

SMALL = {"one": (6, 5), "two": (5, 5)}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("glora", {"start": "state"}),
    ("glora", {"sides": "both", "server_rank": "auto"}),
    ("local", {"trains": "all"}),
]


def stand(method: Method, rounds: int, ranks: tuple[int, ...], shapes: dict[str, tuple[int, int]]) -> RunState:
    run_state, people = tiny.run_state(method, max(ranks), shapes), tiny.clients(*ranks)
    for i in range(rounds):
        cohort = people if i % 2 == 0 else people[: i % len(people) + 1]
        run_state, _ = tiny.run_round(method, run_state, cohort, tiny.fake_work)
    return run_state


def kept(run_state: RunState, **extra: Any) -> Checkpoint:
    return Checkpoint(run_state.state, run_state.client_states, run_state.seen, **extra)


def same(x: Checkpoint, y: Checkpoint) -> None:
    pairs = [RunState(c.state, c.client_states, c.seen) for c in (x, y)]
    tiny.same_standing(*pairs)
    assert json.dumps([x.history, x.notes]) == json.dumps([y.history, y.notes])


def test_every_constant_of_a_run_comes_back(tmp_path: Path) -> None:
    """Such as the clients' optimizer, by which readouts are balanced: none of them may fall back to its default."""
    template = Template({"x": (6, 5)}, 3, 8.0, True, 7, 11, adaptive=False)
    given, plain = asdict(template), asdict(Template({}, 0))
    assert all(given[name] != plain[name] for name in plain)
    state = METHODS["glora"]().init(template, {})
    checkpoint.write(tmp_path / "c", Checkpoint(state))
    assert asdict(checkpoint.read(tmp_path / "c").state.template) == given


HISTORY = ({"round_num": 1, "eval": None, "loss": float("nan")}, {"round_num": 2, "rejected": {"client-1": "why – ü"}})


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("rounds", [0, 2, 5])
def test_every_method_comes_back_bit_for_bit(tmp_path: Path, name: str, options: dict[str, Any], rounds: int) -> None:
    """Low-rank and dense patches, client states and counters included, and written again from what was read."""
    ranks = (1, 2, 3) if METHODS[name]().info.hetero_rank else (2, 2, 2)
    for shapes in (tiny.SHAPES, SMALL):
        written = kept(
            stand(METHODS[name](**options), rounds, ranks, shapes), history=HISTORY, notes={"base": {"f": 0.1}}
        )
        path = tmp_path / f"{len(shapes['one'])}{shapes['one'][0]}.safetensors"
        checkpoint.write(path, written)
        first = checkpoint.read(path)
        same(first, written)
        checkpoint.write(path, first)  # over the file that its tensors were read from
        same(checkpoint.read(path), written)
        same(first, written)


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "hetlora", "local", "glora"])
def test_going_on_from_a_file_is_going_on(tmp_path: Path, name: str) -> None:
    method, people = METHODS[name](), tiny.clients(2, 2, 2)
    before = stand(method, 2, (2, 2, 2), SMALL)
    checkpoint.write(tmp_path / "c", kept(before))
    read = checkpoint.read(tmp_path / "c")
    from_file = RunState(read.state, read.client_states, read.seen)
    tiny.same_standing(*(tiny.run_round(method, s, people, tiny.fake_work)[0] for s in (before, from_file)))


@given(
    seed=st.integers(0, 2**32),
    rounds=st.integers(0, 7),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    notes=st.dictionaries(st.text(max_size=5), st.floats() | st.none() | st.text(max_size=5), max_size=3),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_patch_logs_of_any_length_and_shape_come_back(
    tmp_path: Path, seed: int, rounds: int, ranks: list[int], size: tuple[int, int], notes: dict[str, Any]
) -> None:
    run_state = stand(METHODS["flora"](), rounds, tuple(ranks), {"one": size, "two": size[::-1]})
    rng = generator(seed)
    extra = {
        f"client/{i}": {"a/b": torch.randn(i, 2, generator=rng), "half": torch.ones(i).bfloat16()} for i in range(3)
    }
    written = Checkpoint(run_state.state, extra, run_state.seen, (), notes)
    checkpoint.write(tmp_path / "c", written)
    same(checkpoint.read(tmp_path / "c"), written)


def two(tmp_path: Path) -> tuple[Path, Checkpoint, Checkpoint]:
    """A checkpoint on the disk, and a later one, some 80 kB each."""
    method = METHODS["fedavg"]()
    old, new = (kept(stand(method, rounds, (2, 2), {"one": (100, 100)})) for rounds in (1, 2))
    path = tmp_path / "checkpoint" / "federation.safetensors"
    checkpoint.write(path, old)
    return path, old, new


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel itself refuses to write more to any file: what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python leaves SIGXFSZ ignored
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 39_000])
def test_a_write_that_is_cut_short_leaves_the_file_before(tmp_path: Path, size: int) -> None:
    path, old, new = two(tmp_path)
    with files_no_larger_than(size), pytest.raises(OSError, match="large"):
        checkpoint.write(path, new)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    same(checkpoint.read(path), old)
    checkpoint.write(path, new)
    same(checkpoint.read(path), new)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_later_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path, old, new = two(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write(path, new)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    same(checkpoint.read(path), old)


def test_an_interrupt_while_writing_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old, new = two(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(path, new)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    same(checkpoint.read(path), old)


def test_what_a_killed_process_left_half_written_is_no_obstacle(tmp_path: Path) -> None:
    path, old, new = two(tmp_path)
    path.with_name(path.name + ".partial").write_bytes(b"half")
    same(checkpoint.read(path), old)
    checkpoint.write(path, new)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    same(checkpoint.read(path), new)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path, _, _ = two(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="expected a checkpoint") as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [0, 8, 20])
def test_a_file_with_a_damaged_header_is_refused(tmp_path: Path, start: int) -> None:
    path, _, _ = two(tmp_path)
    content = bytearray(path.read_bytes())
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="expected a checkpoint"):
        checkpoint.read(path)


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    """In the header's length, the header, a tensor: never another checkpoint, and never more than one line."""
    written = kept(stand(METHODS["glora"](), 1, (2, 2), {"one": (6, 5)}), history=HISTORY[1:])
    path = tmp_path / "c"
    checkpoint.write(path, written)
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), max(1, len(content) // 400)):
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << place % 8
        path.write_bytes(bytes(spoiled))
        try:
            found = checkpoint.read(path)
        except FedspanError as error:
            refused += str(error).count("\n") == 0
        else:
            same(found, written)
    assert refused > 300


def test_another_library_s_file_is_refused(tmp_path: Path) -> None:
    path, _, _ = two(tmp_path)
    tensors = load_file(path)
    metas = (
        None,
        {"format": "pt"},
        {"fedspan": "{"},
        {"fedspan": "[]"},
        {"fedspan": json.dumps({"format": 99, "checkpoint": {}})},
        {"fedspan": json.dumps({"format": 1, "checkpoint": {}})},
        {"fedspan": json.dumps({"format": 1})},
        {"fedspan": json.dumps({"format": 1, "checkpoint": []})},
    )
    for meta in metas:
        save_file(tensors, path, metadata=meta)
        with pytest.raises(ValueError, match="checkpoint") as caught:
            checkpoint.read(path)
        assert str(path) in str(caught.value)
    (tmp_path / "text").write_text("no tensors here, but long enough to have a header")
    with pytest.raises(ValueError, match="expected a checkpoint"):
        checkpoint.read(tmp_path / "text")


def test_a_checkpoint_without_a_tensor_that_it_names_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    path, _, _ = two(tmp_path)
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata()
    save_file({"other": torch.zeros(1)}, path, metadata=meta)
    with pytest.raises(ValueError, match="expected a checkpoint"):
        checkpoint.read(path)


def test_bytes_are_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"", b"three"):
        write_bytes(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]
