"""Uploads of a site's answer that outlast a broken connection.

Flower's SuperNode repeats a request whose response was lost, but the SuperLink does not take all of them twice. An
answer whose announcement is repeated after the server has asked for it is refused without a word, and no part of it is
sent; a part that is repeated counts as a failure of the whole answer. Either way the answer is lost, and the SuperNode
goes on. An answer of many pieces over a line that breaks now and then would hardly ever arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, ObjectUnavailableError

from fedspan.support.errors import FedspanError

Send = Callable[[Message, ObjectTree, float], tuple[set[str], str]]
"""(answer, the ids of its parts, seconds at work) -> the ids of the parts to send, and the session to send them in."""
Push = Callable[[int, str, str, bytes], None]
"""(run, session, part's id, part)."""
Pull = Callable[[int, str], bytes]
"""(run, part's id) -> part."""

_ANY_SESSION = ""
"""The SuperLink finds the session itself, as for SuperNodes that know of none."""
_CALLS = 8
"""Of a connection, in this order: node id, receive, send, get_run, get_fab, pull_object, push_object, confirm."""


class LastingUploads:
    """The calls of one connection by which answers are uploaded, with what a lost response leaves open made good."""

    def __init__(self, send: Send, push: Push, pull: Pull) -> None:
        self._send, self._push, self._pull = send, push, pull

    def send(self, message: Message, tree: ObjectTree, seconds: float) -> tuple[set[str], str]:
        """Announce an answer; return the parts to send, all of them where the SuperLink knows the answer already."""
        needed, session = self._send(message, tree, seconds)
        if needed:
            return needed, session
        # A new answer always has parts that nobody has, since its id and its time are its own.
        return {part.object_id for part in iterate_object_tree(tree)}, _ANY_SESSION

    def push(self, run_id: int, session: str, part: str, content: bytes) -> None:
        """Send one part.

        Raises
        ------
        ObjectPushError
            When the SuperLink neither takes it nor has it.
        """
        try:
            self._push(run_id, session, part, content)
        except ObjectPushError:
            if not self._is_there(run_id, part, content):
                raise

    def _is_there(self, run_id: int, part: str, content: bytes) -> bool:
        try:
            return self._pull(run_id, part) == content
        except (ObjectPullError, ObjectUnavailableError):
            return False


def lasting(connect: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
    """Return a SuperNode's connection with lasting uploads."""

    @contextmanager
    def connected(*given: Any, **named: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*given, **named) as calls:
            num_calls = len(calls)
            if num_calls == _CALLS:
                node_id, receive, send, get_run, get_fab, pull, push, confirm = calls
                uploads = LastingUploads(send, push, pull)
                yield node_id, receive, uploads.send, get_run, get_fab, pull, uploads.push, confirm
        # After the connection, which logs what is raised in it and goes on.
        if num_calls != _CALLS:
            raise FedspanError(
                f"a connection of flwr's SuperNode with {num_calls} calls: expected {_CALLS}, flwr>=1.41,<1.43"
            )

    return connected


def install() -> None:
    """Install lasting uploads in Flower's SuperNode.

    Raises
    ------
    FedspanError
        When it differs from the one of the versions that this was written for.
    """
    from flwr.supernode import start_client_internal as loop

    connect = vars(loop).get("http_request_response")
    if connect is None:
        raise FedspanError("flwr's SuperNode has no http_request_response: expected flwr>=1.41,<1.43")
    vars(loop)["http_request_response"] = lasting(connect)
