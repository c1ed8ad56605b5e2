"""Episodes in an environment, in the terminal: the model plays, or the user in its place. What each
turn was worth is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from rich.console import Console

from retool.data.read.chunk import RowError
from retool.data.read.library import IN_NAME
from retool.data.read.names import resolve_files
from retool.data.tokens.encoder import Piece
from retool.rl.agent.environments.play import Attempt, run_in_world, seed_of
from retool.rl.agent.episode import Episode, Sampled
from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.loop import Generate
from retool.rl.agent.options import Agent
from retool.rl.data import PromptOptions, Question, read_questions, to_question
from retool.rl.types import Prompt, Stop, Trajectory
from retool.talk.agent import MAX_TURNS, Talker, open_worlds
from retool.talk.lines import read_message
from retool.talk.questions import of_world
from retool.talk.screen import TerminalScreen
from retool.talk.session import Voice, turn_params

ROW = {"prompt": "Begin."}  # where no rows are given
YOURS = "your turn> "
ENDINGS = {
    Stop.DONE: "done",
    Stop.LENGTH: "cut off: --max-tokens, or the model's own limit",
    Stop.MAX_TURNS: f"ended after {MAX_TURNS} turns",
    Stop.ABORTED: "stopped",
}


@dataclass
class Stage:
    """Where episodes are played. `by_user`: the user makes the turns."""

    talker: Talker
    screen: TerminalScreen
    loop: asyncio.AbstractEventLoop
    rows: str | None
    seed: int
    by_user: bool = False
    prompt: Prompt | None = None
    played: int = 0  # episodes with this prompt


@dataclass
class Seat:
    """Who makes an episode's turns. Between them it shows what the world said, and gave."""

    stage: Stage
    voice: Voice
    told: int = 0  # turns whose rewards were shown

    def show_world(self) -> None:
        self.voice.show_results()
        rewards = self.voice.episode.turn_rewards
        for reward in rewards[self.told :]:
            if reward:
                self.stage.screen.note(f"(reward {reward:g})")
        self.told = len(rewards)

    async def speak(self, ids: Sequence[int], max_tokens: int) -> Sampled:
        """The next turn, see `retool.rl.agent.loop.Generate`."""
        self.show_world()
        if self.stage.by_user:
            return self._typed(max_tokens)
        return await self.voice.speak(ids, max_tokens)

    def _typed(self, max_tokens: int) -> Sampled:
        """What the user types, as the tokens that it is."""
        text = self._read()
        if text is None:
            return Sampled([], [], [], "aborted")
        if not sys.stdin.isatty():  # a terminal has shown it already
            self.voice.screen.write(text)
            self.voice.screen.end_turn(())
        renderer = self.voice.talker.agent.renderer
        piece = Piece(text, quoted=renderer.controls.spans(text))
        (ids,) = renderer.encoder.encode([piece], begins=False)
        ids = [*ids, renderer.end_of_turn_ids[0]]
        # The loop adds this turn to the messages: it isn't the world's
        self.voice.shown = len(self.voice.episode.messages) + 1
        whole = len(ids) <= max_tokens
        ids = ids[:max_tokens]
        nothing = [0.0] * len(ids)
        return Sampled(ids, nothing, nothing, "stop" if whole else "length")

    def _read(self) -> str | None:
        """What the user types; None at the end, and for Ctrl-C."""
        loop = self.stage.loop
        episode = asyncio.current_task()
        assert episode is not None, "a turn is made within an episode"
        # The loop stands still here, so nobody would hear of Ctrl-C but who reads
        loop.remove_signal_handler(signal.SIGINT)
        try:
            return _ask(YOURS)
        except KeyboardInterrupt:
            self.stage.screen.note("")  # a line of its own, behind ^C
            return None
        finally:
            loop.add_signal_handler(signal.SIGINT, episode.cancel)


def hold_episodes(
    talker: Talker, options: argparse.Namespace, loop: asyncio.AbstractEventLoop
) -> int:
    """What `retool chat --environment` does: its exit status. ValueError for what the user can mend."""
    screen = TerminalScreen(Console(highlight=False), talker.agent.options.format is HERMES)
    worlds = open_worlds(options.environment, options.environment_kwargs, talker.llm)
    playing = replace(talker, worlds=worlds)
    stage = Stage(playing, screen, loop, options.rows, options.seed, options.play)
    try:
        stage.prompt = read_row(stage, options.row)
        if not sys.stdin.isatty():
            return 0 if play(stage) else 1
        screen.note(f"{options.model} in {options.environment} · /help")
        return converse(stage)
    finally:
        worlds.let_go()


def read_row(stage: Stage, number: int) -> Prompt:
    """The row of that number as a prompt, which the environment is given. ValueError where there is
    none.
    """
    if number < 0:
        raise ValueError(f"--row {number}: the first is 0.")
    wanted = PromptOptions(needs_truth=False, keeps_rows=True)
    found: Question | RowError | None
    if stage.rows is None:
        found = to_question(ROW, "--environment", number, wanted)
    else:
        rows = read_questions(resolve_files(stage.rows, part=IN_NAME), wanted)
        found = next(islice(rows, number, None), None)
    if found is None:
        raise ValueError(f"--row {number}: {stage.rows} has no such row; the first is 0.")
    return of_world(found, number, stage.talker).prompt


def converse(stage: Stage) -> int:
    """Episodes until the user leaves."""
    again = True
    while again:
        play(stage)
        again = _obey(stage)
    return 0


def _obey(stage: Stage) -> bool:
    """Read what the user wants; whether there is another episode."""
    while True:
        try:
            text = _ask("Enter: again> ")
        except KeyboardInterrupt:
            text = None
        command, _, argument = (text or "").partition(" ")
        if text is None or command in ("/quit", "/exit"):
            return False
        if not command:
            return True
        if command == "/play":
            stage.by_user = not stage.by_user
            return True
        if command == "/row" and argument.strip().isdecimal():
            try:
                stage.prompt = read_row(stage, int(argument))
                stage.played = 0
                return True
            except ValueError as error:
                stage.screen.note(f"error: {error}")
                continue
        stage.screen.note("There is Enter (another episode), /row N, /play and /quit.")


def _ask(prompt: str) -> str | None:
    """What the user types; of a pipe, the next line. None at the end."""
    if sys.stdin.isatty():
        return read_message(lambda _: input(prompt))
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def play(stage: Stage) -> bool:
    """One episode; whether the environment did its part. Ctrl-C ends it, and not the program."""
    episode = stage.loop.create_task(_play(stage))
    stage.loop.add_signal_handler(signal.SIGINT, episode.cancel)
    try:
        trajectory = stage.loop.run_until_complete(episode)
    except asyncio.CancelledError:
        stage.screen.note("(stopped)")
        return True
    finally:
        stage.loop.remove_signal_handler(signal.SIGINT)
    stage.screen.note(f"({_ending(trajectory)})")
    return not trajectory.tool_failure


async def _play(stage: Stage) -> Trajectory:
    prompt = stage.prompt
    talker = stage.talker
    assert prompt is not None and talker.worlds is not None, "a row is read first"
    seats: list[Seat] = []

    def begin(episode: Episode, agent: Agent) -> Generate:
        there = replace(talker, agent=agent)
        params = turn_params(there, stage.played)
        seats.append(Seat(stage, Voice(there, stage.screen, episode, params, shown=0)))
        return seats[0].speak

    stage.played += 1
    attempt = Attempt(prompt, stage.played - 1, seed_of(stage.seed, 0, prompt.index))
    try:
        return await run_in_world(attempt, begin, talker.in_world(prompt), talker.worlds)
    finally:
        for seat in seats:
            seat.voice.end()
            seat.show_world()


def _ending(trajectory: Trajectory) -> str:
    """How an episode ended, and what it was worth."""
    if trajectory.tool_failure:
        return f"the environment failed: {trajectory.tool_failure}"
    ending = ENDINGS.get(trajectory.stop, "the model ended it")
    rewards = trajectory.turn_rewards
    if not rewards:
        return f"{ending}; no rewards"
    each = ", ".join(f"{reward:g}" for reward in rewards)
    return f"{ending}; rewards of the turns: {each}; in all {sum(rewards):g}"
