"""Reinforcement learning with tools: rollouts, rewards, losses and the code interpreter.

Import the module you need.
"""
