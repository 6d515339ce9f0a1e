"""Another account of the machine, which calls a SuperLink's or SuperNode's interfaces over the loopback.

    other_account.py UID HOST PORT CA|- [--blind]

It imports everything as the account that started it, becomes UID, and prints the status of each call as JSON. With
--blind it sends its calls and closes the connection without waiting for an answer.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  # before this process can no longer read Python's own files
import json
import os
import socket
import ssl
import sys
from pathlib import Path

from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

KEY = public_key_to_bytes(generate_key_pairs()[1])
CALLS = {
    "/v1/control/list-nodes": ListNodesRequest(),
    "/v1/control/register-node": RegisterNodeRequest(public_key=KEY, name="intruder"),
    "/v1/control/start-run": StartRunRequest(),
    "/v1/runtime/acquire-task": AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP, TaskType.CLIENT_APP]),
    "/v1/fleet/pull-messages": ListNodesRequest(),
    "/v1/fleet/%2e%2e/control/list-nodes": ListNodesRequest(),
    "/docs": ListNodesRequest(),
    "/health": ListNodesRequest(),
}
DISGUISE = "X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\n"


def request(path: str, head: str = "") -> bytes:
    body = CALLS[path].SerializeToString()
    method = "GET" if path in ("/docs", "/health") else "POST"
    lines = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\n{head}"
    return f"{lines}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def main() -> None:
    user, host, port, ca = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    trust = None if ca == "-" else ssl.create_default_context(cadata=Path(ca).read_text())
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)

    def send(content: bytes) -> socket.socket:
        plain = socket.create_connection((host, port), 10)
        channel = plain if trust is None else trust.wrap_socket(plain, server_hostname="localhost")
        channel.sendall(content)
        return channel

    if "--blind" in sys.argv:
        # With 1.3 the server's last words are still unread here when the connection is closed, and it is reset.
        assert trust is not None
        trust.maximum_version = ssl.TLSVersion.TLSv1_2
        for _ in range(20):
            send(request("/v1/control/register-node")).close()
        return
    found = {}
    for path in CALLS:
        for head in ("", DISGUISE):
            with send(request(path, head)) as channel:
                answer = b""
                while part := channel.recv(65536):
                    answer += part
            found[path + (" in disguise" if head else "")] = int(answer.split()[1])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
