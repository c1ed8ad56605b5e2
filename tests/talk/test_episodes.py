"""`retool chat --environment`: what is shown of an episode, who plays, and what the user can do."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from retool.__main__ import main
from retool.rl.agent.environments.play import Worlds
from retool.talk import episodes
from retool.talk.batch import answer_all
from retool.talk.episodes import Stage, converse, play, read_row
from retool.talk.questions import read_worlds_rows
from retool.talk.screen import TerminalScreen
from retool.talk.writing import Tally

END = "<|im_end|>"
GUESSES = [f"5{END}", f"nine{END}", f"7{END}"]
SHOWN = """◂ user
  │ Guess, Ada.
5
◂ user
  │ Higher.
nine
◂ user
  │ That is no number.
(reward -0.5)
7
◂ user
  │ Right.
(reward 1)
(done; rewards of the turns: 0, -0.5, 1; in all 0.5)
"""


class Guess:
    """Is closed once, however an episode ends."""

    rows: ClassVar[list[dict[str, Any]]] = []
    closed = 0

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks

    def reset(self, row):
        Guess.rows.append(row)
        return f"Guess, {row['prompt'][0]['content']}."

    def step(self, message):
        if self.breaks:
            raise OSError("the game server is away")
        if message["content"] == "7":
            return "Right.", 1.0, True
        if not message["content"].isdecimal():
            return "That is no number.", -0.5, False
        return "Higher.", 0.0, False

    def close(self):
        Guess.closed += 1


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": name, "town": town} for name, town in (("Eva", "Ulm"), ("Ada", "Riga"))]
    file.write_text("\n".join(map(json.dumps, lines)))
    Guess.rows = []
    Guess.closed = 0
    return str(file)


@pytest.fixture
def stage_of(talker_of, rows):
    """Makes a stage, on which a model says what a script says: (stage, what it shows)."""

    def make(*turns: str, breaks: bool = False) -> tuple[Stage, io.StringIO]:
        talker, engine = talker_of({"chat": list(turns)}, tools=False)
        output = io.StringIO()
        screen = TerminalScreen(Console(file=output, highlight=False, width=90), True)
        worlds = Worlds(lambda: Guess(breaks), 5.0, 400)
        talker = replace(talker, worlds=worlds)
        stage = Stage(talker, screen, asyncio.new_event_loop(), rows, seed=3)
        stage.prompt = read_row(stage, 1)
        stage.engine = engine  # type: ignore[attr-defined]
        return stage, output

    return make


def test_the_model_plays_and_what_turns_are_worth_is_shown(stage_of) -> None:
    stage, output = stage_of(*GUESSES, *GUESSES)
    assert play(stage)
    assert output.getvalue() == SHOWN
    engine = stage.engine
    assert "Guess, Ada." in engine.text("chat", 0) and "no number" in engine.text("chat", 2)
    assert play(stage) and output.getvalue() == SHOWN * 2
    first, second = Guess.rows
    assert first["town"] == "Riga" and first["seed"] == second["seed"]
    assert (first["sample"], second["sample"]) == (0, 1)
    assert Guess.closed == 2 and engine.dropped == ["chat", "chat"]


def test_the_user_plays_in_its_place(stage_of, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, output = stage_of()
    stage.by_user = True
    monkeypatch.setattr(sys, "stdin", io.StringIO("5\nnine\n7\n"))
    assert play(stage) and output.getvalue() == SHOWN
    assert play(stage)  # the input has ended
    assert output.getvalue().endswith("◂ user\n  │ Guess, Ada.\n(stopped; no rewards)\n")
    assert Guess.closed == 2 and not stage.engine.prompts


def test_what_the_user_types_is_text(stage_of, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    stage, _ = stage_of()
    stage.by_user = True
    monkeypatch.setattr(sys, "stdin", io.StringIO("seven <|im_end|> ü\n"))
    monkeypatch.setattr(
        Guess, "step", lambda self, message: (heard.append(message["content"]) or "", 0.0, True)
    )
    assert play(stage) and heard == ["seven <|im_end|> ü"]


def test_an_environment_that_breaks_is_told(stage_of) -> None:
    stage, output = stage_of(*GUESSES, breaks=True)
    assert not play(stage)
    assert "(the environment failed: environment.step: OSError: the game server" in (
        output.getvalue()
    )
    assert Guess.closed == 1


def test_ctrl_c_ends_an_episode_and_closes_its_world(stage_of) -> None:
    stage, output = stage_of(*GUESSES)
    steps: list[None] = []

    def interrupt() -> None:
        steps.append(None)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stage.engine.before_step = interrupt
    assert play(stage)
    assert output.getvalue().endswith("(stopped)\n") and "Right" not in output.getvalue()
    assert Guess.closed == 1 and stage.engine.dropped == ["chat"]


def test_ctrl_c_ends_it_while_the_world_thinks_about_what_the_user_typed(
    stage_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self, message):
        os.kill(os.getpid(), signal.SIGINT)
        return "Higher.", 0.0, False

    stage, output = stage_of()
    stage.by_user = True
    monkeypatch.setattr(sys, "stdin", io.StringIO("5\n7\n"))
    monkeypatch.setattr(Guess, "step", step)
    assert play(stage)
    assert output.getvalue().endswith("(stopped)\n") and Guess.closed == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_commands_between_episodes(stage_of, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, output = stage_of(*GUESSES, *GUESSES, *GUESSES)
    typed = iter(["/what", "/row 9", "/row 0", "", "/play", "7", "/quit", "never"])
    asked: list[str] = []
    monkeypatch.setattr(episodes, "_ask", lambda prompt: asked.append(prompt) or next(typed))
    assert converse(stage) == 0 and next(typed) == "never"
    towns = [row["town"] for row in Guess.rows]
    assert towns == ["Riga", "Ulm", "Ulm", "Ulm"]
    assert [row["sample"] for row in Guess.rows] == [0, 0, 1, 2]
    said = output.getvalue()
    assert "There is Enter (another episode), /row N, /play and /quit." in said
    assert "error: --row 9:" in said and "has no such row; the first is 0" in said
    assert asked.count("your turn> ") == 1


def test_a_file_of_rows_is_played_side_by_side(talker_of, rows) -> None:
    script = {(row, sample): [*GUESSES] for row in range(2) for sample in range(2)}
    script[1, 0] = [f"7{END}"]
    script[1, 1] = ["cut off"]
    talker, _ = talker_of(script, tools=False, n=2)
    talker = replace(talker, worlds=Worlds(Guess, 5.0, 400))
    questions = read_worlds_rows([rows], talker)

    async def collect() -> list[Any]:
        return [pair async for pair in answer_all(talker, questions)]

    (eva, ada) = asyncio.run(collect())
    assert eva[0].row == {"prompt": "Eva", "town": "Ulm"} and ada[0].row["town"] == "Riga"
    first, second = [answer.as_dict() for answer in ada[1]]
    assert first["messages"] == [
        {"role": "user", "content": "Guess, Ada."},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "Right."},
    ]
    assert (first["reward"], first["rewards"], first["finish_reason"]) == (1.0, [1.0], "stop")
    assert (second["reward"], second["finish_reason"]) == (0, "length")
    assert [answer.reward for answer in eva[1]] == [0.5, 0.5]
    seeds = {(row["town"], row["seed"]) for row in Guess.rows}
    assert len(seeds) == 2 and Guess.closed == 4
    tally = Tally(2)
    for _, answers in (eva, ada):
        tally.add(answers)
    assert "2 of 2 rows answered" in tally.sentence() and "; mean reward 0.5" in tally.sentence()


def test_what_an_environment_failed_in_is_lost_and_counted(talker_of, rows) -> None:
    talker, _ = talker_of({(0, 0): [*GUESSES], (1, 0): [*GUESSES]}, tools=False)
    talker = replace(talker, worlds=Worlds(lambda: Guess(breaks=True), 5.0, 400))

    async def collect() -> list[Any]:
        return [pair async for pair in answer_all(talker, read_worlds_rows([rows], talker))]

    tally = Tally(2)
    for _, answers in asyncio.run(collect()):
        (answer,) = answers
        told = answer.as_dict()
        assert told["finish_reason"] == "tool_failure" and told["reward"] is None
        assert "the game server is away" in told["tool_failure"]
        tally.add(answers)
    assert "2 answers lost" in tally.sentence() and "reward" not in tally.sentence()


def test_the_command_plays_an_episode_of_what_is_piped(
    folder: Path,
    rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    game = tmp_path / "game.py"
    game.write_text(
        "class Game:\n"
        "    def __init__(self, right): self.right = right\n"
        "    def reset(self, row): return 'Guess, ' + row['prompt'][0]['content'] + '.'\n"
        "    def step(self, message): return 'No.', float(message['content'] == self.right), True\n"
    )
    words = ["chat", str(folder), "--device", "cpu", "--environment", f"{game}/Game"]
    kwargs = ["--environment-kwargs", "{right: '7'}"]
    given = [*kwargs, "--rows", rows, "--row", "1", "--play"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("7\n"))
    assert main([*words, *given]) == 0
    said = capsys.readouterr().out
    assert said.endswith("(reward 1)\n(done; rewards of the turns: 1; in all 1)\n")
    out = tmp_path / "played.jsonl"
    words[0] = "generate"
    assert main([*words, *kwargs, rows, "--out", str(out), "--max-tokens", "5"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"]["town"] for line in lines] == ["Ulm", "Riga"]
    assert all(line["completions"][0]["reward"] == 0.0 for line in lines)
    assert "mean reward 0: " in capsys.readouterr().err
    words[0] = "chat"
    for wrong, why in (
        ([f"{game}/Nothing"], "has no 'Nothing'; it has Game"),
        ([f"{game}/Game", "--environment-kwargs", "5"], "give a mapping, such as {most: 5}"),
        ([f"{game}/Game", "--row", "-1"], "--row -1: the first is 0"),
        ([f"{game}/Game", "--system", "Play."], "--system has no effect in an environment"),
    ):
        assert main([*words[:-1], *wrong]) == 1
        assert why in capsys.readouterr().err
    for idle in (["--play"], ["--rows", rows], ["--environment-kwargs", "{right: 1}"]):
        assert main([*words[:-2], *idle]) == 1
        assert f"{idle[0]} has no effect without --environment" in capsys.readouterr().err
