"""The top of a report's page: the run's model, its data, and its most important settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"
# What it is called, and the keys that say it: the first that is set does
ASKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model", ("actor_rollout_ref.model.path", "model.partial_pretrain")),
    ("trained on", ("data.train_files",)),
    ("validated on", ("data.val_files",)),
    ("reward", ("custom_reward_function.path", "reward_model.name")),
    ("tools", (f"{ROLLOUT}.multi_turn.tool_config_path", f"{ROLLOUT}.multi_turn.tools")),
)
SHARED = "GPUs a sequence"  # worth a word where it isn't one
SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("advantages", ("algorithm.adv_estimator",)),
    ("batch", ("data.train_batch_size",)),
    ("answers to each", (f"{ROLLOUT}.n",)),
    ("learning rate", (f"{ACTOR}.optim.lr", "optim.lr")),
    ("longest question", ("data.max_prompt_length",)),
    ("longest answer", ("data.max_response_length",)),
    ("longest sample", ("data.max_length",)),
    (
        SHARED,
        (f"{ACTOR}.ulysses_sequence_parallel_size", "ulysses_sequence_parallel_size"),
    ),
)
UNSET = ("", "null", "[]", "???")  # ???: a required key that wasn't given


def what_it_is(config: Mapping[str, str]) -> list[tuple[str, str]]:
    """(what, which) of a run with this configuration (dotted key → value as text): its model, its
    data, its reward and tools.
    """
    found = ((label, _first(config, keys)) for label, keys in ASKED)
    return [(label, _unlisted(value)) for label, value in found if value]


def how_it_trains(config: Mapping[str, str]) -> list[tuple[str, str]]:
    """(what, how much) of its settings that one asks for first."""
    found = ((label, _first(config, keys)) for label, keys in SETTINGS)
    shown = [(label, _readable(value)) for label, value in found if value]
    return [line for line in shown if line != (SHARED, "1")]


def _unlisted(text: str) -> str:
    """A list of one file is that file."""
    is_list = text.startswith("[") and text.endswith("]")
    return text[1:-1] if is_list else text


def _first(config: Mapping[str, str], keys: Sequence[str]) -> str:
    """The value of the first of these keys that is set."""
    return next((config[key] for key in keys if config.get(key, "") not in UNSET), "")


def _readable(text: str) -> str:
    """A number as the page writes its numbers: 16,384 and 1e-5; other texts as they are."""
    if text.isascii() and text.isdigit():
        # Longer ones are no setting, and Python refuses thousands of digits
        if len(text) >= 20:
            return text
        return f"{int(text):,}"
    try:
        value = float(text)
    except ValueError:
        return text
    if not 0 < value < 1e-3:
        return text
    scientific = f"{value:.2e}"
    return scientific.replace(".00e", "e").replace("e-0", "e-")
