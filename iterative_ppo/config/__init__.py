"""Frozen configuration: types, bounds and meaning here, defaults only in params.yaml, one loader for every way in."""

from iterative_ppo.config.evidence import (
    ABTestConfig,
    AlarmsConfig,
    GateConfig,
    GuardrailConfig,
    NotifyConfig,
    RoundsConfig,
)
from iterative_ppo.config.learning import (
    BestOfNConfig,
    CreditConfig,
    GroupConfig,
    ImproveConfig,
    LoggedConfig,
    LoRAConfig,
    PolicyConfig,
    PPOConfig,
    QConfig,
    RuntimeConfig,
    SupervisedConfig,
)
from iterative_ppo.config.loading import DEFAULTS, load_config, read_overrides
from iterative_ppo.config.traffic import (
    ClassifierConfig,
    DataConfig,
    ExplorationConfig,
    LabelsConfig,
    PersonaConfig,
    RuleConfig,
    SimulatorConfig,
    SourceConfig,
    TrackingConfig,
)
from iterative_ppo.config.whole import Config

__all__ = [
    "ABTestConfig",
    "AlarmsConfig",
    "BestOfNConfig",
    "ClassifierConfig",
    "Config",
    "CreditConfig",
    "DEFAULTS",
    "DataConfig",
    "ExplorationConfig",
    "GateConfig",
    "GroupConfig",
    "GuardrailConfig",
    "ImproveConfig",
    "LabelsConfig",
    "LoRAConfig",
    "LoggedConfig",
    "NotifyConfig",
    "PPOConfig",
    "PersonaConfig",
    "PolicyConfig",
    "QConfig",
    "RoundsConfig",
    "RuleConfig",
    "RuntimeConfig",
    "SimulatorConfig",
    "SourceConfig",
    "SupervisedConfig",
    "TrackingConfig",
    "load_config",
    "read_overrides",
]
