"""A Flower strategy that runs one of our methods, for users with their own Flower app.

    # ServerApp
    strategy = FedspanStrategy(create_method("glora"), template, ranks={node: 4, other: 16})
    strategy.start(grid, strategy.arrays(), num_rounds=10)

    # ClientApp
    @app.train()
    def train(message, context):
        sent = received(message)  # factors by module, with their scaling, and dense weights
        ...
        return reply(message, method, Update("clinic-1", num_examples, modules, dense), {"train_loss": loss})

The server's step has the bits of `fedspan.aggregate`. Methods that need several exchanges per round, or that keep
state at the clients, run in fedspan's own app (`fedspan flower init`).
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
from fedspan.federation.server_step import take_step
from fedspan.flower import tensors
from fedspan.flower.tensors import figures, received, reply
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Factors, Recipe, Request, Template, Tensors, Update
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.seeding import generator

__all__ = ["FedspanStrategy", "figures", "received", "reply"]

_POLL = 0.5
_CONFIG = "config"
_MAX_REASON = 300
"""Characters of the reason against a reply."""


class FedspanStrategy(Strategy):
    """One of our methods as a Flower strategy.

    Parameters
    ----------
    method
        As made by `fedspan.create_method`.
    template
        The adapted modules' shapes, the largest rank and the scaling rule.
    dense
        Trained dense weights of the base (heads; for full-weight methods all trained weights).
    ranks
        Ranks that the nodes train: one for all, or one by node id; none: the template's.
    participation
        Share of the connected nodes that train in a round, drawn by the template's seed from the sorted node ids.
    min_nodes
        Smallest number of nodes that train in a round; the strategy waits for them.
    min_success
        Smallest number of valid replies; with fewer the run ends.
    evaluation
        Share of the connected nodes that evaluate after a round.
    wait
        Longest time to wait for `min_nodes` nodes, in seconds.
    lifetime
        Seconds after which a message or its reply expires.

    Raises
    ------
    FedspanError
        For a method that one exchange per round cannot carry, or settings out of range.
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
        """The method's own figures for each round."""
        self.rejected: dict[str, str] = {}
        """Rejected replies of the last round: node -> reason."""
        self._pending: dict[int, Broadcast] = {}
        self._owners: dict[str, int] = {}
        """Client id -> the node that used it first."""
        for rank in self._all_ranks():
            _check_broadcast(method, self.broadcast(rank))
        _check_later(method, self.state.template.rank, self._all_ranks())

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
        """Create a strategy for an untrained adapter in Flower's form, such as PEFT's state dict.

        Parameters
        ----------
        arrays
            `MODULE.lora_A.weight` and `MODULE.lora_B.weight`, or `MODULE/a` and `MODULE/b`, of the largest rank, and
            dense weights. Only the factors' shapes are used: the method makes the first adapter.

        Raises
        ------
        FedspanError
            For factors that are incomplete, of different ranks, or already trained.
        """
        template, dense = tensors.template_of(arrays, alpha, rslora, seed)
        return cls(method, template, dense=dense, **settings)

    def broadcast(self, rank: int | None = None) -> Broadcast:
        """Return the broadcast for a node of that rank; none: everything that the server holds."""
        return self.method.broadcast(self.state, Request(rank))

    def arrays(self, rank: int | None = None) -> ArrayRecord:
        """Return `broadcast` as Flower's record: the first argument of `start`, and its result."""
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
        """Return the round's messages, one for each node drawn.

        Raises
        ------
        FedspanError
            When too few nodes connect within `wait` seconds, or `arrays` are not this strategy's.
        """
        if not tensors.same_bits(arrays, self.arrays()):
            raise FedspanError("the arrays passed to start are not this strategy's: expected strategy.arrays()")
        nodes = self._draw_nodes(grid, self.participation, server_round, "train")
        self._pending = {node: self.broadcast(self._rank(node)) for node in nodes}
        return self._messages(self._pending, server_round, config, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the replies and take the server's step.

        Raises
        ------
        FedspanError
            When fewer than `min_success` replies are valid, or they give no finite model; the state is then unchanged.
        """
        self.rejected = {}
        updates: dict[str, tuple[Update, MetricRecord]] = {}
        # Sorted, so that of two nodes that claim one client id the same one is accepted whatever the order of arrival.
        for message in sorted(replies, key=lambda m: (m.metadata.src_node_id, m.metadata.message_id)):
            node = message.metadata.src_node_id
            try:
                if node not in self._pending:
                    raise FedspanError("it was not sampled, or has replied before")
                update = tensors.update_of(message, self.method, self._pending.pop(node), server_round)
                if self._owners.setdefault(update.client_id, node) != node:
                    raise FedspanError(f"its client-id {update.client_id!r} belongs to another node")
                updates[update.client_id] = update, tensors.metrics_of(message)
            except FedspanError as error:
                self._reject(str(node), str(error))
        for node in self._pending:
            self._reject(str(node), "no reply")
        if len(updates) < self.min_success:
            first = next((f": {node}: {reason}" for node, reason in self.rejected.items()), "")
            raise FedspanError(
                f"round {server_round}: {len(updates)} valid replies, min_success = {self.min_success}{first}"
            )
        fold, partial = self.method.exchanges[0].fold, Partial()
        for _, (update, _) in sorted(updates.items()):
            partial = fold.add(partial, update)
        self.state, diagnostics = take_step(self.method, self.state, partial)
        self.diagnostics.append(diagnostics)
        weighted = [(updates[name][0].num_examples, updates[name][1]) for name in sorted(updates)]
        return self.arrays(), tensors.mean_metrics(weighted)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the evaluation messages, one for each node drawn."""
        if self.evaluation == 0:
            return []
        nodes = self._draw_nodes(grid, self.evaluation, server_round, "evaluate")
        sent = {node: self.broadcast(self._rank(node)) for node in nodes}
        return self._messages(sent, server_round, config, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the nodes' mean figures, weighted by their numbers of examples."""
        results: list[tuple[str, float, MetricRecord]] = []
        for message in replies:
            try:
                client_id, num_examples = tensors.sender_of(message, server_round)
                results.append((client_id, num_examples, tensors.metrics_of(message)))
            except FedspanError as error:
                self._reject(str(message.metadata.src_node_id), str(error))
        results.sort(key=lambda result: result[0])
        return tensors.mean_metrics([(weight, metrics) for _, weight, metrics in results]) if results else None

    def _reject(self, node: str, reason: str) -> None:
        reason = self.rejected[node] = one_line(reason, _MAX_REASON)
        log(WARNING, "the reply of node %s is rejected: %s", node, reason)

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

    def _draw_nodes(self, grid: Grid, share: float, server_round: int, purpose: str) -> list[int]:
        end = time.monotonic() + self.wait
        while len(nodes := sorted(grid.get_node_ids())) < self.min_nodes:
            if time.monotonic() > end:
                raise FedspanError(
                    f"{len(nodes)} nodes are connected after {self.wait:g} s: expected at least {self.min_nodes}"
                )
            time.sleep(min(_POLL, self.wait))
        stream = ("train", "evaluate").index(purpose)
        sampler = UniformSampler(share, self.min_nodes, self.state.template.seed, stream)
        return [nodes[i] for i in sampler.draw(len(nodes), server_round)]

    def _messages(
        self, sent: Mapping[int, Broadcast], server_round: int, config: ConfigRecord, kind: str
    ) -> list[Message]:
        round_config = ConfigRecord({**config, "server-round": server_round})
        records: dict[int, RecordDict] = {}  # nodes of one rank share one record, which Flower uploads once
        messages = []
        for node, broadcast in sent.items():
            rank = self._rank(node)
            if rank not in records:
                records[rank] = tensors.record_of(broadcast, self.method, server_round, rank)
                records[rank][_CONFIG] = round_config
            messages.append(Message(records[rank], node, kind, ttl=self.lifetime, group_id=str(server_round)))
        return messages


def _check_method(method: Method) -> None:
    info = method.info
    start = next(f.default for f in fields(Method) if f.name == "start")
    for wrong, reason in (
        (info.pooled or info.alone, "is a control"),
        (len(method.exchanges) != 1, "has several exchanges per round"),
        (info.personalised or method.start is not start, "keeps state at its clients"),
    ):
        if wrong:
            raise FedspanError(f"{info.name} {reason}: expected a method with one exchange; see `fedspan flower init`")


def _check_broadcast(method: Method, sent: Broadcast) -> None:
    plain = Recipe(train_a=sent.recipe.train_a, train_b=sent.recipe.train_b, proximal=sent.recipe.proximal)
    if sent.patch or sent.correction or sent.subspaces or sent.moments or sent.recipe != plain:
        raise FedspanError(
            f"{method.info.name} sends its clients more than factors and weights: expected only these; "
            "see `fedspan flower init`"
        )


def _check_later(method: Method, largest: int, ranks: Iterable[int]) -> None:
    """Refuse methods that change the clients' base in later rounds, which shows only after updates that differ.

    Parameters
    ----------
    largest, ranks
        The template's rank, and those of the clients.
    """
    size = 3 * largest + 1  # so that the updates span more directions than any client's adapter
    x = torch.randn((size, size), generator=generator("flower", "later rounds"))
    state = method.init(Template({"x": (size, size)}, largest), {"x": x})
    updates = []
    for number, rank in enumerate(r for r in ranks for _ in range(3)):
        sent = method.broadcast(state, Request(rank))
        step = x.roll(number * largest, dims=0)
        modules = {
            k: Factors(f.b + step[:, : f.rank], f.a + step[: f.rank], f.scaling) for k, f in sent.adapter.items()
        }
        dense = {k: value + 1 + number for k, value in sent.dense.items()}
        updates.append(method.encode(Update(f"{number}", 1.0, modules, dense), sent, None)[0])
    state, _ = aggregate(method, state, updates)
    if state.patches is not None or any(method.broadcast(state, Request(rank)).patch for rank in ranks):
        raise FedspanError(
            f"{method.info.name} changes its clients' base: expected only factors and weights; "
            "see `fedspan flower init`"
        )
