"""The rollout engine: continuous batching over a paged KV cache, with the decoder modules that training runs."""

from retool.rl.engine.engine import Engine
from retool.rl.engine.params import EngineOptions, SamplingParams, Stats, TurnDone

__all__ = ["Engine", "EngineOptions", "SamplingParams", "Stats", "TurnDone"]
