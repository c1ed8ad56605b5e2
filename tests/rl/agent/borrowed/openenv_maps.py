"""A user's functions between the model and OpenEnv's lights."""

from __future__ import annotations


def pressed(message):
    """All digits of a message, as actions."""
    return [{"light": int(letter)} for letter in message["content"] if letter.isdigit()]


def said(observation):
    return f"The lights are {observation['lights']}."
