"""A reward model judges: its numbers are transformers', and what isn't a reward model is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config
from transformers import Qwen2ForSequenceClassification as Classifier

from retool.rl.config.reward import RewardConfig
from retool.rl.config.reward_model import RewardModelConfig
from retool.rl.preflight.trial import try_reward
from retool.rl.reward.calling import Asked
from retool.rl.reward.judges import open_judges
from retool.rl.reward.model_judge import ModelJudge, give_fp32_head, reward_model_bytes
from retool.rl.reward.protocol import JUDGES_LOST, Judged
from retool.rl.reward.source import find_reward, find_several
from tests import warm
from tests.rl.test_command import REWARDS, TORCHRUN, main, steps, words

FLOOR = -1.0


def conversations() -> list[list[dict[str, Any]]]:
    texts = ["4", "It is 4, I think, and not 5.", "?", "a book costs 3"]
    asked = {"role": "user", "content": "What is 2 + 2?"}
    return [[asked, {"role": "assistant", "content": text}] for text in texts]


@pytest.fixture(scope="module")
def folder(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model with the tokenizer and the template of `work`'s model."""
    folder = tmp_path_factory.mktemp("rm") / "scores"
    shutil.copytree(work / "model", folder)
    torch.manual_seed(1)
    known = json.loads((work / "model" / "config.json").read_text())
    config: Any = Qwen2Config(
        vocab_size=known["vocab_size"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    Classifier(config).save_pretrained(folder)
    return folder


@pytest.fixture
def judge(folder: Path) -> Iterator[ModelJudge]:
    judge = ModelJudge(RewardModelConfig(path=str(folder)), FLOOR, "cpu")
    yield judge
    judge.close()


def judged(judge: Any, asked: Sequence[list[dict[str, Any]]]) -> list[Judged]:
    """All at once."""

    async def everything() -> list[Judged]:
        questions = [Asked("numbers", "", "4", {}, {"messages": said}) for said in asked]
        return await asyncio.gather(*(judge.score(question) for question in questions))

    return asyncio.run(everything())


def test_the_score_is_transformers_of_each_conversation_alone(
    folder: Path, judge: ModelJudge
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = judged(judge, conversations() * 3)
    for i, said in enumerate(conversations() * 3):
        text = tokenizer.apply_chat_template(said, tokenize=False)
        with torch.no_grad():
            alone = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt"))
        assert found[i].failure is None
        assert found[i].score == pytest.approx(float(alone.logits[0, 0]), abs=1e-5)
    assert len({round(each.score, 4) for each in found}) == 4, "the answer doesn't matter to it"


def test_a_model_without_padding_reads_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    model = AutoModelForSequenceClassification.from_pretrained(bare).eval()
    tokenizer = AutoTokenizer.from_pretrained(bare)
    judge = ModelJudge(RewardModelConfig(path=str(bare)), FLOOR, "cpu")
    try:
        found = judged(judge, conversations())
    finally:
        judge.close()
    for said, each in zip(conversations(), found, strict=True):
        text = tokenizer.apply_chat_template(said, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert each.score == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-5)


def test_what_it_cannot_judge_gets_the_floor_and_the_others_their_score(folder: Path) -> None:
    short = RewardModelConfig(path=str(folder), max_length=60)
    judge = ModelJudge(short, FLOOR, "cpu")
    first, second, *_ = conversations()
    long = [*first[:1], {"role": "assistant", "content": "4 " * 99}]
    broken: list[dict[str, Any]] = [{}]
    try:
        good, too_long, unrendered, also_good = judged(judge, [first, long, broken, second])
    finally:
        judge.close()
    assert good.failure is also_good.failure is None
    assert (too_long.score, too_long.failure) == (FLOOR, "exception")
    assert "reward_model.model.max_length=60: raise it" in too_long.reason
    assert (unrendered.score, unrendered.failure) == (FLOOR, "exception")


def test_answers_are_lost_with_a_batch_that_the_model_breaks_on(
    judge: ModelJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no memory, say: that is no answer's fault."""

    def breaks(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(judge._model, "forward", breaks)
        lost = judged(judge, conversations()[:2])
    assert [each.failure for each in lost] == [JUDGES_LOST] * 2
    assert lost[0].reason.endswith("OutOfMemoryError: CUDA out of memory")
    assert judged(judge, conversations()[:1])[0].failure is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "holds Qwen2ForCausalLM"),
        ({"id2label": {"0": "bad", "1": "good"}}, "gives 2 numbers, not one"),
    ],
)
def test_no_reward_model(folder: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=says):
        ModelJudge(RewardModelConfig(path=str(other)), FLOOR, "cpu")


def test_a_head_that_was_never_trained_is_refused(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    named = {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "score"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **named}))
    with pytest.raises(ValueError, match=r"no weights for score\.weight"):
        ModelJudge(RewardModelConfig(path=str(tmp_path / "model")), FLOOR, "cpu")


def test_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"name=model needs reward_model\.model\.path"):
        open_judges(find_reward("model", None, None), RewardConfig())


def test_beside_other_rewards_it_is_one_of_several(folder: Path) -> None:
    settings = RewardConfig(num_workers=1, model=RewardModelConfig(path=str(folder)))
    source = find_several([f"{REWARDS}/digits", "model"], [1.0, 0.5])
    assert not list(try_reward(source, settings, [])), "its weights aren't read for a trial"
    alone = find_several(["model"], [0.5])
    nowhere = RewardConfig(num_workers=1, model=RewardModelConfig(path="/nowhere"))
    assert not list(try_reward(alone, nowhere, [])), "nor are those of the only one"
    judges = open_judges(source, settings)
    try:
        (each,) = judged(judges, conversations()[:1])
    finally:
        judges.close()
    assert each.failure is None
    told = each.info
    assert each.score == pytest.approx(told["rewards/digits"] + 0.5 * told["rewards/model"])


def test_the_plan_counts_its_weights(
    folder: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = sum(p.numel() for p in Classifier.from_pretrained(folder).parameters())
    assert reward_model_bytes(folder) == 2 * parameters
    verls = ["reward_model.enable=true", "reward_model.model.path=/nowhere/at/all"]
    rule = [word for word in words(work, tmp_path / "run") if "custom_reward" not in word]
    assert main([*rule, *verls, "--check"]) == 1
    assert "reward_model.model.path" in capsys.readouterr().out
    verls[1] = f"reward_model.model.path={folder}"
    assert main([*rule, *verls, "--check"]) == 0
    assert "reward: model" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_a_reward_model_judges(folder: Path, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rule = [word for word in words(work, out) if "custom_reward" not in word]
    command = [
        *TORCHRUN,
        *rule,
        f"reward_model.functions=[{REWARDS}/digits,model]",
        f"reward_model.model.path={folder}",
        "trainer.total_training_steps=2",
        "trainer.device=cpu",
    ]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    for entry in steps(out):
        assert entry["reward/exceptions"] == entry["stop/infrastructure"] == 0
        mean = entry["rewards/digits/mean"] + entry["rewards/model/mean"]
        assert entry["critic/score/mean"] == pytest.approx(mean, abs=1e-5)


def test_a_score_has_more_digits_than_bf16(folder: Path) -> None:
    model: Any = Classifier.from_pretrained(folder, dtype=torch.bfloat16)
    give_fp32_head(model)
    ids = torch.arange(5, 45).view(4, 10)
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state[:, -1]
        scores = model(ids).logits
    assert hidden.dtype == torch.bfloat16 and scores.dtype == torch.float32
    wanted = hidden.double() @ model.score.weight.double().T
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_it_reads_in_bf16_beside_the_engine(
    folder: Path, work: Path, tmp_path: Path
) -> None:
    scores = {}
    for device in ("cpu", "cuda"):
        judge = ModelJudge(RewardModelConfig(path=str(folder)), FLOOR, device)
        scores[device] = [each.score for each in judged(judge, conversations() * 5)]
        judge.close()
    # bf16 in two random layers: 0.02 on average, of scores that spread by 1.4
    assert scores["cuda"] == pytest.approx(scores["cpu"], rel=0.05, abs=0.15)

    rule = [word for word in words(work, tmp_path / "run") if "custom_reward" not in word]
    model = ["reward_model.name=model", f"reward_model.model.path={folder}"]
    assert main([*rule, *model, "trainer.total_training_steps=3", "trainer.device=cuda"]) == 0
    for entry in steps(tmp_path / "run"):
        assert entry["reward/exceptions"] == entry["stop/infrastructure"] == 0
