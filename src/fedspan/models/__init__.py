"""The base model in memory: loading, adapters, patches, quantisation, and many clients in one pass.

The only folder that imports transformers, peft and bitsandbytes.
"""

from fedspan.models.build import build
from fedspan.models.federated_model import FederatedModel
from fedspan.models.loading import load_processor, resolve, seeded

__all__ = ["FederatedModel", "build", "load_processor", "resolve", "seeded"]
