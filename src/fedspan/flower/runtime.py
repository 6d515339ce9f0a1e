"""A client of a SuperNode's runtime API: one persistent connection, and retries that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

from fedspan.flower import local_peers
from fedspan.flower.backoff import FIRST
from fedspan.support.errors import one_line

PATIENCE = 20.0
"""Seconds after which a SuperNode that does not respond counts as unreachable."""
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_TRANSIENT = (502, 503, 504)


class SuperNodeLost(RuntimeError):
    """The SuperNode does not respond."""


class _Token:
    """Adds the current task's token to each request: one connection serves all tasks, one after the other."""

    def __init__(self) -> None:
        self.value = ""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        if self.value and context.rpc_method != _ACQUIRE:
            context.request.headers[TASK_TOKEN_HEADER] = self.value
        return call_next(context)


class _OwnServer:
    """Refuses to send anything to a port that another account of this machine listens on."""

    def __init__(self, address: str) -> None:
        self._port = int(address.rpartition(":")[2])

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.extensions["trace"] = self._on_event
        return call_next(context)

    def _on_event(self, name: str, info: Mapping[str, Any]) -> None:
        # When a connection has been made, before anything is sent through it; not for each of its requests, because the
        # kernel takes milliseconds to list its sockets.
        if not name.endswith("connect_tcp.complete"):
            return
        # Whoever had taken the port while the SuperNode was away would otherwise be given the site's answers.
        strangers = local_peers.listening_users(self._port) - local_peers.allowed_users()
        if strangers:
            raise SuperNodeLost(f"port {self._port} belongs to user id {min(strangers)}: expected this account's")


class Runtime:
    """The calls for one task after another: acquire it, pull its message, push its answer.

    Parameters
    ----------
    address
        HOST:PORT of the SuperNode's runtime API.
    root_certificates
        A PEM file, if that API has TLS.
    secret
        Secret shared with the SuperNode, if it requires one.
    """

    def __init__(self, address: str, root_certificates: str | None = None, secret: bytes | None = None) -> None:
        self._token = _Token()
        interceptors: list[ProtobufClientInterceptor] = [RuntimeVersionHttpInterceptor("SuperExec"), self._token]
        if root_certificates is None:  # no certificate says who the SuperNode is
            interceptors.append(_OwnServer(address))
        if secret is not None:
            interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE}))
        # Not Flower's own invoker: it retries for ever, and ends the process when a task has expired.
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
        self._token_lock = threading.Lock()

    def acquire(self) -> bool:
        """Acquire the task that has waited longest; return whether there was one.

        Raises
        ------
        SuperNodeLost
            When the SuperNode does not respond.
        """
        try:
            answer = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except (httpx.HTTPError, OSError) as error:
            raise SuperNodeLost(one_line(error)) from None
        if not answer.HasField("task") or not answer.token:
            return False
        with self._token_lock:
            self._token.value = answer.token
        return True

    def take_over(self, token: str) -> None:
        """Take the task in hand that another process has acquired."""
        with self._token_lock:
            self._token.value = token

    def pull(self) -> tuple[Message, Context]:
        """Pull the task's message and its context (the node's and the run's). The run's code bundle is not fetched."""
        context = context_from_proto(self._client.PullTaskInput(PullTaskInputRequest()).context)
        node = Node(node_id=context.node_id)
        end = time.monotonic() + PATIENCE
        # The task is announced a moment before its message.
        while not (pulled := self._client.PullMessages(PullAppMessagesRequest())).messages_list:
            if time.monotonic() > end:
                raise SuperNodeLost("the SuperNode has a task without a message")
            time.sleep(FIRST)
        tree = pulled.message_object_trees[0]
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self._client.PullObject, node, context.run_id),
            make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, context.run_id),
            return_type=Message,
            initial_backoff=FIRST,
        )
        # A message's id is not part of what is sent.
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, context

    def push(self, reply: Message, context: Context) -> None:
        """Push the answer, which completes the task."""
        push_message(self._client, reply, context)
        status = SubStatus.FAILED if reply.has_error() else SubStatus.COMPLETED
        push_task_output(self._client, context, status, reply.error.reason or "" if reply.has_error() else "")
        with self._token_lock:
            self._token.value = ""

    def heartbeat(self) -> None:
        """Send a heartbeat for the task in hand, if there is one."""
        with self._token_lock:
            if not self._token.value:
                return
            try:
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except (httpx.HTTPError, OSError, SuperNodeLost):
                return  # the next heartbeat, or the answer itself, reports a lasting problem

    def stop_retrying(self) -> None:
        """Retry no more: this process is about to end, and the same signal may have ended the SuperNode."""
        self._retries.max_tries = 1

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _is_final(error: Exception) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _TRANSIENT
