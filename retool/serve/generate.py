"""`/generate`, as SGLang has it: token ids in, token ids with their log-probabilities out."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retool.llm.answer import Answer
from retool.llm.llm import LLM
from retool.llm.requests import Prompt, several
from retool.llm.sampling import SamplingParams
from retool.serve.engine_thread import Piece
from retool.serve.fields import Fields, sampling_of
from retool.serve.shape import About, Found, Question

MAX_TOKENS = 128  # SGLang's default


def read_generate(body: Any, llm: LLM, about: About) -> Question:
    """The question in a request's body. Refusal (400) for what can't be answered."""
    fields = Fields(body)
    given = fields.raw("input_ids")
    name = "text" if given is None else "input_ids"
    prompt = fields.raw("text") if given is None else given
    if not prompt or not isinstance(prompt, (str, list)):
        raise fields.refusal(name, "must be a prompt or a list of prompts")
    if fields.take("stream", bool, False):
        raise fields.refusal("stream", "isn't supported here: use /v1/completions")
    logprobs = 0 if fields.take("return_logprob", bool, False) else None
    params = _params(Fields(fields.take("sampling_params", dict, {}), "sampling_params"), logprobs)
    for neutral, value in (("logprob_start_len", -1), ("top_logprobs_num", 0)):
        if fields.take(neutral, int, value) not in (value, 0):
            raise fields.refusal(neutral, f"must be {value}")
    fields.take("return_text_in_logprobs", bool, False)
    fields.finish()
    prompts: list[Prompt] = several(prompt)
    requests = [llm.text_request(one, params) for one in prompts]
    # `several` made a list of it; SGLang answers a prompt alone without one
    alone = prompts[0] is prompt and params.n == 1
    return Question(requests, False, GenerateForm(alone, about), about)


def _params(fields: Fields, logprobs: int | None) -> SamplingParams:
    max_tokens = fields.take("max_new_tokens", int, MAX_TOKENS)
    params = sampling_of(fields, max_tokens, logprobs)
    seed = fields.optional("sampling_seed", int)
    fields.finish()
    return params if seed is None else replace(params, seed=seed)


@dataclass(frozen=True)
class GenerateForm:
    """The form of `/generate`. `alone`: the answer isn't in a list."""

    alone: bool
    about: About

    def whole(self, answers: Sequence[Answer], found: Found) -> Any:
        """See `Form`."""
        entries = [self._entry(answer) for answer in answers]
        return entries[0] if self.alone else entries

    def first(self) -> list[dict[str, Any]]:
        """See `Form`; nothing streams here."""
        return []

    def grown(self, piece: Piece) -> dict[str, Any] | None:
        """See `Form`."""
        return None

    def last(self, usage: Mapping[str, int]) -> list[dict[str, Any]]:
        """See `Form`."""
        return []

    def _entry(self, answer: Answer) -> dict[str, Any]:
        reason: dict[str, Any] = {"type": answer.finish_reason}
        if answer.finish_reason == "stop":
            by_text = isinstance(answer.stop_reason, str)
            reason["matched"] = answer.stop_reason if by_text else answer.ids[-1]
        else:
            reason["length"] = len(answer.ids)
        meta = {
            "id": uuid.uuid4().hex,
            "finish_reason": reason,
            "prompt_tokens": len(answer.prompt),
            "completion_tokens": len(answer.ids),
            "weight_version": self.about.origin.version,
        }
        if answer.params.logprobs is not None:
            pairs = zip(answer.logp, answer.ids, strict=True)
            meta["output_token_logprobs"] = [[logp, token, None] for logp, token in pairs]
        return {"text": answer.text, "output_ids": answer.ids, "meta_info": meta}
