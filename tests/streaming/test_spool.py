"""A spool gives back what was put into it, a module at a time, and says which file is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import PEAK
from safetensors.torch import save_file

from fedspan.methods import create
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Factors, Template, Update, Vector
from fedspan.runs import checkpoint
from fedspan.streaming.spool import Spool, read_update, write_update

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def update_of(client: str = "c0", seed: int = 0, dtype: torch.dtype = torch.float32, rank: int = 2) -> Update:
    modules = {
        "model.layers.1/x": Factors(draw(seed, 5, rank, dtype=dtype), draw(seed + 1, rank, 7, dtype=dtype), 0.3),
        "model.layers.0": Vector({"a": draw(seed + 2, 3, 4, dtype=dtype), "size": torch.ones(1, 1)}),
    }
    return Update(client, 2.5 + seed, modules, {"head.bias": draw(seed + 3, 4), "norm": draw(seed + 4, 2, 2).T})


def assert_same(read: Update, written: Update) -> None:
    assert (read.client_id, read.num_examples) == (written.client_id, written.num_examples)
    assert list(read.modules) == list(written.modules)
    assert list(read.dense) == list(written.dense)
    for name, payload in written.modules.items():
        if isinstance(payload, Factors):
            got = read.factors(name)
            assert got.scaling == payload.scaling
            same({"b": got.b, "a": got.a}, {"b": payload.b, "a": payload.a})
        else:
            same(dict(read.modules[name].values), dict(payload.values))
    same(dict(read.dense), dict(written.dense))


def same(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> None:
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=0)  # and the same dtype


@settings(max_examples=40, deadline=None)
@given(
    client=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    dtype=st.sampled_from(DTYPES),
    rank=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_what_is_read_is_what_was_written(client: str, dtype: torch.dtype, rank: int, seed: int) -> None:
    """Any client id, any dtype, bit for bit; a file's name never leaves its folder."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder))
        written = update_of(client, seed, dtype, rank)
        assert spool.add(written).parent == Path(folder)
        (read,) = spool
        assert_same(read, written)


def test_clients_come_sorted_and_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    names = ["site/10", "b", "site/2", "a.safetensors", "..", "%2F"]
    for seed, name in enumerate(names):
        spool.add(update_of(name, seed))
    assert [u.client_id for u in spool] == sorted(names) == spool.clients()
    assert len(spool) == len(names)
    with pytest.raises(ValueError, match="already holds an update of b"):
        spool.add(update_of("b", 9))
    assert next(u for u in spool if u.client_id == "b").num_examples == 3.5


def test_a_read_tensor_belongs_to_the_reader(tmp_path: Path) -> None:
    Spool(tmp_path).add(update_of())
    (read,) = Spool(tmp_path)
    read.factors("model.layers.1/x").b.zero_()
    assert_same(read, update_of())


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        Spool(tmp_path).add(update_of())
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_update(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    path = spool.add(update_of())
    path.with_name("c1.safetensors.partial").write_bytes(b"half")
    assert spool.clients() == ["c0"]


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """A NaN in one module harms nobody who does not ask for it."""
    bad = update_of()
    factors = bad.factors("model.layers.1/x")
    factors.b[3, 1] = float("nan")
    path = Spool(tmp_path).add(bad)
    (read,) = Spool(tmp_path)
    assert "model.layers.1/x" in read.modules
    assert len(read.modules) == 2
    assert set(read.modules["model.layers.0"].values) == {"a", "size"}
    with pytest.raises(ValueError, match=rf"{path}: model.layers.1/x of c0 holds NaN or infinity"):
        read.factors("model.layers.1/x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_numbers_comes_out(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    update = update_of(dtype=dtype)
    update.factors("model.layers.1/x").a[0, 0] = value
    Spool(tmp_path).add(update)
    (read,) = Spool(tmp_path)
    with pytest.raises(ValueError, match="NaN or infinity"):
        read.factors("model.layers.1/x")


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named(cut: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Spool(Path(folder)).add(update_of())
        content = path.read_bytes()
        path.write_bytes(content[: int(cut * len(content))])
        with pytest.raises(ValueError, match=str(path)):
            read_update(path)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_header_is_named_or_harmless(place: int, byte: int) -> None:
    """Whatever stands in the header, nothing is read outside the file and nothing but a ValueError comes out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Spool(Path(folder)).add(update_of())
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        content[place % header] = byte
        path.write_bytes(content)
        said = str(path)
        try:
            read = read_update(path)
            [read.modules[name] for name in read.modules]
            dict(read.dense)
        except ValueError as error:
            said = str(error)
        assert str(path) in said


def rewritten(path: Path, change: dict[str, object]) -> None:
    """The file with a changed safetensors header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for key, entry in change.items():
        header[key] = {**header.get(key, {}), **entry}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def about(path: Path, **change: object) -> dict[str, object]:
    """The header's own description of the update, changed."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    description = json.loads(header["__metadata__"]["fedspan_update"])
    return {"__metadata__": {"fedspan_update": json.dumps({**description, **change})}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"000000": {"data_offsets": [0, 4]}}, "bytes"),
        ({"000000": {"data_offsets": [40, 80]}}, "starts at byte"),
        ({"000000": {"data_offsets": [-40, 0]}}, "counts"),
        ({"000000": {"data_offsets": [10**9, 10**9 + 40]}}, "starts at byte"),
        ({"000000": {"shape": [5, -2]}}, "counts"),
        ({"000000": {"shape": [2, 5]}}, r"expected \(m, r\) and \(r, n\)"),
        ({"000000": {"dtype": "I32"}}, "expected one of F64"),
        ({"000009": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "starts at byte"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(tmp_path: Path, change: dict[str, object], why: str) -> None:
    path = Spool(tmp_path).add(update_of())
    rewritten(path, change)
    with pytest.raises(ValueError, match=why) as error:
        list(Spool(tmp_path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 99}, "format 99"),
        ({"client_id": 7}, "client_id 7"),
        ({"num_examples": "many"}, "num_examples 'many'"),
        ({"modules": {"x": {"b": "000000"}}}, "'a'"),
        ({"modules": {"x": {"b": "000000", "a": "000001", "scaling": float("nan")}}}, "scaling nan"),
        ({"modules": {"x": {"values": {"a": "777777"}}}}, "777777"),
        ({"dense": {"x": "777777"}}, "777777"),
        ({"modules": 3}, "damaged"),
    ],
)
def test_a_description_that_cannot_be_true_is_refused(tmp_path: Path, change: dict[str, object], why: str) -> None:
    path = Spool(tmp_path).add(update_of())
    rewritten(path, about(path, **change))
    with pytest.raises(ValueError, match=why) as error:
        list(Spool(tmp_path))
    assert str(path) in str(error.value)


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    path = Spool(tmp_path).add(update_of())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=str(path)):
        read_update(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """A safetensors file of somebody else, a checkpoint, text, an empty file, another client's update."""
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    state = create("fedit").init(Template({"x": (2, 2)}, 1), {})
    checkpoint.write(tmp_path / "run.safetensors", checkpoint.Checkpoint(state))
    (tmp_path / "text.safetensors").write_text("{}" * 40)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("other", "run", "text", "empty"):
        with pytest.raises(ValueError, match=rf"{name}.safetensors is damaged or no update"):
            read_update(tmp_path / f"{name}.safetensors")
    folder = tmp_path / "spool"
    Spool(folder).add(update_of()).rename(folder / "c1.safetensors")
    with pytest.raises(ValueError, match="holds an update of c0: expected that of c1"):
        list(Spool(folder))
    with pytest.raises(ValueError, match="is no folder"):
        list(Spool(tmp_path / "nowhere"))


def test_a_file_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = Spool(tmp_path).add(update_of())
    (read,) = Spool(tmp_path)
    write_update(path, update_of(seed=5))
    with pytest.raises(ValueError, match="was changed while it was being read"):
        read.factors("model.layers.1/x")


def test_integers_are_no_update(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c0 holds a tensor of torch\.int64"):
        Spool(tmp_path).add(replace(update_of(), dense={"step": torch.tensor(3)}))


@pytest.mark.parametrize("name", ["glora", "flexlora", "flora", "fedex_lora", "fedit"])
def test_a_server_step_over_a_spool_is_that_over_memory(tmp_path: Path, name: str) -> None:
    """The same bits, since the same numbers are read."""
    method = create(name)
    state = method.init(Template({"x": (9, 7), "y": (6, 6)}, 2), {"head": torch.zeros(3)})
    updates = []
    for k in range(4):
        modules = {n: Factors(draw(k, m, 2), draw(k + 9, 2, c), 8.0) for n, (m, c) in state.template.modules.items()}
        updates.append(Update(f"c{k}", k + 1.0, modules, {"head": draw(k, 3)}))
        Spool(tmp_path).add(updates[-1])
    expected, expected_report = aggregate(method, state, updates)
    actual, report = aggregate(method, state, list(Spool(tmp_path)))
    assert report == expected_report
    for module, held in expected.modules.items():
        same(dict(actual.modules[module]), dict(held))
    same(dict(actual.dense), dict(expected.dense))


SCRIPT = """
import torch
from fedspan.methods import create
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Factors, Template, Update
from fedspan.streaming.spool import Spool

torch.set_num_threads(1)

modules = {f"layer{i}": (512, 512) for i in range(40)}
template = Template(modules, 8)
spool = Spool(Path(sys.argv[1]))
for k in range(25):
    factors = {n: Factors(torch.randn(m, 8), torch.randn(8, c), 2.0) for n, (m, c) in modules.items()}
    spool.add(Update(f"c{k:03d}", 1.0, factors, {}))
for name in sys.argv[2:]:
    method = create(name)
    state = method.init(template, {})
    updates = list(spool)
    warm = Template({"layer0": (512, 512)}, 8)
    aggregate(method, method.init(warm, {}), updates)  # libraries take their workspaces at first use
    for hold in (False, True):
        before = reset()
        if hold:
            updates = [Update(u.client_id, u.num_examples, dict(u.modules), {}) for u in updates]
        state_after = aggregate(method, state, updates)
        print(peak() - before)
    del updates, state_after
"""
STEPS = ("glora", "flexlora")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Bytes that a step takes over a spool, and over the same updates in memory, by method, all in one process."""
    command = [sys.executable, "-c", PEAK + SCRIPT, str(tmp_path_factory.mktemp("spool")), *STEPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [int(x) for x in done.stdout.split()]
    return {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(STEPS)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's peak memory anew")
@pytest.mark.parametrize("name", STEPS)
def test_a_server_step_over_a_spool_holds_one_module(held: dict[str, tuple[int, int]], name: str) -> None:
    """25 clients, 40 layers: the factors take 31 MiB in all, those of a layer 0.8 MiB, the result 1.25 MiB."""
    lazy, in_memory = held[name]
    assert lazy < 12 * 2**20
    assert in_memory > 25 * 2**20  # the bound can fail
