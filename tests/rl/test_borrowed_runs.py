"""Whole runs on two ranks in environments of other libraries."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.rl.agent.test_openenv import LIGHTS, server
from tests.rl.agent.test_verifiers import rows_of, tasksets
from tests.rl.test_command import TORCHRUN, steps
from tests.rl.test_environment_runs import WORLD, brief, played

__all__ = ["brief", "server", "tasksets"]


def run(work, out, *more) -> list[dict]:
    """The steps of a run on two ranks. Its processes leave nothing behind."""
    given = [word for word in played(work, out) if not word.startswith(f"{WORLD}.")]
    done = subprocess.run(
        [*TORCHRUN, *given, *more], capture_output=True, text=True, timeout=170, env=os.environ
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return steps(out)


@pytest.mark.slow
def test_a_run_in_a_game_of_verifiers(brief, tasksets, tmp_path) -> None:
    """A task that breaks is lost; what is left is learnt from."""
    rows = rows_of("retool_guess", 2) * 6
    for index in (4, 9):
        task = json.loads(rows[index]["extra_info"]["task"])
        task["raises"] = True
        rows[index] = {**rows[index], "extra_info": {"task": json.dumps(task)}}
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [
        f"data.train_files={file}",
        "data.shuffle=false",
        f"{WORLD}.name=verifiers:retool_guess",
        f"{WORLD}.kwargs={{most: 2}}",
    ]
    found = run(brief, tmp_path / "run", *more)
    lost = [entry["stop/infrastructure"] for entry in found]
    assert len(found) == 2 and lost == [0, 4], "of a broken row, all four answers"
    for entry in found:
        # Each turn that verifiers has heard of is worth a hundredth
        assert 0.01 <= entry["environment/reward/mean"] <= 1.03
        assert entry["num_turns/max"] > 2 and entry["stop/done"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("over_http", [False, True])
def test_a_run_in_openenv_s_lights(brief, server, tmp_path, over_http) -> None:
    """In each rank's own process, or at a server that both speak to: what breaks is lost."""
    prompt = [{"role": "user", "content": "Switch them on."}]
    row = {"data_source": "lights", "prompt": prompt, "extra_info": {"reset": {"broken": ""}}}
    broken = {**row, "extra_info": {"reset": {"broken": "a fuse"}}}
    rows = [row] * 4 + [broken, *[row] * 7]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    maps = tmp_path / "maps.py"
    maps.write_text("def press(message):\n    return {'light': len(message['content']) % 3}\n")
    name = server[0] if over_http else f"{LIGHTS}/LightsEnvironment"
    more = [
        f"data.train_files={file}",
        "data.shuffle=false",
        f"{WORLD}.name=openenv:{name}",
        f"{WORLD}.kwargs.to_action={maps}/press",
    ]
    found = run(brief, tmp_path / "run", *more)
    assert len(found) == 2
    assert found[0]["stop/infrastructure"] == 0 < found[1]["stop/infrastructure"] <= 4
    assert found[0]["environment/reward/max"] > 0
