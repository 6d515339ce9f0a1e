"""NVFlare's FedAvg workflow with a Client API script, as its own LLM examples use them: the client's half."""

from __future__ import annotations

import json
import sys

import common
import numpy as np
import nvflare.client as flare


def main() -> None:
    """Work on every round that comes; the base is loaded once."""
    spec_path = sys.argv[1]
    flare.init()
    client = int(flare.get_site_name().rpartition("-")[2]) - 1
    held = common.trainer(spec_path)
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        adapter = common.unflatten(np.asarray(model.params["adapter"]), held.shapes)
        result = held.train(client, model.current_round + 1, adapter)
        report = {
            "train_loss": result.train_loss,
            "num_examples": result.num_examples,
            "started": result.started,
            "seconds": result.seconds,
        }
        # NVFlare weights by this entry, which its examples fill with steps; examples are what the others weight by.
        meta = {"NUM_STEPS_CURRENT_ROUND": result.num_examples, "peer": json.dumps(report)}
        flare.send(flare.FLModel(params={"adapter": common.flatten(result.adapter)}, meta=meta))


if __name__ == "__main__":
    main()
