"""What survives an RL step, and how it is written into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from retool import checkpoint
from retool.rl.types import Group, Prompt, Scored, Stop, Trajectory

ARRAYS = ("tokens", "mask", "logp", "logp_behaviour")
NUMBERS = (
    "sample",
    "prompt_length",
    "num_turns",
    "tool_calls",
    "tool_errors",
    "tool_timeouts",
    "tool_seconds",
    "policy_version",
    "assistant_text",
    "tool_queue_seconds",
)


@dataclass
class TrainState:
    """`step` training steps done, `updates` optimizer steps, `position` prompts taken from the
    stream, `kept` surplus groups of dynamic sampling, `kl_coef` the KL controller's.
    """

    kl_coef: float
    step: int = 0
    updates: int = 0
    position: int = 0
    kept: list[Group] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    lost_in_a_row: int = 0  # steps of which too many samples were lost
    lost_share: float = 0.0  # of the last step's samples
    lost_to: str = ""  # what the first of them was lost to
    saved_step: int = -1
    save: checkpoint.PendingSave | None = None  # the last one, until its result was said

    def data_state(self) -> dict[str, Any]:
        """What every rank has in common, as tensors, strings, numbers, lists and dicts."""
        numbers = {
            "position": self.position,
            "updates": self.updates,
            "kl_coef": self.kl_coef,
            "skipped": self.skipped,
        }
        return {**numbers, "kept": [group_to_plain(group) for group in self.kept]}


def restored(step: int, data: Mapping[str, Any], kl_coef: float, prompt_of: Any) -> TrainState:
    """The state of a checkpoint; `prompt_of(position)` gives the stream's prompts.

    Another program's checkpoint tells nothing: 0.
    """
    kept = [group_from_plain(entry, prompt_of) for entry in data.get("kept", [])]
    return TrainState(
        float(data.get("kl_coef", kl_coef)),
        step,
        int(data.get("updates", 0)),
        int(data.get("position", 0)),
        kept,
        int(data.get("skipped", 0)),
        saved_step=step,
    )


def group_to_plain(group: Group) -> dict[str, Any]:
    """A group without its prompt, which its place in the stream gives."""
    return {
        "index": group.prompt.index,
        "members": [_member_to_plain(member) for member in group.members],
    }


def _member_to_plain(member: Scored) -> dict[str, Any]:
    t = member.trajectory
    arrays = {name: torch.from_numpy(getattr(t, name).copy()) for name in ARRAYS}
    numbers = {name: getattr(t, name) for name in NUMBERS}
    return {
        **arrays,
        **numbers,
        "stop": t.stop.value,
        "score": member.score,
        "reward": member.reward,
        "info": dict(member.info),
    }


def group_from_plain(entry: Mapping[str, Any], prompt_of: Any) -> Group:
    """The inverse of `group_to_plain`."""
    prompt: Prompt = prompt_of(int(entry["index"]))
    return Group(prompt, [_member_from_plain(member, prompt) for member in entry["members"]])


def _member_from_plain(entry: Mapping[str, Any], prompt: Prompt) -> Scored:
    arrays = {name: entry[name].numpy() for name in ARRAYS}
    # An older checkpoint has fewer
    numbers = {name: entry[name] for name in NUMBERS if name in entry}
    trajectory = Trajectory(prompt=prompt, stop=Stop(entry["stop"]), **arrays, **numbers)
    return Scored(trajectory, float(entry["score"]), float(entry["reward"]), dict(entry["info"]))


def regroup(prompts: Sequence[Prompt], members: Sequence[Scored]) -> list[Group]:
    """Trajectories from all ranks as groups, in the order of `prompts` and of their samples,
    whoever made them.
    """
    by_prompt: dict[int, list[Scored]] = {prompt.index: [] for prompt in prompts}
    for member in members:
        by_prompt[member.trajectory.prompt.index].append(member)
    return [
        Group(prompt, sorted(by_prompt[prompt.index], key=lambda m: m.trajectory.sample))
        for prompt in prompts
    ]


def adapted_kl_coef(
    coef: float, kl: float, target: float, horizon: int, trajectories: int
) -> float:
    """The adaptive controller's next coefficient: arXiv 1909.08593, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * trajectories / horizon)
