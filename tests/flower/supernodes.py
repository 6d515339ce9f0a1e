"""A SuperNode's own runtime API over its own state, with messages put into it as its main loop does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

RUN, NODE = 7, 99


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class SuperNode:
    """The state, and the server over it."""

    def __init__(self, port: int, secret: bytes | None = None) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
        factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        self.state, self.port = factory.state(), port
        self.state.set_node_id(NODE)
        run = Run.create_empty(run_id=RUN)
        # Were the bundle installed or imported, it would raise.
        run.fab_hash = self.state.store_fab(Fab("", b"no bundle at all", {}))
        self.state.store_run(run)
        context = Context(RUN, NODE, {}, RecordDict(), {})
        self.state.set_run_series_context(run.series_id, context)
        app = create_app(state_factory=factory, superexec_auth_secret=secret)
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def put(self, content: RecordDict, message_type: str, ttl: float = 60.0, late: float = 0.0) -> str:
        """Its ticket; the task is announced `late` seconds before the message."""
        message = Message(content, NODE, message_type, ttl=ttl)
        ticket = message.object_id
        message.metadata.__dict__["_message_id"] = ticket
        assert self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN, fab_hash=None) is not None
        time.sleep(late)
        self.state.object_store.preregister(RUN, get_object_tree(message))
        for name, part in get_all_nested_objects(message).items():
            self.state.object_store.put(name, part.deflate())
        self.state.store_message(message)
        return ticket

    def reply(self, seconds: float = 20.0) -> Message:
        """The next answer."""
        end = time.monotonic() + seconds
        while not (found := self.state.get_messages_legacy(is_reply=True)):
            assert time.monotonic() < end, "no answer"
            time.sleep(0.005)
        (bare,) = found
        while True:
            tree = self.state.object_store.get_object_tree(bare.metadata.message_id)
            names = _names(tree)
            parts = {name: self.state.object_store.get(name) for name in names}
            if all(parts.values()):
                break
            time.sleep(0.005)
        message = inflate_object_from_contents(tree.object_id, parts)
        assert isinstance(message, Message)
        self.state.delete_messages(message_ids=[bare.metadata.message_id, bare.metadata.reply_to_message_id])
        return message


def _names(tree: object) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in _names(child))]


@contextmanager
def supernode(port: int | None = None, secret: bytes | None = None) -> Iterator[SuperNode]:
    made = SuperNode(port or free_port(), secret)
    made.start()
    try:
        yield made
    finally:
        made.stop()
