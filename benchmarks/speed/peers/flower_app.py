"""The Flower apps: a module of its own, so that Ray's actors import it once and its cache lives as long as they do."""

from __future__ import annotations

import time

import common
import measure
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's local work of one round."""
    config = message.content["config"]
    held = common.trainer(str(config["spec"]))
    client = int(context.node_config["partition-id"])
    sent = common.unflatten(message.content["arrays"]["adapter"].numpy(), held.shapes)
    result = held.train(client, int(config["server-round"]), sent)
    metrics = {
        "num-examples": result.num_examples,
        "train_loss": result.train_loss,
        "started": result.started,
        "seconds": result.seconds,
    }
    return Message(RecordDict({"arrays": _record(result.adapter), "metrics": MetricRecord(metrics)}), reply_to=message)


def _record(adapter: common.Adapter) -> ArrayRecord:
    """One array for the whole adapter: fewer to serialise, and FedAvg averages it all the same."""
    return ArrayRecord({"adapter": Array(common.flatten(adapter))})


class LoggedFedAvg(FedAvg):
    """Flower's FedAvg; it only notes when a round has been aggregated."""

    log: measure.Log

    def aggregate_train(self, server_round, replies):
        """Aggregate as Flower does, then log the round."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed or arrays is None:
            raise RuntimeError(f"round {server_round}: {len(failed)} clients failed: {failed[:1]}")
        held = [dict(reply.content["metrics"]) for reply in replies]
        self.log.add(
            [float(m["train_loss"]) for m in held],
            [float(m["num-examples"]) for m in held],
            [float(m["started"]) for m in held],
            sum(float(m["seconds"]) for m in held),
        )
        return arrays, metrics


def server(spec_path: str, log: measure.Log, final: common.Adapter, pull_interval: float) -> ServerApp:
    """The server's app: it fills `log` and `final` as it goes."""
    app = ServerApp()
    spec = common.Spec.read(spec_path)

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        grid.pull_interval = pull_interval  # of the in-memory grid: 0.1 s unless told otherwise
        strategy = LoggedFedAvg(
            fraction_train=spec.participation,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=spec.num_clients,
        )
        strategy.log = log
        first = common.initial_adapter(spec_path)
        while len(list(grid.get_node_ids())) < spec.num_clients:  # Flower's own wait sleeps a whole second
            time.sleep(0.01)
        config = ConfigRecord({"spec": spec_path})
        result = strategy.start(grid, _record(first), num_rounds=spec.rounds, timeout=3600.0, train_config=config)
        final.update(common.unflatten(result.arrays["adapter"].numpy(), common.shapes(first)))

    return app
