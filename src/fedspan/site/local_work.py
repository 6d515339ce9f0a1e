"""One client's work in a round: from a question and what was sent with it to the update that leaves the site."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedspan.client.cohort import engine_of_one
from fedspan.client.executors import InlineExecutor
from fedspan.client.training import Assignment, LocalResult, num_steps
from fedspan.config import Config
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Question, begin, respond, sum_layout, unlearnt, widened
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, ClientState, Recipe, Request, Template, Update
from fedspan.privacy.ledgers import ExampleLedgers
from fedspan.privacy.sum_layout import SumLayout
from fedspan.site.contents import ContentStore
from fedspan.site.errors import Refused
from fedspan.site.loading import Loaded
from fedspan.site.message_checks import RoundHeader, check_patch, check_tensors, check_work
from fedspan.site.storage import SiteStorage
from fedspan.support.errors import FedspanError
from fedspan.wire import protocol
from fedspan.wire.contents import filled
from fedspan.wire.precision import EXACT
from fedspan.wire.refusals import Code


@dataclass(frozen=True, slots=True)
class LocalAnswer:
    """The update that answers a question, before it is put into a message."""

    update: Update
    train_loss: float
    optimizer_bytes: int
    seconds: float
    """Time at work."""
    layout: SumLayout | None
    """Of the sum that the question is about."""
    stored: bool
    """Every tensor that was to be kept is held."""


class LocalWork:
    """The work of a site's client, and what it holds between the exchanges of a round.

    Parameters
    ----------
    loaded
        The base and data that it works on.
    storage
        Its state and patches on disk.
    examples
        The account of its examples' privacy, under `privacy.dp = "example"`.
    contents
        Tensors that it was sent before.

    Raises
    ------
    FedspanError
        When `engine.name = "cohort"` and the model or the method does not allow it.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        client: Client,
        loaded: Loaded,
        storage: SiteStorage,
        examples: ExampleLedgers | None,
        contents: ContentStore,
    ) -> None:
        self._contents = contents
        self._method, self._client, self._storage, self._examples = method, client, storage, examples
        self._adapter, self._seed = config.adapter, config.seed
        self._steps = num_steps(config.local, client.num_examples)
        self._secure = config.privacy.secure_sums
        self._weight = client.weight(config.federation.weighting)
        self._engines: dict[Recipe, str] = {}
        """The engine for every recipe that has occurred."""
        self._model, self._initial = loaded.context.model, loaded.initial
        self._data = loaded.context.data["train"].subset(client.indices)
        self._executor = InlineExecutor(loaded.context)
        self._derived: Broadcast | None = None
        """The method's broadcast before it has learnt anything: tensors equal to it are not sent."""
        self._result: LocalResult | None = None
        """The result of training, while a later exchange of the round may ask about it."""
        self._result_of: tuple[str, int] | None = None
        """The run and round of that result."""
        self._state: ClientState | None = None
        self._widened: Broadcast | None = None
        """The broadcast that a client of the rank of the sum's layout would have started training from."""
        template = self._model.template(client.rank, self._adapter.alpha, self._adapter.rslora, self._seed)
        # Here, so that an engine that cannot do this method's work is refused before the first round.
        self._engine(method.broadcast(method.init(template, self._initial), Request(client.rank)).recipe)

    def evaluation(self, message: Mapping[str, Any], header: RoundHeader) -> Question:
        """Return the question that a message about the client's held-out rows asks.

        Raises
        ------
        Refused
            When its number is that of an exchange.
        """
        exchanges = self._method.exchanges
        if header.number != len(exchanges) or message["keep"] or tuple(message["place"]) != (0, 1):
            raise Refused(f"an evaluation as exchange {header.number}: expected {len(exchanges)}, by itself")
        # Whether a method keeps a state is asked of what a client trains: of a gradient, the derived broadcast may lack
        # the subspaces.
        trained = next((exchange for exchange in exchanges if exchange.ask == "train"), exchanges[0])
        return Question(self._template(header), header.round_num, header.number, trained, (0, 1), keep=False)

    def received_model(
        self, message: Mapping[str, Any], header: RoundHeader, tensors: Sequence[Tensor], question: Question
    ) -> tuple[Broadcast, bool]:
        """Return the model that the client has after a broadcast: with its own state, where the method keeps one; and
        whether the client keeps all that it was asked to.

        Raises
        ------
        Lacking
            When the message names a tensor by its digest that this site does not hold.
        """
        sent, stored = self._received(message, header, tensors, question)
        started = self._method.start(sent, self._state_after(header, question))
        self._derived = None  # of another round than the one that may be going on
        self._model.check_fits(started)
        return started, stored

    def question(self, message: Mapping[str, Any], header: RoundHeader) -> Question:
        """Return the question that a message asks.

        Raises
        ------
        Refused
            When the method has no such exchange in that round.
        """
        exchanges = self._method.exchanges
        if header.number >= len(exchanges):
            raise Refused(f"exchange {header.number}: {self._method.info.name} has {len(exchanges)}")
        # Derived, and only compared with the message: a site that let the server say which exchange of the round it is
        # could be asked for one as if it were several.
        due = [number for number, exchange in enumerate(exchanges) if exchange.due(header.round_num)]
        place, num_places = message["place"]
        if num_places != len(due) or place >= len(due) or due[place] != header.number:
            raise Refused(
                f"exchange {header.number} as number {place} of {num_places} in round {header.round_num}: expected one "
                f"of {due} in this order"
            )
        exchange, keep = exchanges[header.number], bool(message["keep"])
        return Question(self._template(header), header.round_num, header.number, exchange, (place, num_places), keep)

    def answer(
        self, question: Question, message: Mapping[str, Any], header: RoundHeader, tensors: Sequence[Tensor]
    ) -> LocalAnswer:
        """Do the work that a question asks for.

        Raises
        ------
        Refused
            When the question assumes something that this site does not hold, or the result must not leave it.
        Lacking
            When the message names a tensor by its digest that this site does not hold.
        """
        sent, stored = self._received(message, header, tensors, question)
        layout = self._layout(question, header, sent, message["sum"]["rank"]) if "sum" in message else None
        if question.place[0] == 0:
            # Read from disk in every round: after a lost answer the state in memory is ahead of the one that counts.
            self._state = self._state_after(header, question)
        began = time.perf_counter()
        if question.exchange.ask == "again":
            started = sent
        else:
            started = begin(self._method, question, sent, self._state)
            self._result = self._train(started, header.run, question.round_num)
            self._result_of = (header.run, header.round_num)
        # In another round it would be in a second sum, whose clients may be others: the difference would be bare.
        if self._result is None or self._result_of != (header.run, header.round_num):
            raise Refused("a question about a training result that this site does not hold any more", Code.NOT_HELD)
        # Exact here: tensors are rounded when they are put into the message, to the same bits.
        response = respond(self._method, question, self._result, started, self._state, EXACT, self._weight)
        seconds = time.perf_counter() - began
        if response.problem is not None:
            raise Refused(response.problem, Code.UNFIT)
        assert response.update is not None
        if response.kept is not None:
            self._state = response.kept
            self._storage.keep(header.run, question.round_num + 1, response.kept)
        result = self._result
        # A secure sum that failed through false shares is asked for again.
        if not question.keep and not self._secure:
            self._result = None
        return LocalAnswer(response.update, result.train_loss, result.optimizer_bytes, seconds, layout, stored)

    def _template(self, header: RoundHeader) -> Template:
        adapter = self._adapter
        return self._model.template(header.rank, adapter.alpha, adapter.rslora, self._seed, header.num_clients)

    def _layout(self, question: Question, header: RoundHeader, sent: Broadcast, rank: int) -> SumLayout:
        """Return the layout of a sum, that of a client of this rank, as the server must derive it too."""
        own = self._client.rank
        if type(rank) is not int or not own <= rank <= max(own, header.rank):
            raise Refused(f"a sum of clients of rank {rank!r}: expected {own} to {header.rank}")
        started = begin(self._method, question, widened(sent, question.template, own, rank), None)
        if question.exchange.ask != "again":
            self._widened = started
        return sum_layout(self._method, question.template, started, self._widened)

    def _received(
        self, message: Mapping[str, Any], header: RoundHeader, tensors: Sequence[Tensor], question: Question
    ) -> tuple[Broadcast, bool]:
        """Return the broadcast, completed with what this site derives by itself and what it holds, and whether it keeps
        all that it was asked to."""
        if question.place[0] == 0 or self._derived is None:
            state = replace(self._method.init(question.template, self._initial), round_num=question.round_num)
            self._derived = self._method.broadcast(state, Request(self._client.rank))
        tensors = filled(
            tensors,
            message.get("held", ()),
            self._contents.get,
            lambda known: self._completed(message, known, question),
        )
        news = protocol.get_news(message["patch"], tensors)
        for increment in news:
            check_patch(increment, question.template.modules)
        patch = self._storage.patch(header.run, message["patch"], news)
        sent = protocol.get_broadcast(message["broadcast"], tensors, self._derived, patch)
        check_tensors(sent, question.template.modules, {name: tuple(t.shape) for name, t in self._initial.items()})
        check_work(sent.recipe, self._derived.recipe)
        # After the checks, so that nothing is kept that no model of this site has.
        return sent, all([self._contents.put(tensors[place]) for place in message.get("store", ())])

    def _completed(self, message: Mapping[str, Any], tensors: Sequence[Tensor], question: Question) -> Sequence[Tensor]:
        """Return the tensors that the method completes from earlier ones and the news; none where it cannot."""
        previous, complete = message.get("previous"), self._method.complete
        if previous is None or complete is None or self._derived is None:
            return ()
        try:
            part = protocol.get_broadcast(previous["broadcast"], tensors, self._derived, {})
            check_tensors(part, question.template.modules, {name: tuple(t.shape) for name, t in self._initial.items()})
            return complete(question.template, part, protocol.get_news(previous, tensors))
        except FedspanError:
            return ()  # of what is held in part, or does not fit, nothing is made: it is sent whole

    def _state_after(self, header: RoundHeader, question: Question) -> ClientState | None:
        """Return this client's state after the last round whose answer counted; None where the method keeps none."""
        state = self._storage.state(header.run, header.counted)
        if state is None and header.counted and self._derived is not None:
            # The method tells by encoding an update of the right shapes whether it keeps a state at all.
            started = begin(self._method, question, self._derived, None)
            if self._method.encode(unlearnt(question.template, started), started, None)[1] is not None:
                raise Refused(
                    f"the server counts on this site's state after round {header.counted}, which it does not hold",
                    Code.NOT_HELD,
                )
        return state

    def _engine(self, recipe: Recipe) -> str:
        """Return the engine for a recipe; the trial that it takes is made once."""
        if recipe not in self._engines:
            context = self._executor.context
            self._engines[recipe] = engine_of_one(self._model, context.data["train"], recipe, context.training)
        return self._engines[recipe]

    def _train(self, started: Broadcast, run: str, round_num: int) -> LocalResult:
        client, ledgers = self._client, self._examples
        self._model.check_fits(started)
        assignment = Assignment(client.client_id, started, client.indices, self._steps, self._weight)
        if ledgers is not None:
            ask = ledgers.ask(run, client.client_id, round_num, self._steps, started, self._data)
            ledgers.check(ask)
            assignment = replace(assignment, secret=ledgers.secret(ask))
        ((result, _),) = self._executor.train([assignment], round_num, self._engine(started.recipe))
        if ledgers is not None:
            # Before it is encoded, so that nothing of it leaves which is not on the disk.
            ledgers.charge(ask, result.update)
        return result
