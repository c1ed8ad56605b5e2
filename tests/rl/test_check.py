"""`--check` is the run, for RL: in both the same faults, before anything is touched; and another
run's checkpoint by name.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from retool.rl.__main__ import main
from retool.rl.agent.tools import ToolResult, load, state
from retool.sft.__main__ import main as sft
from tests.faults import another_model, contents, planned, refused
from tests.rl.test_command import ARR, REWARDS, words

TURNS = f"{ARR}rollout.multi_turn."


class Adder:
    """A tool of the user's."""

    name = "add"

    def __init__(self, config: object, schema: object) -> None:
        self.schema = {"type": "function", "function": {"name": "add"}}

    async def call(self, arguments: object) -> ToolResult:
        return ToolResult("4", "success")

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def begun(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is there of a run after its first step: `run/`; its questions in two files, its reward
    in a file of its own; other models.
    """
    folder = tmp_path_factory.mktemp("begun")
    lines = (work / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:12]))
    (folder / "b.jsonl").write_text("".join(lines[12:]))
    (folder / "answers.jsonl").write_text(
        "".join(lines).replace('"ground_truth": "', '"ground_truth": "1', 1)
    )
    shutil.copy(REWARDS, folder / "judge.py")
    (folder / "milder.py").write_text(REWARDS.read_text() + "\n# milder\n")
    (folder / "tools.yaml").write_text("tools: [{class_name: tests.rl.test_check.Adder}]")
    another_model(work / "model", folder / "tuned")
    assert main([*command(work, folder, folder / "run"), "trainer.total_training_steps=1"]) == 0
    return folder


def command(work: Path, begun: Path, out: Path, *more: str) -> list[str]:
    files = f"data.train_files=[{begun}/a.jsonl,{begun}/b.jsonl]"
    small = [
        "data.max_response_length=6",
        f"{ARR}rollout.n=2",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=false",
    ]
    return [
        *words(work, out),
        files,
        f"custom_reward_function.path={begun}/judge.py",
        *small,
        *more,
    ]


class Staying(Adder):
    """It never heeds that it is cancelled."""

    async def close(self) -> None:
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)


STAYING = """
import asyncio


class World:
    async def reset(self, row):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    async def step(self, message):
        pass
"""


def test_a_tool_and_an_environment_that_do_not_heed_being_cancelled_do_not_hold_up_the_check(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    untried: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(load, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(state, "CLOSE_SECONDS", 0.05)
    (tmp_path / "tools.yaml").write_text("tools: [{class_name: tests.rl.test_check.Staying}]")
    (tmp_path / "world.py").write_text(STAYING)
    tools = ["enable=true", f"tool_config_path={tmp_path}/tools.yaml"]
    world = [f"environment.path={tmp_path}/world.py", "environment.name=World"]
    asked = [TURNS + key for key in (*tools, *world, "environment.timeout_seconds=0.1")]
    with pytest.warns(UserWarning, match="the tool add did not close"):
        assert main([*words(work, tmp_path / "out"), *asked, "--check"]) == 1
    assert "reset gave no answer within 0.1 s. Mend it" in capfd.readouterr().out


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trial of the reward, which starts processes."""
    monkeypatch.setattr("retool.rl.preflight.checks.try_reward", lambda *_: [])


@pytest.fixture
def out(begun: Path, tmp_path: Path) -> Path:
    """A copy of the run to try to go on with."""
    shutil.copytree(begun / "run", tmp_path / "run")
    return tmp_path / "run"


def test_the_run_goes_on_where_nothing_is_another(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(out)
    lower = command(work, begun, out, f"{ARR}actor.optim.lr=1e-3", f"{ARR}rollout.temperature=0.9")
    text = planned(main, lower, capfd)
    assert f"goes on from {out}/global_step_1" in text and contents(out) == before
    assert (
        f"note: {ARR}actor.optim.lr: then 0.01, now 0.001.\n" in text
        and f"note: {ARR}rollout.temperature: then 1.0, now 0.9.\n" in text
    )
    assert main(lower) == 0 and (out / "global_step_2").is_dir()


ANOTHER: dict[str, tuple[list[str], list[str], bool]] = {
    "order of files": (
        ["data.train_files=[{begun}/b.jsonl,{begun}/a.jsonl]"],
        ["their content and order: then "],
        True,
    ),
    "other answers": (
        ["data.train_files={begun}/answers.jsonl"],
        ["data.train_files=[{begun}/answers.jsonl]: ", "content and order"],
        True,
    ),
    "fewer questions": (["data.train_max_samples=20"], ["questions: then 24, now 20"], True),
    "seed": (["data.seed=2"], ["data.seed=2: ", "then 1, now 2"], True),
    "weights": (
        [f"{ARR}model.path={{begun}}/tuned"],
        [f"{ARR}model.path={{begun}}/tuned: ", "the model's weights: then "],
        False,
    ),
    "reference": (
        [f"{ARR}model.path={{begun}}/tuned", f"{ARR}actor.use_kl_loss=true"],
        ["the model's weights: then "],
        True,
    ),
    "reward": (
        ["custom_reward_function.name=never"],
        ["digits in judge.py (", "now never in judge.py ("],
        False,
    ),
    "code of the reward": (
        ["custom_reward_function.path={begun}/milder.py"],
        ["digits in milder.py ("],
        False,
    ),
    "objective": (
        ["algorithm.adv_estimator=rloo"],
        ["algorithm.adv_estimator=rloo: ", "then grpo, now rloo"],
        False,
    ),
    "loss": ([f"{ARR}actor.policy_loss.loss_mode=cispo"], ["then vanilla, now cispo"], False),
    "length": (
        ["reward_model.overlong_buffer.enable=true"],
        ["the punishment of long answers: then off, now 4096 tokens"],
        False,
    ),
    "tools": (
        [
            f"{TURNS}enable=true",
            f"{TURNS}tool_config_path={{begun}}/tools.yaml",
            "data.max_prompt_length=900",
        ],
        [
            "the tools: then none, now add (",
            "how calls are written: then none are read, now hermes",
        ],
        True,
    ),
}


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("name", ANOTHER)
def test_another_run_is_refused_by_name(
    work: Path, begun: Path, out: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    more, expected, strict = ANOTHER[name]
    asked = command(work, begun, out, *(word.format(begun=begun, work=work) for word in more))
    faults = refused(main, asked, out, capfd)
    text = "\n".join(faults)
    assert all(part.format(begun=begun) in text for part in expected), text
    anyway = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={out}/global_step_1"]
    assert (" ".join(anyway) in text) or strict
    if strict:
        assert (
            f"give {ARR}model.path={out}/global_step_1/actor/huggingface and another trainer.default_local_dir"
            in text
        )
    if name == "reference":
        assert refused(main, [*asked, *anyway], out, capfd), "not even where it is asked for"
    if name == "objective":
        assert "it goes on all the same" in planned(main, [*asked, *anyway], capfd)


def test_the_other_commands_checkpoint_is_refused_with_the_way_to_its_weights(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "1"}]}
    ] * 8
    (out.parent / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = f"model.partial_pretrain={work}/model"
    talk = [
        f"data.train_files={out.parent}/talk.jsonl",
        model,
        "data.train_batch_size=4",
        "data.num_workers=0",
    ]
    (fault,) = refused(sft, [*talk, f"trainer.default_local_dir={out}"], out, capfd)
    assert (
        "saved by python -m retool.rl" in fault
        and f"model.partial_pretrain={out}/global_step_1/actor/huggingface" in fault
    )
    other = out.parent / "sft"
    assert sft([*talk, f"trainer.default_local_dir={other}", "trainer.total_training_steps=1"]) == 0
    (fault,) = refused(main, command(work, begun, other), other, capfd)
    assert (
        "saved by python -m retool.sft" in fault
        and f"{ARR}model.path={other}/global_step_1/huggingface" in fault
    )
    there = [
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={out}/global_step_1/actor",
    ]
    assert "goes on from" in planned(main, command(work, begun, other, *there), capfd), (
        "actor/ in a checkpoint means the whole"
    )


def short_vocabulary(work: Path, folder: Path) -> None:
    """A tokenizer with a token more than the model has rows."""
    from transformers import AutoTokenizer

    shutil.copytree(work / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    tokenizer.add_tokens(["orange"])
    tokenizer.save_pretrained(folder)


FRESH: dict[str, tuple[list[str], list[str]]] = {
    "configuration, processes, devices": (
        [
            "algorithm.adv_estimatr=grpo",
            "algorithm.adv_estimator=gae",
            "trainer.logger=[consol]",
            f"{ARR}actor.ppo_mini_batch_size=3",
            f"{ARR}rollout.tensor_model_parallel_size=2",
            f"{ARR}actor.ulysses_sequence_parallel_size=3",
            "trainer.device=cuda",
            f"{ARR}model.attn=flash4",
            "data.template_date=2026-13-01",
            "trainer.val_only=true",
            "trainer.resume_from_path=x",
        ],
        [
            "unknown key algorithm.adv_estimatr",
            "needs a value model",
            "trainer.logger=consol",
            "does not divide data.train_batch_size=4",
            "tensor_model_parallel_size=2: does not fit 1 process",
            "ulysses_sequence_parallel_size=3: does not fit",
            "has no usable GPU",
            "attn=flash4: needs a GPU",
            "data.template_date=2026-13-01: is no date",
            "has nothing to validate on",
            "is not used under trainer.resume_mode=auto",
        ],
    ),
    "variables that aren't set": ([f"{ARR}model.path="], [f"{ARR}model.path=: is empty"]),
    "what ends a text": (
        [f"{ARR}model.path={{tmp}}/endless"],
        ["generation_config.json holds no token ids as eos_token_id ('never')"],
    ),
    "files": (["data.train_files={tmp}/none.jsonl"], ["none.jsonl doesn't exist"]),
    "no prompt": (["data.train_files={tmp}/untold.jsonl"], ["row 0", "there is no 'prompt'"]),
    "prompts too long": (["data.max_prompt_length=2"], ["none of the 24 prompts fits"]),
    "no full batch": (
        ["data.train_batch_size=40", f"{ARR}actor.ppo_mini_batch_size=40"],
        ["more than the 24 prompts"],
    ),
    "reward and tools": (
        [
            "custom_reward_function.name=nothing",
            f"{TURNS}enable=true",
            f"{TURNS}tool_config_path={{tmp}}/none.yaml",
        ],
        ["has no 'nothing'", "none.yaml doesn't exist"],
    ),
    "a reward that can't be called": (
        ["custom_reward_function.path={tmp}/judge.py", "custom_reward_function.name=short"],
        ["can't be called"],
    ),
    "tokens without an embedding": (
        [f"{ARR}model.path={{tmp}}/short"],
        ["row ", "rows. The tokenizer isn't this model's"],
    ),
}


@pytest.fixture(scope="module")
def wrong(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, functions and a model that are refused."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "untold.jsonl").write_text(
        json.dumps({"data_source": "shop", "question": "2+2?"}) + "\n"
    )
    (folder / "judge.py").write_text("def short(answer):\n    return 1.0\n")
    short_vocabulary(work, folder / "short")
    shutil.copytree(work / "model", folder / "endless")
    (folder / "endless" / "generation_config.json").write_text('{"eos_token_id": "never"}')
    (folder / "orange.jsonl").write_text(
        (work / "train.jsonl").read_text().replace('"content": "', '"content": "orange ', 1)
    )
    return folder


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("name", FRESH)
def test_the_check_of_a_new_run_is_the_run(
    work: Path, wrong: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    more, expected = FRESH[name]
    files = [f"data.train_files={wrong}/orange.jsonl"] if "tokens" in name else []
    asked = [*words(work, tmp_path / "run"), *files, *(word.format(tmp=wrong) for word in more)]
    faults = refused(main, asked, tmp_path, capfd)
    assert all(part in "\n".join(faults) for part in expected), faults
    assert not (tmp_path / "run").exists()


def test_a_reward_that_its_workers_cannot_load_touches_no_folder(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (out.parent / "judge.py").write_text(
        "import multiprocessing as m\nif m.parent_process() is not None: raise OSError('no judge here')\n"
        "def digits(data_source, solution_str, ground_truth, extra_info):\n    return 1.0\n"
    )
    anew = ["trainer.resume_mode=disable", f"custom_reward_function.path={out.parent}/judge.py"]
    assert "no judge here" in "\n".join(refused(main, command(work, begun, out, *anew), out, capfd))
