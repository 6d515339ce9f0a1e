"""A Flower strategy over one of our methods, for an app of the user's own.

    # ServerApp
    strategy = FedspanStrategy(create_method("glora"), template, ranks={node: 4, other: 16})
    strategy.start(grid, strategy.arrays(), num_rounds=10)

    # ClientApp
    @app.train()
    def train(message, context):
        sent = received(message)  # factors by module, with their scaling, and dense weights
        ...
        return reply(message, method, Update("clinic-1", num_examples, modules, dense), {"train_loss": loss})

The server's step is `fedspan.aggregate`, to the last bit. Methods that need more than one exchange a round, or that
keep something at the clients, run in fedspan's own app (`fedspan flower init`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log

from fedspan.federation.sampling import UniformSampler
from fedspan.flower import tensors
from fedspan.flower.tensors import figures, received, reply
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Broadcast, Factors, Recipe, Request, Template, Tensors, Update
from fedspan.support.errors import FedspanError

__all__ = ["FedspanStrategy", "figures", "received", "reply"]

_LOOK = 0.5
_CONFIG = "config"


class FedspanStrategy(Strategy):
    """One of our methods as a Flower strategy.

    Parameters
    ----------
    method
        From `fedspan.create_method`.
    template
        The adapted modules' shapes, the largest rank and the rule of the scaling.
    dense
        Trained dense weights of the base (heads; for full-weight methods everything that is trained).
    ranks
        What the nodes train: one rank for all, or one by node id; none: the template's.
    participation
        Share of the connected nodes that train in a round, drawn by the template's seed from the sorted node ids.
    min_nodes
        At least so many train, and are waited for.
    min_success
        At least so many valid replies are needed, or the run ends.
    evaluation
        Share of the connected nodes that evaluate after a round.
    wait
        Seconds to wait for `min_nodes` nodes at most.
    lifetime
        Seconds after which a message or its reply is not wanted any more.

    Raises
    ------
    ValueError
        For a method that Flower's one exchange a round cannot carry, or settings out of range.
    """

    def __init__(
        self,
        method: Method,
        template: Template,
        *,
        dense: Tensors | None = None,
        ranks: int | Mapping[int, int] | None = None,
        participation: float = 1.0,
        min_nodes: int = 1,
        min_success: int = 1,
        evaluation: float = 1.0,
        wait: float = 300.0,
        lifetime: float = 3600.0,
    ) -> None:
        if not (0 < participation <= 1 and 0 <= evaluation <= 1 and min_nodes >= 1 and min_success >= 1):
            raise FedspanError(
                f"participation = {participation}, evaluation = {evaluation}, min_nodes = {min_nodes}, min_success = "
                f"{min_success}: expected shares of at most 1 and counts of at least 1"
            )
        _check_method(method)
        self.method, self.ranks = method, ranks
        self.participation, self.evaluation = participation, evaluation
        self.min_nodes, self.min_success = min_nodes, min_success
        self.wait, self.lifetime = wait, lifetime
        self.state: ServerState = method.init(template, dense or {})
        """The server's state after the last round."""
        self.diagnostics: list[Mapping[str, Any]] = []
        """What the method measured of itself, round by round."""
        self.rejected: dict[str, str] = {}
        """Of the last round: node -> why its reply was left out."""
        self._asked: dict[int, Broadcast] = {}
        self._owners: dict[str, int] = {}
        """Client id -> the node that first used it."""
        for rank in self._all_ranks():
            _check_broadcast(method, self.broadcast(rank))
        _check_later(method)

    @classmethod
    def from_arrays(
        cls,
        method: Method,
        arrays: ArrayRecord,
        *,
        alpha: float = 16.0,
        rslora: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> FedspanStrategy:
        """A strategy for an untrained adapter as Flower has it, such as PEFT's state dict.

        Parameters
        ----------
        arrays
            `MODULE.lora_A.weight` and `MODULE.lora_B.weight` or `MODULE/a` and `MODULE/b` of the largest rank, and
            dense weights. Only the factors' shapes are used: the method makes the first adapter.

        Raises
        ------
        ValueError
            For factors without their other half, of different ranks, or already trained.
        """
        template, dense = tensors.template_of(arrays, alpha, rslora, seed)
        return cls(method, template, dense=dense, **settings)

    def broadcast(self, rank: int | None = None) -> Broadcast:
        """What a node of that rank receives; none: everything the server has."""
        return self.method.broadcast(self.state, Request(rank))

    def arrays(self, rank: int | None = None) -> ArrayRecord:
        """The same as Flower's record: what `start` is given first, and what it ends with."""
        return tensors.arrays_of(self.broadcast(rank))

    def summary(self) -> None:
        """Log the settings."""
        template = self.state.template
        log(INFO, "\t├──> Method: %s (%s), rank %s", self.method.info.title, self.method.info.paper, template.rank)
        log(INFO, "\t├──> Training: %.2f of the nodes, at least %d", self.participation, self.min_nodes)
        log(INFO, "\t└──> Evaluation: %.2f of the nodes", self.evaluation)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages, one for each node that was drawn.

        Raises
        ------
        ValueError
            When too few nodes come within `wait` seconds, or `arrays` are not this strategy's own.
        """
        if not tensors.same(arrays, self.arrays()):
            raise FedspanError("start was given other arrays than this strategy's: expected strategy.arrays()")
        drawn = self._drawn(grid, self.participation, server_round, "train")
        self._asked = {node: self.broadcast(self._rank(node)) for node in drawn}
        return self._messages(self._asked, server_round, config, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the replies and take the server's step.

        Raises
        ------
        ValueError
            When fewer than `min_success` replies are valid; the state is then as before.
        """
        self.rejected = {}
        updates: dict[str, tuple[Update, MetricRecord]] = {}
        # By node, so that of two that claim one name the same one is believed however the replies arrive.
        for message in sorted(replies, key=lambda m: (m.metadata.src_node_id, m.metadata.message_id)):
            node = message.metadata.src_node_id
            try:
                if node not in self._asked:
                    raise FedspanError("it was not asked, or has answered before")
                update = tensors.update_of(message, self.method, self._asked.pop(node), server_round)
                if self._owners.setdefault(update.client_id, node) != node:
                    raise FedspanError(f"it calls itself {update.client_id!r}, which is another node's name")
                updates[update.client_id] = update, tensors.metrics_of(message)
            except ValueError as error:
                self._reject(str(node), str(error))
        for node in self._asked:
            self._reject(str(node), "no reply")
        if len(updates) < self.min_success:
            first = next((f": {node}: {why}" for node, why in self.rejected.items()), "")
            raise FedspanError(
                f"round {server_round}: {len(updates)} valid replies, min_success = {self.min_success}{first}"
            )
        self.state, told = aggregate(self.method, self.state, [update for update, _ in updates.values()])
        self.diagnostics.append(told)
        found = [(updates[name][0].num_examples, updates[name][1]) for name in sorted(updates)]
        return self.arrays(), tensors.mean_metrics(found)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the nodes that evaluate what they receive."""
        if self.evaluation == 0:
            return []
        drawn = self._drawn(grid, self.evaluation, server_round, "evaluate")
        sent = {node: self.broadcast(self._rank(node)) for node in drawn}
        return self._messages(sent, server_round, config, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean of the nodes' figures, by their numbers of examples."""
        found: list[tuple[str, float, MetricRecord]] = []
        for message in replies:
            try:
                name, num_examples = tensors.sender_of(message, server_round)
                found.append((name, num_examples, tensors.metrics_of(message)))
            except ValueError as error:
                self._reject(str(message.metadata.src_node_id), str(error))
        found.sort(key=lambda x: x[0])
        return tensors.mean_metrics([(weight, metrics) for _, weight, metrics in found]) if found else None

    def _reject(self, node: str, why: str) -> None:
        self.rejected[node] = why
        log(WARNING, "the reply of node %s is left out: %s", node, why)

    def _all_ranks(self) -> list[int]:
        if isinstance(self.ranks, Mapping):
            return sorted(set(self.ranks.values()))
        return [self.state.template.rank if self.ranks is None else self.ranks]

    def _rank(self, node: int) -> int:
        if not isinstance(self.ranks, Mapping):
            return self._all_ranks()[0]
        if node not in self.ranks:
            raise FedspanError(f"node {node} has no rank: expected one of {sorted(self.ranks)}")
        return self.ranks[node]

    def _drawn(self, grid: Grid, share: float, server_round: int, purpose: str) -> list[int]:
        end = time.monotonic() + self.wait
        while len(nodes := sorted(grid.get_node_ids())) < self.min_nodes:
            if time.monotonic() > end:
                raise FedspanError(f"{len(nodes)} nodes after {self.wait:g} s: expected at least {self.min_nodes}")
            time.sleep(min(_LOOK, self.wait))
        stream = ("train", "evaluate").index(purpose)
        sampler = UniformSampler(share, self.min_nodes, self.state.template.seed, stream)
        return [nodes[i] for i in sampler.draw(len(nodes), server_round)]

    def _messages(
        self, sent: Mapping[int, Broadcast], server_round: int, config: ConfigRecord, kind: str
    ) -> list[Message]:
        told = ConfigRecord({**config, "server-round": server_round})
        made: dict[int, RecordDict] = {}  # nodes of one rank share one record, which Flower uploads once
        messages = []
        for node, broadcast in sent.items():
            rank = self._rank(node)
            if rank not in made:
                made[rank] = tensors.record_of(broadcast, self.method, server_round, rank)
                made[rank][_CONFIG] = told
            messages.append(Message(made[rank], node, kind, ttl=self.lifetime, group_id=str(server_round)))
        return messages


def _check_method(method: Method) -> None:
    info = method.info
    start = next(f.default for f in fields(Method) if f.name == "start")
    for wrong, reason in (
        (info.pooled or info.alone, "is a control"),
        (len(method.exchanges) != 1, "has several exchanges a round"),
        (info.personalised or method.start is not start, "keeps something at its clients"),
    ):
        if wrong:
            raise FedspanError(f"{info.name} {reason}: expected one plain exchange; see `fedspan flower init`")


def _check_broadcast(method: Method, sent: Broadcast) -> None:
    plain = Recipe(train_a=sent.recipe.train_a, train_b=sent.recipe.train_b, proximal=sent.recipe.proximal)
    if sent.patch or sent.correction or sent.subspaces or sent.moments or sent.recipe != plain:
        raise FedspanError(
            f"{method.info.name} sends its clients more than factors and weights: expected nothing else; "
            "see `fedspan flower init`"
        )


def _check_later(method: Method) -> None:
    """That it goes on as it begins: some methods add to their clients' base once clients differ."""
    weights = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    state = method.init(Template({"x": (2, 2)}, 1), {"x": weights})
    updates = []
    for name, shift in (("a", 1.0), ("b", 2.0)):
        sent = method.broadcast(state, Request(1))
        modules = {k: Factors(f.b + weights[:, :1] * shift, f.a + shift, f.scaling) for k, f in sent.adapter.items()}
        dense = {k: x + shift for k, x in sent.dense.items()}
        updates.append(method.encode(Update(name, 1.0, modules, dense), sent, None)[0])
    state, _ = aggregate(method, state, updates)
    if state.patches is not None:
        raise FedspanError(
            f"{method.info.name} adds to its clients' base: expected factors and weights alone; "
            "see `fedspan flower init`"
        )
