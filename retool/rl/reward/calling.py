"""How a reward function is called: with what its signature asks for.

Every function may take ARGUMENTS, those of verl's `compute_score`.
What it names of SEEN it gets besides.
A function that takes `completions` is one of TRL's.
It gets lists, of one answer each, and the row's columns by their names.

No torch: reward workers import this.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from retool.rl.types import Trajectory

# By name, of every reward function
ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
ALIASES = {"completion": "solution_str"}  # what else a function may call them
# By name, of a function that asks for it
SEEN = (
    "messages",
    "response",
    "tool_calls",
    "tool_results",
    "turn_rewards",
    "row",
)
BATCH = "completions"  # who takes these is called as TRL calls it
SEEN_BY_BATCH = ("messages", "response", "row")
# What TRL gives that isn't in the row
OF_TRL = ("prompts", BATCH)
ANY_NAME = inspect.Parameter.VAR_KEYWORD

RewardFunction = Callable[..., Any]
Parameters = Mapping[str, inspect.Parameter]


class Asked(NamedTuple):
    """The arguments of a reward function; `seen` has the optional ones that it asks for, by name."""

    data_source: str
    solution: str
    truth: Any
    extra: Mapping[str, Any]
    seen: Mapping[str, Any] = {}

    @staticmethod
    def about(trajectory: Trajectory, names: Collection[str] = ()) -> Asked:
        """The arguments for a finished trajectory; the `names` of SEEN are looked up."""
        prompt = trajectory.prompt
        extra = {
            **prompt.extra_info,
            "num_turns": trajectory.num_turns,
            "tool_calls": trajectory.tool_calls,
            "stop_reason": trajectory.stop.value,
        }
        if trajectory.tool_scores:
            extra["rollout_reward_scores"] = dict(trajectory.tool_scores)  # verl's name for it
        seen = {name: _LOOKED_UP[name](trajectory) for name in names}
        return Asked(
            prompt.data_source,
            trajectory.assistant_text,
            prompt.ground_truth,
            extra,
            seen,
        )

    def arguments(self) -> dict[str, Any]:
        """The arguments under the names by which a function knows them."""
        return {
            "data_source": self.data_source,
            "solution_str": self.solution,
            "ground_truth": self.truth,
            "extra_info": dict(self.extra),
            **self.seen,
        }


def _messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    asked = [dict(message) for message in trajectory.prompt.messages]
    return asked + _response(trajectory)


def _response(trajectory: Trajectory) -> list[dict[str, Any]]:
    return [dict(message) for message in trajectory.messages]


def _tool_calls(trajectory: Trajectory) -> list[dict[str, Any]]:
    return [
        {
            "turn": use.turn,
            "name": use.name,
            "arguments": use.arguments,
        }
        for use in trajectory.tool_uses
    ]


def _tool_results(trajectory: Trajectory) -> list[dict[str, Any]]:
    return [
        {
            "turn": use.turn,
            "name": use.name,
            "status": use.status,
            "content": use.text,
        }
        for use in trajectory.tool_uses
    ]


def _turn_rewards(trajectory: Trajectory) -> list[float]:
    return list(trajectory.turn_rewards)


def _row(trajectory: Trajectory) -> dict[str, Any]:
    return dict(trajectory.prompt.row)


_LOOKED_UP: dict[str, Callable[[Trajectory], Any]] = {
    "messages": _messages,
    "response": _response,
    "tool_calls": _tool_calls,
    "tool_results": _tool_results,
    "turn_rewards": _turn_rewards,
    "row": _row,
}


def seen_by(function: RewardFunction) -> tuple[str, ...]:
    """The names of SEEN that a function asks for, as it is or `adapted`."""
    parameters = inspect.signature(function).parameters
    if BATCH in parameters:
        return SEEN_BY_BATCH
    return tuple(name for name in SEEN if name in parameters)


def adapted(
    function: RewardFunction,
    what: str,
    name: str,
) -> RewardFunction:
    """A function that takes all of ARGUMENTS and what `function` asks for of SEEN, and calls it as
    it wants to be called.

    It may take some of these only, by their names or ALIASES.
    ValueError, which calls it `what`, where it wants something else.
    """
    signature = inspect.signature(function)
    if BATCH in signature.parameters:
        batch = functools.partial(_batch_of_one, signature.parameters)
        return _with_choice(function, batch, _only)
    everything = (*ARGUMENTS, *seen_by(function))
    try:
        signature.bind(**dict.fromkeys(everything))
        return function
    except TypeError as error:
        taken = _taken(signature)
        if not taken:
            wanted = f"def {name}({', '.join(ARGUMENTS)})"
            raise ValueError(
                f"{what} can't be called ({error}): "
                f"write {wanted}, or leave some of these out. "
                f"It may take {', '.join(SEEN)}, too."
            ) from error

    def chosen(given: Mapping[str, Any]) -> dict[str, Any]:
        return {own: given[ours] for own, ours in taken.items()}

    return _with_choice(function, chosen, lambda result: result)


def _with_choice(
    function: RewardFunction,
    chosen: Callable[[Mapping[str, Any]], dict[str, Any]],
    read: Callable[[Any], Any],
) -> RewardFunction:
    """`function`, called with the `chosen` ones of all arguments; its result goes through `read`."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(**given: Any) -> Any:
            return read(await function(**chosen(given)))

        return awaited

    @functools.wraps(function)
    def called(**given: Any) -> Any:
        return read(function(**chosen(given)))

    return called


def _taken(signature: inspect.Signature) -> dict[str, str]:
    """Of each argument that a function takes, which of ours it is; nothing where one is none."""
    named = {**{name: name for name in (*ARGUMENTS, *SEEN)}, **ALIASES}
    taken = {name: named[name] for name in signature.parameters if name in named}
    try:
        signature.bind(**dict.fromkeys(taken))
    except TypeError:
        return {}
    return taken


# --- as TRL calls them ---


def _batch_of_one(
    parameters: Parameters,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Prompt, completion and the row's columns as lists of one.

    Text where the row's prompt is text, messages where it is messages.
    """
    row: Mapping[str, Any] = given["row"]
    response: Sequence[Any] = given["response"]
    messages: Sequence[Any] = given["messages"]
    asked = messages[: len(messages) - len(response)]
    known = {**given, **row, "prompts": asked, BATCH: response}
    if isinstance(row.get("prompt"), str):
        known |= {"prompts": row["prompt"], BATCH: given["solution_str"]}
    names = list(_named(parameters, known))
    if any(parameter.kind is ANY_NAME for parameter in parameters.values()):
        columns = [column for column in row if column != "prompt"]
        names += [*OF_TRL, *columns]
    return {name: [known[name]] for name in names}


def _named(
    parameters: Parameters,
    known: Mapping[str, Any],
) -> Iterator[str]:
    """Parameters that are known. ValueError for one that isn't, and has no default."""
    for name, parameter in parameters.items():
        if parameter.kind is ANY_NAME:
            continue
        if name in known:
            yield name
        elif parameter.default is inspect.Parameter.empty:
            there = ", ".join(sorted(known))
            raise ValueError(
                f"the reward function asks for {name!r}, which is no column of the row; "
                f"there is {there}"
            )


def _only(result: Any) -> Any:
    """The answer to a batch of one."""
    if isinstance(result, (list, tuple)) and len(result) == 1:
        return result[0]
    raise ValueError(
        f"a reward function that takes {BATCH} was asked about one "
        f"and returned {result!r:.80}: return a list with a number for each"
    )
