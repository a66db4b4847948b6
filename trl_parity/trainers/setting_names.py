"""Names of the settings that TRL's trainers take."""

from __future__ import annotations

from dataclasses import fields

__all__ = ["setting_names"]


def setting_names(trainer: str) -> list[str]:
    """Fields of the trainer's config ("grpo", "rloo") and of TRL's ModelConfig, which scripts take beside it."""
    import trl

    config = {"grpo": "GRPOConfig", "rloo": "RLOOConfig"}[trainer]
    return [field.name for name in (config, "ModelConfig") for field in fields(getattr(trl, name))]
