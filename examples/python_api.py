"""The library from Python: a run, its result, and a server rule on plain tensors.

python examples/python_api.py [FOLDER]
"""

import sys
from pathlib import Path

import torch

import fedspan
from fedspan.algebra import lowrank


def a_short_run(folder: Path) -> None:
    """Three rounds of GLoRA on the embedded text task."""
    config = fedspan.load_config(
        overrides=[
            "method.name=glora",
            "federation.rounds=3",
            "federation.num_clients=4",
            "local.steps=5",
            "data.max_train=400",
            "data.max_test=40",
        ]
    )
    result = fedspan.run(config, folder)
    for record in result.history:
        print(record["round_num"], record["train_loss"], record["eval"])
    metric = result.summary["metric"]
    print(metric, {key: result.summary[key] for key in ("base", "local", "federated")})
    print("PEFT adapter:", result.adapter)


def a_rule_on_tensors() -> None:
    """Two updates of different ranks, their exact weighted mean, and its best approximation of rank 4."""
    seeded = torch.Generator().manual_seed(0)
    updates = [
        lowrank.LowRank(torch.randn(64, r, generator=seeded), torch.randn(r, 48, generator=seeded)) for r in (2, 8)
    ]
    mean = lowrank.stack(updates, [0.25, 0.75])
    nearest = lowrank.truncate(mean, 4)
    print("rank", mean.rank, "norm", lowrank.norm(mean), "lost at rank 4:", lowrank.distance(mean, nearest))


if __name__ == "__main__":
    a_short_run(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))
    a_rule_on_tensors()
