"""The loop over a run's rounds: one method over one set of clients, checkpointed after every round."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedspan.client.learning_rates import check_groups
from fedspan.diagnostics.measure import measure
from fedspan.federation.clients import Client, pooled
from fedspan.federation.exchange import WINDOW, Answer
from fedspan.federation.held_out import ClientEvaluation, record_of
from fedspan.federation.round_spool import round_spool
from fedspan.federation.rounds import Observe, OnAnswer, RunState, conduct
from fedspan.federation.simulated import SimulatedClients
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Request
from fedspan.privacy.budget import BudgetSpent
from fedspan.robust import screen
from fedspan.runs import checkpoint
from fedspan.runs.best import best_record, is_spent
from fedspan.runs.checkpoint import Checkpoint
from fedspan.runs.client_evaluation import evaluated_by_clients
from fedspan.runs.context import RunContext
from fedspan.runs.engine_choice import EngineChoice, choose_engine, engine_used, measured_cohort_size
from fedspan.runs.history import write_history
from fedspan.runs.identity import check_identity
from fedspan.runs.precision_choice import chosen_precision, use_precision
from fedspan.runs.privacy_budget import ClientBudget, PrivacyBudget, create_budget
from fedspan.runs.results import set_aside
from fedspan.runs.scoring import mean_figures, personal_figures
from fedspan.runs.simulated_work import SimulatedWork, steps_of
from fedspan.support import parallel
from fedspan.wire.precision import Precision

FEDERATION = "federation"
"""The phase of the method that the run is about; any other is a control."""


@dataclass(slots=True)
class MethodRun:
    """One method over one set of clients, checkpointed after every round."""

    context: RunContext
    phase: str
    """`federation`, or `local` for the control in which every client trains alone."""
    method: Method
    clients: list[Client]
    path: Path
    """The checkpoint."""
    start: Checkpoint
    """Before the first round."""
    saved: Checkpoint
    """After the last finished round."""
    engine: EngineChoice
    budget: PrivacyBudget
    on_best: Callable[[MethodRun], None] = lambda run: None
    """Called after a round that is the best so far, before its checkpoint is written."""
    by_clients: tuple[int, ClientEvaluation | None] | None = None
    """The clients' last evaluation of all their rows, after so many rounds."""
    evaluated_at: float = field(default_factory=time.monotonic)
    """The time of the last evaluation by `evaluation.every_seconds`, in seconds."""

    @classmethod
    def open(cls, context: RunContext, phase: str, method: Method, clients: list[Client]) -> MethodRun:
        """Start a method over these clients, or continue from its checkpoint where there is one.

        Raises
        ------
        FedspanError
            When the method does not fit the model, or the configured engine does not fit the method; or when the
            checkpoint is damaged, or of a run with other settings, data, base or libraries.
        """
        config, model = context.config, context.model
        rank = max(client.rank for client in clients)
        adapter = config.adapter
        template = model.template(
            rank,
            adapter.alpha,
            adapter.rslora,
            config.seed,
            len(context.clients),
            adaptive=config.local.optimizer != "sgd",
        )
        start = Checkpoint(method.init(template, context.initial_dense), identity=context.identity)
        recipe = method.broadcast(start.state, Request(None)).recipe
        model.check(recipe)
        check_groups(config.local, recipe, model.trains, config.privacy)
        engine = choose_engine(context, recipe)
        path = context.out / "checkpoint" / f"{phase}.safetensors"
        saved = start
        if path.exists():
            saved = checkpoint.read(path)
            check_identity(context.out, saved.identity, context.identity)
        budget = create_budget(context, method, released=phase == FEDERATION)
        budget.check(saved.state.round_num)
        return cls(
            context=context,
            phase=phase,
            method=method,
            clients=clients,
            path=path,
            start=start,
            saved=saved,
            engine=engine,
            budget=budget,
        )

    def initial(self) -> Broadcast:
        """Return the untouched base as this method's model: its state before the first round."""
        return self.method.broadcast(self.start.state, Request(None))

    def engine_used(self) -> EngineChoice:
        """Return the engine that the first round is worked on by."""
        return engine_used(self.context, self.engine, self.method, self.start.state, self.first_cohort())

    def first_cohort(self) -> list[Client]:
        """Return the clients of the first round."""
        return pooled(self.clients) if self.method.info.pooled else self._sampled(0)

    def settle_precision(self) -> str | None:
        """Measure which precision is faster on a CPU, or take what this run's folder says of its beginning.

        Returns
        -------
        str
            The choice and the reason for it; None where the settings leave nothing open.
        """
        kept = self.saved.notes.get("precision")
        if kept is None:
            chosen = chosen_precision(self.context)
            if chosen is None:
                return None
            kept = [chosen.name, chosen.reason]
            self.note({**self.saved.notes, "precision": kept})
        use_precision(self.context, kept[0])
        return f"{kept[0]}: {kept[1]}"

    def settle_cohort_size(self) -> None:
        """Measure how many clients share a pass on a GPU, or take what this run's folder says of its beginning."""
        executor, size = self.context.executor, self.saved.notes.get("cohort_size")
        if size is None:
            size = measured_cohort_size(self.context, self.engine, self.method, self.start.state, self.first_cohort())
            if size is None:
                return
            self.note({**self.saved.notes, "cohort_size": size})
        training = executor.context.training
        engine = training.engine.model_copy(update={"cohort_size": size})
        executor.context.training = replace(training, engine=engine)

    def note(self, notes: Mapping[str, Any]) -> None:
        """Keep in the checkpoint what was measured outside the rounds."""
        self.saved = replace(self.saved, notes=notes)
        checkpoint.write(self.path, self.saved)

    def advance(self, rounds: int) -> None:
        """Run the missing rounds up to the given number of rounds, or as many as the privacy budget allows."""
        done = self.saved.state.round_num
        self.context.emit("phase", phase=self.phase, total=rounds, done=done)
        self._write_history()
        for round_num in range(done, rounds):
            cohort = self._cohort(round_num)
            if self.stopped_early():
                self.context.emit("budget", line=self._stop_line())
                break
            refusal = self.budget.refusal(round_num, cohort)
            if refusal is not None:
                self.context.emit("budget", line=refusal)
                break
            if self.phase == FEDERATION and round_num == done:
                set_aside(self.context.out, done)
            try:
                self._one_round(round_num, cohort, last=round_num + 1 == rounds)
            except BudgetSpent as error:
                # A round that was interrupted and came to something else than before, which does not fit any more.
                self.context.emit("budget", line=f"round {round_num + 1} is given up: {error}")
                break

    def _one_round(self, round_num: int, cohort: list[Client], last: bool) -> None:
        context, saved = self.context, self.saved
        # The worker processes are idle while the server works, so it may use as many threads as all of them that are on
        # this machine.
        room = context.config.engine.round_memory
        limit = None if room == "auto" else int(room * 2**30)
        threads = min(context.num_workers * context.config.threads, os.cpu_count() or 1)
        with parallel.threads(threads), round_spool(context.out / ".round", limit) as spool:
            run_state, record = conduct(
                self.method,
                RunState(saved.state, saved.client_states, saved.seen, saved.counted),
                cohort,
                context.coordinator or self._simulated(cohort),
                min_success=self._min_success(),
                sums=self._sums_only(),
                screen=screen(context.config.robust, self.method),
                on_answer=self._on_answer(round_num, len(cohort)),
                observe=self._observer(len(cohort)),
                spool=spool,
            )
        self.saved = replace(
            saved,
            state=run_state.state,
            client_states=run_state.client_states,
            seen=run_state.seen,
            counted=run_state.counted,
        )
        record |= self.budget.spent()
        record |= self._evaluations(round_num, last)
        costs = {} if context.coordinator is None else context.coordinator.costs()  # of an evaluation by the clients
        record |= {name: record[name] + cost for name, cost in costs.items()}
        if record.get("client_evaluation") is not None and costs:
            record["client_evaluation_costs"] = dict(costs)
        if best_record((*saved.history, record), self.context.metrics[0]) is record:
            # Before the checkpoint: a run that is killed in between does the round again, and writes the same.
            self.on_best(self)
        # State and record are one file, so a round is either finished with its figures or not finished at all.
        self.saved = replace(self.saved, history=(*saved.history, record))
        checkpoint.write(self.path, self.saved)
        self._write_history()
        context.emit("round", phase=self.phase, record=record)

    def stopped_early(self) -> bool:
        """Return whether the run ends before its last round, since its validation figures no longer improve."""
        patience = self.context.config.evaluation.patience
        return self.phase == FEDERATION and is_spent(self.saved.history, self.context.metrics[0], patience)

    def _stop_line(self) -> str:
        best = best_record(self.saved.history, self.context.metrics[0])
        since = "no round has a figure" if best is None else f"the best is round {best['round_num']}"
        return f"the run ends after round {self.saved.state.round_num}: evaluation.patience is spent, {since}"

    def _cohort(self, round_num: int) -> list[Client]:
        """Return the clients that are asked in a round."""
        if self.method.info.pooled:
            return pooled(self.clients)
        sampled = self._sampled(round_num)
        if self.context.coordinator is not None:
            return self.context.coordinator.draw(sampled, self.clients, round_num)
        able = self.budget.able(sampled, round_num)
        if len(able) < len(sampled):
            num_spent = len(sampled) - len(able)
            self.context.emit("budget", line=f"{num_spent} clients have spent their privacy budget")
        return able

    def _sampled(self, round_num: int) -> list[Client]:
        return [self.clients[i] for i in self.context.sampler.draw(len(self.clients), round_num)]

    def _simulated(self, cohort: Sequence[Client]) -> SimulatedClients:
        """Return the clients of this process, with their states as they are before the round."""
        context, config = self.context, self.context.config
        steps = steps_of(config.local, cohort)
        if self.method.info.pooled:
            # The centralised control trains as long as the clients of the same round would have together.
            sampled = self._sampled(self.saved.state.round_num)
            steps = {cohort[0].client_id: sum(steps_of(config.local, sampled).values())}
        weighting = config.federation.weighting
        work = SimulatedWork(context.executor, self.engine.name, weighting, steps, self.budget)
        # Sums travel as fixed-point words, which are not rounded a second time.
        up = "float32" if context.total else config.wire.up
        return SimulatedClients(
            self.method,
            work,
            self.saved.client_states,
            weighting=weighting,
            precision=Precision(up, config.wire.down),
            total=context.total,
        )

    def _min_success(self) -> int:
        """Return the number of valid answers that a round needs."""
        config = self.context.config
        if self.method.info.pooled:
            return 1
        # Client-level privacy hides who is in a round, so the number of answers must not decide anything.
        return 0 if config.privacy.dp == "client" and self.phase == FEDERATION else config.federation.min_success

    def _sums_only(self) -> bool:
        """Return whether the server sees sums alone; controls have no server that could see more."""
        return self.context.total is not None and not (self.method.info.pooled or self.method.info.alone)

    def _on_answer(self, round_num: int, num_asked: int) -> OnAnswer:
        """Return what notifies the display of every answer."""

        def on_answer(answer: Answer, done: int) -> None:
            self.context.emit(
                "client",
                phase=self.phase,
                round_num=round_num + 1,
                client_id=answer.client.client_id,
                done=done,
                cohort=num_asked,
                train_loss=None if math.isnan(answer.train_loss) else answer.train_loss,
            )

        return on_answer

    def _observer(self, num_asked: int) -> Observe | None:
        """Return what measures the server step, where that was asked for and is possible."""
        context = self.context
        wanted = context.config.evaluation.diagnostics
        if wanted == "auto":
            # It needs every client's own update: held until the round is done, and not hidden by privacy.
            hidden = context.total is not None or context.config.privacy.dp != "none"
            wanted = self.method.info.trains == "adapter" and num_asked <= WINDOW and not hidden
        if not wanted or self.phase != FEDERATION or context.coordinator is not None:
            return None
        return partial(measure, base=context.initial_dense)

    def _evaluations(self, round_num: int, last: bool) -> dict[str, Any]:
        """Return what a round's record says of the models after it."""
        where = self.context.config.evaluation.where
        due = self.phase == FEDERATION and (last or self._is_due(round_num))
        by_clients = self.evaluated_by_clients(whole=last) if due and where != "server" else None
        if due and last:
            self.by_clients = (self.saved.state.round_num, by_clients)
        if where != "clients":
            figures, rows = self._evaluated(last) if due else (None, 0)
        else:
            figures = None if by_clients is None else by_clients["figures"]
            rows = 0 if by_clients is None else by_clients["rows"] or 0
        validation = self._validated(figures is not None)
        if by_clients is not None and self.context.judged_by_clients:
            validation = by_clients["figures"]
        found: dict[str, Any] = {"eval": figures, "eval_rows": rows, "validation": validation}
        if where != "server":
            found["client_evaluation"] = None if by_clients is None else record_of(by_clients)
        return {**found, **self.budget.spent()}

    def evaluated_by_clients(self, whole: bool = True, saved: Checkpoint | None = None) -> ClientEvaluation | None:
        """Return the figures of this method's models on the clients' own rows.

        Parameters
        ----------
        saved
            The state to judge; none: that after the last finished round.
        """
        ledger = self.budget.ledger if isinstance(self.budget, ClientBudget) else None
        judged, released = saved or self.saved, self.phase == FEDERATION
        return evaluated_by_clients(
            self.context, self.method, judged, self.context.clients, whole=whole, ledger=ledger, released=released
        )

    def final_by_clients(self) -> ClientEvaluation | None:
        """Return the figures of the final models on the clients' own rows: as the last round's, where it has some."""
        if self.by_clients is None or self.by_clients[0] != self.saved.state.round_num:
            # A run that ended before its last round, or was resumed after it.
            self.by_clients = (self.saved.state.round_num, self.evaluated_by_clients())
        return self.by_clients[1]

    def _evaluated(self, last: bool) -> tuple[dict[str, float] | None, int]:
        """Return the figures on the server's test data and the examples that they are of; none for models that are not
        here."""
        context = self.context
        if self.method.info.personalised:
            # One model for each client is too much to evaluate between rounds, and those of real sites are not here.
            if not last or context.coordinator is not None:
                return None, 0
            each = list(personal_figures(context, self.method, self.saved, self.clients).values())
            return mean_figures(each), len(each[0].references)
        broadcast = self.method.broadcast(self.saved.state, Request(None))
        found = context.evaluate([context.evaluation_task(broadcast, whole=False)])[0]
        return dict(found), len(found.references)

    def _validated(self, due: bool) -> dict[str, float] | None:
        """Return the figures of the server's state on the validation data, where there is any and they are due."""
        if not due or "validation" not in self.context.data or self.method.info.personalised:
            return None
        broadcast = self.method.broadcast(self.saved.state, Request(None))
        return dict(self.context.evaluate([self.context.evaluation_task(broadcast, split="validation")])[0])

    def _is_due(self, round_num: int) -> bool:
        """Return whether a round is evaluated that is not the last."""
        evaluation = self.context.config.evaluation
        if evaluation.every_seconds is None:
            return (round_num + 1) % evaluation.every == 0
        now = time.monotonic()
        if now - self.evaluated_at < evaluation.every_seconds:
            return False
        self.evaluated_at = now
        return True

    def _write_history(self) -> None:
        if self.phase == FEDERATION:
            write_history(self.context.out, self.saved.history)
