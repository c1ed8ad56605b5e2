"""The three small worlds: what they are made of, on answers made by hand; and, slowly, that a model
learns in each.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from examples.worlds import customer, learning, notebook, search
from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.data.tokens.load import load_tokenizer

WORLDS = {"search": search, "customer": customer, "notebook": notebook}


def calls_and_results(messages: list[dict[str, Any]]) -> list[tuple[dict[str, str], str]]:
    """The arguments of each call, and what the tool said to it."""
    found = []
    for message, following in pairwise(messages):
        for call in message.get("tool_calls", []):
            found.append((call["function"]["arguments"], following["content"]))
    return found


@pytest.mark.parametrize("name", WORLDS)
def test_demonstrations_are_what_a_model_of_its_own_can_be_trained_on(name, tmp_path) -> None:
    world = WORLDS[name].make_world(random.Random(1))
    assert len(world.demonstrations) >= 8 * world.sft_steps
    shown = world.conversations()[:12]
    folder = learning.make_model(tmp_path / "model", shown, seed=1)
    renderer = Renderer(load_tokenizer(str(folder)))
    for index, row in enumerate(shown):
        conversation = to_conversation(row, name, index)
        (sample,) = renderer.render(conversation)
        assert len(sample.tokens) <= 384 and sample.mask.any()
        assert row["messages"][0]["role"] == "user" and conversation.assistant_turns


@pytest.mark.parametrize("name", WORLDS)
def test_each_is_short_enough_to_be_read(name, repository: Path) -> None:
    text = (repository / f"examples/worlds/{name}.py").read_text()
    assert len(text.splitlines()) <= 60


def test_a_search_finds_the_page_and_nothing_else() -> None:
    world = search.make_world(random.Random(1))
    assert not {str(row) for row in world.held_out} & {str(row) for row in world.questions}
    assert world.tools is not None
    (tool,) = world.tools
    facts = search.make_facts(random.Random(1))
    for fact in facts[:20]:
        messages = search.demonstrate(fact, careful=True)
        for arguments, page in calls_and_results(messages):
            assert tool.find(**arguments) == [page]
        assert search.right(messages[-1]["content"], fact[2]) == 1.0
        careless = search.demonstrate(fact, careful=False)[-1]["content"]
        assert search.right(careless, fact[2]) == search.right(f"{fact[2]} it is", fact[2]) == 0.0


def test_a_customer_buys_from_who_asks_for_what_is_missing_and_no_more() -> None:
    untold: set[int] = set()
    for seed in range(12):
        for careful in (True, False):
            messages = customer.demonstrate(seed, careful=careful)
            person = customer.Customer()
            assert person.reset({"seed": seed}) == messages[0]["content"]
            needless = len(person.told) if not careful else 0
            untold.add(len(person.told))
            answers = [person.step(message) for message in messages[1::2]]
            given = sum(reward for _, reward, _ in answers)
            if needless:  # it has left in the middle
                assert ("Bye .", 0.0, True) in answers
            else:
                assert given == 1.0 and answers[-1] == ("Bye .", 1.0, True)
                assert [text for text, _, _ in answers[:-1]] == [
                    m["content"] for m in messages[2::2]
                ]
    assert untold == {0, 1, 2}
    person = customer.Customer()
    person.reset({"seed": 1})
    assert person.step({"content": "A bag ."}) == ("Bye .", 0.0, True)


def test_a_notebook_s_cells_do_what_its_demonstrations_say(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(3)
    seen: set[tuple[str, bool]] = set()
    for _ in range(16):
        row = notebook.make_question(draw)
        about = row["extra_info"]
        given = about["tools_kwargs"]["code_interpreter"]["execute_kwargs"]["files"]
        Path("data.csv").write_text(given["data.csv"])
        messages = notebook.demonstrate(row, draw)
        variables: dict[str, Any] = {}
        for arguments, said in calls_and_results(messages):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                try:
                    exec(arguments["code"], variables)
                except KeyError as error:
                    output.write(f"KeyError: {error}")
            assert (output.getvalue().strip() or "[no output]") == said
        looks = "rows[0]" in str(messages)
        seen.add((about["end"], looks))
        answer = messages[-1]["content"]
        assert notebook.right(answer, row["answer"]) == float(looks)
    assert len(seen) == 4


def cells(said: str) -> list[float]:
    """The closing table's shares: untrained, after SFT, after RL."""
    (row,) = re.findall(r"answers right +│ +(\d+)% +│ +(\d+)% +│ +(\d+)%", said)
    return [float(cell) / 100 for cell in row]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", WORLDS)
def test_a_model_learns(name: str, tmp_path: Path, repository: Path) -> None:
    """SFT makes it about half right; reinforcement learning does the rest."""
    command = [sys.executable, "-m", f"examples.worlds.{name}", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command,
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    untrained, tuned, better = cells(done.stdout)
    assert untrained <= 0.05 and 0.2 <= tuned <= 0.75
    assert better >= max(0.7, tuned + 0.15)
