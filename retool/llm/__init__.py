"""Sampling from Python with vLLM's names: `LLM(model).generate(prompts, SamplingParams(…))`.

Import what you need from `retool`: torch is imported with `LLM`, and not before.
"""
