"""The bytes between a server and its sites: messages arrive as they were, and messages that lie are refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedspan.algebra.lowrank import LowRank
from fedspan.methods.patches import PatchLog
from fedspan.site.storage import SiteStorage
from fedspan.wire import protocol, schema
from fedspan.wire.protocol import Malformed


def test_messages_come_back_as_they_were() -> None:
    outgoing = protocol.MessageTensors()
    rng = torch.Generator().manual_seed(1)
    tensors = [torch.randn(5, 7, generator=rng), torch.randn(4, 6, generator=rng).T, torch.arange(3), torch.zeros(0, 3)]
    indices = [outgoing.put(t) for t in tensors]
    head, got = protocol.decode(protocol.encode({"kind": "x", "order": indices}, outgoing))
    for index, tensor in zip(head["order"], tensors, strict=True):
        assert got[index].stride() == tensor.stride() or not tensor.numel()
        assert torch.equal(got[index], tensor)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_rounded_tensors_err_by_half_a_step_at_most(kind: Any) -> None:
    outgoing = protocol.MessageTensors(kind=kind)
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 6, 20)[:, None]
    index = outgoing.put(x)
    _, got = protocol.decode(protocol.encode({}, outgoing))
    step = x.abs().amax(dim=1, keepdim=True) / 127 if kind == "int8" else x.abs() * 2.0**-7
    assert bool(((got[index] - x).abs() <= step / 2 * 1.001).all())


def test_every_damaged_byte_is_found_or_harmless() -> None:
    """A message with one byte changed or its end missing is refused, or decodes to tensors of the same shapes."""
    outgoing = protocol.MessageTensors()
    outgoing.put(torch.ones(3, 5))
    outgoing.put(torch.zeros(8, dtype=torch.int64))
    content = protocol.encode({"kind": "ask"}, outgoing)
    refused = 0
    for position in range(len(content)):
        for bad in (
            content[:position],
            content[:position] + bytes([content[position] ^ 0x11]) + content[position + 1 :],
        ):
            try:
                _, tensors = protocol.decode(bad)
            except Malformed:
                refused += 1
            else:
                assert sum(t.numel() * t.element_size() for t in tensors) <= len(content)
    assert refused >= len(content)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.update(size=10**6), "buffer"),
        (lambda t: t.update(size=64.0), "buffer"),
        (lambda t: t.update(extra=1), "not a message with its tensors"),
        (lambda t: t["tensors"][0].__setitem__(0, "os.system"), "type"),
        (lambda t: t["tensors"][0].__setitem__(0, "__dict__"), "type"),
        (lambda t: t["tensors"][0].__setitem__(0, "float64"), "type 'float64'"),
        (lambda t: t["tensors"][0].__setitem__(0, "bool"), "type 'bool'"),
        (lambda t: t["tensors"][0].__setitem__(0, []), "type"),
        (lambda t: t["tensors"][0].__setitem__(1, [10**9, 10**9]), "fit"),
        (lambda t: t["tensors"][0].__setitem__(1, [2**39, 2**39]), "more numbers than any memory"),
        (lambda t: t["tensors"][0].__setitem__(1, [0, 10**15]), "counts"),
        (lambda t: t["tensors"][0].__setitem__(1, [3, True]), "counts"),
        (lambda t: t["tensors"][0].__setitem__(1, [1] * 9), "counts"),
        (lambda t: t["tensors"][0].__setitem__(1, {"3": 5}), "counts"),
        (lambda t: t["tensors"][0].__setitem__(2, [0, 0]), "dense"),
        (lambda t: t["tensors"][0].__setitem__(2, [-1, 5]), "counts"),
        (lambda t: t["tensors"][0].__setitem__(2, [5]), "counts"),
        (lambda t: t["tensors"][0].__setitem__(3, -64), "fit"),
        (lambda t: t["tensors"][0].__setitem__(3, 64), "fit"),
        (lambda t: t["tensors"][0].__setitem__(3, 2**63), "fit"),
        (lambda t: t["tensors"].append(t["tensors"][0]), "fit"),
        (lambda t: t["tensors"].clear(), "bytes in a buffer"),
        (lambda t: t["tensors"].__setitem__(0, 7), "not described by"),
        (lambda t: t["message"].update(schema=99), "schema 99"),
        (lambda t: t["message"].update(schema=1), "schema 1: expected 4; both sides need the same version"),
        (lambda t: t["message"].update(schema=True), "schema True"),
        (lambda t: t["message"].pop("schema"), "schema None"),
        (lambda t: t["message"].update(parts=[2]), "parts of tensors"),
        (lambda t: t["message"].update(parts=[True]), "ones and twos"),
        (lambda t: t["message"].update(parts={"0": 1}), "ones and twos"),
        (lambda t: t.update(message=[]), "no object"),
        (lambda t: t.update(tensors=7), "no list"),
    ],
)
def test_a_head_that_lies_is_refused(change: Callable[[dict[str, Any]], None], expected: str) -> None:
    outgoing = protocol.MessageTensors()
    outgoing.put(torch.ones(3, 5))
    content = protocol.encode({"kind": "ask"}, outgoing)
    start = 8
    length = int.from_bytes(content[4:8], "big")
    described: dict[str, Any] = json.loads(content[start : start + length])
    change(described)
    head = json.dumps(described).encode()
    with pytest.raises(Malformed, match=expected):
        protocol.decode(content[:4] + len(head).to_bytes(4, "big") + head + content[start + length :])


def framed(head: bytes) -> bytes:
    return b"FSPN" + len(head).to_bytes(4, "big") + head


DEEP = b"[" * 10**5 + b"]" * 10**5


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b'{"message": {"x": NaN}}', "the number NaN"),
        (b'{"message": {"x": -Infinity}}', "the number -Infinity"),
        (b'{"message": {"x": 1e999}}', "the number 1e999"),
        (b'{"message": {"x": ' + b"9" * 400 + b"}}", "an integer of 400 digits"),
        (b'{"message": {"x": ' + b"9" * 5000 + b"}}", "an integer of 5000 digits"),
        (b'{"message": {"x": 0.' + b"1" * 5000 + b"}}", "a number of 5002 characters"),
        (b'{"message": {' + b'"":0,' * 600_000 + b"}}", "a head of 600001 entries"),
        (b'{"message": {"x": 1, "x": 2}}', "names a key twice"),
        (b'{"message": {"x": ' + DEEP + b"}}", "nested more than 32 deep"),
        # Brackets in a string must not hide others.
        (b'{"message": {"x": "' + b"]" * 10**5 + b'", "y": ' + DEEP + b"}}", "nested more than 32 deep"),
        (b'{"message": {"x": "\xff"}}', "no JSON"),
        (b"{", "no JSON"),
        (b"[1]", "not a message with its tensors"),
    ],
)
def test_json_that_only_a_careless_parser_takes_is_refused(head: bytes, expected: str) -> None:
    with pytest.raises(Malformed, match=expected) as caught:
        protocol.decode(framed(head))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("open_end", [b'\\"', b'"', b"\\", b"\\\n", b'"\\'], ids=repr)
def test_a_head_whose_strings_do_not_end_is_refused_at_once(open_end: bytes) -> None:
    """Once, a search for strings began again at every quotation mark: 16 kB took 6 s, and one MB would have taken
    hours. The limit is 1,000 times what it takes now."""
    head = b'{"a":"' + open_end * (2**20 // len(open_end))
    began = time.process_time()
    with pytest.raises(Malformed):
        protocol.decode(framed(head))
    assert time.process_time() - began < 20


def test_more_wrong_fields_than_anyone_reads_are_counted_and_not_described() -> None:
    """A description of each took 20 µs and 900 bytes: a message of 32 MB would have taken a minute and 2 GB."""
    update = {"modules": {}, "dense": dict.fromkeys(map(str, range(50_000)), "x"), "moments": {}, "num_examples": 1.0}
    with pytest.raises(Malformed, match=r"^a message with 50000 wrong fields$"):
        schema.answer({"client_id": "a", "run": "r", "round": 0, "number": 0, "update": update})


def test_a_matrix_travels_in_the_agreed_type_alone() -> None:
    """Otherwise a site could choose the precision, and so the size, of what it sends."""
    for kind in ("float32", "bfloat16", "int8"):
        outgoing = protocol.MessageTensors(kind=kind)
        outgoing.put(torch.ones(3, 5))
        content = protocol.encode({}, outgoing)
        protocol.decode(content, [kind])
        for other in {"float32", "bfloat16", "int8"} - {kind}:
            with pytest.raises(Malformed, match=f"a tensor in {kind}: expected {other}"):
                protocol.decode(content, [other])


def test_a_tensor_that_is_not_there_is_named() -> None:
    _, tensors = protocol.decode(protocol.encode({}, protocol.MessageTensors()))
    with pytest.raises(Malformed, match="a message of 0 tensors that names tensor 3"):
        tensors[3]


def test_a_patch_is_put_together_as_the_server_does(tmp_path: Path) -> None:
    """Increments, whole patches and dense ones, read from the disk of a restarted process too."""
    rng = torch.Generator().manual_seed(3)

    def increment() -> Mapping[str, LowRank]:
        return {"x": LowRank(torch.randn(12, 3, generator=rng), torch.randn(3, 9, generator=rng))}

    log = PatchLog({})
    seen = 0
    for version in range(1, 9):
        log = log.append(increment())
        if version in (3, 4):
            continue  # away
        news = log.since(seen)
        whole = len(news) == 1 and news[0] is log.total
        header = {"whole": whole, "seen": seen, "version": log.version}
        got = SiteStorage(tmp_path).patch("run", header, news)["x"]
        want = log.total["x"]
        pairs = zip((got.b, got.a), (want.b, want.a), strict=True) if isinstance(want, LowRank) else [(got, want)]
        assert all(torch.equal(x, y) for x, y in pairs)
        seen = log.version
