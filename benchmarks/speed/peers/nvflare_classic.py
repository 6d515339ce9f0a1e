"""NVFlare's FedAvg workflow with a Client API script, as its own LLM examples use them: the server's half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common
import measure
import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg

FLAT = "adapter"
"""The one parameter: the whole adapter, flattened."""


class LoggedFedAvg(FedAvg):
    """NVFlare's FedAvg without its files: it starts from the experiment's adapter and notes the rounds."""

    def __init__(self, spec_path: str, result_path: str, num_clients: int, num_rounds: int, period: float) -> None:
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, task_check_period=period)
        self.spec_path = spec_path
        self.result_path = result_path
        self.period = period
        self.log = measure.Log()
        self.replies: list[dict[str, float]] = []

    def load_model(self) -> FLModel:
        """The adapter to start from."""
        return FLModel(params={FLAT: common.flatten(common.initial_adapter(self.spec_path))})

    def _aggregate_one_result(self, result: FLModel) -> bool:
        self.replies.append(json.loads(result.meta["peer"]))
        return bool(super()._aggregate_one_result(result))

    def update_model(self, model: FLModel, aggr_result: FLModel) -> Any:
        """Update the model as NVFlare does, then log the round."""
        updated = super().update_model(model, aggr_result)
        held, self.replies = self.replies, []
        self.log.add(
            [r["train_loss"] for r in held],
            [r["num_examples"] for r in held],
            [r["started"] for r in held],
            sum(r["seconds"] for r in held),
        )
        return updated

    def save_model(self, model: FLModel) -> None:
        """Nothing between the rounds; at the end, what they came to."""
        if len(self.log.ends) == self.num_rounds:
            flat = np.asarray(model.params[FLAT])
            adapter = common.unflatten(flat, common.shapes(common.initial_adapter(self.spec_path)))
            np.savez(self.result_path + ".npz", **adapter)
            Path(self.result_path).write_text(json.dumps(self.log.as_dict()), encoding="utf-8")
