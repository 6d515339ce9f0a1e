"""Do the arms compute the same thing? Losses of their rounds, and of their final adapters on everyone's data.

The reference is the first OUT.json; the exit status is 1 when another arm is further from it than allowed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
from safetensors.numpy import load_file

COLUMNS = (
    *("arm", "wall s", "start-up s", "rounds s", "median round s", "clients' work s", "CPU s", "peak RSS GiB"),
    *("last train loss", "final loss"),
)


def peft_names(adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PEFT's parameter names, whether or not the file names the adapter (`lora_A.default.weight`, `lora_A.weight`)."""
    named = {}
    for name, array in adapter.items():
        for factor in ("lora_A", "lora_B"):
            name = name.replace(f"{factor}.weight", f"{factor}.default.weight")
        named[name] = array
    return named


def loss_on_all(trainer: common.Trainer, adapter: dict[str, np.ndarray]) -> float:
    """Mean over all examples of all clients: every example is as long as the others."""
    import torch

    trainer.load(peft_names(adapter))
    trainer.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in trainer.data.values():
            for ids in rows.split(64):
                total += float(trainer.model(input_ids=ids, labels=ids).loss) * len(ids)
                count += len(ids)
    return total / count


def differences(arm: dict[str, Any], reference: dict[str, Any], tolerance: float) -> list[str]:
    """Return the figures of `arm` that differ from `reference` by more than the share `tolerance`."""
    found = []
    if len(arm["train_loss"]) != len(reference["train_loss"]):
        found.append(f"{len(arm['train_loss'])} rounds; expected {len(reference['train_loss'])}")
    for key in ("final_loss", "last_train_loss"):
        if not abs(arm[key] - reference[key]) <= tolerance * abs(reference[key]):  # not >: NaN must be found too
            found.append(f"{key} {arm[key]:.5f} against {reference[key]:.5f}")
    return found


def main() -> None:
    """Print a table; say what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--tolerance", type=float, default=0.001, help="share of the reference's loss")
    parser.add_argument("results", nargs="+", help="OUT.json files, the reference first")
    options = parser.parse_args()
    trainer = common.Trainer(common.Spec.read(options.spec))
    start = loss_on_all(trainer, trainer.adapter())
    arms, failed = [], False
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for path in options.results:
        arm = json.loads(Path(path).read_text(encoding="utf-8"))
        arm["final_loss"] = loss_on_all(trainer, load_file(arm["final_adapter"]))
        arm["last_train_loss"] = arm["train_loss"][-1]
        arms.append(arm)
        rounds = arm["round_seconds"]
        cells = [arm["wall_seconds"], arm["startup_seconds"], sum(rounds), float(np.median(rounds))]
        cells += [arm.get("client_seconds", float("nan")), arm.get("cpu_seconds", float("nan"))]
        cells += [arm["peak_rss_bytes"] / 2**30]
        text = " | ".join(f"{cell:.2f}" for cell in cells)
        print(f"| {Path(path).stem} | {text} | {arm['last_train_loss']:.5f} | {arm['final_loss']:.5f} |")
    print(f"\nThe loss before training was {start:.5f}.")
    if not arms[0]["final_loss"] < 0.9 * start:
        failed = True
        print("the reference did not learn: nothing is compared by such a loss")
    for path, arm in zip(options.results[1:], arms[1:], strict=True):
        for difference in differences(arm, arms[0], options.tolerance):
            failed = True
            print(f"{path}: {difference}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
