"""Signs of life: a process is silent from its last new one on."""

from __future__ import annotations

import torch.distributed as dist

from fedspan.distributed.pulse import Pulse


def test_a_process_whose_count_stands_still_is_silent() -> None:
    store, now = dist.HashStore(), [0.0]
    watching = Pulse(store, 0, [1, 2], lambda: now[0])
    one, two = Pulse(store, 1, [0]), Pulse(store, 2, [0])
    for second in range(10):
        now[0] = float(second)
        one.beat()
        if second < 4:
            two.beat()
        watching.look()
    assert watching.silent(6.5) == []
    assert watching.silent(5.5) == [2]
    assert watching.silence(2) == 6.0
    two.beat()
    watching.look()
    assert watching.silent(0.5) == []
