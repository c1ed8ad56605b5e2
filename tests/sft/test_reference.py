"""A run of the command beside the plainest program for it: text written by hand, transformers' model,
torch's AdamW. No key has its default, so that one which never arrives is noticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retool import checkpoint
from retool.batch import PackedBatch
from retool.data.loader import epoch_order
from retool.metrics import read_jsonl
from retool.sft import train
from retool.sft.__main__ import main
from retool.sft.step import train_step
from tests.sft.test_command import words

ROWS = 15
BATCH = 2
STEPS = 20
STEPS_AN_EPOCH = 7
WARMUP = 3
LR = 2e-3
SEED = 5
CLIP = 0.5
BETAS = (0.8, 0.9)
DECAY = 0.3
FLOOR = 0.25
KEYS = {
    "data__train_batch_size": BATCH,
    "data__micro_batch_size_per_gpu": 1,
    "data__fill_micro_batches": "false",
    "data__train_max_samples": ROWS,
    "data__val_max_samples": 3,
    "optim__lr": LR,
    "optim__betas": list(BETAS),
    "optim__weight_decay": DECAY,
    "optim__clip_grad": CLIP,
    "optim__lr_scheduler": "wsd",
    "optim__warmup_steps_ratio": 0.16,
    "optim__min_lr_ratio": FLOOR,
    "trainer__seed": SEED,
    "trainer__total_epochs": 7,
    "trainer__total_training_steps": STEPS,
    "trainer__test_freq": "after_each_epoch",
    "trainer__save_freq": "after_each_epoch",
    "trainer__max_ckpt_to_keep": 2,
    "trainer__checkpoint__save_contents": "[model,optimizer,extra]",
}

CHATML = Path(__file__).parents[1] / "data/templates/chatml.jinja"
READER = """
import json

def read_none(path):
    return []

def read_all(path):
    return map(json.loads, open(path))
"""


class Said(NamedTuple):
    """Tokens of a row, int64 [n], and which of them are trained, bool [n]."""

    tokens: torch.Tensor
    trained: torch.Tensor


def rows(seed: int) -> list[dict[str, Any]]:
    """Conversations of two questions each, in some of which the first answer isn't trained."""
    made = []
    for i in range(ROWS + 2):
        count = (i * seed) % 5 + 2
        plums = ["How many plums?", "plums " * count, "Then?", f"The answer is {count}."]
        turns: list[dict[str, Any]] = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, plums, strict=True)
        ]
        turns[1]["loss_mask"] = int(i % 3 > 0)
        made.append({"messages": turns})
    return made


def said(row: dict[str, Any], tokenizer: Any) -> Said:
    """What a row says in ChatML, each piece tokenised by itself."""
    tokens: list[int] = []
    trained: list[bool] = []

    def say(text: str, by_model: bool) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens.extend(ids)
        trained.extend([by_model] * len(ids))

    context = ""
    for turn in row["messages"]:
        context += f"<|im_start|>{turn['role']}\n"
        if turn["role"] == "assistant":
            say(context, False)
            say(f"{turn['content']}<|im_end|>", turn.get("loss_mask", 1) == 1)
            context = "\n"
        else:
            context += f"{turn['content']}<|im_end|>\n"
    say(context, False)
    return Said(torch.tensor(tokens), torch.tensor(trained))


def mean_loss(model: Any, batch: Sequence[Said]) -> torch.Tensor:
    """−log p of the trained tokens of some rows, over their number."""
    losses = []
    for tokens, trained in batch:
        logp = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1)
        losses.append(-logp.gather(1, tokens[1:, None])[trained[1:], 0])
    return torch.cat(losses).mean()


def rate(step: int) -> float:
    """Warm-up, then constant, and in the last of the last two steps half the way to the floor."""
    after = (1 + FLOOR) / 2 if step == STEPS - 1 else 1.0
    return LR * min((step + 1) / WARMUP, after)


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_a_run_is_what_transformers_and_torch_make_of_it(work: Path, tmp_path: Path) -> None:
    train = rows(seed=2)
    val = rows(seed=3)
    files = {
        "data__train_files": write(tmp_path / "train.jsonl", train),
        "data__val_files": write(tmp_path / "val.jsonl", val),
    }
    out = tmp_path / "run"
    store = tmp_path / "store"
    copies = f"trainer.default_hdfs_dir=file://{store}"
    assert main(words(work, out, copies, **files, **KEYS)) == 0
    assert torch.initial_seed() == SEED * 1_000_003
    entries = list(read_jsonl(out / "metrics.jsonl"))
    steps = iter([entry for entry in entries if "train/loss" in entry])
    validations = [entry for entry in entries if "val/loss" in entry]

    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    samples = [said(row, tokenizer) for row in train[:ROWS]]
    held_out = [said(row, tokenizer) for row in val[:3]]
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=DECAY)
    expected = {}
    for step in range(STEPS):
        epoch, place = divmod(step, STEPS_AN_EPOCH)
        order = epoch_order(ROWS, SEED, epoch)
        batch = [samples[i] for i in order[place * BATCH : (place + 1) * BATCH]]
        adamw.param_groups[0]["lr"] = rate(step)
        adamw.zero_grad()
        loss = mean_loss(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        entry = next(steps)
        assert entry["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert entry["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert entry["train/lr"] == pytest.approx(rate(step))
        assert entry["train/global_tokens"] == sum(len(sample.tokens) for sample in batch)
        assert entry["train/trained_tokens"] == sum(int(s.trained.sum()) for s in batch)
        if place == STEPS_AN_EPOCH - 1 or step == STEPS - 1:
            with torch.no_grad():
                expected[step + 1] = mean_loss(model, held_out).item()
    assert next(steps, None) is None
    validated = {entry["step"]: entry["val/loss"] for entry in validations}
    assert validated == pytest.approx(expected, rel=1e-5)
    for entry in validations:
        assert entry["val/perplexity"] == pytest.approx(math.exp(entry["val/loss"]))
    saved = sorted(folder.name for folder in out.glob("global_step_*"))
    assert saved == ["global_step_14", "global_step_20"]
    assert (store / "latest_checkpointed_iteration.txt").read_text() == "20"
    check_checkpoint(store / "global_step_20", model, adamw)


def check_checkpoint(folder: Path, model: Any, adamw: torch.optim.AdamW) -> None:
    """Weights, moments and settings, as torch itself reads them and has them."""
    assert not (folder / "huggingface" / "model.safetensors").exists()

    def read(kind: str) -> Any:
        return torch.load(folder / f"{kind}_world_size_1_rank_0.pt", weights_only=True)

    weights = read("model")
    wanted = model.state_dict()
    assert list(weights) == list(wanted)
    torch.testing.assert_close(dict(weights), dict(wanted), rtol=1e-4, atol=1e-6)
    moments = read("optim")
    theirs = adamw.state_dict()
    for i, state in theirs["state"].items():
        torch.testing.assert_close(moments["state"][i], state, rtol=1e-3, atol=1e-6)
    (group,) = moments["param_groups"]
    assert group["params"] == theirs["param_groups"][0]["params"]
    assert tuple(group["betas"]) == BETAS
    assert (group["lr"], group["weight_decay"]) == (LR, DECAY)


@pytest.mark.parametrize("padded", [True, False])
def test_unshuffled_rows_are_padded_and_divided_as_asked(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    short = [{"messages": row["messages"][2:]} for row in rows(seed=2)[:4]]
    made = [*short, *rows(seed=3)]
    seen: list[PackedBatch] = []

    def watched(model: Any, optimizer: Any, packs: Any, *rest: Any, **more: Any) -> Any:
        seen.extend(packs)
        return train_step(model, optimizer, packs, *rest, **more)

    monkeypatch.setattr(train, "train_step", watched)
    saved: list[bool] = []
    save = checkpoint.save

    def watched_save(*given: Any, options: checkpoint.SaveOptions, **more: Any) -> Any:
        saved.append(options.async_save)
        return save(*given, options=options, **more)

    monkeypatch.setattr(checkpoint, "save", watched_save)
    reader = tmp_path / "reader.py"
    reader.write_text(READER)
    asked = {
        "data__train_files": write(tmp_path / "train.rows", made),
        "data__custom_cls__path": reader,
        "data__custom_cls__name": "read_all",
        "data__shuffle": "false",
        "data__micro_batch_size_per_gpu": 2,
        "data__fill_micro_batches": "false",
        "data__max_length": 64,
        "use_remove_padding": str(not padded).lower(),
        "trainer__total_training_steps": 1,
        "trainer__checkpoint__save_contents": "[hf_model]",
        "trainer__checkpoint__async_save": str(padded).lower(),
        "data__chat_template": CHATML,
    }
    out = tmp_path / "run"
    assert main(words(work, out, **asked)) == 0
    assert saved == [padded]
    export = out / "global_step_1" / "huggingface"
    assert AutoTokenizer.from_pretrained(export).chat_template == CHATML.read_text()
    # By their tokens three of these would fit beside each other
    assert [len(pack.seqlens) for pack in seen] == [2, 2]
    found = []
    for pack in seen:
        documents = zip(pack.tokens.split(pack.seqlens), pack.real.split(pack.seqlens), strict=True)
        found += [tokens[real].tolist() for tokens, real in documents]
        assert not padded or pack.seqlens == (64, 64)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    assert sorted(found) == sorted(said(row, tokenizer).tokens.tolist() for row in short)
