"""What survives an RL step, and how it is written into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from retool import checkpoint
from retool.rl.types import Group, Prompt, Scored, Stop, Trajectory
from retool.run.session import Skips

PromptOf = Callable[[int], Prompt]  # by its position in the stream
# Fields of a trajectory that a checkpoint keeps.
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
    "tool_failed_opens",
    "tool_failed_calls",
    "tool_failed_closes",
)


@dataclass
class TrainState:
    """What survives a step; `step`, `saved_step`, `save` and `skips` as `run.session.Progress` says.

    `updates` counts optimizer steps, `position` prompts taken from the stream. `kept` are surplus
    groups of dynamic sampling, `kl_coef` is the KL controller's. `lost_in_a_row` counts steps of
    which too many samples were lost, `lost_share` is the last step's, and `lost_to` says what the
    first of them was lost to.
    """

    kl_coef: float
    step: int = 0
    saved_step: int = -1
    save: checkpoint.PendingSave | None = None
    skips: Skips = field(default_factory=Skips)
    updates: int = 0
    position: int = 0
    kept: list[Group] = field(default_factory=list)
    lost_in_a_row: int = 0
    lost_share: float = 0.0
    lost_to: str = ""

    def data_state(self) -> dict[str, Any]:
        """What every rank has in common, as tensors, strings, numbers, lists and dicts."""
        return {
            "position": self.position,
            "updates": self.updates,
            "kl_coef": self.kl_coef,
            "skipped": self.skips.total,
            "kept": [group_to_plain(group) for group in self.kept],
        }


def restored(step: int, data: Mapping[str, Any], kl_coef: float, prompt_of: PromptOf) -> TrainState:
    """The state of a checkpoint of `step`, from its `data_state`.

    Another program's checkpoint tells nothing: 0.
    """
    return TrainState(
        float(data.get("kl_coef", kl_coef)),
        step=step,
        saved_step=step,
        skips=Skips(int(data.get("skipped", 0))),
        updates=int(data.get("updates", 0)),
        position=int(data.get("position", 0)),
        kept=[group_from_plain(entry, prompt_of) for entry in data.get("kept", [])],
    )


def group_to_plain(group: Group) -> dict[str, Any]:
    """A group without its prompt, which its place in the stream gives."""
    return {
        "index": group.prompt.index,
        "members": [_member_to_plain(member) for member in group.members],
    }


def _member_to_plain(member: Scored) -> dict[str, Any]:
    trajectory = member.trajectory
    names = ARRAYS if trajectory.experts is None else (*ARRAYS, "experts")
    arrays = {name: torch.from_numpy(getattr(trajectory, name).copy()) for name in names}
    numbers = {name: getattr(trajectory, name) for name in NUMBERS}
    return {
        **arrays,
        **numbers,
        "turn_rewards": list(trajectory.turn_rewards),
        "tool_scores": dict(trajectory.tool_scores),
        "cuts": list(trajectory.cuts),
        "joins": list(trajectory.joins),
        "stop": trajectory.stop.value,
        "score": member.score,
        "reward": member.reward,
        "info": dict(member.info),
    }


def group_from_plain(entry: Mapping[str, Any], prompt_of: PromptOf) -> Group:
    """The inverse of `group_to_plain`."""
    prompt = prompt_of(int(entry["index"]))
    return Group(prompt, [_member_from_plain(member, prompt) for member in entry["members"]])


def _member_from_plain(entry: Mapping[str, Any], prompt: Prompt) -> Scored:
    names = ARRAYS if "experts" not in entry else (*ARRAYS, "experts")
    arrays = {name: entry[name].numpy() for name in names}
    # An older checkpoint has fewer
    numbers = {name: entry[name] for name in NUMBERS if name in entry}
    numbers["turn_rewards"] = tuple(entry.get("turn_rewards", ()))
    numbers["tool_scores"] = dict(entry.get("tool_scores", {}))
    numbers["cuts"] = tuple(entry.get("cuts", ()))
    numbers["joins"] = tuple(entry.get("joins", ()))
    trajectory = Trajectory(prompt=prompt, stop=Stop(entry["stop"]), **arrays, **numbers)
    return Scored(trajectory, float(entry["score"]), float(entry["reward"]), dict(entry["info"]))


def regroup(prompts: Sequence[Prompt], members: Sequence[Scored]) -> list[Group]:
    """Trajectories from all ranks as groups, in the order of `prompts` and of their samples,
    whoever made them.
    """
    # The order in which ranks and engines delivered must not show: mini-batches are cut from this
    # list, so the update would depend on timing.
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
    # The paper's clip: one step's KL, however large, changes the coefficient by a fifth of
    # trajectories/horizon at most.
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * trajectories / horizon)
