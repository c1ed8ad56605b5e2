"""What the parts of an RL step hand to each other, and what each value means for training.

[Note: sequences] A trajectory is one sequence of tokens, prompt and response, unless a loop of the
user's cut its context: went on after a summary, say, or tried two ways. Then it is several, which
were given to the model one by one. They stand one behind the other in its arrays, `cuts` between
them, and each begins with a prompt of its own. What is counted by trajectory (groups, advantages,
shares of a loss) counts it once. Only a model is given sequences: `objective/sequences.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

# Keys in `Scored.info`: why the reward function gave no score, and what infrastructure did to a
# trajectory (`Stop.INFRASTRUCTURE`).
FAILURE = "failure"
TOOL_FAILURE = "tool_failure"
# Before the name of one of several rewards: what it gave. Its metrics are called so, too.
REWARD_OF = "rewards/"
# Before what an answer's judge took: calls, tokens, … Its metrics are the sums.
COUNTED = "llm_judge/"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Stop(str, Enum):
    """Why a trajectory ended."""

    EOS = "eos"  # the tokenizer's end of text, where that isn't what ends a turn
    NO_CALL = "no_call"  # a finished turn without a tool call: the answer
    DONE = "done"  # its environment, or a tool, said that it is over
    MAX_TURNS = "max_turns"  # it would have gone on, but its turns are used up
    LENGTH = "length"  # its tokens are used up
    # its sandbox, tool server or judges failed, which says nothing about the policy
    INFRASTRUCTURE = "infrastructure"
    ABORTED = "aborted"  # the engine could not hold it, which says as little


# Such a trajectory isn't judged, not trained on, and in no mean of scores
LOST = (Stop.INFRASTRUCTURE, Stop.ABORTED)


@dataclass(frozen=True)
class Prompt:
    """A question.

    `ids` int32 [n] is the render, tool schemas and generation prompt included. `index` is its row;
    in a rollout it is its place in the endless stream of prompts, so that a prompt that comes again
    in another epoch is another one. `ground_truth` is a text, or the row's list or dict. `row` is
    the row itself, where somebody asks for it.
    """

    index: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    ids: np.ndarray
    data_source: str
    ground_truth: Any
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    ability: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def truth_text(self) -> str:
        """The truth as text: a list or dict as JSON."""
        return truth_as_text(self.ground_truth)


def truth_as_text(truth: Any) -> str:
    if isinstance(truth, str):
        return truth
    return json.dumps(truth, ensure_ascii=False, default=beside_json)


def beside_json(value: Any) -> Any:
    """What a row may hold that isn't JSON, in words that are the same in each process: the order of
    a set and the address of an object aren't.
    """
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return ADDRESS.sub("", str(value))


class ToolUse(NamedTuple):
    """A call and its answer: in which of the model's turns (from 0), and how it went."""

    turn: int
    name: str
    arguments: Any
    status: str
    text: str


@dataclass(frozen=True)
class Trajectory:
    """One answer to a prompt, as token ids.

    tokens              int32 [n]: prompt and response
    mask                bool [n]: where the model sampled the token; only those are trained
    logp                float32 [n]: the sampler's log-probability under softmax(logits /
                        temperature) over the whole vocabulary; 0 where `mask` is False
    logp_behaviour      likewise, after top-p and top-k as well: what was drawn from
    num_turns           user + assistant turns + 1; without a tool call 2
    tool_seconds        in which tools ran
    tool_queue_seconds  in which calls waited to be run
    tool_failure        what a tool that broke said
    policy_version      how many training steps the weights that sampled it had seen
    assistant_text      what the model wrote, without tool output
    turn_rewards        what its environment or its tools gave for each turn of the model, in order;
                        empty where there is nobody to give any
    tool_failed_opens   how often a tool with a state couldn't open one
    tool_failed_calls   how often a tool raised, or was away, when it was called
    tool_failed_closes  how often a tool didn't close its state
    tool_scores         what tools gave for the whole answer when they closed, by their names
    messages            the conversation after the prompt, the model's turns as it wrote them
    tool_uses           every call with its answer, in order
    experts             int8 or int16 [n, layers, k]: which experts computed each token when it was
                        sampled, where the run replays them; -1 for a token that nobody computed
    cuts                where in `tokens` its sequences after the first begin: see [Note: sequences]
    joins               where in `tokens` a turn of the model begins right behind another: a loop of
                        the user's had the model go on with nothing said to it

    Messages and uses are for reward functions: once it is judged, a trajectory has none.
    """

    prompt: Prompt
    sample: int
    tokens: np.ndarray
    prompt_length: int
    mask: np.ndarray
    logp: np.ndarray
    logp_behaviour: np.ndarray
    stop: Stop
    num_turns: int
    tool_calls: int
    tool_errors: int
    tool_timeouts: int
    tool_seconds: float
    policy_version: int
    assistant_text: str
    tool_failure: str = ""
    tool_queue_seconds: float = 0.0
    turn_rewards: tuple[float, ...] = ()
    messages: Sequence[Mapping[str, Any]] = ()
    tool_uses: Sequence[ToolUse] = ()
    tool_failed_opens: int = 0
    tool_failed_calls: int = 0
    tool_failed_closes: int = 0
    tool_scores: Mapping[str, float] = field(default_factory=dict)
    experts: np.ndarray | None = None
    cuts: tuple[int, ...] = ()
    joins: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = {len(self.tokens), len(self.mask), len(self.logp), len(self.logp_behaviour)}
        assert len(sizes) == 1 and self.prompt_length <= len(self.tokens), (
            f"a trajectory's arrays have lengths {sorted(sizes)}"
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def spans(self) -> list[slice]:
        """Its sequences, each a part of `tokens`."""
        return spans_of(self.cuts, len(self))

    @property
    def response_lengths(self) -> list[int]:
        """Of each sequence the tokens after its prompt, tool text included."""
        first, *others = self.spans
        lengths = [first.stop - self.prompt_length]
        for span in others:
            # Of a prompt nothing is sampled, and it is all that comes before
            begins = int(np.argmax(self.mask[span]))
            lengths.append(span.stop - span.start - begins)
        return lengths

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, tool text included; of all sequences."""
        return sum(self.response_lengths)

    @property
    def environment_reward(self) -> float:
        """What its turns were given, in all."""
        return float(sum(self.turn_rewards))

    @property
    def truncated(self) -> bool:
        """Whether its tokens were used up before it was done."""
        return self.stop is Stop.LENGTH

    @property
    def sampled(self) -> int:
        """Tokens that the model wrote."""
        return int(self.mask.sum())

    def without_texts(self) -> Trajectory:
        """As it goes on to training and to other ranks, which need no conversation."""
        return replace(self, messages=(), tool_uses=())


def spans_of(cuts: Sequence[int], length: int) -> list[slice]:
    """The parts of `length` tokens that are cut there."""
    edges = [0, *cuts, length]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class Scored:
    """A trajectory and how it was judged.

    `score` is what the reward function gave, `reward` what is trained on: with overlong shaping.
    `info` is whatever else it told (acc, pred, …). Where it failed, `score` is the configured floor
    and `info` has FAILURE; where a tool broke it has TOOL_FAILURE.

    `failure` is how the reward failed (exception, timeout, killed) and `trace` where. A checkpoint
    keeps neither.
    """

    trajectory: Trajectory
    score: float
    reward: float
    info: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    trace: str = ""

    @property
    def lost(self) -> bool:
        """Whether it says nothing about the policy; its score is 0 then, and means nothing."""
        return self.trajectory.stop in LOST

    @property
    def accuracy(self) -> float:
        """`acc` where the reward function told one as a number, else the score; 0 where it failed:
        the floor isn't an accuracy.
        """
        told = self.info.get("acc")
        if isinstance(told, (int, float)):
            return float(told)
        return 0.0 if FAILURE in self.info else self.score


@dataclass(frozen=True)
class Group:
    """The samples of one prompt."""

    prompt: Prompt
    members: Sequence[Scored]

    @property
    def sound(self) -> list[Scored]:
        """The members that weren't lost."""
        return [member for member in self.members if not member.lost]

    @property
    def policy_version(self) -> int:
        """The oldest weights that sampled one of them."""
        return min(member.trajectory.policy_version for member in self.members)


def trainable(groups: Sequence[Group]) -> list[Group]:
    """What a step can learn from.

    Lost members are left out, and so are groups of which nothing is left, or a single one of
    several: it would be compared with nobody.
    """
    kept = []
    for group in groups:
        sound = group.sound
        if len(sound) >= min(2, len(group.members)):
            kept.append(Group(group.prompt, sound))
    return kept
