"""The settings of a run: sections with defaults, read from TOML and `--set` overrides, written as commented TOML.

`Config` and its sections are in `sections`, other libraries' names for them in `aliases`.
"""

from fedspan.config.aliases import ALIASES
from fedspan.config.loading import from_mapping, load, with_absolute_paths
from fedspan.config.sections import (
    AdapterConfig,
    Config,
    DataConfig,
    DeploymentConfig,
    EngineConfig,
    EvaluationConfig,
    FederationConfig,
    LocalConfig,
    ModelConfig,
    PrivacyConfig,
    RobustConfig,
    ServerConfig,
    WireConfig,
    valid_keys,
)
from fedspan.config.writing import json_schema, to_toml

__all__ = [
    "ALIASES",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "DeploymentConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FederationConfig",
    "LocalConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RobustConfig",
    "ServerConfig",
    "WireConfig",
    "from_mapping",
    "json_schema",
    "load",
    "to_toml",
    "valid_keys",
    "with_absolute_paths",
]
