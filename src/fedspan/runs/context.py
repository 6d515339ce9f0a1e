"""The things that a run needs in memory: its data, its model, its clients, and the executor of its work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspan.client.evaluation import Figures, spread_rows
from fedspan.client.executors import EvaluationTask, Executor
from fedspan.client.setup import Prepared, device_of, notes_of
from fedspan.config import Config
from fedspan.data import Corpus, Encoded, no_rows
from fedspan.data.load import load_no_rows
from fedspan.federation import requirements
from fedspan.federation.clients import Client, make_clients, partition_note, site_test_rows
from fedspan.federation.held_out import HeldOutTerms
from fedspan.federation.held_out_metrics import check_judged, left_out_notes
from fedspan.federation.sampling import ClientSampler, create_sampler
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel
from fedspan.privacy.fixed_point import FixedPoint
from fedspan.privacy.ledgers import ExampleLedgers
from fedspan.privacy.running_sum import SumSettings
from fedspan.privacy.secret_file import secret_of
from fedspan.runs.events import Event, OnEvent
from fedspan.runs.identity import identity
from fedspan.runs.provision import Provision, Wanted
from fedspan.server.coordinator import Coordinator
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement
from fedspan.wire.transport import Transport


@dataclass(slots=True)
class RunContext:
    """A run's data, model and clients in memory. The run folder alone records how far the run has come."""

    config: Config
    method: Method
    out: Path
    """The run folder."""
    on_event: OnEvent
    clients: list[Client]
    model: FederatedModel
    initial_dense: Mapping[str, torch.Tensor]
    """Heads and trained weights of the untouched base."""
    prepared: Prepared
    """The data as the base reads it."""
    metrics: tuple[str, ...]
    """Names of the metrics; the summary's headlines are of the first."""
    executor: Executor
    sampler: ClientSampler
    device: torch.device
    """The device of the local work; with several workers the model here stays on the CPU."""
    num_workers: int
    """Processes that share the local work and the evaluation."""
    described: Mapping[str, Any]
    """The rows of every split and the classes, as `Corpus.describe` says them."""
    site_tests: Mapping[str, np.ndarray]
    """Client named after its file -> the rows of the test data that are of this file."""
    shared: bool = False
    """The executor works for other runs too."""
    ready: Callable[[], None] = lambda: None
    """Returns when the run may begin, once other runs that share its work are ready too."""
    coordinator: Coordinator | None = None
    """Reaches the clients of a federation of real sites; none: the clients are simulated."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """The settings, base, data and libraries, for the checkpoints."""
    total: SumSettings | None = None
    """Takes the sums of simulated clients' updates in fixed point; none: updates are folded as they are."""
    examples: ExampleLedgers | None = None
    """Ledgers of simulated clients that train by DP-SGD."""
    held_out: HeldOutTerms | None = None
    """The form in which the clients judge what they receive on rows of their own; none: they do not."""

    @classmethod
    def prepare(
        cls,
        config: Config,
        method: Method,
        out: Path,
        on_event: OnEvent,
        transport: Transport | None = None,
        trusted: Mapping[str, bytes] | None = None,
        provision: Provision | None = None,
    ) -> RunContext:
        """Read everything that a run needs.

        Parameters
        ----------
        transport
            Reaches the clients; none: they are simulated in this process.
        trusted
            As of `Coordinator`.
        provision
            Makes the costly parts; none: for this run alone.

        Raises
        ------
        FedspanError
            For anything that can be known to be wrong before training.
        """
        torch.set_num_threads(config.threads)
        provision = provision or Provision()
        corpus = provision.corpus(config) if transport is None else _corpus_of_server(config, provision)
        coordinator = None
        if transport is None:
            clients = make_clients(corpus, config.federation, config.federation_seed, config.data.client_holdout)
        else:
            coordinator = Coordinator(transport, config, method, out, _site_lines(on_event), trusted)
            clients = coordinator.gather()
        sampler = create_sampler(config.federation, config.federation_seed, config.privacy.dp, secret_of(out))
        num_sampled = max(1, round(sampler.expected_size(len(clients))))
        if not method.info.pooled:
            _check_min_success(config.federation.min_success, num_sampled)
        prepared = provision.prepared(config, corpus)
        data = prepared.data
        device = device_of(config.device)
        # There is at most one task for each client of a round, or for each batch of an evaluation.
        num_tasks = max(num_sampled, -(-len(data["test"]) // config.evaluation.batch_size))
        max_rank = max(client.rank for client in clients)
        wanted = Wanted(
            config,
            prepared,
            method.info.trains,
            max_rank,
            requirements.galore_rank(method),
            device,
            num_tasks,
            training=coordinator is None,
        )
        provided = provision.work(wanted)
        model, initial_dense, base = provided.model, provided.initial_dense, provided.base
        if coordinator is not None:
            # Last, since it needs the base: sites with another base are turned away before the first round.
            shapes = agreement.shapes(model.modules(), initial_dense)
            read = prepared.corpus
            labels = agreement.labels(read.kind, read.num_labels, read.label_names)
            clients = coordinator.agree(base, labels, shapes, initial_dense, clients)
        described = identity(config, base, data)
        held_out = _held_out(config, prepared.corpus, method)
        site_tests = site_test_rows(corpus, config.federation)
        if (
            held_out is not None
            and coordinator is None
            and not any(c.client_id in site_tests or len(c.holdout) for c in clients)
        ):
            raise FedspanError(
                f"evaluation.where = {config.evaluation.where!r}: no client has held-out rows of its own; expected "
                "data.client_holdout above 0, or a file of each client in data.test"
            )
        return cls(
            config=config,
            method=method,
            out=out,
            on_event=on_event,
            clients=clients,
            model=model,
            initial_dense=initial_dense,
            prepared=prepared,
            metrics=corpus.metrics,
            executor=provided.executor,
            sampler=sampler,
            # A base on several devices says itself where batches go.
            device=model.device if model.places else device,
            num_workers=provided.num_workers,
            described=prepared.corpus.describe(),
            site_tests=site_tests,
            shared=provided.shared,
            ready=partial(provision.ready, described),
            coordinator=coordinator,
            total=_total(config),
            identity=described,
            examples=_ledgers(config, base, out) if coordinator is None else None,
            held_out=held_out,
        )

    @property
    def processor(self) -> Any:
        """The base's tokenizer or image processor."""
        return self.prepared.processor

    @property
    def data(self) -> Mapping[str, Encoded]:
        """`train`, `test`, and `unseen` where there is any."""
        return self.prepared.data

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on how base and data were read where that may surprise, and on metrics that are left out."""
        # Real sites have their own rows: nothing is divided.
        divided = () if self.coordinator else partition_note(self.prepared.corpus, self.config.federation)
        left_out: tuple[str, ...] = ()
        if self.held_out is not None:
            left_out = left_out_notes(self.config, self.held_out.layout, self.metrics)
        return (*divided, *self._unused_validation(), *left_out, *notes_of(self.prepared, self.model))

    def _unused_validation(self) -> tuple[str, ...]:
        """Return a line about validation rows that are kept from the training and not used otherwise."""
        num_rows = len(self.data.get("validation", ()))
        if not (num_rows and self.method.info.personalised):
            return ()
        judged = "judged on the client's held-out rows" if self.judged_by_clients else "so there is no best round"
        own = f"each client of {self.method.info.name} has a model of its own, {judged}"
        return (f"the {num_rows:,} rows of data.validation are not used: {own}",)

    @property
    def judged_by_clients(self) -> bool:
        """The clients' own rows find the best round: no validation data does, and personal models are theirs alone."""
        judged = self.held_out is not None
        return judged and (self.method.info.personalised or "validation" not in self.data)

    def emit(self, kind: str, **data: Any) -> None:
        """Notify the display of an event."""
        self.on_event(Event(kind, data))

    def evaluation_task(
        self, broadcast: Broadcast, whole: bool = True, split: str = "test", rows: np.ndarray | None = None
    ) -> EvaluationTask:
        """Return the task that evaluates a broadcast.

        Parameters
        ----------
        whole
            On all the data, not only the part that `evaluation.max_examples` allows between rounds.
        rows
            Positions in the split; none: all of it.
        """
        most = self.config.evaluation.max_examples
        if not whole and most is not None:
            given = np.arange(len(self.data[split])) if rows is None else rows
            rows = spread_rows(given, most) if most < len(given) else rows
        return EvaluationTask(broadcast, split, rows)

    def evaluate(self, tasks: Iterable[EvaluationTask]) -> list[Figures]:
        """Return the loss and the metrics of every task."""
        return self.executor.evaluate(list(tasks))

    def close(self) -> None:
        """End every process that was started."""
        self.executor.close()


def _corpus_of_server(config: Config, provision: Provision) -> Corpus:
    """Return the server's rows, or what the settings say of the sites' where it has none."""
    if not no_rows.has_none(config.data):
        return provision.corpus(config)
    if config.evaluation.where != "clients":
        raise FedspanError(
            f"evaluation.where = {config.evaluation.where!r} and no data.train: a server without data judges nothing; "
            "expected 'clients'"
        )
    return load_no_rows(config.data)


def _held_out(config: Config, corpus: Corpus, method: Method) -> HeldOutTerms | None:
    if config.evaluation.where == "server":
        return None
    terms = HeldOutTerms.of(config, corpus.metrics, corpus.num_labels)
    check_judged(config, terms.layout, corpus.metrics, method.info.personalised or not config.data.validation)
    return terms


def _site_lines(on_event: OnEvent) -> Callable[[str], None]:
    """Return a function that turns the coordinator's lines about sites into events."""
    return lambda line: on_event(Event("site", {"line": line}))


def _check_min_success(min_success: int, num_sampled: int) -> None:
    if min_success > num_sampled:
        raise FedspanError(
            f"federation.min_success = {min_success}, but only {num_sampled} clients are sampled per round"
        )


def _ledgers(config: Config, base: str, out: Path) -> ExampleLedgers | None:
    if config.privacy.dp != "example":
        return None
    setting = f"{agreement.digest(agreement.terms(config))} {base}"
    return ExampleLedgers(config.privacy, config.local.batch_size, out, setting)


def _total(config: Config) -> SumSettings | None:
    privacy = config.privacy
    if not privacy.secure_sums and not privacy.fixed_point:
        return None
    least = requirements.least_in_sums(config.federation, privacy) if privacy.secure_sums else 2
    point = FixedPoint(privacy.fraction_bits)
    return SumSettings(point, privacy.secure_sums, privacy.threshold, str(config.seed), least)
