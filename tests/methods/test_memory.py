"""Peak resident memory of the server step, as the operating system counts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedspan.methods import METHODS

pytestmark = pytest.mark.long
ADAPTER_METHODS = [n for n, f in METHODS.items() if f().info.trains == "adapter" and not f().info.personalised]

SCRIPT = """
import sys
from dataclasses import replace
import torch
from fedspan.methods import create
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Factors, Request, Template, Update, Vector
from fedspan.support.peak_memory import peak_memory, reset_peak_memory

torch.set_num_threads(1)

def step(size, rank=4, clients=3, **options):
    method = create(sys.argv[1], **options)
    template = Template({"layer": (size, size)}, rank, alpha=8.0)
    state = method.init(template, {})
    peaks, learnt = [], {}
    for number, exchange in enumerate(method.exchanges):
        state = replace(state, exchange=number)
        sent = method.start(method.broadcast(state, Request(rank)), None)
        encoded = []
        for k in range(clients):
            if exchange.ask == "train":
                start = sent.adapter["layer"]
                learnt[k] = Factors(torch.randn_like(start.b), start.a, start.scaling)
            elif exchange.ask == "gradient":
                learnt[k] = Vector({"gradient": torch.randn(size, size)})
            trained = learnt[k]  # a question asked again is about the same
            encoded.append(method.encode(Update(f"c{k}", 10.0, {"layer": trained}, {}), sent, None)[0])
        before = reset_peak_memory()
        state, _ = aggregate(method, state, encoded)
        if exchange.ask == "train":
            method.broadcast(state, Request(rank))
        peaks.append(peak_memory() - before)
    return max(peaks)

step(64)  # libraries take their workspaces at first use
print(step(4096))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's peak memory anew")
@pytest.mark.parametrize("name", ADAPTER_METHODS)
def test_a_server_step_stays_far_below_one_dense_matrix(name: str) -> None:
    """Three clients of rank 4 on a 4096×4096 layer: a dense float32 matrix would take 64 MiB."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * 2**20


@pytest.mark.parametrize("name", ["glora", "flexlora"])
def test_many_clients_cost_no_memory_beyond_their_factors(name: str) -> None:
    """200 clients of rank 16 on a 2048×2048 layer hold 50 MiB; nothing of m×n, m×m (16 MiB), c×c (39 MiB) or of the
    size of all factors together is made on top of them."""
    many = SCRIPT.replace("print(step(4096))", "step(64, 16, 200)\nprint(step(2048, 16, 200))")
    done = subprocess.run([sys.executable, "-c", many, name], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12 * 2**20


def test_the_measurement_sees_a_dense_matrix() -> None:
    """The same script with T formed densely: the bound above can fail."""
    dense = SCRIPT.replace("state, _ = aggregate(", "f = trained.delta().dense(); state, _ = aggregate(")
    done = subprocess.run([sys.executable, "-c", dense, "fedit"], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60 * 2**20
