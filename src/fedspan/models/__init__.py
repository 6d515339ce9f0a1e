"""The base model in memory, and the places in it where a client's adapter, patch and dense weights go.

The only folder that imports transformers and peft.
"""

from fedspan.models.build import build
from fedspan.models.federated_model import FederatedModel
from fedspan.models.loading import load_processor, resolve, seeded

__all__ = ["FederatedModel", "build", "load_processor", "resolve", "seeded"]
