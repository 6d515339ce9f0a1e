"""A SuperNode's runtime API as an executor needs it: one kept connection, and retries that end."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedspan.flower.backoff import FIRST
from fedspan.flower.records import one_line

PATIENCE = 20.0
"""Seconds after which a SuperNode that does not respond is away."""
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_TRANSIENT = (502, 503, 504)


class Lost(RuntimeError):
    """The SuperNode does not respond."""


class _Token:
    """Sends the token of the task that is being worked on: one connection serves all tasks, one after the other."""

    def __init__(self) -> None:
        self.value = ""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        if self.value and context.rpc_method != _ACQUIRE:
            context.request.headers[TASK_TOKEN_HEADER] = self.value
        return call_next(context)


class Runtime:
    """Acquire a task, pull its message, push its answer.

    Parameters
    ----------
    address
        HOST:PORT of the SuperNode's runtime API.
    root_certificates
        A PEM file, where that API has TLS.
    secret
        Shared with the SuperNode, where it asks for one.
    """

    def __init__(self, address: str, root_certificates: str | None = None, secret: bytes | None = None) -> None:
        self._token = _Token()
        interceptors: list[ProtobufClientInterceptor] = [RuntimeVersionHttpInterceptor("SuperExec"), self._token]
        if secret is not None:
            interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE}))
        # Not Flower's own invoker: that one retries for ever, and ends the process when a task has expired.
        self._retries = RetryInvoker(
            lambda: exponential(base_delay=0.1, max_delay=2),
            httpx.HTTPError,
            max_tries=None,
            max_time=PATIENCE,
            should_giveup=_is_final,
        )
        self._client = RuntimeHttpClient.from_server_address(
            address,
            root_certificates is None,
            None if root_certificates is None else Path(root_certificates).read_bytes(),
            interceptors,
            retry_invoker=self._retries,
        )
        self._beaten = threading.Lock()

    def acquire(self) -> bool:
        """Take on the task that waits longest; whether there is one.

        Raises
        ------
        Lost
            When the SuperNode does not respond.
        """
        try:
            answer = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except (httpx.HTTPError, OSError) as error:
            raise Lost(one_line(error)) from None
        if not answer.HasField("task") or not answer.token:
            return False
        with self._beaten:
            self._token.value = answer.token
        return True

    def pull(self) -> tuple[Message, Context]:
        """The task's message, and what the SuperNode knows of itself and the run. The run's bundle is left alone."""
        context = context_from_proto(self._client.PullTaskInput(PullTaskInputRequest()).context)
        node = Node(node_id=context.node_id)
        end = time.monotonic() + PATIENCE
        # The task is announced a moment before its message.
        while not (pulled := self._client.PullMessages(PullAppMessagesRequest())).messages_list:
            if time.monotonic() > end:
                raise Lost("the SuperNode has a task without a message")
            time.sleep(FIRST)
        tree = pulled.message_object_trees[0]
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self._client.PullObject, node, context.run_id),
            make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, context.run_id),
            return_type=Message,
            initial_backoff=FIRST,
        )
        # What is sent does not hold its own name.
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, context

    def push(self, reply: Message, context: Context) -> None:
        """Hand the answer over; the task is done with it."""
        push_message(self._client, reply, context)
        status = SubStatus.FAILED if reply.has_error() else SubStatus.COMPLETED
        push_task_output(self._client, context, status, reply.error.reason or "" if reply.has_error() else "")
        with self._beaten:
            self._token.value = ""

    def beat(self) -> None:
        """Tell the SuperNode that the task in hand, if there is one, is being worked on."""
        with self._beaten:
            if not self._token.value:
                return
            try:
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except (httpx.HTTPError, OSError):
                return  # the next beat, or the answer itself, will tell

    def hurry(self) -> None:
        """From now on wait for nobody: this process is about to end, and what ends it may have ended the SuperNode."""
        self._retries.max_tries = 1

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _is_final(error: Exception) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _TRANSIENT
