"""The rollout engine: continuous batching over a paged KV cache, with the decoder modules that
training runs.
"""

from retool.engine.backend import RolloutEngine, Sampler, find_backend, make_engine
from retool.engine.engine import Engine
from retool.engine.types import EngineOptions, SamplingParams, Stats, TurnDone

__all__ = [
    "Engine",
    "EngineOptions",
    "RolloutEngine",
    "Sampler",
    "SamplingParams",
    "Stats",
    "TurnDone",
    "find_backend",
    "make_engine",
]
