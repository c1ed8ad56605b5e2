"""The likeliest tokens beside each sampled one: a forward over the finished answers.

The engine keeps log-probabilities of what it samples, and of nothing else. Legend: t tokens of a
pack · R rows of it that predict an answer's tokens · D model · V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retool.batch import Sample, pack
from retool.engine import Engine
from retool.llm.answer import Answer
from retool.model.attention.dispatch import choose_backend
from retool.model.block import Execution
from retool.model.decoder import Decoder
from retool.model.logits import capped, product, workspace

LOGIT_BYTES = 64 << 20  # of the rows that are looked at together


class Likeliest(NamedTuple):
    """Of one position: token ids and log-probabilities of the k likeliest, and the place of the
    sampled token among all (1: none is likelier, None: nobody looked).
    """

    ids: list[int]
    logp: list[float]
    rank: int | None


def likeliest(engine: Engine, answers: Sequence[Answer]) -> list[list[Likeliest]]:
    """Of each answer, in order, the `params.logprobs` likeliest tokens at each of its positions."""
    decoder = _decoder(engine)
    found: list[list[Likeliest]] = []
    for together in _packs(answers, engine.options.max_batch_tokens):
        found += _of_pack(decoder, together, engine.device)
    return found


def _decoder(engine: Engine) -> Decoder:
    """The engine's weights in a decoder that takes packed documents, as in training."""
    weights = engine.weights
    theirs = weights.decoder
    config = engine.config
    assert weights.dtype is not None
    execution = Execution(
        plan=theirs.execution.plan,
        mesh=theirs.execution.mesh,
        backend=choose_backend(
            engine.device,
            weights.dtype,
            config.head_dim,
            windowed=config.windowed,
            capped=config.score_cap > 0,
        ),
        fp32_residual=theirs.execution.fp32_residual,
    )
    with torch.device("meta"):
        ours = Decoder(config, execution)
    for mine, other in zip(ours.modules(), theirs.modules(), strict=True):
        # No second copy of the weights: both decoders read the same tensors.
        mine._parameters = other._parameters
    return ours


def _packs(answers: Sequence[Answer], most: int) -> Iterator[list[Answer]]:
    """The answers in order, so many that they have at most `most` tokens, or one."""
    together: list[Answer] = []
    tokens = 0
    for answer in answers:
        length = len(answer.prompt) + len(answer.ids)
        if together and tokens + length > most:
            yield together
            together = []
            tokens = 0
        together.append(answer)
        tokens += length
    if together:
        yield together


@torch.no_grad()
def _of_pack(
    decoder: Decoder, answers: Sequence[Answer], device: torch.device
) -> list[list[Likeliest]]:
    documents = [np.asarray(answer.prompt + answer.ids, np.int32) for answer in answers]
    batch = pack([Sample(ids, np.zeros(len(ids), bool)) for ids in documents])
    hidden_tD, weight_VD = decoder(
        batch.to(device), lambda hidden, weight, cap=0.0: (hidden, weight)
    )
    found = []
    start = 0
    for answer, ids in zip(answers, documents, strict=True):
        # The token at i is predicted by what is at i - 1
        rows = slice(start + len(answer.prompt) - 1, start + len(ids) - 1)
        found.append(_of_answer(hidden_tD[rows], weight_VD, decoder.config.logits_cap, answer))
        start += len(ids)
    return found


def _of_answer(hidden_RD: Tensor, weight_VD: Tensor, cap: float, answer: Answer) -> list[Likeliest]:
    count = min(answer.params.logprobs or 0, len(weight_VD))
    temperature = answer.params.temperature or 1.0
    chosen_R = torch.tensor(answer.ids, device=hidden_RD.device)
    most = max(1, LOGIT_BYTES // (4 * len(weight_VD)))
    found: list[Likeliest] = []
    for hidden, chosen in zip(hidden_RD.split(most), chosen_R.split(most), strict=True):
        logits = product(hidden, weight_VD, workspace(hidden, len(hidden), len(weight_VD)))
        logp = (capped(logits, cap) / temperature).log_softmax(-1)
        values, ids = logp.topk(count, -1)
        # The rank counts the tokens that are likelier: 1 is the likeliest.
        ranks = (logp > logp.gather(1, chosen[:, None])).sum(-1) + 1
        rows = zip(ids.tolist(), values.tolist(), ranks.tolist(), strict=True)
        found += [Likeliest(*row) for row in rows]
    return found
