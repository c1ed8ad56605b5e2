"""The demo's parts: data from a seed, a folder that transformers loads, the code tool's limits,
what counts as a call; then all of it.
"""

import asyncio
import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.model.catalogue.families import read_model_config
from retool.rl.__main__ import main as rl_main
from retool.rl.agent.tools.load import load_tools
from tests.real_data import real

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from quickstart import code_tool, data, evaluate, improving, listing, training  # noqa: E402
from quickstart import model as tiny  # noqa: E402

# A program that never ends needn't take the demo's five seconds.
code_tool.SECONDS = 2
code_tool.LIMITS = replace(code_tool.LIMITS, wall_seconds=2, cpu_seconds=4)

TURN_TOKENS = 40  # as in demo.py

CALL = 'I add.\n<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(1+2)"}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as the demo makes it."""
    path = tmp_path_factory.mktemp("model")
    template = (EXAMPLES / "quickstart/chat.jinja").read_text()
    tokenizer = tiny.train_tokenizer(tiny.render(data.make_problems(200, 1), template))
    tiny.write_tokenizer(path, tokenizer, template)
    tiny.write_model(path, tokenizer, 1)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# -- data
# -------------------------------------------------------------------------------------------------------------


def test_problems_follow_from_the_seed_and_are_all_different():
    problems = data.make_problems(500, 1)
    assert problems == data.make_problems(500, 1)
    assert problems[:100] == data.make_problems(100, 1)
    assert problems != data.make_problems(500, 2)
    assert len(set(problems)) == 500
    assert {len(problem) for problem in problems} == {1, 2}


def test_the_truth_is_what_the_program_prints():
    for question in [question for problem in data.make_problems(200, 3) for question in problem]:
        assert eval(question.expression) == question.answer
        numbers = [int(word) for word in question.text.replace(".", "").split() if word.isdigit()]
        assert str(numbers[-1]) in question.expression


def test_the_parquet_has_the_schema_of_real_tool_conversations(tmp_path):
    data.write_parquet(tmp_path / "train.parquet", data.make_problems(20, 1))
    ours = pq.read_schema(tmp_path / "train.parquet")
    theirs = pq.read_schema(real("gsm8k-tool-sft/train.parquet"))
    assert {f.name: f.type for f in ours} == {f.name: f.type for f in theirs}


def test_rows_render_and_only_the_assistant_is_trained(tmp_path, folder, tokenizer):
    data.write_parquet(tmp_path / "train.parquet", data.make_problems(30, 1))
    renderer = Renderer(tokenizer)
    for i, row in enumerate(pq.read_table(tmp_path / "train.parquet").to_pylist()):
        conversation = to_conversation(row, "train.parquet", i)
        (sample,) = renderer.render(conversation)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.mask.astype(int), [0]])))
        turns = [
            tokenizer.decode(sample.tokens[a:b])
            for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]
        assert len(turns) == len(conversation.assistant_turns)
        assert all(b - a <= TURN_TOKENS for a, b in zip(edges[::2], edges[1::2], strict=True))
        for turn, at in zip(turns, conversation.assistant_turns, strict=True):
            assert evaluate.parse_turn(turn) == conversation.messages[at]


# -- tokenizer and model
# ----------------------------------------------------------------------------------------------


def test_the_tokenizer_survives_loading_and_any_text_comes_back(folder, tokenizer):
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (
        "Mia has 23 boxes.\n\n  Ünïcode – 日本 \t<tool_call>\n{}",
        *tiny.render(data.make_problems(3, 9), tokenizer.chat_template),
    ):
        ids = tokenizer.encode(text)
        assert ids == raw.encode(text).ids  # transformers didn't put another splitting in its place
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]
    assert (
        tokenizer.decode(tokenizer.encode("<tool_call>a<|im_end|>"), skip_special_tokens=True)
        == "<tool_call>a"
    )


def test_the_model_loads_in_transformers_and_here(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    config = read_model_config(folder)
    assert (config.family, config.heads % 2, config.kv_heads % 2, config.tied) == (
        "qwen2",
        0,
        0,
        True,
    )
    assert config.vocab == model.config.vocab_size


def test_the_same_seed_makes_the_same_folder(folder, tmp_path):
    template = (EXAMPLES / "quickstart/chat.jinja").read_text()
    tokenizer = tiny.train_tokenizer(tiny.render(data.make_problems(200, 1), template))
    tiny.write_tokenizer(tmp_path, tokenizer, template)
    tiny.write_model(tmp_path, tokenizer, 1)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


# -- the code tool
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("print(23*47)", "1081"),
        ("23*47", "1081"),
        ("print('ä', '日本')", "ä 日本"),
        ("x = 1", "[no output]"),
        ("import sys; sys.exit(3)", "[the program ended with return code 3]"),
        ("print('x' * 5000)", "x" * 1024 + "\n[3977 more bytes of output]"),
    ],
)
def test_a_program_gives_its_output(code, result):
    assert code_tool.run_code(code) == result


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print(1)\n1/0", "ZeroDivisionError: division by zero"),
        ("print(", "SyntaxError: '(' was never closed"),
        ("print('\ud800')", "surrogates not allowed"),
        (
            "x = bytearray(1 << 30)",
            f"MemoryError: the program asked for more than its {code_tool.MEMORY_MB} MB",
        ),
        pytest.param(
            "while True: pass",
            f"TimeoutError: the program ran longer than {code_tool.SECONDS} s",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_went_wrong_is_told_at_the_end(code, error):
    assert error in code_tool.run_code(code).splitlines()[-1]


def test_the_program_runs_in_the_sandbox():
    """Not in a plain child process: neither this process's files nor the network are there."""
    assert "Error" in code_tool.run_code(f"open({str(EXAMPLES / 'demo.py')!r})")
    assert "Error" in code_tool.run_code(
        "import socket; socket.create_connection(('127.0.0.1', 9))"
    )
    assert code_tool.isolation() in ("strict", "best_effort") and (
        code_tool.isolation() == "strict"
    ) == (not code_tool.sandbox().unmet)


def test_where_strict_cannot_start_it_says_so_and_goes_on(monkeypatch, capsys):
    asked = []

    def start(limits, workers, isolation="strict"):
        asked.append(isolation)
        if isolation == "strict":
            raise ValueError("sandbox.isolation=strict: no network has no mechanism here.")
        return SimpleNamespace(unmet={"network": "refused"})

    monkeypatch.setattr(code_tool, "Sandbox", start)
    monkeypatch.setattr(code_tool, "sandbox", functools.cache(code_tool.sandbox.__wrapped__))
    assert (code_tool.isolation(), asked) == ("best_effort", ["strict", "best_effort"])
    assert (
        "no network has no mechanism" in (said := capsys.readouterr().err)
        and "isolation=best_effort" in said
    )


# -- evaluation
# -------------------------------------------------------------------------------------------------------


def test_a_well_formed_call_and_an_answer_are_told_apart():
    call = {
        "type": "function",
        "function": {"name": "code_interpreter", "arguments": {"code": "print(1+2)"}},
    }
    assert evaluate.parse_turn(CALL) == {
        "role": "assistant",
        "content": "I add.",
        "tool_calls": [call],
    }
    assert evaluate.parse_turn(CALL + "<|endoftext|><|endoftext|>") == evaluate.parse_turn(CALL)
    assert evaluate.parse_turn("It is 3.<|im_end|>") == {"role": "assistant", "content": "It is 3."}


@pytest.mark.parametrize(
    "text",
    [
        CALL.removesuffix("<|im_end|>"),
        CALL.replace("</tool_call>", ""),
        CALL.replace("<tool_call>", ""),
        CALL.replace('"}}', '"}'),
        CALL.replace("code_interpreter", "calculator"),
        CALL.replace('"print(1+2)"', "3"),
        CALL.replace('"code":', '"program":'),
        CALL.replace("I add.", "<tool_call>"),
        "box box box",
    ],
)
def test_what_is_not_well_formed(text):
    assert evaluate.parse_turn(text) is None


def script(*turns):
    """A model that says these turns, whatever it is asked."""
    left = list(turns)
    return lambda conversations: [left.pop(0) for _ in conversations]


def test_a_dialogue_runs_the_code_and_counts():
    problem = (data.Question("1+2?", "", "1+2", 3), data.Question("And 4?", "", "3+4", 7))
    (dialogue,) = evaluate.hold_dialogues(
        [problem],
        script(CALL, r"\boxed{3}<|im_end|>", CALL, r"\boxed{8}<|im_end|>"),
        code_tool.run_code,
    )
    assert [message["role"] for message in dialogue.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ] * 2
    assert dialogue.messages[2]["content"] == "3"
    assert evaluate.score([dialogue]) == evaluate.Score(questions=2, well_formed=2, right=1)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["nonsense"], (2, 0, 0)),  # the second question is never reached, and missed too
        ([CALL, "nonsense"], (2, 1, 0)),
        (
            [r"\boxed{3}<|im_end|>", CALL, r"\boxed{7}<|im_end|>"],
            (2, 1, 2),
        ),  # right without a call: not a call
        ([CALL] * 4, (2, 1, 0)),  # never answers
    ],
)
def test_dialogues_that_go_wrong(turns, expected):
    problem = (data.Question("1+2?", "", "1+2", 3), data.Question("And 4?", "", "3+4", 7))
    dialogues = evaluate.hold_dialogues([problem], script(*turns), lambda code: "3")
    assert evaluate.score(dialogues) == evaluate.Score(*expected)


def test_greedy_turns_do_not_depend_on_their_neighbours(folder, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    conversations = [
        [{"role": "user", "content": text}]
        for text in ("1?", "Mia has 23 boxes with 47 pens each. How many pens?")
    ]
    generate = evaluate.greedy(model, tokenizer, 12)
    assert generate(conversations) == [
        generate([conversation])[0] for conversation in conversations
    ]


# -- the run
# ----------------------------------------------------------------------------------------------------------


def test_every_missing_file_is_named(tmp_path, folder):
    run = tmp_path / "run"
    for name in listing.expected_files(7, 2, folder):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("7")
    (run / "global_step_7/fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 2}')
    assert listing.check_run(run, 7, 2, folder) == run / "global_step_7"
    (run / "global_step_7/huggingface/chat_template.jinja").unlink()
    (run / "global_step_7/optim_world_size_2_rank_1.pt").write_text("")
    with pytest.raises(ValueError, match=r"optim_world_size_2_rank_1\.pt.*chat_template\.jinja"):
        listing.check_run(run, 7, 2, folder)


def test_the_command_is_the_published_one():
    published = (EXAMPLES / "sft_qwen2_5.sh").read_text()
    words = training.sft_words(Path("t"), Path("e"), Path("m"), Path("r"), 5, 4, 2)
    for key in (
        "data.train_files=",
        "data.multiturn.enable=true",
        "model.strategy=fsdp",
        "use_remove_padding=true",
    ):
        assert key in published and any(word.startswith(key) for word in words)
    assert "ulysses_sequence_parallel_size=2" in words and "--nproc_per_node=2" in words


def test_what_was_logged_is_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "train/loss": 0.25, "x": null}\n{"step": 4, "train/l'
    )
    assert training.logged(tmp_path, "step 3/40  loss 0.2500  eta 0:00:12\n") == [
        {"step": 3, "steps": 40, "train/loss": 0.25}
    ]
    assert training.STEP.match("saved run/global_step_3 (0.01 s of waiting)") is None


def test_the_loss_is_shown_now_and_then():
    steps = [
        {"step": float(i), "steps": 24.0, "train/loss": loss}
        for i, loss in enumerate([4.0, 3.0, 2.0, 1.0], 1)
    ]
    assert [training.loss_line(steps[:n]) is not None for n in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        True,
    ]
    assert "step    4/24  loss  1.500" in str(training.loss_line(steps))
    assert training.loss_line([*steps, {"step": 4.0, "steps": 24.0, "val/loss": 1.0}]) is None


# -- reinforcement learning
# -------------------------------------------------------------------------------------------


def test_questions_are_new_and_each_is_there_once():
    problems = data.make_problems(300, 1)
    again = (problems[0][0], data.Question("And more?", "", "1", 1))
    kept = data.unasked([*problems[100:], again, *problems[100:110]], problems[:100])
    assert kept == problems[100:]


def test_the_command_starts_from_the_sft_model_with_the_sandbox(
    tmp_path, folder, capsys, monkeypatch
):
    """Preflight of the very words: questions, tool file, reward and model are found sound, and
    rendered as in SFT.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    problems = data.make_problems(40, 1)
    data.write_questions(tmp_path / "questions.parquet", problems[8:])
    data.write_questions(tmp_path / "held_out.parquet", problems[:8])
    improving.write_tools(tmp_path / "tools.yaml", code_tool.isolation(), 5, 512, 2)
    files = (tmp_path / name for name in ("questions.parquet", "held_out.parquet", "tools.yaml"))
    words = improving.rl_words(*files, folder, tmp_path / "run", 18, 1)
    assert words[:4] == ["--nnodes=1", "--nproc_per_node=2", "-m", "retool.rl"]
    assert rl_main([*words[4:], "--check"]) == 0
    said = capsys.readouterr().out
    assert (
        "16 prompts × 8 samples = 128 trajectories" in said
        and "reward: retool" in said
        and "tools: code_interpreter" in said
    )
    assert "32 prompts (shop: 32)" in said and "8 prompts (shop: 8)" in said
    (loaded,) = load_tools(tmp_path / "tools.yaml")
    assert loaded.schema == data.TOOL
    asyncio.run(loaded.close())


def transcript(acc, reward, *turns):
    segments = [
        {"role": "assistant" if i % 2 == 0 else "tool", "text": text}
        for i, text in enumerate(turns)
    ]
    return {"prompt": "user: 1+2?", "reward": reward, "info": {"acc": acc}, "segments": segments}


def test_answers_are_counted_and_a_change_is_found():
    wrong = transcript(0.0, -0.9, CALL, "4", r"\boxed{4}<|im_end|>")
    broken = transcript(0.0, -1.0, CALL.replace('"}}', '"}'))
    silent = transcript(0.0, -1.0, "box box")
    right = transcript(1.0, 1.0, CALL, "3", r"\boxed{3}<|im_end|>")
    assert improving.count([wrong, broken, silent, right]) == improving.Answers(
        answers=4, right=1, calls=3, malformed=1, reward=-0.475
    )
    assert improving.changed([right, wrong, broken], [right, right, right]) == (broken, right)
    assert improving.changed([wrong, wrong], [wrong, right]) == (wrong, right)
    assert improving.changed([right, wrong], [wrong, wrong]) is None


def test_what_is_said_of_a_step():
    sampled = {
        "step": 3.0,
        "steps": 18.0,
        "critic/score/mean": -0.125,
        "tool/calls": 120.0,
        "tool/errors": 7.0,
    }
    assert (
        improving.step_line([sampled])
        == "  step   3/18  reward -0.12, 120 tool calls, 7 of them invalid or failed"
    )
    assert improving.step_line([{**sampled, "step": 4.0}]) is None
    # No group had a signal
    untrained = {name: value for name, value in sampled.items() if name != "critic/score/mean"}
    assert (
        improving.step_line([untrained])
        == "  step   3/18  120 tool calls, 7 of them invalid or failed"
    )
    assert "42% right" in str(
        improving.step_line([{"step": 0.0, "steps": 18.0, improving.ACCURACY: 0.42}])
    )
    assert improving.training_calls([sampled, {"step": 0.0, "steps": 18.0}, sampled]) == 240


# -- the whole
# --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_demo(tmp_path):
    """As `make demo` runs it: it learns its tool, reinforcement learning makes it better, and it
    says so with exit status 0.
    """
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--out", str(out)],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    losses = [step["train/loss"] for step in steps if "train/loss" in step]
    assert len(losses) == 640 and np.mean(losses[-20:]) < 0.1 * np.mean(losses[:20])
    before, after = cells(done.stdout, "tool calls well-formed")
    assert before <= 5 and after >= 90
    before, after = cells(done.stdout, "answers right")
    assert before <= 5 and after >= 70
    steps = [json.loads(line) for line in (out / "rl/metrics.jsonl").read_text().splitlines()]
    accuracy = [step[improving.ACCURACY] for step in steps if improving.ACCURACY in step]
    assert 0.2 <= accuracy[0] <= 0.8 and accuracy[-1] >= accuracy[0] + 0.1
    before, after = cells(done.stdout, "sampled answers right")
    assert (before, after) == (round(100 * accuracy[0]), round(100 * accuracy[-1]))
    before, after = cells(done.stdout, "of them malformed")
    assert after < before
    assert sum(step.get("tool/calls", 0) for step in steps) > 30 * 100


def cells(said, row):
    """The two numbers of a row of a closing table."""
    (found,) = re.findall(rf"│ {row} +│ (\d+)%? +│ (\d+)%? +│", said)
    return int(found[0]), int(found[1])
