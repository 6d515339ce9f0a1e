"""Flower's own grid over its own state in memory, with ClientApps in threads; every message is taken apart and put
together again as on the wire."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_INTERVAL_INF, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

RUN = 7


def through(message: Message) -> Message:
    """The message after its way over the wire."""
    objects = get_all_nested_objects(message)
    arrived = inflate_object_from_contents(message.object_id, {name: o.deflate() for name, o in objects.items()})
    assert isinstance(arrived, Message)
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived


class Field:
    """A grid and its nodes, whose ids rise in the order of `apps`."""

    def __init__(self, apps: list[ClientApp], configs: list[Mapping[str, str]]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SUPERLINK_NODE_ID
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        self.state = factory.state()
        run = Run.create_empty(run_id=RUN)
        run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
        self.state.run_ids[RUN] = RunRecord(run=run)
        self.state.task_store[1] = Task(task_id=1, run_id=RUN)
        self.grid = InMemoryGrid(factory, pull_interval=0.01)
        self.grid.set_run(run)
        self.nodes = sorted(self._node() for _ in apps)
        """Sorted, so that they are in the order of the apps."""
        self.served = {id(app): node for app, node in zip(apps, self.nodes, strict=True)}
        self.silent: set[int] = set()
        """Nodes that take no messages."""
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, args=(node, app, dict(config)), daemon=True)
            for node, app, config in zip(self.nodes, apps, configs, strict=True)
        ]

    def _node(self) -> int:
        node: int = self.state.create_node(
            NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, secrets.token_bytes(32), heartbeat_interval=HEARTBEAT_INTERVAL_INF
        )
        self.state.acknowledge_node_heartbeat(node_id=node, heartbeat_interval=HEARTBEAT_INTERVAL_INF)
        return node

    def _serve(self, node: int, app: ClientApp, config: dict[str, str]) -> None:
        context = Context(RUN, node, config, RecordDict(), {})
        while not self._ended.wait(0.005):
            for message in [] if node in self.silent else self.state.get_message_ins(node_id=node, limit=1):
                reply = through(app(through(message), context))
                reply.metadata.__dict__["_message_id"] = str(uuid4())
                self.state.store_message_res(reply)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()


@contextmanager
def field(*apps: ClientApp, configs: list[Mapping[str, str]] | None = None) -> Iterator[Field]:
    made = Field(list(apps), configs or [{} for _ in apps])
    made.start()
    try:
        yield made
    finally:
        made.stop()
