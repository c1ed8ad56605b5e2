"""A sequence-classification model as judge, on the GPU of the process that samples.

It reads the conversation through its own chat template, and its one number is the score, as
transformers computes it.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from retool.model.hub import find_model, read_json_object
from retool.rl.config.reward_model import RewardModelConfig
from retool.rl.reward.calling import Asked
from retool.rl.reward.protocol import Judged, Raised

KEY = "reward_model.model.path"


class ModelFailed(RuntimeError):
    """The model broke on a batch, for example for want of memory. That says nothing about the
    answers.
    """


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its score."""

    messages: Sequence[dict[str, Any]]
    answer: Future[float]


class ModelJudge:
    """Judges with a reward model in this process. Close them.

    A thread of its own takes what waits, up to `micro_batch_size` conversations at a time.
    """

    seen = ("messages",)

    def __init__(
        self,
        settings: RewardModelConfig,
        floor: float,
        device: str,
    ) -> None:
        """ValueError where the folder holds no reward model."""
        folder = reward_model_folder(settings)
        self._settings = settings
        self._floor = floor
        self._tokenizer = open_tokenizer(folder)
        self._model = load_reward_model(folder, device)
        self._device = device
        self._waiting: SimpleQueue[Question | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="retool-reward-model", daemon=True)
        self._thread.start()

    def problem(self) -> str:
        return ""

    async def score(
        self,
        asked: Asked,
        timeout: float | None = None,
    ) -> Judged:
        """The model's number for a conversation; the floor where that is too long, can't be
        rendered or isn't finite. Lost where the model breaks.
        """
        question = Question(asked.seen["messages"], Future())
        self._waiting.put(question)
        try:
            score = await asyncio.wait_for(asyncio.wrap_future(question.answer), timeout)
        except Exception as error:  # whatever a template or the model raises
            raised = Raised.by(error)
            away = raised.away or isinstance(error, ModelFailed)
            return raised._replace(away=away).judged(self._floor)
        return Judged(score)

    def close(self) -> None:
        """What still waits is answered first. To be closed twice does no harm."""
        self._waiting.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._answer(batch)

    def _next_batch(self) -> list[Question] | None:
        """The questions that wait, at least one; None at the end."""
        batch: list[Question] = []
        while len(batch) < self._settings.micro_batch_size:
            try:
                question = self._waiting.get(block=not batch)
            except Empty:
                break
            if question is None:
                # Put back, so that the next look ends the thread: what was taken with it is judged
                # first.
                self._waiting.put(None)
                return batch or None
            # Nobody waits any more for one that was cancelled: it needs no place in the batch.
            if question.answer.set_running_or_notify_cancel():
                batch.append(question)
        return batch

    def _answer(self, batch: Sequence[Question]) -> None:
        rendered: list[tuple[Question, list[int]]] = []
        for question in batch:
            try:
                rendered.append((question, self._tokens(question.messages)))
            except Exception as error:  # whatever a template raises
                question.answer.set_exception(error)
        try:
            scores = self._scores([ids for _, ids in rendered])
        except Exception as error:  # the device's memory, say
            failed = ModelFailed(f"{type(error).__name__}: {error}")
            failed.__cause__ = error
            for question, _ in rendered:
                question.answer.set_exception(failed)
            return
        for (question, _), score in zip(rendered, scores, strict=True):
            if math.isfinite(score):
                question.answer.set_result(score)
            else:
                question.answer.set_exception(ValueError(f"the reward model gave {score}"))

    def _tokens(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        longest = self._settings.max_length
        if len(ids) > longest:
            raise ValueError(
                f"a conversation has {len(ids):,} tokens for the reward model, more than "
                f"reward_model.model.max_length={longest}: raise it, if the model was trained on such."
            )
        return ids

    def _scores(self, rows: Sequence[list[int]]) -> list[float]:
        """The scores of rows of tokens, as transformers gives them for each row alone.

        A model without a token for padding can't tell where a row ends: it reads one at a time.
        """
        import torch

        pad = self._model.config.pad_token_id
        groups = [rows] if pad is not None else [[row] for row in rows]
        scores: list[float] = []
        for group in filter(len, groups):
            width = max(map(len, group))
            ids = torch.full((len(group), width), pad or 0)
            there = torch.zeros(len(group), width, dtype=torch.long)
            for i, row in enumerate(group):
                ids[i, : len(row)] = torch.tensor(row)
                there[i, : len(row)] = 1
            with torch.inference_mode():
                out = self._model(ids.to(self._device), attention_mask=there.to(self._device))
            scores += out.logits[:, 0].float().tolist()
        return scores


# --- what the folder must hold ---


@lru_cache
def reward_model_folder(settings: RewardModelConfig) -> Path:
    """The folder of the reward model. ValueError if none is named, or it holds no reward model."""
    if settings.path is None:
        raise ValueError(f"reward_model.name=model needs {KEY}: give the reward model's folder.")
    folder = find_model(settings.path)
    config = read_json_object(folder / "config.json")
    names = config.get("architectures") or ["none"]
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise ValueError(
            f"{KEY}={settings.path} holds {', '.join(names)}: a reward model is one for sequence "
            "classification. Give such a folder."
        )
    labels = config.get("num_labels", len(config.get("id2label") or "ab"))
    if labels != 1:
        raise ValueError(
            f"{KEY}={settings.path} gives {labels} numbers, not one: it classifies, it doesn't score. "
            "Write a reward function that makes one of them."
        )
    return folder


def open_tokenizer(folder: Path) -> Any:
    """ValueError where it has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer in {folder} has no chat template, so conversations can't be put to the "
            "reward model as it was trained. Add its chat_template.jinja."
        )
    return tokenizer


def load_reward_model(folder: Path, device: str) -> Any:
    """In bf16 on a GPU with its head in fp32, in fp32 elsewhere. ValueError where weights are missing."""
    import torch
    from transformers import AutoModelForSequenceClassification

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, told = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    if told["missing_keys"]:
        missing = ", ".join(sorted(told["missing_keys"]))
        raise ValueError(
            f"{folder} has no weights for {missing}: its scores would be random. Give a folder with "
            "the trained head."
        )
    give_fp32_head(model)
    return model.eval().to(device)


def give_fp32_head(model: Any) -> None:
    """What makes a score of the hidden state computes in fp32: in bf16 a score has three digits, and
    answers that are alike would tie.
    """

    def widen(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return tuple(x.float() if x.is_floating_point() else x for x in inputs)

    for head in model.children():
        if head is not model.base_model:
            head.float().register_forward_pre_hook(widen)


@lru_cache
def reward_model_bytes(folder: Path) -> int:
    """What its weights take on a GPU: bf16, counted from the files' headers."""
    elements = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            # safetensors: 8 bytes say how long the JSON header is; the weights follow it.
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                elements += math.prod(tensor["shape"])
    return 2 * elements
