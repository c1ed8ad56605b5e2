"""A trajectory on its way: what was sampled, what stood between, and what the tools did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from retool.batch import NO_EXPERTS
from retool.rl.agent.reading.form import Inline
from retool.rl.agent.tools.state import State
from retool.rl.types import Prompt, Stop, ToolUse, Trajectory


@dataclass(frozen=True)
class Sampled:
    """A turn as the engine made it: ids, log-probabilities (see `Trajectory`), and why it ended: an
    end token, the token limit, or because the engine or the run gave it up. `experts` are as in
    `TurnDone`.
    """

    tokens: Sequence[int]
    logp: Sequence[float]
    logp_behaviour: Sequence[float]
    reason: Literal["stop", "length", "aborted"]
    experts: np.ndarray | None = None

    def followed_by(self, more: Sampled) -> Sampled:
        """Both as one turn, of which `more` was sampled later."""
        experts = [part for part in (self.experts, more.experts) if part is not None]
        return Sampled(
            [*self.tokens, *more.tokens],
            [*self.logp, *more.logp],
            [*self.logp_behaviour, *more.logp_behaviour],
            more.reason,
            np.concatenate(experts) if experts else None,
        )


@dataclass
class Episode:
    """A trajectory on its way. `tokens` and `mask` are those after the prompt; log-probabilities are
    of those that were sampled.
    """

    prompt: Prompt
    messages: list[dict[str, Any]]
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    logp_behaviour: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)  # empty until one is given
    assistant_turns: int = 0
    user_turns: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    tool_timeouts: int = 0
    tool_seconds: float = 0.0
    tool_queue_seconds: float = 0.0
    tool_uses: list[ToolUse] = field(default_factory=list)
    tool_failed_opens: int = 0
    tool_failed_calls: int = 0
    tool_failed_closes: int = 0
    tool_scores: dict[str, float] = field(default_factory=dict)
    sample: int = 0
    states: dict[str, State] = field(default_factory=dict)  # of tools that keep one
    # Of prompt and response, a piece for each turn
    experts: list[np.ndarray] = field(default_factory=list)
    cuts: tuple[int, ...] = ()
    joins: tuple[int, ...] = ()
    inline: Inline | None = None  # it is in the middle of a turn, which this answers calls in

    @staticmethod
    def begin(prompt: Prompt, sample: int = 0) -> Episode:
        messages = [dict(message) for message in prompt.messages]
        return Episode(prompt, messages, sample=sample)

    def add_turn(self, turn: Sampled, text: str) -> None:
        """What the model wrote: its ids are trained."""
        count = len(turn.tokens)
        self.tokens += turn.tokens
        self.mask += [True] * count
        self.logp += turn.logp
        self.logp_behaviour += turn.logp_behaviour
        if turn.experts is not None:
            self.experts.append(turn.experts)
        self.texts.append(text)
        if self.inline is None:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages[-1]["content"] += text
        self.assistant_turns += 1

    def add_tool_turn(self, responses: Sequence[dict[str, Any]], ids: Sequence[int]) -> None:
        """What the tools answered, with all that is put around it: never trained."""
        self.tokens += ids
        self.mask += [False] * len(ids)
        if self.inline is None:
            self.messages += responses
        else:
            self.messages[-1]["content"] += self.output(responses)
        self.user_turns += 1

    def output(self, responses: Sequence[dict[str, Any]]) -> str:
        """How the tools' answers stand in the middle of a turn."""
        assert self.inline is not None
        answers = [str(response["content"]) for response in responses]
        return self.inline.output(self.messages[-1]["content"], answers)

    def reward_turn(self, reward: float, turn: int | None = None) -> None:
        """Add to the reward of a turn of the model: the last one, or the one of that number. Turns
        without any have 0.
        """
        # Filled up only now: a trajectory that nobody rewards by turn has no list of zeros.
        missing = self.assistant_turns - len(self.turn_rewards)
        self.turn_rewards += [0.0] * missing
        self.turn_rewards[-1 if turn is None else turn] += reward

    def finish(self, stop: Stop, version: int, tool_failure: str = "") -> Trajectory:
        """The trajectory, which ended for the reason `stop`."""
        prompt_ids = self.prompt.ids.astype(np.int32)
        response_ids = np.asarray(self.tokens, np.int32)
        mask = np.zeros(len(prompt_ids) + len(response_ids), bool)
        mask[len(prompt_ids) :] = self.mask
        return Trajectory(
            self.prompt,
            self.sample,
            np.concatenate([prompt_ids, response_ids]),
            len(prompt_ids),
            mask,
            _where_sampled(self.logp, mask),
            _where_sampled(self.logp_behaviour, mask),
            stop,
            # The question is one, too
            num_turns=self.user_turns + self.assistant_turns + 1,
            tool_calls=self.tool_calls,
            tool_errors=self.tool_errors,
            tool_timeouts=self.tool_timeouts,
            tool_seconds=self.tool_seconds,
            policy_version=version,
            assistant_text="\n".join(self.texts),
            tool_failure=tool_failure,
            tool_queue_seconds=self.tool_queue_seconds,
            turn_rewards=self._rewards_of_all_turns(),
            tool_failed_opens=self.tool_failed_opens,
            tool_failed_calls=self.tool_failed_calls,
            tool_failed_closes=self.tool_failed_closes,
            tool_scores=self.tool_scores,
            messages=self.messages[len(self.prompt.messages) :],
            tool_uses=self.tool_uses,
            experts=self._all_experts(len(prompt_ids) + len(response_ids)),
            cuts=self.cuts,
            joins=self.joins,
        )

    def _all_experts(self, length: int) -> np.ndarray | None:
        """[length, layers, k]; `NO_EXPERTS` for what the engine computed nothing from."""
        if not self.experts:
            return None
        told = np.concatenate(self.experts)
        missing = length - len(told)
        return np.pad(told, ((0, missing), (0, 0), (0, 0)), constant_values=NO_EXPERTS)

    def _rewards_of_all_turns(self) -> tuple[float, ...]:
        if not self.turn_rewards:
            return ()
        missing = self.assistant_turns - len(self.turn_rewards)
        return (*self.turn_rewards, *[0.0] * missing)


def _where_sampled(values: Sequence[float], mask: np.ndarray) -> np.ndarray:
    """Values of sampled tokens where they stand, 0 elsewhere."""
    out = np.zeros(len(mask), np.float32)
    out[mask] = values
    return out
