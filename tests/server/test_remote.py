"""A server and its sites in memory: the same bits as in one process, and what becomes of sites that misbehave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites
from remote import IDS, REMOTE, Federation, settings, spoiled, stop_in_round_2
from run_folders import Stop, of_each_kind, state_of

from fedspan.client import length_parts
from fedspan.federation.rounds import RoundFailed
from fedspan.federation.sampling import create_sampler
from fedspan.models import packed_rows
from fedspan.runs.application import evaluate
from fedspan.runs.events import Event
from fedspan.runs.execution import run, serve
from fedspan.site.settings import SiteSettings
from fedspan.site.site import Site
from fedspan.support.errors import FedspanError
from fedspan.wire import protocol

# The same bits


@pytest.mark.parametrize("name", of_each_kind(REMOTE))
def test_sites_come_to_the_bits_of_one_process(bases: dict[str, Path], texts: Path, tmp_path: Path, name: str) -> None:
    """Partial participation, so that clients come back to states and patches that they left rounds ago."""
    config = settings(bases["bert"], texts, name)
    run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)
    history = fed.serve()
    tiny.same(fed.state(), state_of(tmp_path / "here"))
    assert all(not record["rejected"] for record in history)
    assert all(record["wire_up"] > record["bytes_up"] > 0 for record in history)


def test_only_a_base_that_is_trained_in_is_tried_for_faster_ways_to_train(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sites' is; that of the server and that of a later evaluation hold no client's batch."""
    monkeypatch.setattr(length_parts, "WIDEST", 0)
    tried = []
    find = packed_rows.find
    monkeypatch.setattr(packed_rows, "find", lambda *args: tried.append(1) or find(*args))
    config = settings(bases["llama"], instructions, federation={"rounds": 1}, adapter={"layers": [1]})
    fed = Federation(config, tmp_path)
    assert len(tried) == 1  # the sites share theirs
    assert "the lowest layer is computed once for each example" in fed.sites[IDS[0]].loaded.notes
    fed.serve()
    found = evaluate(tmp_path / "run", [instructions])
    assert len(tried) == 1
    assert not any("the lowest layer" in note for note in found.notes)


@pytest.mark.parametrize("name", ["hetlora", "glora", "flora", "ffa_lora"])
def test_mixed_ranks(bases: dict[str, Path], texts: Path, tmp_path: Path, name: str) -> None:
    config = settings(bases["bert"], texts, name, federation={"ranks": (2, 8, 4, 3), "rounds": 2})
    run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)
    fed.serve()
    tiny.same(fed.state(), state_of(tmp_path / "here"))


@pytest.mark.parametrize("up", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["flexlora", "ffa_lora"])
def test_small_types_are_rounded_alike_and_are_smaller(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str, up: str
) -> None:
    config = settings(bases["bert"], texts, name, wire={"up": up, "down": up}, federation={"rounds": 2})
    here = run(config, tmp_path / "here").history
    fed = Federation(config, tmp_path)
    there = fed.serve()
    tiny.same(fed.state(), state_of(tmp_path / "here"))
    wide = run(settings(bases["bert"], texts, name, federation={"rounds": 2}), tmp_path / "wide").history
    assert here[1]["bytes_up"] == there[1]["bytes_up"] < wide[1]["bytes_up"] * (0.75 if up == "bfloat16" else 0.6)


# Going on


@pytest.mark.parametrize("name", ["scaffold", "flora", "fed_sb", "fedsa_lora"])
def test_a_server_that_was_cut_off_goes_on_to_the_same_bits(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    """In the middle of round 2, after its clients have answered: the states that they kept then are not used again."""
    config = settings(bases["bert"], texts, name)
    run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)
    with pytest.raises(Stop):
        fed.serve(stop_in_round_2)
    fed.restart("client-1")
    fed.serve()
    tiny.same(fed.state(), state_of(tmp_path / "here"))


@pytest.mark.parametrize("name", ["scaffold", "flora"])
def test_a_site_whose_process_was_restarted_has_its_state(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    config = settings(bases["bert"], texts, name)
    run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)

    def between(event: Event) -> None:
        if event.kind == "round":
            for client_id in IDS:
                fed.restart(client_id)

    fed.serve(between)
    tiny.same(fed.state(), state_of(tmp_path / "here"))


def test_a_lost_answer_leaves_no_trace_in_the_sites_state(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """client-1 works in round 1 and its answer is lost: in round 2 it starts from its state before round 1."""
    config = settings(bases["bert"], texts, "scaffold", federation={"participation": 1.0})
    fed, twin = Federation(config, tmp_path / "a"), Federation(config, tmp_path / "b")
    for lost, which in ((True, fed), (False, twin)):

        def mishap(node: str, head: dict[str, Any], content: bytes, lost: bool = lost, which: Any = which) -> Any:
            if node == "node-1" and head["kind"] == "ask" and head["round"] == 1:
                if lost:
                    which.transport.handlers[node](content)  # it does its work for nothing
                return "the line was cut"
            return None

        which.transport.mishap = mishap
        history = which.serve()
        assert history[1]["rejected"] == {"client-1": "the line was cut"}
    tiny.same(fed.state(), twin.state())


def test_a_site_that_lost_its_disk_says_so(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = settings(bases["bert"], texts, "scaffold", federation={"participation": 1.0})
    fed = Federation(config, tmp_path)

    def between(event: Event) -> None:
        if event.kind == "round" and event.data["record"]["round_num"] == 1:
            for path in (fed.folder / "sites" / "client-2").rglob("client-*.safetensors"):
                path.unlink()
            fed.restart("client-2")

    history = fed.serve(between)
    assert "which it does not hold" in history[1]["rejected"]["client-2"]


# Bad answers


def rescale(modules: dict[str, Any]) -> None:
    """Double the first module's scaling."""
    next(iter(modules.values()))[""][2] *= 2


BAD: dict[str, tuple[Callable[[dict[str, Any], list[torch.Tensor]], None], str]] = {
    "NaN": (lambda head, tensors: tensors[0].fill_(float("nan")), "NaN or infinity"),
    "infinity": (lambda head, tensors: tensors[-1].view(-1)[:1].fill_(float("inf")), "NaN or infinity"),
    "a shape": (lambda head, tensors: tensors.__setitem__(0, tensors[0][:1].clone()), "has shape"),
    "a missing name": (lambda head, tensors: head["update"]["dense"].popitem(), "not asked for or is missing"),
    "another round": (lambda head, tensors: head.update(round=7), "answered for round 8"),
    "another run": (lambda head, tensors: head.update(run="x"), "answered for run 'x'"),
    "another exchange": (lambda head, tensors: head.update(number=1), "answered for number 1"),
    "another client": (lambda head, tensors: head.update(client_id="client-0"), "answered as 'client-0'"),
    "a scaling": (lambda head, tensors: rescale(head["update"]["modules"]), "scales its factors of"),
    "many examples": (lambda head, tensors: head["update"].update(num_examples=1e9), "examples: it said"),
    "a place outside": (lambda head, tensors: head["update"]["dense"].update({"x": 10**6}), "names tensor 1000000"),
    "no update": (lambda head, tensors: head.pop("update"), "damaged update"),
    "modules in a list": (lambda head, tensors: head["update"].update(modules=[]), "update.modules = a list of 0"),
    "a scaling that is no number": (
        lambda head, tensors: next(iter(head["update"]["modules"].values()))[""].__setitem__(2, "high"),
        "= 'high'",
    ),
    "a count without end": (lambda head, tensors: head.update(optimizer_bytes=float("inf")), "the number Infinity"),
    "a time that no float holds": (lambda head, tensors: head.update(seconds=10**400), "an integer of 401 digits"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_left_out_and_named(bases: dict[str, Path], texts: Path, tmp_path: Path, kind: str) -> None:
    """The others' round is what it would have been without that client."""
    config = settings(bases["bert"], texts, federation={"participation": 1.0, "rounds": 1})
    change, expected = BAD[kind]
    fed, without = Federation(config, tmp_path / "a"), Federation(config, tmp_path / "b")

    def mishap(node: str, head: dict[str, Any], content: bytes) -> bytes | None:
        if node != "node-2" or head["kind"] != "ask":
            return None
        return spoiled(change)(fed.transport.handlers[node](content))

    fed.transport.mishap = mishap
    without.transport.mishap = lambda node, head, content: (
        "gone" if node == "node-2" and head["kind"] == "ask" else None
    )
    rejected = fed.serve()[0]["rejected"]
    assert list(rejected) == ["client-2"]
    assert expected in rejected["client-2"]
    without.serve()
    tiny.same(fed.state(), without.state())


def test_an_answer_of_the_round_before_is_no_answer(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    fed = Federation(settings(bases["bert"], texts, federation={"participation": 1.0}), tmp_path)
    kept: dict[str, bytes] = {}

    def mishap(node: str, head: dict[str, Any], content: bytes) -> bytes | None:
        if head["kind"] != "ask" or node not in ("node-0", "node-1"):
            return None
        reply = fed.transport.handlers[node](content)
        if head["round"] == 1:
            return kept[node] if node == "node-0" else kept["node-0"]  # its own old one, and another client's
        kept[node] = reply
        return reply

    fed.transport.mishap = mishap
    rejected = fed.serve()[1]["rejected"]
    assert "answered for round 1" in rejected["client-0"]
    assert "answered as 'client-0'" in rejected["client-1"]


def test_a_site_refuses_an_old_round_another_base_and_other_settings(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    fed = Federation(settings(bases["bert"], texts, federation={"participation": 1.0}), tmp_path)
    asked: list[bytes] = []

    def mishap(node: str, head: dict[str, Any], content: bytes) -> None:
        if head["kind"] == "ask" and node == "node-0":
            asked.append(content)

    fed.transport.mishap = mishap
    fed.serve()
    site = fed.sites["client-0"]

    said: list[str] = []
    site.notify = said.append

    def code(content: bytes) -> str:
        return str(protocol.decode(site.answer(content))[0]["code"])

    assert code(asked[0]) == "old"
    assert "from before round 2" in said[-1]
    assert code(spoiled(lambda head, tensors: head.update(base="0" * 64))(asked[-1])) == "other-base"
    assert code(spoiled(lambda head, tensors: head.update(terms="0"))(asked[-1])) == "other-settings"
    assert code(spoiled(lambda head, tensors: head.update(rank=2**15))(asked[-1])) == "other-settings"
    assert "a server of rank 32768: expected at most 4" in said[-1]
    assert code(spoiled(lambda head, tensors: head.update(kind="drop"))(asked[-1])) == "unreadable"
    assert "kind 'drop'" in said[-1]
    assert code(b"hello") == "unreadable"
    assert "no fedspan message" in said[-1]


# Who is taken in


def test_a_site_with_other_settings_or_another_base_is_left_out(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts)
    fed = Federation(config, tmp_path)
    odd = make_sites(settings(bases["bert"], texts, local={"steps": 3}), ["client-0"], tmp_path / "odd")["client-0"]
    fed.transport.handlers["node-0"] = odd.answer
    other = fed.sites["client-1"]
    other.loaded = replace(other.loaded, base="0" * 64)
    history = fed.serve()
    lines = "\n".join(fed.lines)
    assert "local.steps is 3 on the site and 2 on the server" in lines
    assert "base weights differ from the server's" in lines
    listed = json.loads((tmp_path / "run" / "sites.json").read_text())
    assert [c["client_id"] for c in listed["clients"]] == ["client-2", "client-3"]
    assert all(record["num_clients"] == 2 for record in history)


def test_sites_with_files_of_their_own(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Each site has its own rows, of its own number, and the server only a sample to evaluate on: the result is that
    of one process with one file a client."""
    rows = tiny.words(60)
    files = [tiny.write_jsonl(tmp_path / f"{k}.jsonl", rows[:12] if k == 0 else rows[12:60]) for k in range(2)]
    sample = tiny.write_jsonl(tmp_path / "sample.jsonl", tiny.words(48))
    federation = {"num_clients": 2, "participation": 1.0, "rounds": 2}
    served = settings(bases["bert"], sample, federation=federation, data={"test": [str(sample)]})
    names = ["charite", "mayo"]
    sites: dict[str, Site] = {}
    for name, file in zip(names, files, strict=True):
        config = settings(bases["bert"], file, federation=federation, data={"test": [str(sample)]})
        sites[name] = Site(SiteSettings(config, name, 4, own_data=True), tmp_path / name)
    transport = MemoryTransport({name: site.answer for name, site in sites.items()})
    history = serve(served, tmp_path / "run", lambda event: None, transport).history
    assert [record["rejected"] for record in history] == [{}, {}]
    listed = json.loads((tmp_path / "run" / "sites.json").read_text())["clients"]
    assert [(c["client_id"], c["num_examples"]) for c in listed] == [("charite", 12), ("mayo", 48)]


def test_a_site_whose_data_has_other_labels_is_left_out(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Fewer classes: its head would have another shape than those of the others."""
    config = settings(bases["bert"], texts, federation={"rounds": 1, "participation": 1.0})
    fed = Federation(config, tmp_path)
    two = tiny.write_jsonl(tmp_path / "two.jsonl", [row for row in tiny.words() if row["label"] != "z"])
    odd = settings(bases["bert"], two, federation={"rounds": 1, "participation": 1.0})
    fed.transport.handlers["node-0"] = Site(SiteSettings(odd, "client-0", 4, own_data=True), tmp_path / "odd").answer
    assert fed.serve()[0]["num_clients"] == 3
    assert any("client-0 is left out: the labels of its data are not the server's" in line for line in fed.lines)


def test_a_second_node_of_one_client_is_not_taken_in(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = settings(bases["bert"], texts, federation={"num_clients": 4, "rounds": 1})
    fed = Federation(config, tmp_path)
    fed.transport.handlers["node-9"] = fed.transport.handlers["node-0"]
    del fed.transport.handlers["node-3"]
    fed.serve()
    assert any("client-0 is here already" in line for line in fed.lines)


def test_too_few_sites_end_the_wait(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = settings(bases["bert"], texts, federation={"min_success": 3})
    fed = Federation(config, tmp_path)
    away = {node: fed.transport.handlers.pop(node) for node in ("node-0", "node-1")}
    with pytest.raises(ValueError, match=r"2 of 4 sites came within deployment.wait = 20 s: expected at least 3"):
        fed.serve()
    assert fed.transport.clock >= 20
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"events.jsonl", ".events.lock"}
    fed.transport.handlers |= away
    assert len(fed.serve()) == 3  # of the same name, since nothing but the log of the attempt is there


def test_the_server_needs_no_engine(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Its own settings say `auto`, but it trains nothing."""
    fed = Federation(settings(bases["bert"], texts, engine={"name": "auto"}, federation={"rounds": 1}), tmp_path)
    seen: dict[str, Any] = {}
    fed.serve(lambda event: seen.update(event.data) if event.kind == "start" else None)
    assert seen["engine"] == "sites"


def test_controls_need_no_sites(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a control for one process"):
        serve(settings(bases["bert"], texts, "centralised"), tmp_path / "run", lambda e: None, MemoryTransport({}))


@pytest.mark.parametrize(
    ("method", "reason"),
    [("fedftg", "every client trains base weights of its own"), ("fedavg", "base weights"), ("ravan", "subspace")],
)
def test_a_site_refuses_an_engine_that_cannot_do_its_work(
    bases: dict[str, Path], texts: Path, tmp_path: Path, method: str, reason: str
) -> None:
    """Before the first round: the cohort would leave out GaLore, a proximal term or a correction without a word."""
    config = settings(bases["bert"], texts, method, engine={"name": "cohort"})
    with pytest.raises(FedspanError, match=rf"engine\.name = 'cohort': .*{reason}.*; expected auto or sequential"):
        make_sites(config, ["client-0"], tmp_path)


def test_a_site_trains_in_a_pass_of_its_own_where_that_is_asked_for(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """To rounding what it trains otherwise; on a GPU this is the choice of `auto`."""
    states = {}
    for name in ("sequential", "cohort"):
        config = settings(bases["bert"], texts, engine={"name": name}, federation={"rounds": 1})
        fed = Federation(config, tmp_path / name)
        fed.serve()
        states[name] = fed.state()
    for key, value in states["sequential"].items():
        torch.testing.assert_close(states["cohort"][key], value, rtol=1e-3, atol=1e-4)


def test_a_site_whose_labels_mean_something_else_is_left_out(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """It learns the ids from its own rows: the same number of classes under other names would be trained in silence."""
    config = settings(bases["bert"], texts, federation={"rounds": 1})
    fed = Federation(config, tmp_path)
    rows = [{**row, "label": {"x": "x", "y": "y", "z": "zebra"}[row["label"]]} for row in tiny.words()]
    other = tiny.write_jsonl(tmp_path / "other.jsonl", rows)
    own = config.model_copy(update={"data": config.data.model_copy(update={"train": (str(other),)})})
    fed.sites["client-1"] = Site(SiteSettings(own, "client-1"), tmp_path / "sites" / "other")
    fed.transport.handlers["node-1"] = fed.sites["client-1"].answer
    (record,) = fed.serve()
    assert any(
        line == "client-1 is left out: the labels of its data are not the server's: expected the same label names, or "
        "numbers, in one order"
        for line in fed.lines
    )
    assert record["num_clients"] <= 3


# Silence


def test_a_silent_site_is_waited_for_once_a_round_and_then_left_out(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(
        bases["bert"],
        texts,
        federation={"participation": 1.0, "rounds": 6},
        deployment={"patience": 2, "quarantine": 2, "deadline": 5},
    )
    fed = Federation(config, tmp_path)
    fed.transport.mishap = lambda node, head, content: "" if node == "node-3" and head["kind"] == "ask" else None
    history = fed.serve()
    silent = {"client-3": "did not answer within 5 s"}
    assert [record["rejected"] for record in history] == [silent, silent, {}, {}, silent, silent]
    waits = [record["waited_seconds"] for record in history]
    assert all((wait >= 5) == bool(record["rejected"]) for wait, record in zip(waits, history, strict=True))
    assert any("client-3 has been silent 2 times" in line for line in fed.lines)


def test_a_node_that_is_gone_is_waited_for_and_then_missed(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    fed = Federation(settings(bases["bert"], texts, federation={"participation": 1.0, "rounds": 2}), tmp_path)

    def leave(event: Event) -> None:
        if event.kind == "round":
            fed.transport.handlers.pop("node-2", None)

    history = fed.serve(leave)
    assert history[1]["rejected"] == {"client-2": "is not connected"}
    assert fed.transport.clock >= 20


def test_a_node_that_comes_back_under_another_name_is_known_again(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts, federation={"participation": 1.0, "rounds": 2})
    run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)

    def move(event: Event) -> None:
        if event.kind == "round" and "node-2" in fed.transport.handlers:
            fed.transport.handlers["node-7"] = fed.transport.handlers.pop("node-2")

    fed.serve(move)
    tiny.same(fed.state(), state_of(tmp_path / "here"))


def test_too_few_answers_fail_the_round_and_the_run_goes_on_later(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts, federation={"min_success": 3})
    run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)
    people = [s.client for s in fed.sites.values()]
    drawn = [people[i] for i in create_sampler(config.federation, config.seed, "none").draw(len(people), 1)]
    bad = f"node-{IDS.index(drawn[0].client_id)}"
    fed.transport.mishap = lambda node, head, content: (
        "out of order" if node == bad and head["kind"] == "ask" and head["round"] == 1 else None
    )
    with pytest.raises(RoundFailed, match=r"round 2: 2 valid updates.*out of order"):
        fed.serve()
    fed.transport.mishap = None
    fed.serve()
    tiny.same(fed.state(), state_of(tmp_path / "here"))


def test_over_sampling_does_not_wait_for_the_last(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = settings(
        bases["bert"],
        texts,
        federation={"participation": 0.5, "rounds": 2},
        deployment={"oversample": 1.0, "deadline": 30, "order": "arrival"},
    )
    fed = Federation(config, tmp_path)
    fed.transport.mishap = lambda node, head, content: (
        "" if node in ("node-1", "node-2") and head["kind"] == "ask" else None
    )
    history = fed.serve()
    for record in history:
        assert record["num_clients"] == 2
        assert set(record["rejected"].values()) == {"was not waited for"}
        assert record["waited_seconds"] < 5


def test_answers_in_any_order_come_to_the_same_bits(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = settings(bases["bert"], texts, "fedit", federation={"participation": 1.0})
    run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)
    poll = fed.transport.poll
    fed.transport.poll = lambda: poll()[::-1]
    fed.serve()
    tiny.same(fed.state(), state_of(tmp_path / "here"))
