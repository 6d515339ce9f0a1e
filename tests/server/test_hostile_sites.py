"""Whatever a site sends is data: thousands of answers that lie, through the real coordinator and rounds.

The genuine answers are those of real sites, recorded once for each method; every mutation is played back by sites that
are members of the run. Nothing but refusals may come of it, and a round in which all of them are refused has the
result, to the bit, of one in which those sites did not answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_transport import MemoryTransport, make_sites, remote_config
from mutations import Parts, mutated

from fedspan.config import Config
from fedspan.federation import requirements
from fedspan.federation.clients import Client
from fedspan.federation.rounds import RunState, conduct
from fedspan.server.coordinator import Coordinator
from fedspan.server.registry import SiteRegistry
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement, protocol

GOOD, BAD = 2, 6
IDS = [f"client-{k}" for k in range(GOOD + BAD)]
NODES = [f"node-{k}" for k in range(GOOD + BAD)]
METHODS: dict[str, dict[str, Any]] = {
    "flexlora": {},
    "fedit": {"wire": {"up": "bfloat16", "down": "int8"}},
    "lora_fair": {},
    "fedgalore": {},
    "glora_sums": {},
    "scaffold": {},
    "ffa_lora": {"privacy": {"fixed_point": True}},
}
ROUNDS = [40, pytest.param(140, marks=pytest.mark.slow)]
"""Of each method, with `BAD` mutated answers each: 1,560 answers (slow: 5,160), beside 800 greetings."""
FEW = {"lora_fair": 20}
"""A method whose server step takes long."""
SETTINGS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def config_of(bases: dict[str, Path], texts: Path, name: str, **sections: Any) -> Config:
    options = {"galore_rank": 4} if name == "fedgalore" else {}
    return remote_config(
        bases["bert"],
        texts,
        name,
        adapter={"target_modules": ["query", "value"]},
        federation={"rounds": 1, "participation": 1.0, "num_clients": len(IDS)},
        method={"name": name, **options},
        **sections,
    )


class Playback:
    """A server's run whose sites answer from a recording, all but some of them with something wrong."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.sites = make_sites(config, IDS, folder / "sites")
        site = next(iter(self.sites.values()))
        self.method, model, initial = requirements.chosen(config), site.loaded.context.model, site.loaded.initial
        self.transport = MemoryTransport({n: s.answer for n, s in zip(NODES, self.sites.values(), strict=True)})
        self.coordinator = Coordinator(self.transport, config, self.method, folder, lambda line: None)
        clients = self.coordinator.gather()
        shapes = agreement.shapes(model.modules(), initial)
        self.clients: list[Client] = self.coordinator.agree(
            site.loaded.base, site.loaded.labels, shapes, initial, clients
        )
        self.coordinator.enrol()
        rank = max(client.rank for client in self.clients)
        template = model.template(rank, config.adapter.alpha, config.adapter.rslora, config.seed, len(clients))
        self.start = RunState(self.method.init(template, initial))
        self.sums = config.privacy.fixed_point
        self.recorded: dict[tuple[str, int], bytes] = {}
        for node, answer in list(self.transport.handlers.items()):
            self.transport.handlers[node] = self.recording(node, answer)
        assert self.round()[1]["rejected"] == {}
        self.transport.handlers = {node: self.playing(node) for node in NODES}
        self.transport.mishap = lambda node, head, content: "gone" if NODES.index(node) >= GOOD else None
        self.without, _ = self.round()
        self.transport.mishap = None

    def recording(self, node: str, answer: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def recorded(content: bytes) -> bytes:
            reply = answer(content)
            self.recorded[node, protocol.decode(content)[0]["number"]] = reply
            return reply

        return recorded

    def playing(self, node: str) -> Callable[[bytes], bytes]:
        return lambda content: self.recorded[node, protocol.decode(content)[0]["number"]]

    def round(self) -> tuple[RunState, dict[str, Any]]:
        self.transport._due.clear()
        return conduct(self.method, self.start, self.clients, self.coordinator, sums=self.sums)

    def against(self, change: Callable[[int, bytes], bytes | None]) -> dict[str, str]:
        """Play a round in which every bad site's answers are changed, judge its result, and return the refusals."""

        later = False  # a bad answer was taken, and its site asked again

        def mishap(node: str, head: dict[str, Any], content: bytes) -> bytes | None:
            nonlocal later
            place = NODES.index(node)
            later = later or (place >= GOOD and head["number"] > 0)
            return None if place < GOOD else change(place - GOOD, self.recorded[node, head["number"]])

        self.transport.mishap = mishap
        after, record = self.round()
        self.transport.mishap = None
        rejected = record["rejected"]
        assert not rejected.keys() & set(IDS[:GOOD])
        for reason in rejected.values():
            assert reason.isprintable()
            assert len(reason) <= 400
        if len(rejected) == BAD and not later:
            tiny.same_state(after.state, self.without.state)
        for name, value in tiny.state_tensors(after.state).items():
            assert bool(torch.isfinite(value).all()), name
        return rejected


@pytest.fixture(scope="module")
def played(bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Playback]:
    made: dict[str, Playback] = {}

    def play(name: str) -> Playback:
        if name not in made:
            config = config_of(bases, texts, name, **METHODS[name])
            made[name] = Playback(config, tmp_path_factory.mktemp(name))
        return made[name]

    return play


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_but_refusals_comes_of_answers_that_lie(
    played: Callable[[str], Playback], name: str, rounds: int
) -> None:
    playback, rounds = played(name), FEW.get(name, rounds)
    refused = 0

    @given(st.integers(0, 2**62))
    @settings(max_examples=rounds, **SETTINGS)
    def play(seed: int) -> None:
        nonlocal refused
        refused += len(playback.against(lambda place, answer: mutated(answer, BAD * seed + place)))

    play()
    assert refused > rounds * BAD / 2


Change = Callable[[dict[str, Any], bytearray], None]


def message(**fields: Any) -> Change:
    return lambda head, buffer: head["message"].update(fields)


def floats(value: float, only: slice = slice(None)) -> Change:
    """Numbers of the first tensor's place in the buffer."""

    def change(head: dict[str, Any], buffer: bytearray) -> None:
        (_, shape, _, start), *_ = head["tensors"]
        numbers = torch.frombuffer(buffer, dtype=torch.float32, count=shape[0] * shape[1], offset=start)
        numbers[only] = value

    return change


def entry(place: int, value: Any) -> Change:
    return lambda head, buffer: head["tensors"][0].__setitem__(place, value)


def first_pair(head: dict[str, Any]) -> Any:
    return next(iter(head["message"]["update"]["modules"].values()))


def as_vector(head: dict[str, Any], buffer: bytearray) -> None:
    """The parts of a pair under their own names, without a scaling: the same shapes."""
    modules = head["message"]["update"]["modules"]
    name = next(iter(modules))
    b, a, _ = modules[name][""]
    modules[name] = {"values": {"a": a, "b": b}}


LISTED: dict[str, tuple[Change, str]] = {
    "a list": (lambda head, buffer: head.update(message=[]), "no object"),
    "a word": (lambda head, buffer: head.update(message="update"), "no object"),
    "seconds of 400 digits": (message(seconds=10**400), "an integer of 401 digits"),
    "infinite seconds": (message(seconds=float("inf")), "Infinity"),
    "seconds below 0": (message(seconds=-1.0), "seconds = -1.0"),
    "seconds without a type": (message(seconds=None), "seconds = None"),
    "true seconds": (message(seconds=True), "seconds = True"),
    "bytes of 400 digits": (message(optimizer_bytes=10**400), "an integer of 401 digits"),
    "bytes in a float": (message(optimizer_bytes=3.5), "optimizer_bytes = 3.5"),
    "a loss that is infinite": (message(train_loss=float("-inf")), "Infinity"),
    "a loss beyond reason": (message(train_loss=1e300), "train_loss = 1e+300"),
    "a round beyond 64 bits": (message(round=10**30), "an integer of 31 digits"),
    "a round in a float": (message(round=0.0), "round = 0.0"),
    "another round": (message(round=7), "answered for round 8"),
    "a run of another script": (message(run="\u0440un"), "run = "),
    "ESC in its name": (message(client_id="\x1b]0;x\x07"), r"\x1b]0;x\x07"),
    "half a character": (message(client_id="\ud800"), r"\ud800"),
    "no update": (lambda head, buffer: head["message"].pop("update"), "KeyError: 'update'"),
    "null for an update": (message(update=None), "update = None"),
    "more than was asked for": (message(also=1), "also = 1"),
    "examples of 400 digits": (
        lambda head, buffer: head["message"]["update"].update(num_examples=10**400),
        "an integer of 401 digits",
    ),
    "true examples": (lambda head, buffer: head["message"]["update"].update(num_examples=True), "num_examples = True"),
    "many examples": (lambda head, buffer: head["message"]["update"].update(num_examples=1e9), "counts as 1e+09"),
    "a tensor before the first": (lambda head, buffer: first_pair(head)[""].__setitem__(0, -1), "= -1"),
    "a tensor that is not there": (lambda head, buffer: first_pair(head)[""].__setitem__(0, 999), "names tensor 999"),
    "an infinite scaling": (lambda head, buffer: first_pair(head)[""].__setitem__(2, 1e999), "Infinity"),
    "a pair as a vector": (as_vector, "as a vector: expected a pair of factors"),
    "a tensor in float64": (entry(0, "float64"), "type 'float64'"),
    "a type that torch has as an attribute": (entry(0, "__builtins__"), "type '__builtins__'"),
    "a tensor of whole numbers": (entry(0, "int64"), "does not fit"),
    "codes without scales": (
        lambda head, buffer: head["tensors"].__setitem__(0, ["int8", [4 * 32, 4], [4, 1], 0]),
        "has shape",
    ),
    "a huge tensor": (entry(1, [2**20, 2**30]), "does not fit"),
    "a place behind the end": (entry(3, 2**40), "does not fit"),
    "a place before the start": (entry(3, -64), "does not fit"),
    "strides of nothing": (entry(2, [0, 0]), "expected it to be dense"),
    "two tensors in one place": (lambda head, buffer: head["tensors"][1].__setitem__(3, 0), "does not fit"),
    "a huge announced size": (lambda head, buffer: head.update(size=2**62), "a buffer of"),
    "NaN": (floats(float("nan"), slice(1)), "NaN or infinity"),
    "infinity": (floats(float("inf"), slice(1)), "NaN or infinity"),
    "3e38 in a factor": (floats(3e38), "expected weights that training gives"),
    "one 3e38 in a factor": (floats(3e38, slice(1)), "expected weights that training gives"),
    "1e25 in a factor": (floats(1e25, slice(1)), "expected weights that training gives"),
}


@pytest.mark.parametrize("what", LISTED)
def test_a_listed_lie_is_refused_by_its_reason(played: Callable[[str], Playback], what: str) -> None:
    change, expected = LISTED[what]

    def changed(place: int, answer: bytes) -> bytes:
        parts = Parts.of(answer)
        change(parts.head, parts.buffer)
        return parts.put_together()

    rejected = played("flexlora").against(changed)
    assert rejected.keys() == set(IDS[GOOD:])
    for reason in rejected.values():
        assert expected in reason


DEEP = b"[" * 10**5 + b"]" * 10**5


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "0 bytes that are no fedspan message"),
        (b"FSPN", "no fedspan message"),
        (b"FSPN\xff\xff\xff\xff{}", "a head of 4294967295 bytes was announced"),
        (b"FSPN" + len(DEEP).to_bytes(4, "big") + DEEP, "nested more than"),
        (b'FSPN\x00\x00\x00\x0b{"x":1e999}', "the number 1e999"),
        (b"FSPN\x00\x00\x00\x04null", "not a message"),
    ],
)
def test_bytes_that_are_no_message_are_refused(
    played: Callable[[str], Playback], content: bytes, expected: str
) -> None:
    rejected = played("flexlora").against(lambda place, answer: content)
    assert all(expected in rejected[name] for name in IDS[GOOD:])


def test_a_refusal_is_a_code_and_other_words_are_none(played: Callable[[str], Playback]) -> None:
    heads: list[tuple[dict[str, Any], str]] = [
        ({"client_id": IDS[2], "code": "no-memory", "incident": "0a1b2c"}, "it has not enough memory (incident 0a1b2c"),
        ({"client_id": None, "code": "not-ready", "incident": "0a1b2c"}, "its settings, its base or its data"),
        ({"client_id": IDS[0], "code": "failed", "incident": "0a1b2c"}, "refused as 'client-0'"),
        ({"client_id": IDS[5], "code": "the label is 'carcinoma'", "incident": "0a1b2c"}, "a message with code = "),
        ({"client_id": IDS[6], "code": "failed", "incident": "carcinoma"}, "a message with incident = "),
        ({"client_id": IDS[7], "problem": "carcinoma"}, "a message that lacks run"),
    ]
    answers = [protocol.encode(head, protocol.MessageTensors()) for head, _ in heads]
    rejected = played("flexlora").against(lambda place, answer: answers[place])
    for (_, expected), name in zip(heads, IDS[GOOD:], strict=True):
        assert expected in rejected[name]


@pytest.mark.parametrize("size", [1e12, 1e19])
def test_a_gauge_of_a_sites_own_changes_nothing(played: Callable[[str], Playback], size: float) -> None:
    """B·c and A/c are the same update: FlexLoRA takes it, however large one factor is."""
    playback = played("flexlora")

    def gauged(place: int, answer: bytes) -> bytes | None:
        if place:
            return None
        head, tensors = protocol.decode(answer)
        for pair in head["update"]["modules"].values():
            b, a, _ = pair[""]
            tensors[b], tensors[a] = tensors[b] * size, tensors[a] / size
        outgoing = protocol.MessageTensors()
        for tensor in tensors:
            outgoing.put(tensor)
        return protocol.encode(head, outgoing)

    assert playback.against(gauged) == {}


def test_moments_that_no_optimizer_has_are_refused(played: Callable[[str], Playback]) -> None:
    """And a site that leaves out its own does not end the round."""

    def spoilt(place: int, answer: bytes) -> bytes:
        head, tensors = protocol.decode(answer)
        moments = head["update"]["moments"]
        index = next(iter(moments.values()))
        match place:
            case 0:
                moments.clear()
            case 1:
                tensors[index] = tensors[index][:1].clone()
            case 2:
                tensors[index] = -tensors[index] - 1
            case 3:
                tensors[index] = tensors[index][None]
            case 4:
                moments["classifier.weight"] = index
            case 5:
                tensors[index] = tensors[index].to(torch.int64)
        outgoing = protocol.MessageTensors()
        for tensor in tensors:
            outgoing.put(tensor)
        return protocol.encode(head, outgoing)

    rejected = played("fedgalore").against(spoilt)
    reasons = ["has shape (1, 32)", "below 0", "has shape (1, 4, 32)", "no second moments of it", "is of torch.int64"]
    assert rejected.keys() == set(IDS[3:])
    for name, reason in zip(IDS[3:], reasons, strict=True):
        assert reason in rejected[name]


def test_words_in_the_open_count_as_the_site_said(played: Callable[[str], Playback]) -> None:
    playback = played("ffa_lora")

    def spoilt(place: int, answer: bytes) -> bytes:
        head, tensors = protocol.decode(answer)
        words = tensors[head["words"]]
        match place:
            case 0:
                words[0] = 0
            case 1:
                words[0] *= -1
            case 2:
                words[1] += 1
            case 3:
                words[9] = 2**62
            case 4:
                tensors[head["words"]] = words[:-1].clone()
            case 5:
                tensors[head["words"]] = words.to(torch.float32)
        outgoing = protocol.MessageTensors()
        for tensor in tensors:
            outgoing.put(tensor)
        return protocol.encode(head, outgoing)

    rejected = playback.against(spoilt)
    expected = ["counts as 0", "counts as -", "counts as", "the sum could wrap", "in shape", "torch.float32"]
    assert all(words in rejected[name] for name, words in zip(IDS[GOOD:], expected, strict=True))


def test_no_greeting_ends_the_wait_for_the_others(played: Callable[[str], Playback], tmp_path: Path) -> None:
    playback = played("flexlora")
    hello = protocol.encode({"kind": "hello"}, protocol.MessageTensors())
    genuine = playback.sites[IDS[7]].answer(hello)
    before = playback.coordinator.registry

    @given(st.integers(0, 2**62))
    @settings(max_examples=100, **SETTINGS)
    def greet(seed: int) -> None:
        lines: list[str] = []
        answers = {f"bad-{i}": mutated(genuine, 8 * seed + i) for i in range(8)}
        answers["good"] = playback.sites[IDS[0]].answer(hello)
        transport = MemoryTransport({node: lambda content, node=node: answers[node] for node in answers})
        given = transport, before.federation, before.deployment, before.terms, before.method
        sites = SiteRegistry(*given, tmp_path / "none.json", lines.append)
        sites.greet()
        assert IDS[0] in sites.members
        assert all(line.isprintable() and len(line) <= 500 for line in lines)
        assert all(member.client.rank <= 4 for member in sites.members.values())

    greet()


@pytest.mark.parametrize("plays", [25, pytest.param(60, marks=pytest.mark.slow)])
def test_secure_sums_survive_whatever_one_site_sends(
    bases: dict[str, Path], texts: Path, tmp_path: Path, plays: int
) -> None:
    """Keys, shares, vectors and unmasking: the bad site is left out, or the sum is given up in one line."""
    federation = {"rounds": 1, "participation": 1.0, "num_clients": 4}
    config = config_of(bases, texts, "ffa_lora").model_copy()
    tree = config.model_dump() | {"federation": config.federation.model_dump() | federation}
    tree["privacy"]["secure_sums"] = True
    tree["evaluation"] = {}
    config = Config.model_validate(tree)
    sites = make_sites(config, IDS[:4], tmp_path / "sites")
    site = sites[IDS[0]]
    for each in sites.values():
        # Trained once: the work of a site is not what is tested here.
        work, answered = each.work, {}
        train = work._train
        work._train = lambda started, run, n, train=train, answered=answered: (
            answered[n] if n in answered else answered.setdefault(n, train(started, run, n))
        )
    transport = MemoryTransport({n: s.answer for n, s in zip(NODES, sites.values(), strict=False)})
    method, model, initial = requirements.chosen(config), site.loaded.context.model, site.loaded.initial
    coordinator = Coordinator(transport, config, method, tmp_path, lambda line: None)
    clients = coordinator.gather()
    clients = coordinator.agree(
        site.loaded.base, site.loaded.labels, agreement.shapes(model.modules(), initial), initial, clients
    )
    coordinator.enrol()
    template = model.template(4, config.adapter.alpha, config.adapter.rslora, config.seed, 4)
    kinds = ["advertise", "share", "receive", "ask", "unmask"]
    ended: list[str] = []

    @given(st.sampled_from(kinds), st.integers(0, 2**32 - 1), st.integers(0, 10**9))
    @settings(max_examples=plays, **SETTINGS)
    def play(kind: str, seed: int, round_num: int) -> None:
        def mishap(node: str, head: dict[str, Any], content: bytes) -> bytes | None:
            return (
                mutated(transport.handlers[node](content), seed) if (node, head["kind"]) == (NODES[3], kind) else None
            )

        transport.mishap = mishap
        transport._due.clear()
        coordinator._masked_sums._setup = None
        coordinator._masked_sums._excluded.clear()
        for each in sites.values():
            # Each play is a federation of its own. In one with the same updates and other sites they would refuse.
            (each.folder / "state" / ".vectors.json").unlink(missing_ok=True)
        coordinator.registry.run = f"run-{random.Random(seed).randrange(10**9)}-{round_num}"
        try:
            after, record = conduct(method, RunState(method.init(template, initial)), clients, coordinator, sums=True)
        except FedspanError as error:
            ended.append(str(error))
            return
        assert not record["rejected"].keys() & set(IDS[:3])
        for name, value in tiny.state_tensors(after.state).items():
            assert bool(torch.isfinite(value).all()), name

    play()
    # Under masks a vector of noise looks like any other, so that some end the sum.
    assert len(ended) < 30
    assert all("\n" not in line for line in ended)
