"""A stream of updates, in passes, blocks and trees, gives what the server gives with all of them in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.federations import (
    FEDERATED,
    TOLERANCE,
    Case,
    Federation,
    assert_same,
    build,
    distance,
    encoded,
    federations,
    received,
    served,
)
from peaks import PEAK
from safetensors.torch import load_file

from fedspan.methods import METHODS, create
from fedspan.methods.base import ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Factors, Template, Update
from fedspan.methods.queries import Queries
from fedspan.streaming import (
    Progress,
    Source,
    Tree,
    aggregate_passes,
    aggregate_stream,
    merge,
    stream_checkpoint,
    sum_pass,
)
from fedspan.streaming.spool import Spool

SUMS = [case for case in FEDERATED if case.make().secure_sum or case.make().sums_products]


def talks(case: Case) -> bool:
    """Some options need all updates at once, and say so before the first pass."""
    method = case.make()
    try:
        by_queries, state = method.finish_by_queries, method.init(Template({"x": (2, 2)}, 1), {})
        return by_queries is not None and by_queries(state) is not None
    except ValueError:
        return False


TALKS = [case for case in FEDERATED if talks(case)]
STREAMS = SUMS + TALKS


def ids(case: Case) -> str:
    return case.id


def named(*names: str) -> list[Case]:
    return [case for case in STREAMS if case.id in names]


def streamed(fed: Federation, source: Source | None = None, **options: object) -> ServerState:
    state, _ = aggregate_stream(fed.method, fed.state, encoded(fed) if source is None else source, **options)
    return state


def streamed_round(fed: Federation, **options: object) -> ServerState:
    """What is left of the round, each of its exchanges a stream."""
    state = fed.state
    for number in range(fed.state.exchange, len(fed.method.exchanges)):
        if fed.method.exchanges[number].due(fed.state.round_num):
            state = streamed(replace(fed, state=replace(state, exchange=number)), **options)
    return state


def assert_close(fed: Federation, actual: ServerState, expected: ServerState, tolerance: float | None = None) -> None:
    """What a client receives, products not factors, and the heads; to what rounding leaves of the largest term."""
    tolerance = TOLERANCE[fed.dtype] if tolerance is None else tolerance
    terms = [fed.delta_of(update, name) for update in fed.updates for name in fed.template.modules]
    size = max(float(np.linalg.norm(term)) for term in terms)
    assert_same(received(fed, actual), received(fed, expected), tolerance, size)
    assert actual.dense.keys() == expected.dense.keys()
    for name, value in expected.dense.items():
        torch.testing.assert_close(actual.dense[name], value, rtol=tolerance, atol=tolerance)
    assert (actual.round_num, actual.exchange) == (expected.round_num, expected.exchange)


def lost_by_squaring(fed: Federation) -> float:
    """What a consensus of projectors may lose through sums, relative to the clients' updates.

    A direction u with Σ p_k ‖P_k u‖² below rounding, 4·l·eps for l asked columns, cannot be told from none; by
    Cauchy-Schwarz it holds at most the square root of that share of the updates. In memory the same threshold stands
    on √p_k ‖P_k u‖, so a client of one example among thousands is still heard.
    """
    widest = min(fed.template.rank + 16, max(size for shape in fed.template.modules.values() for size in shape))
    return float((4 * widest * torch.finfo(fed.dtype).eps) ** 0.5)


def same_bits(x: ServerState, y: ServerState) -> bool:
    pairs = [(x.dense, y.dense), *((x.modules[n], y.modules[n]) for n in x.modules)]
    return x.modules.keys() == y.modules.keys() and all(torch.equal(a[k], b[k]) for a, b in pairs for k in a)


def test_every_method_streams_or_says_that_it_cannot() -> None:
    each = {"raflora", "lora_fair", "lora_fair_ridge", "flora_na", "fedgalore"}
    each |= {"fedmomentum", "florist"}
    assert {case.info.name for case in STREAMS} == {c.info.name for c in FEDERATED} - each
    assert {"glora", "flexlora"} <= {case.info.name for case in TALKS}


@pytest.mark.parametrize("case", STREAMS, ids=ids)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_streaming_is_in_memory(case: Case, data: st.DataObject) -> None:
    """Any shapes, ranks, counts and blocks, where the server's rank holds all that the clients say."""
    fed = data.draw(federations(case, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))))
    expected, _ = served(fed)
    projectors = case.id.startswith("glora") and "energy" not in case.id
    tolerance = lost_by_squaring(fed) if projectors else TOLERANCE[fed.dtype]
    assert_close(fed, streamed_round(fed, block=data.draw(st.integers(1, 6))), expected, tolerance)


def split(data: st.DataObject, updates: Sequence[Update], depth: int = 0) -> Source:
    """A random tree over the updates; its leaves may be empty, its nodes may have one child."""
    if depth == 3 or data.draw(st.booleans()):
        return list(updates)
    owner = [data.draw(st.integers(0, 2)) for _ in updates]
    parts = [[u for u, o in zip(updates, owner, strict=True) if o == i] for i in range(3)]
    return Tree([split(data, part, depth + 1) for part in parts])


@pytest.mark.parametrize("case", named("glora", "glora-innovation", "flexlora", "hetlora"), ids=ids)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_tree_of_servers_is_one_server(case: Case, data: st.DataObject) -> None:
    fed = data.draw(federations(case, max_clients=8, dtype=torch.float64))
    tree = split(data, encoded(fed))
    flat = streamed(fed, encoded(fed))
    assert_close(fed, streamed(fed, tree, block=data.draw(st.integers(1, 4))), flat, lost_by_squaring(fed))


@pytest.mark.parametrize("case", named("glora", "flexlora", "fedit"), ids=ids)
def test_servers_elsewhere_send_sums_of_plain_tensors(case: Case) -> None:
    """Three sites answer the root's questions on their own clients; nothing else leaves them."""
    ranks = (2,) * 6
    fed = build(case, seed=3, ranks=ranks, counts=(3, 1, 4, 1, 5, 9), server_rank=None if case.info.hetero_rank else 2)
    updates = encoded(fed)
    asked: list[bool] = []

    def ask(queries: Queries | None, dense: bool) -> Partial:
        asked.append(dense)
        parts = [
            sum_pass(fed.method, fed.state, updates[i : i + 2], queries, dense=dense, block=1) for i in range(0, 6, 2)
        ]
        assert all(not part.collected for part in parts)
        return merge(merge(parts[0], parts[1]), parts[2])

    state, _ = aggregate_passes(fed.method, fed.state, ask)
    assert_close(fed, state, served(fed)[0])
    assert asked == [True] + [False] * (len(asked) - 1)


@pytest.mark.parametrize("case", named("glora", "flexlora"), ids=ids)
def test_a_server_rank_below_the_span_loses_what_it_must(case: Case) -> None:
    """On decaying spectra, within 1 % of the error that the rule has in memory, whose SVDs are exact."""
    rng = np.random.default_rng(0)
    method = case.make()
    state = method.init(Template({"layer": (60, 50)}, 4), {"head": torch.zeros(2)})
    columns, rows = rng.standard_normal((60, 12)), rng.standard_normal((12, 50))
    updates = []
    for k in range(10):
        # Direction j is weaker than the one before, and known to fewer clients.
        known = [j for j in range(12) if k < 10 * 0.8**j]
        b = torch.from_numpy(columns[:, known] * 0.5 ** np.array(known)).float()
        factors = Factors(b, torch.from_numpy(rows[known]).float(), state.template.scaling(len(known)))
        updates.append(Update(f"c{k}", k + 1.0, {"layer": factors}, {"head": torch.ones(2)}))
    fed = Federation(method, state.template, state, tuple(updates), torch.float32)
    target = fed.ideal
    exact, stream = received(fed, served(fed)[0], 4), received(fed, streamed(fed, block=3), 4)
    assert distance(stream, target) <= 1.01 * distance(exact, target)
    assert 0.001 < distance(exact, target) < 0.2  # something is lost, and not everything


@pytest.mark.parametrize("name", ["raflora", "florist"])
def test_methods_that_need_all_updates_are_refused(name: str) -> None:
    fed = build(Case(name, METHODS[name]), ranks=(2, 2))
    with pytest.raises(ValueError, match=rf"^{name} needs all updates at once; these stream: .*fedit.*flexlora.*glora"):
        streamed(fed)


def test_options_that_need_all_updates_are_refused_before_the_first_pass() -> None:
    fed = build(Case("glora-auto", lambda: METHODS["glora"](server_rank="auto")), ranks=(2, 2))
    source = Making(encoded(fed))
    with pytest.raises(ValueError, match="needs all updates at once"):
        streamed(fed, source)
    assert source.passes == 0


class Making:
    """Updates made anew at every pass, as a simulation makes them; counts how often."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self.updates = updates
        self.passes = 0

    def __iter__(self) -> Iterator[Update]:
        self.passes += 1
        return (replace(update) for update in self.updates)


def test_progress_counts_updates_and_passes() -> None:
    fed = build(Case("flexlora", METHODS["flexlora"]), ranks=(2,) * 5, counts=(1,) * 5)
    seen: list[Progress] = []
    source = Making(encoded(fed))
    streamed(fed, source, block=2, on_progress=seen.append)
    assert source.passes >= 2
    assert [p.num_clients for p in seen] == [2, 4, 5] * source.passes
    assert [p.pass_num for p in seen] == [i for i in range(source.passes) for _ in range(3)]
    assert [p.total for p in seen] == [None] * 3 + [5] * 3 * (source.passes - 1)


def test_dense_weights_are_read_in_the_first_pass_alone() -> None:
    fed = build(Case("flexlora", METHODS["flexlora"]), ranks=(2, 2))
    reads: list[str] = []

    class Heads(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().__getitem__(name)

        def keys(self) -> list[str]:
            return list(super().keys())

    streamed(fed, [replace(u, dense=Heads(u.dense)) for u in encoded(fed)], block=1)
    assert len(reads) <= 2


NANS = {"head": torch.full((3, 4), torch.nan)}
DEFECTS = {
    "two updates of client1: expected one each": lambda us: [us[0], us[1], us[1]],
    "the update of client0 comes after that of client1: expected sorted clients": lambda us: [us[1], us[0]],
    "two updates of client0: expected one each": lambda us: Tree([us, [us[0]]]),
    "client1 has 0 examples: expected more than 0": lambda us: [us[0], replace(us[1], num_examples=0)],
    "client1 has nan examples: expected more than 0": lambda us: [us[0], replace(us[1], num_examples=float("nan"))],
    "client1 has inf examples: expected more than 0": lambda us: [us[0], replace(us[1], num_examples=float("inf"))],
    "no update to aggregate: expected at least one client": lambda us: Tree([[], []]),
    "head of client1 holds NaN or infinity": lambda us: [us[0], replace(us[1], dense=NANS)],
}


@pytest.mark.parametrize("name", ["flexlora", "glora", "fedit"])
@pytest.mark.parametrize("why", DEFECTS)
def test_a_bad_update_is_named_in_one_line(name: str, why: str) -> None:
    fed = build(Case(name, METHODS[name]), ranks=(2, 2))
    with pytest.raises(ValueError, match=f"^{why}$"):
        streamed(fed, DEFECTS[why](encoded(fed)))


@pytest.mark.parametrize("name", ["flexlora", "glora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_no_number_is_named(name: str, value: float) -> None:
    fed = build(Case(name, METHODS[name]), ranks=(2, 2))
    fed.updates[1].factors("layer1").a[0, 0] = value
    with pytest.raises(ValueError, match=r"^a of layer1 of client1 holds NaN or infinity$"):
        streamed(fed)


def test_factors_of_another_shape_are_named() -> None:
    fed = build(Case("flexlora", METHODS["flexlora"]), ranks=(2, 2))
    first, second = encoded(fed)
    lacking = replace(second, modules={"layer0": second.modules["layer0"]})
    with pytest.raises(ValueError, match=r"^the update of client1 has no module layer1$"):
        streamed(fed, [first, lacking])
    swapped = replace(second, modules={**second.modules, "layer1": second.modules["layer0"]})
    with pytest.raises(ValueError, match=r"^client1 holds layer1 in shapes .*: expected a product of shape \(9, 5\)$"):
        streamed(fed, [first, swapped])


def test_a_source_that_changes_between_two_passes_is_refused() -> None:
    fed = build(Case("flexlora", METHODS["flexlora"]), ranks=(2, 2, 2), counts=(1, 2, 3))

    class Changing(Making):
        def __iter__(self) -> Iterator[Update]:
            return iter(list(super().__iter__())[: 4 - self.passes])

    with pytest.raises(ValueError, match="expected the same clients every time"):
        streamed(fed, Changing(encoded(fed)))


class Stop(Exception):
    """The process is gone."""


def interrupted(fed: Federation, source: Source, path: Path, blocks: int, **options: object) -> None:
    """A stream that stops after so many blocks, with a checkpoint after each."""
    left = [blocks]

    def count(_: Progress) -> None:
        if left[0] == 0:
            raise Stop
        left[0] -= 1

    with pytest.raises(Stop):
        streamed(fed, source, checkpoint=path, checkpoint_seconds=0, on_progress=count, **options)


def six(name: str, **options: object) -> Federation:
    method = METHODS[name](**options)
    return build(method, seed=1, ranks=(2,) * 6, counts=(3, 1, 4, 1, 5, 9), server_rank=4 if name != "fedit" else None)


@pytest.mark.parametrize("name", ["glora", "flexlora", "fedit"])
@pytest.mark.parametrize("shape", ["flat", "tree"])
def test_a_stream_stopped_anywhere_ends_with_the_same_bits(name: str, shape: str, tmp_path: Path) -> None:
    """After every single block of every pass; a killed process is tested below."""
    fed, path = six(name), tmp_path / "stream.safetensors"
    u = encoded(fed)
    source: Source = u if shape == "flat" else Tree([Tree([u[:1], u[1:3]]), [], Tree([Tree([u[3:5], u[5:]])])])
    blocks: list[Progress] = []
    whole = streamed(fed, source, block=2, on_progress=blocks.append)
    for stop in range(1, len(blocks)):
        interrupted(fed, source, path, stop, block=2)
        left: list[Progress] = []
        again = streamed(fed, source, block=2, checkpoint=path, on_progress=left.append)
        assert same_bits(again, whole)
        assert left == blocks[stop:]  # nothing is done twice
        assert not path.exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    fed, path = six("glora"), tmp_path / "stream.safetensors"
    updates = encoded(fed)
    interrupted(fed, updates, path, 2, block=2)

    def refused(why: str, other: Federation, source: Source = updates, block: int = 2) -> None:
        with pytest.raises(ValueError, match=why) as error:
            streamed(other, source, block=block, checkpoint=path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    refused("another method, state or round", replace(fed, method=METHODS["flexlora"]()))
    refused("another method, state or round", replace(fed, state=replace(fed.state, round_num=7)))
    refused("another method, state or round", replace(fed, state=replace(fed.state, dense={"head": torch.ones(3, 4)})))
    refused("other queries", replace(fed, method=METHODS["glora"](basis="energy")))
    refused("other updates", fed, [replace(u, num_examples=u.num_examples + 1) for u in updates])
    refused("other updates", fed, [replace(u, client_id="x" + u.client_id) for u in updates])
    refused("other updates", fed, updates[:2])
    refused("written with block = 2", fed, block=3)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:40], b"", b"{}" * 100):
        path.write_bytes(damaged)
        refused("damaged or no checkpoint of a stream", fed)
    path.write_bytes(content)
    assert same_bits(streamed(fed, updates, block=2, checkpoint=path), streamed(fed, updates, block=2))


def test_a_checkpoint_of_finished_passes_still_knows_its_source(tmp_path: Path) -> None:
    """Stopped after the last pass, before the result was returned."""
    fed, path = six("flexlora"), tmp_path / "stream.safetensors"
    updates = encoded(fed)
    kept: list[bytes] = []
    write = stream_checkpoint.write

    def spy(*args: object) -> None:
        write(*args)
        kept.append(path.read_bytes())

    stream_checkpoint.write = spy
    try:
        whole = streamed(fed, updates, checkpoint=path)
    finally:
        stream_checkpoint.write = write
    path.write_bytes(kept[-1])
    assert same_bits(streamed(fed, updates, checkpoint=path), whole)
    path.write_bytes(kept[-1])
    with pytest.raises(ValueError, match="other updates"):
        streamed(fed, updates[:-1], checkpoint=path)


KILLED_SHAPES = {"x": (30, 20), "y": (16, 16)}
KILLED = """
import sys, time
from pathlib import Path
import torch
from fedspan import streaming
from fedspan.methods import create
from fedspan.methods.messages import Template
from fedspan.streaming.spool import Spool
from safetensors.torch import save_file

torch.set_num_threads(1)
folder, slow = Path(sys.argv[1]), float(sys.argv[2])
method = create("glora")
state = method.init(Template({"x": (30, 20), "y": (16, 16)}, 3), {"head": torch.zeros(3)})

def report(progress):
    time.sleep(slow)
    if slow:
        print(progress.pass_num, progress.num_clients, flush=True)

state, _ = streaming.aggregate_stream(method, state, Spool(folder / "spool"), block=4,
    checkpoint=folder / "stream.safetensors", checkpoint_seconds=0, on_progress=report)
held = {f"{m}/{k}": v.contiguous() for m, t in state.modules.items() for k, v in t.items()}
save_file(held | dict(state.dense), sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_stream_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """kill -9 in the middle of the second pass, in a real process; then it is started again."""
    generator = torch.Generator().manual_seed(0)
    for k in range(20):
        modules = {
            n: Factors(torch.randn(m, 3, generator=generator), torch.randn(3, c, generator=generator), 2.0)
            for n, (m, c) in KILLED_SHAPES.items()
        }
        Spool(tmp_path / "spool").add(Update(f"c{k:02d}", k + 1.0, modules, {"head": torch.ones(3) * k}))

    def start(slow: float, result: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(slow), str(tmp_path / result)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    victim = start(0.02, "none")
    assert victim.stdout is not None
    for line in victim.stdout:
        if line.split() == ["1", "12"]:
            break
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert (tmp_path / "stream.safetensors").exists()
    again = start(0.001, "again")
    first = again.communicate()[0].splitlines()[0].split()
    assert again.returncode == 0
    assert first[0] == "1"
    assert int(first[1]) in (12, 16)  # it did not begin anew
    method = METHODS["glora"]()
    start_state = method.init(Template(KILLED_SHAPES, 3), {"head": torch.zeros(3)})
    whole, _ = aggregate_stream(method, start_state, Spool(tmp_path / "spool"), block=4)
    ended = load_file(tmp_path / "again")
    assert ended.keys() == {"head", "x/u", "x/c", "y/u", "y/c"}
    for module, held in whole.modules.items():
        assert all(torch.equal(ended[f"{module}/{name}"], value) for name, value in held.items())
    assert torch.equal(ended["head"], whole.dense["head"])


MEMORY = """
import torch
from fedspan.methods import create
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Factors, Template, Update
from fedspan.streaming import aggregate_stream

torch.set_num_threads(1)

class Made:
    def __init__(self, number):
        self.number = number
    def __iter__(self):
        for k in range(self.number):
            g = torch.Generator().manual_seed(k)
            factors = Factors(torch.randn(256, 4, generator=g), torch.randn(4, 256, generator=g), 2.0)
            yield Update(f"c{k:06d}", 1.0, {"x": factors}, {"head": torch.randn(64, generator=g)})

for case in sys.argv[1:]:
    name, how = case.split("/")
    method = create(name)
    state = method.init(Template({"x": (256, 256)}, 4), {"head": torch.zeros(64)})
    step = aggregate_stream if how == "stream" else lambda m, s, u: aggregate(m, s, list(u))
    step(method, state, Made(64))  # libraries take their workspaces at first use
    for number in (50, 1000):
        before = reset()
        step(method, state, Made(number))
        print(peak() - before)
"""
HELD = "flexlora/hold"
"""The same with all updates in memory. The last one, so that what the others left free could not hide them either."""
CASES = ("fedit/stream", "flexlora/stream", "glora/stream", HELD)


@pytest.fixture(scope="module")
def peaks() -> dict[str, tuple[int, int]]:
    """Bytes taken by a step over 50 clients, and over 1000, by method and way, all in one process."""
    command = [sys.executable, "-c", PEAK + MEMORY, *CASES]
    found = [int(x) for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]
    return {case: (found[2 * i], found[2 * i + 1]) for i, case in enumerate(CASES)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's peak memory anew")
@pytest.mark.parametrize("name", ["glora", "flexlora", "fedit"])
def test_memory_does_not_grow_with_the_clients(peaks: dict[str, tuple[int, int]], name: str) -> None:
    """1000 updates are 8 MiB; 50 or 1000 of them take the same, up to the allocator's pages."""
    few, many = peaks[f"{name}/stream"]
    assert many < few + 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's peak memory anew")
def test_the_measurement_sees_updates_that_are_held(peaks: dict[str, tuple[int, int]]) -> None:
    """The same process with all updates in memory: the bound above can fail."""
    few, many = peaks[HELD]
    assert many > few + 6 * 2**20


def test_the_time_between_checkpoints_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between blocks only when it is due; after every pass in any case."""
    fed, written = six("flexlora"), []
    write = stream_checkpoint.write
    monkeypatch.setattr(
        stream_checkpoint, "write", lambda path, state: (written.append(state.current), write(path, state))
    )
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(time, "monotonic", tick)
    source = Making(encoded(fed))
    streamed(fed, source, block=1, checkpoint=tmp_path / "s", checkpoint_seconds=1e9)
    assert written == [None] * source.passes
    written.clear()
    streamed(fed, Making(encoded(fed)), block=1, checkpoint=tmp_path / "s", checkpoint_seconds=0)
    assert sum(current is not None for current in written) == 6 * source.passes


def test_a_block_is_at_least_one_update() -> None:
    with pytest.raises(ValueError, match="block = 0"):
        streamed(six("fedit"), block=0)


def test_streaming_needs_no_method_by_name() -> None:
    """`create` makes what streams; options travel with the method."""
    method = create("glora", server_rank=3)
    state = method.init(Template({"x": (8, 8)}, 2), {})
    updates = [Update(f"c{k}", 1.0, {"x": Factors(torch.randn(8, 2), torch.randn(2, 8), 1.0)}, {}) for k in range(4)]
    after, report = aggregate_stream(method, state, updates)
    assert after.modules["x"]["u"].shape == (8, 3)
    assert report["server_rank"] == 3
