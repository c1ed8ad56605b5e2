"""The rollout engine: continuous batching over a paged KV cache, with the decoder modules that
training runs.
"""

from retool.engine.engine import Engine
from retool.engine.types import EngineOptions, SamplingParams, Stats, TurnDone

__all__ = ["Engine", "EngineOptions", "SamplingParams", "Stats", "TurnDone"]
