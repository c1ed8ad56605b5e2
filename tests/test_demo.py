"""The demo's parts: data from a seed, a folder that transformers loads, the code tool's limits, what counts as a call; then all of it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from retool.data.chat import Renderer
from retool.data.rows import to_conversation
from retool.model.config import read_model_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from quickstart import code_tool, data, evaluate, listing, training  # noqa: E402
from quickstart import model as tiny  # noqa: E402

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


# -- data -------------------------------------------------------------------------------------------------------------


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


def test_the_parquet_has_the_schema_of_real_tool_conversations(tmp_path, shared_data):
    data.write_parquet(tmp_path / "train.parquet", data.make_problems(20, 1))
    ours, real = pq.read_schema(tmp_path / "train.parquet"), pq.read_schema(shared_data / "gsm8k-tool-sft/train.parquet")
    assert {field.name: field.type for field in ours} == {field.name: field.type for field in real}


def test_rows_render_and_only_the_assistant_is_trained(tmp_path, folder, tokenizer):
    data.write_parquet(tmp_path / "train.parquet", data.make_problems(30, 1))
    renderer = Renderer(tokenizer)
    for i, row in enumerate(pq.read_table(tmp_path / "train.parquet").to_pylist()):
        conversation = to_conversation(row, "train.parquet", i)
        (sample,) = renderer.render(conversation)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.mask.astype(int), [0]])))
        turns = [tokenizer.decode(sample.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        assert len(turns) == len(conversation.assistant_turns)
        assert all(b - a <= TURN_TOKENS for a, b in zip(edges[::2], edges[1::2], strict=True))
        for turn, at in zip(turns, conversation.assistant_turns, strict=True):
            assert evaluate.parse_turn(turn) == conversation.messages[at]


# -- tokenizer and model ----------------------------------------------------------------------------------------------


def test_the_tokenizer_survives_loading_and_any_text_comes_back(folder, tokenizer):
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("Mia has 23 boxes.\n\n  Ünïcode – 日本 \t<tool_call>\n{}", *tiny.render(data.make_problems(3, 9), tokenizer.chat_template)):
        ids = tokenizer.encode(text)
        assert ids == raw.encode(text).ids  # transformers didn't put another splitting in its place
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]
    assert tokenizer.decode(tokenizer.encode("<tool_call>a<|im_end|>"), skip_special_tokens=True) == "<tool_call>a"


def test_the_model_loads_in_transformers_and_here(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    config = read_model_config(folder)
    assert (config.family, config.heads % 2, config.kv_heads % 2, config.tied) == ("qwen2", 0, 0, True)
    assert config.vocab == model.config.vocab_size


def test_the_same_seed_makes_the_same_folder(folder, tmp_path):
    template = (EXAMPLES / "quickstart/chat.jinja").read_text()
    tokenizer = tiny.train_tokenizer(tiny.render(data.make_problems(200, 1), template))
    tiny.write_tokenizer(tmp_path, tokenizer, template)
    tiny.write_model(tmp_path, tokenizer, 1)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


# -- the code tool ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("print(23*47)", "1081"),
        ("print('ä', '日本')", "ä 日本"),
        ("print(1)\n1/0", "1\nError: ZeroDivisionError: division by zero"),
        ("print(", "Error: SyntaxError: '(' was never closed"),
        ("print('x' * 5000)", "x" * code_tool.MAX_OUTPUT),
        ("x = 1", ""),
        ("print('\ud800')", "?"),
        ("import sys; sys.exit(3)", "Error: exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "Error: killed by signal 9"),
    ],
)
def test_a_program_gives_its_output_or_its_error(code, result):
    assert code_tool.run_code(code) == result


def test_a_program_that_never_ends_is_killed():
    started = time.monotonic()
    assert code_tool.run_code("import time; time.sleep(60)", timeout=0.5) == "Error: no result within 0.5 seconds"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("f = open('f', 'wb')\nf.write(b'x' * (2 << 20))\nf.flush()", "File too large"),
        ("[open('/dev/null') for _ in range(50)]", "Too many open files"),
    ],
)
def test_limits(code, error):
    assert error in code_tool.run_code(code)


def test_endless_output_ends():
    result = code_tool.run_code("while True: print('x' * 1000)", timeout=10)
    assert result.startswith("x" * 500) and "Error: " in result and len(result) < 2 * code_tool.MAX_OUTPUT


def test_a_program_sees_nothing_of_the_callers_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    assert "s3cret" not in code_tool.run_code("import os; print(dict(os.environ))")


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_a_well_formed_call_and_an_answer_are_told_apart():
    call = {"type": "function", "function": {"name": "code_interpreter", "arguments": {"code": "print(1+2)"}}}
    assert evaluate.parse_turn(CALL) == {"role": "assistant", "content": "I add.", "tool_calls": [call]}
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
    (dialogue,) = evaluate.hold_dialogues([problem], script(CALL, r"\boxed{3}<|im_end|>", CALL, r"\boxed{8}<|im_end|>"), code_tool.run_code)
    assert [message["role"] for message in dialogue.messages] == ["user", "assistant", "tool", "assistant"] * 2
    assert dialogue.messages[2]["content"] == "3"
    assert evaluate.score([dialogue]) == evaluate.Score(questions=2, well_formed=2, right=1)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["nonsense"], (2, 0, 0)),  # the second question is never reached, and missed too
        ([CALL, "nonsense"], (2, 1, 0)),
        ([r"\boxed{3}<|im_end|>", CALL, r"\boxed{7}<|im_end|>"], (2, 1, 2)),  # right without a call: not a call
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
    conversations = [[{"role": "user", "content": text}] for text in ("1?", "Mia has 23 boxes with 47 pens each. How many pens?")]
    generate = evaluate.greedy(model, tokenizer, 12)
    assert generate(conversations) == [generate([conversation])[0] for conversation in conversations]


# -- the run ----------------------------------------------------------------------------------------------------------


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
    words = training.sft_words(Path("t"), Path("e"), Path("m"), Path("r"), 5, 4)
    for key in ("data.train_files=", "data.multiturn.enable=true", "model.strategy=fsdp", "use_remove_padding=true"):
        assert key in published and any(word.startswith(key) for word in words)
    assert "ulysses_sequence_parallel_size=2" in words and "--nproc_per_node=2" in words


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_demo(tmp_path):
    """As `make demo` runs it: it learns its tool, and says so with exit status 0."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--out", str(tmp_path / "out")], cwd=EXAMPLES.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "out/run/metrics.jsonl").read_text().splitlines()]
    losses = [step["train/loss"] for step in steps if "train/loss" in step]
    assert len(losses) == 640 and np.mean(losses[-20:]) < 0.1 * np.mean(losses[:20])
    before, after = rates(done.stdout, "tool calls well-formed")
    assert before <= 5 and after >= 90
    before, after = rates(done.stdout, "answers right")
    assert before <= 5 and after >= 70


def rates(said, row):
    """The two percentages of a row of the closing table."""
    (found,) = re.findall(rf"│ {row} +│ (\d+)% +│ (\d+)% +│", said)
    return int(found[0]), int(found[1])
