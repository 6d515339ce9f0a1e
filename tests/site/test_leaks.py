"""No text of an error leaves a site: it may quote a row, a label, a path. What leaves is a code and a number.

Every failure here has a canary in its text. The canary is in the site's own log, under the number of the incident, and
in nothing that the site emits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites

from fedspan.config import Config, to_toml
from fedspan.federation import requirements
from fedspan.federation.rounds import RunState, conduct
from fedspan.privacy.budget import BudgetSpent
from fedspan.server.coordinator import Coordinator
from fedspan.site import worker
from fedspan.site.settings import SiteSettings
from fedspan.site.site import Site
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement, protocol, schema
from fedspan.wire.refusals import TEXTS, Code, line, new_incident, packed, unpacked

CANARY = "Mrs-Canary-ICD-C50.9"
ALLOWED = {"client_id", "code", "incident"}


def told(emitted: bytes, log: str) -> Code:
    """Return the code of a refusal, after checking that it says nothing else, and that the log has the rest."""
    assert CANARY.encode() not in emitted
    head, tensors = protocol.decode(emitted)
    assert tensors == []
    assert head.keys() == ALLOWED
    refusal = schema.answer(head)
    assert f"incident {refusal['incident']}" in log
    assert CANARY in log
    return Code(head["code"])


def test_every_code_has_a_sentence_and_travels_as_itself() -> None:
    assert set(TEXTS) == set(Code)
    for code in Code:
        incident = new_incident()
        assert unpacked(packed(code, incident)) == line(code, incident)
        assert line(code, incident).isprintable()
    for text in ("failed", "failed ", f"failed {CANARY}", f"{CANARY} 0a1b2c", "failed 0a1b2c x", "failed 0a1b2c\n"):
        assert unpacked(text) is None


# While loading


def write(folder: Path, config: Config, site: str, name: str = "site.toml") -> None:
    (folder / "config.toml").write_text(to_toml(config))
    (folder / name).write_text(site)


def label(rows: list[dict[str, Any]]) -> None:
    rows[3]["label"] = {"is": CANARY}


def text(rows: list[dict[str, Any]]) -> None:
    rows[3] = {"text": [CANARY], "label": "x"}


def columns(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row[CANARY] = row.pop("text")


DATA: dict[str, Callable[[list[dict[str, Any]]], None]] = {"a label": label, "a text": text, "columns": columns}


@pytest.mark.parametrize(
    "what",
    [*DATA, "broken JSON", "a missing file", "a base", "a key", "TOML", "a client", "an identity", "a setting"],
)
def test_a_failure_to_load_is_a_code(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    rows = tiny.words()
    if what in DATA:
        DATA[what](rows)
    folder = tmp_path / CANARY
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows) + (f'\n{{"text": {CANARY}' if "JSON" in what else ""))
    base, site = bases["bert"], 'client_id = "client-0"\n'
    config = tiny.config(base, data, "flexlora")
    sites = {
        "a missing file": f'{site}[data]\ntrain = ["{tmp_path / CANARY}.jsonl"]\n',
        "a base": f'{site}[model]\nname = "{tmp_path / CANARY}"\n',
        "a key": f'{site}"{CANARY}" = 1\n',
        "TOML": f"{site}{CANARY}\n",
        "a client": f'client_id = "{CANARY}"\n',
        "an identity": f'{site}identity = "{CANARY}.key"\n',
        "a setting": f'{site}device = "{CANARY}"\n',
    }
    write(folder, config, sites.get(what, site))
    try:
        Site(SiteSettings.read(folder), folder)
    except (OSError, FedspanError) as error:  # as the worker has it
        emitted = worker._refusing(error)(b"anything")
    else:
        pytest.fail("it was loaded")
    assert told(emitted, capsys.readouterr().out) == Code.NOT_READY


# While working


class Questioned:
    """A site, and the messages that it is asked."""

    def __init__(self, config: Config, folder: Path) -> None:
        sites = make_sites(config, ["client-0", "client-1", "client-2"], folder)
        self.site, self.log = sites["client-0"], list[str]()
        self.site.notify = self.log.append
        self.asked: dict[str, bytes] = {}
        method, model, initial = requirements.chosen(config), self.site.loaded.context.model, self.site.loaded.initial
        transport = MemoryTransport({name: site.answer for name, site in sites.items()})

        def mishap(node: str, head: dict[str, Any], content: bytes) -> None:
            if node == "client-0":
                self.asked[head["kind"]] = content

        transport.mishap = mishap
        coordinator = Coordinator(transport, config, method, folder, lambda line: None)
        clients = coordinator.gather()
        shapes = agreement.shapes(model.modules(), initial)
        clients = coordinator.agree(self.site.loaded.base, self.site.loaded.labels, shapes, initial, clients)
        coordinator.enrol()
        template = model.template(4, config.adapter.alpha, config.adapter.rslora, config.seed, len(clients))
        state = RunState(method.init(template, initial))
        conduct(method, state, clients, coordinator, sums=config.privacy.secure_sums or config.privacy.fixed_point)

    def answer(self, kind: str = "ask") -> Code:
        self.log.clear()
        return told(self.site.answer(self.asked[kind]), "\n".join(self.log))


@pytest.fixture(scope="module")
def questioned(bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Questioned] = {}

    def question(name: str, **privacy: Any) -> Questioned:
        if name not in made:
            federation = {"rounds": 1, "participation": 1.0, "num_clients": 3}
            options = {"federation": federation, "engine": {"name": "sequential"}, "privacy": privacy}
            config = tiny.config(
                bases["bert"], texts, name, adapter={"target_modules": ["query"]}, deployment={"wait": 20}, **options
            )
            made[name] = Questioned(config, tmp_path_factory.mktemp(name))
        return made[name]

    return question


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*given: Any, **named: Any) -> Any:
        raise error

    return raise_it


class OutOfMemoryError(RuntimeError):
    """By its name torch's own, which CPUs do not raise."""


ERRORS: dict[str, tuple[BaseException, Code]] = {
    "a value": (ValueError(f"row 17: label {CANARY}"), Code.FAILED),
    "a key": (KeyError(CANARY), Code.FAILED),
    "an index": (IndexError(f"row\n{CANARY}"), Code.FAILED),
    "a type": (TypeError(CANARY), Code.FAILED),
    "an attribute": (AttributeError(CANARY), Code.FAILED),
    "a defect": (RuntimeError(f"CUDA error at {CANARY}"), Code.FAILED),
    "an assertion": (AssertionError(CANARY), Code.FAILED),
    "Unicode": (UnicodeEncodeError("ascii", CANARY, 0, 1, CANARY), Code.FAILED),
    "a disk": (OSError(28, "No space left on device", f"/patients/{CANARY}"), Code.FAILED),
    "recursion": (RecursionError(CANARY), Code.FAILED),
    "no memory": (MemoryError(CANARY), Code.NO_MEMORY),
    "no memory on a GPU": (OutOfMemoryError(CANARY), Code.NO_MEMORY),
    "a spent budget": (BudgetSpent(f"{CANARY} is spent"), Code.BUDGET_SPENT),
    "a refusal": (FedspanError(f"{CANARY} is no label"), Code.REFUSED),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_while_training_is_a_code(questioned: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    made: Questioned = questioned("scaffold")
    error, code = ERRORS[what]
    monkeypatch.setattr(made.site.work, "_executor", SimpleNamespace(train=raising(error)))
    assert made.answer() == code
    assert all(text.isprintable() for text in made.log)


@pytest.mark.parametrize("where", ["begin", "respond", "put_update", "keep", "state", "patch", "encode", "hello"])
def test_an_error_anywhere_else_is_a_code(questioned: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """While the broadcast is taken in, the update encoded, the state saved or read, the reply put together."""
    made: Questioned = questioned("scaffold")
    fail = raising(OSError(5, "Input/output error", f"/patients/{CANARY}"))
    places: dict[str, tuple[Any, str]] = {
        "begin": ("fedspan.site.local_work.begin", ""),
        "respond": ("fedspan.site.local_work.respond", ""),
        "put_update": ("fedspan.wire.protocol.put_update", ""),
        "keep": (made.site.work._storage, "keep"),
        "state": (made.site.work._storage, "state"),
        "patch": (made.site.work._storage, "patch"),
        "encode": ("fedspan.site.site.MessageTensors", ""),
        "hello": ("fedspan.site.site.agreement.shapes", ""),
    }
    target, name = places[where]
    if name:
        # Its class has slots or none; the object is the site's own either way.
        monkeypatch.setattr(type(target), name, fail)
    else:
        monkeypatch.setattr(target, fail)
    if where == "hello":
        made.asked["hello"] = protocol.encode({"kind": "hello"}, protocol.MessageTensors())
    assert made.answer("hello" if where == "hello" else "ask") == Code.FAILED


def test_a_damaged_state_is_a_code(questioned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Questioned = questioned("scaffold")
    (run,) = (path for path in (made.site.folder / "state").iterdir() if path.is_dir())
    (run / "client-0.safetensors").write_bytes(CANARY.encode() * 4)
    made.log.clear()
    emitted = made.site.answer(made.asked["ask"])
    (run / "client-0.safetensors").unlink()
    assert protocol.decode(emitted)[0]["code"] == Code.NOT_HELD
    assert protocol.decode(emitted)[0].keys() == ALLOWED
    assert CANARY.encode() not in emitted


def test_a_value_beyond_the_fixed_point_is_a_code(questioned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value would be a weight of this site's own update."""
    made: Questioned = questioned("ffa_lora", fixed_point=True)
    train = made.site.work._executor.train

    def large(*given: Any) -> Any:
        for result, seconds in train(*given):
            for payload in result.update.modules.values():
                payload.b.fill_(1.2345e15)
            yield result, seconds

    monkeypatch.setattr(made.site.work, "_executor", SimpleNamespace(train=large))
    made.log.clear()
    emitted = made.site.answer(made.asked["ask"])
    head, _ = protocol.decode(emitted)
    assert (head["code"], head.keys()) == (Code.UNFIT, ALLOWED)
    assert "does not fit the fixed point: " in "".join(made.log) or "e+1" in "".join(made.log)
    assert b"e+1" not in emitted


def test_an_update_that_is_not_finite_is_a_code(questioned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Questioned = questioned("scaffold")
    train = made.site.work._executor.train

    def bad(*given: Any) -> Any:
        for result, seconds in train(*given):
            next(iter(result.update.dense.values())).fill_(torch.nan)
            yield result, seconds

    monkeypatch.setattr(made.site.work, "_executor", SimpleNamespace(train=bad))
    made.log.clear()
    head, _ = protocol.decode(made.site.answer(made.asked["ask"]))
    assert (head["code"], head.keys()) == (Code.UNFIT, ALLOWED)
    assert re.search(r"incident [0-9a-f]{6} \(unfit\): .*NaN or infinity", "\n".join(made.log))
