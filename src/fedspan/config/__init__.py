"""The settings of a run: sections with defaults, read from TOML and `--set` overrides, written as commented TOML.

`Config` and most of its sections are in `sections`, the others in `system` and `tracking`; other libraries' names for
settings are in `aliases`.
"""

from fedspan.config.aliases import ALIASES
from fedspan.config.loading import from_mapping, load, with_absolute_paths
from fedspan.config.sections import (
    AdapterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    LocalConfig,
    ModelConfig,
    PrivacyConfig,
    RobustConfig,
    ServerConfig,
    valid_keys,
)
from fedspan.config.system import DeploymentConfig, EngineConfig, WireConfig
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
