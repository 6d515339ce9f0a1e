"""Whatever a server sends is data: thousands of messages that lie, to real sites.

Nothing but answers comes of it: no error leaves `answer`, and no file appears outside the site's own folder.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_transport import MemoryTransport, make_sites
from mutations import Parts, mutated

from fedspan.config import Config
from fedspan.federation import requirements
from fedspan.federation.rounds import RunState, conduct
from fedspan.server.coordinator import Coordinator
from fedspan.site.site import Site
from fedspan.wire import agreement, protocol, schema

IDS = ["client-0", "client-1", "client-2"]
SETTINGS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
METHODS: dict[str, dict[str, Any]] = {
    "flexlora": {},
    "flora": {},
    "shared_galore": {},
    "ffa_lora": {"privacy": {"secure_sums": True}},
}
EXAMPLES = [180, pytest.param(530, marks=pytest.mark.slow)]
"""Of each method: 2,120 messages."""


class Asked:
    """A site, and the genuine messages that it was sent in two rounds."""

    def __init__(self, config: Config, folder: Path) -> None:
        sites = make_sites(config, IDS, folder)
        self.site: Site = sites[IDS[0]]
        self.said: list[str] = []
        self.site.notify = self.said.append
        self.messages: list[bytes] = []
        method, model, initial = requirements.chosen(config), self.site.loaded.context.model, self.site.loaded.initial
        transport = MemoryTransport({name: site.answer for name, site in sites.items()})
        transport.mishap = lambda node, head, content: self.messages.append(content) if node == IDS[0] else None
        coordinator = Coordinator(transport, config, method, folder, lambda line: None)
        clients = coordinator.gather()
        shapes = agreement.shapes(model.modules(), initial)
        clients = coordinator.agree(self.site.loaded.base, self.site.loaded.labels, shapes, initial, clients)
        coordinator.enrol()
        template = model.template(4, config.adapter.alpha, config.adapter.rslora, config.seed, len(clients))
        state = RunState(method.init(template, initial))
        for _ in range(2):
            state, record = conduct(method, state, clients, coordinator, sums=config.privacy.secure_sums)
            assert record["rejected"] == {}
        self._train_once()

    def _train_once(self) -> None:
        """Have the site train no more: its work is not what is tested here."""
        held: dict[bool, Any] = {}
        train = self.site.work._executor.train

        def trained(given: Any, round_num: int, engine: str) -> Any:
            kind = given[0].broadcast.recipe.gradient
            if kind not in held:
                held[kind] = list(train(given, round_num, engine))
            return held[kind]

        self.site.work._executor = SimpleNamespace(train=trained)

    def answer(self, content: bytes) -> dict[str, Any]:
        """Return the head of the answer, which must be one that a server takes."""
        self.site._checks._newest = ("", 0)
        head, _ = protocol.decode(self.site.answer(content))
        return dict(schema.introduction(head) if "terms" in head else schema.answer(head))


@pytest.fixture(scope="module")
def asked(bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Asked] = {}

    def ask(name: str) -> Asked:
        if name not in made:
            config = tiny.config(
                bases["bert"],
                texts,
                name,
                adapter={"target_modules": ["query", "value"]},
                federation={"rounds": 3, "participation": 1.0, "num_clients": len(IDS)},
                engine={"name": "sequential"},
                deployment={"wait": 20, "deadline": 30},
                **METHODS[name],
            )
            made[name] = Asked(config, tmp_path_factory.mktemp(name) / "sites")
        return made[name]

    return ask


def files_outside(folder: Path) -> set[Path]:
    return {path for path in folder.parents[1].rglob("*") if folder not in (path, *path.parents)}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_but_answers_comes_of_messages_that_lie(asked: Any, name: str, examples: int) -> None:
    made: Asked = asked(name)
    folder = made.site.folder
    outside = files_outside(folder)
    codes: list[str] = []

    @given(st.integers(0, 10**6), st.integers(0, 2**62))
    @settings(max_examples=examples, **SETTINGS)
    def ask(which: int, seed: int) -> None:
        head = made.answer(mutated(made.messages[which % len(made.messages)], seed))
        codes.append(str(head.get("code", "answered")))

    ask()
    assert files_outside(folder) == outside
    assert all(len(path.relative_to(folder).parts) <= 3 for path in folder.rglob("*"))
    # Some mutations change nothing that counts. A question about a name that a method does not have may end in an error
    # of the site's own, which is answered like any other; anything more would be a defect that a message reached.
    assert codes.count("failed") <= examples // 100, [
        line for line in made.said if "(failed)" in line or "File" in line
    ][-12:]
    assert codes.count("unreadable") > examples / 4


NAMES = ["../../x", "..", "/tmp", ".x", "a/b", "", "x" * 65, "\u0440un", "run\n", "-x", None, 7, ["x"]]


@pytest.mark.parametrize("kind", ["ask", "advertise", "share", "unmask"])
@pytest.mark.parametrize("field", ["run", "session"])
def test_a_name_that_is_a_path_is_refused_at_the_door(asked: Any, kind: str, field: str) -> None:
    """For every kind of message, also for those that wrote a record under the run's name without looking at it."""
    made: Asked = asked("ffa_lora")
    content = next(c for c in made.messages if protocol.decode(c)[0]["kind"] == kind)
    before = {path for path in made.site.folder.parents[1].rglob("*")}
    for name in NAMES:
        parts = Parts.of(content)
        message = parts.head["message"]
        holder = message["sum"] if (kind, field) == ("ask", "session") else message
        holder[field] = name
        assert made.answer(parts.put_together())["code"] == "unreadable", name
        assert f"{field} = " in made.said[-1]
        assert made.said[-1].isprintable()
    assert {path for path in made.site.folder.parents[1].rglob("*")} == before


def test_clients_that_are_named_like_paths_are_refused_everywhere(asked: Any) -> None:
    made: Asked = asked("ffa_lora")
    for content in made.messages:
        parts = Parts.of(content)
        message = parts.head["message"]
        for holder, key in ((message, "keys"), (message.get("sum", {}), "shares"), (message, "survivors")):
            if key not in holder:
                continue
            listed = holder[key]
            holder[key] = [*listed, "../x"] if isinstance(listed, list) else {**listed, "../x": 0}
            assert made.answer(parts.put_together())["code"] == "unreadable"
            holder[key] = listed


def test_a_patch_for_other_modules_is_not_kept(asked: Any) -> None:
    """Else a server could fill the site's disk with what no model holds."""
    made: Asked = asked("flora")
    content = next(c for c in made.messages if protocol.decode(c)[0].get("patch", {}).get("news"))
    for change in ("name", "shape"):
        parts = Parts.of(content)
        (news, *_) = parts.head["message"]["patch"]["news"]
        name = next(iter(news))
        if change == "name":
            news["x"] = news.pop(name)
        else:
            news[name] = news[name][:1]
        parts.head["message"]["patch"]["version"] = 9
        assert made.answer(parts.put_together())["code"] == "refused"
        assert "a patch of" in made.said[-1]
    assert not list(made.site.folder.rglob("patch-9.safetensors"))


@pytest.mark.parametrize("name", ["flexlora", "ffa_lora"])
def test_factors_without_a_number_are_refused_before_they_are_multiplied_or_padded(asked: Any, name: str) -> None:
    """(m, 0) and (0, n) take no byte of a message, and their product m·n numbers: of 2³³ each, more than any memory."""
    made: Asked = asked(name)
    content = next(c for c in made.messages if protocol.decode(c)[0].get("broadcast", {}).get("adapter"))
    head, tensors = protocol.decode(content)
    module, (_, _, scaling) = next(iter(head["broadcast"]["adapter"].items()))
    outgoing = protocol.MessageTensors()
    for tensor in tensors:
        outgoing.put(tensor)
    empty = [outgoing.put(torch.empty(shape)) for shape in ((2**33, 0), (0, 2**33))]
    head["broadcast"]["adapter"][module] = [*empty, scaling]
    assert made.answer(protocol.encode(head, outgoing))["code"] == "refused"
    assert f"factors of {module} for ({2**33}, {2**33})" in made.said[-1]


GALORE = {"rank": 4, "update_gap": 1, "scale": 1.0, "svd": "exact", "side": "auto", "on_refresh": "keep"}


@pytest.mark.parametrize("more", [{"probe_batches": 10**5}, {"galore": GALORE}])
def test_a_recipe_asks_for_no_more_work_than_the_settings(asked: Any, more: dict[str, Any]) -> None:
    """A gradient over 100,000 batches, or a decomposition in every step, would keep a site busy for days."""
    made: Asked = asked("shared_galore")
    content = next(c for c in made.messages if protocol.decode(c)[0]["kind"] == "ask")
    parts = Parts.of(content)
    assert "code" not in made.answer(parts.put_together())
    parts.head["message"]["broadcast"]["recipe"].update(more)
    assert made.answer(parts.put_together())["code"] == "refused"
    assert made.said[-1].split(": ", 1)[1].startswith(("a gradient over 100000 batches", "a recipe with Galore"))
