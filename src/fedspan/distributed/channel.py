"""The way to one other process over torch.distributed, and the meeting of all processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fedspan.distributed.environment import Place
from fedspan.distributed.pulse import Store
from fedspan.support.errors import FedspanError, one_line

_MEETING = timedelta(minutes=10)
"""The time that all processes have to come to the store."""
_PREFIXED: Any = vars(dist)["PrefixStore"]  # which torch's types do not export
_LONGEST = timedelta(days=30)
"""The longest wait for a message. A dead process is recognised by its silence, however long its work may take."""


def open_store(place: Place) -> Store:
    """Return the store at which the processes meet: torchrun's, or one in process 0.

    Raises
    ------
    FedspanError
        When it cannot be reached.
    """
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=_MEETING))
    except (RuntimeError, ValueError, OSError) as error:
        raise FedspanError(
            f"process {place.rank} of {place.size} does not reach the others ({one_line(error, 300)}): expected the "
            "store that MASTER_ADDR and MASTER_PORT name"
        ) from None
    prefixed: Store = _PREFIXED("fedspan", store)
    return prefixed


def join(store: Store, place: Place) -> None:
    """Connect this process with all others; returns when all of them have come.

    Messages are gloo's: they are short beside the work, and gloo needs no GPU.

    Raises
    ------
    FedspanError
        When the processes do not reach each other.
    """
    try:
        dist.init_process_group(
            "gloo", store=_PREFIXED("gloo", store), rank=place.rank, world_size=place.size, timeout=_LONGEST
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise FedspanError(
            f"process {place.rank} of {place.size} cannot be connected with the others ({one_line(error, 300)}): "
            "expected machines that reach each other (GLOO_SOCKET_IFNAME names the network interface)"
        ) from None


class RankChannel:
    """Messages to and from one other process; every message is its length, int64 (1,), and its bytes, uint8 (n,)."""

    def __init__(self, peer: int) -> None:
        self.peer = peer

    def send_bytes(self, buf: Any, /) -> None:
        """Send one message of bytes; EOFError when the other process is gone."""
        # A tensor cannot share the memory of bytes, which must not change.
        data = torch.frombuffer(bytearray(buf) if isinstance(buf, bytes) else buf, dtype=torch.uint8)
        self._send(torch.tensor([data.numel()]))
        self._send(data)

    def recv_bytes(self) -> bytes:
        """Return the next message of bytes; EOFError when the other process is gone."""
        data = torch.empty(self._length(), dtype=torch.uint8)
        self._receive(data)
        return data.numpy().tobytes()

    def recv_bytes_into(self, buf: Any, /) -> int:
        """Write the next message of bytes into `buf` and return its size; EOFError when the other process is gone."""
        length = self._length()
        self._receive(torch.frombuffer(buf, dtype=torch.uint8, count=length))
        return length

    def _length(self) -> int:
        length = torch.zeros(1, dtype=torch.int64)
        self._receive(length)
        return int(length)

    def _send(self, tensor: torch.Tensor) -> None:
        try:
            dist.send(tensor, self.peer)
        except RuntimeError as error:  # gloo's errors of a connection have no class of their own
            raise EOFError(str(error)) from None

    def _receive(self, tensor: torch.Tensor) -> None:
        try:
            dist.recv(tensor, self.peer)
        except RuntimeError as error:
            raise EOFError(str(error)) from None
