"""`LLM`: prompts in, answers out, on one GPU or on the CPU, over the engine that RL samples with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from retool.checkpoint.hf.pretrained import load_pretrained
from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer, make_renderer
from retool.data.render.rendering import Rendering
from retool.data.template.choose import chosen_template
from retool.data.tokens.load import load_tokenizer
from retool.data.tool_schema import schema_of
from retool.engine import Engine, EngineOptions
from retool.llm.answer import PIECE_TOKENS, Answer, Detokenizer, run
from retool.llm.folder import model_of
from retool.llm.likeliest import Likeliest, likeliest
from retool.llm.outputs import RequestOutput, make_output
from retool.llm.requests import Prompt, Request, check, for_each, make_request, several
from retool.llm.sampling import SamplingParams
from retool.model.build import DTYPES, ModelOptions
from retool.model.catalogue.families import read_model_config
from retool.model.hub import eos_ids
from retool.parallel.mesh import Mesh, grow_segments, pick_device

Dtype = Literal["auto", "bf16", "fp16", "fp32", "fp64"]
Message = Mapping[str, Any]
# A function with type hints and a docstring, or a schema
Tool = Callable[..., Any] | Mapping[str, Any]
STREAMED_TOKENS = 4  # at a time


class LLM:
    """A model that answers prompts, with the names that vLLM's users know.

    `model`: a Hugging Face folder, the folder of a run (its newest exported model) or a hub id, of a
    family that retool implements. It runs on one GPU or the CPU and needs no process group: under
    torchrun each process may have its own. Free its memory with `close()`, or use it in a `with`.

    `dtype` auto: bf16 on a GPU, fp32 on the CPU. The cache takes `gpu_memory_utilization` of the GPU
    memory that is still free once the weights are loaded. `max_model_len` bounds prompt and answer
    together (None: the model's own limit). `chat_template`: a Jinja file, or hermes; None: the
    model's own.

    Raises ValueError for a model that isn't there or that isn't implemented.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Dtype = "auto",
        device: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        enforce_eager: bool = False,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
    ) -> None:
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} is not known: use auto, {', '.join(DTYPES)}.")
        self.folder = model_of(model)
        self.seed = seed
        self.tokenizer: Any = load_tokenizer(str(self.folder), trust_remote_code)
        self._rendering = Rendering(chat_template=chat_template)
        if chat_template is not None:
            chosen_template(chat_template, self.tokenizer)  # told now, not at the first chat
        self.eos_ids = eos_ids(self.folder)
        self._calls = 0
        self._under_way: dict[Hashable, Answer] = {}  # of streams that are being read, too
        where = pick_device(device)
        options = EngineOptions(
            max_num_seqs=max_num_seqs,
            kv_share=gpu_memory_utilization,
            max_batch_tokens=max(max_num_batched_tokens, max_num_seqs),
            max_length=max_model_len,
            use_cuda_graphs=not enforce_eager,
            use_compile=False if enforce_eager else "auto",
        )
        config = read_model_config(self.folder)
        if max_model_len is not None and max_model_len < 2:
            raise ValueError(
                f"max_model_len={max_model_len}: a prompt and its answer have at least 2 tokens."
            )
        if max_model_len and config.max_position and max_model_len > config.max_position:
            raise ValueError(
                f"max_model_len={max_model_len:,}: the model takes {config.max_position:,} tokens at most."
            )
        self.engine = Engine(config, where, options)
        in_half = torch.bfloat16 if where.type == "cuda" else torch.float32
        self._dtype = in_half if dtype == "auto" else DTYPES[dtype]
        self.load(self.folder)

    def load(self, folder: Path) -> None:
        """Read the weights of a model folder, which only the engine keeps. Answers under way go on
        with them.

        ValueError where they aren't of this model.
        """
        device = self.engine.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            grow_segments(device)
        options = ModelOptions(param_dtype=self._dtype, master_dtype=self._dtype, trained=False)
        alone = Mesh(0, 1, 1, 1, device)
        self.engine.sync(load_pretrained(folder, alone, options))

    # -- what users call --

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one prompt or several, in their order.

        A text is tokenised as the tokenizer does it, control tokens in it included. Give parameters
        for all, or a list with one for each.

        Raises ValueError for a prompt that is empty, or leaves no room for an answer.
        """
        given = several(prompts)
        each = for_each(sampling_params, len(given))
        pairs = zip(given, each, strict=True)
        requests = [self.text_request(prompt, params) for prompt, params in pairs]
        return self._answer(requests)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The assistant's next turn of one conversation, or of several.

        `tools` are functions or schemas; a call is part of the answer's text, and isn't run. What a
        message says is text: a control token in it is none.

        Raises ValueError, naming the message, for a conversation that can't be rendered.
        """
        given: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        each = for_each(sampling_params, len(given))
        renderer = self.renderer_for(chat_template_kwargs)
        requests = []
        for number, (conversation, params) in enumerate(zip(given, each, strict=True)):
            ids = _render(renderer, conversation, tools, number)
            requests.append(self.turn_request(renderer, ids, params))
        return self._answer(requests)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput]:
        """`generate` for one prompt, handing out what there is of its answers as they grow.

        For a chat, `render` makes the prompt.
        """
        params = sampling_params or SamplingParams()
        request = self.text_request(prompt, params)
        answers = self.begin([request], STREAMED_TOKENS)
        with closing(run(self.engine, answers, self._under_way)) as growth:
            for _ in growth:
                if not all(answer.finish_reason for answer in answers):
                    yield make_output(request, answers, {}, self.tokenizer)
        yield make_output(request, answers, self._looked_up(answers), self.tokenizer)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """A conversation's token ids up to where the assistant's next turn begins."""
        return self.render_with(self.renderer_for(chat_template_kwargs), messages, tools)

    def close(self) -> None:
        """Give weights and cache back; the model answers no more."""
        if self.engine.scheduler is not None:
            self.engine.release()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what they are made of --

    def text_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        """What `generate` makes of a prompt. ValueError for what is none."""
        return make_request(prompt, params, self.tokenizer, self._ends_of_text)

    def render_with(
        self, renderer: Renderer, messages: Sequence[Message], tools: Sequence[Tool] | None
    ) -> list[int]:
        """`render`, with a renderer of `renderer_for`."""
        return _render(renderer, messages, tools, 0)

    def turn_request(self, renderer: Renderer, ids: list[int], params: SamplingParams) -> Request:
        """What `chat` makes of a conversation that `renderer` has rendered to `ids`."""
        ends = (*renderer.end_of_turn_ids, *self.eos_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return Request(text, ids, params, ends)

    @cached_property
    def renderer(self) -> Renderer:
        """What makes a conversation's tokens, as in training. ValueError without a template."""
        return make_renderer(self.tokenizer, self._rendering)

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer."""
        if self.engine.scheduler is None:
            raise ValueError("this LLM was closed: make another one.")
        return self.engine.scheduler.max_length

    def renderer_for(self, template_kwargs: Mapping[str, Any] | None) -> Renderer:
        """The renderer with arguments for the template, such as {"enable_thinking": False}."""
        if not template_kwargs:
            return self.renderer
        rendering = replace(self.renderer.rendering, template_kwargs=dict(template_kwargs))
        return self.renderer.variant(rendering)

    @cached_property
    def _ends_of_text(self) -> tuple[int, ...]:
        """Tokens that end a text by the model's files, or a turn where it has a chat template: a
        prompt may be what `render` made.
        """
        try:
            return (*self.renderer.end_of_turn_ids, *self.eos_ids)
        except ValueError:
            return self.eos_ids

    def _answer(self, requests: Sequence[Request]) -> list[RequestOutput]:
        answers = self.begin(requests, None)
        for _ in run(self.engine, answers, self._under_way):
            pass
        found = self._looked_up(answers)
        in_order = iter(answers)
        outputs = []
        for request in requests:
            mine = list(islice(in_order, request.params.n))
            outputs.append(make_output(request, mine, found, self.tokenizer))
        return outputs

    def begin(self, requests: Sequence[Request], piece: int | None) -> list[Answer]:
        """An answer for each sample of each request, for the engine to sample; `piece` tokens at a
        time (None: what it needs). ValueError for a prompt that the model can't take.
        """
        call = self._calls
        room = self.max_model_len
        vocabulary = self.engine.config.vocab
        answers = []
        for number, request in enumerate(requests):
            check(request.ids, room, vocabulary, number)
            params = request.params
            most = room - len(request.ids)
            stops = () if params.ignore_eos else request.ends
            for sample in range(params.n):
                own = (self.seed, call, number) if params.seed is None else (params.seed,)
                answer = Answer(
                    key=(call, number, sample),
                    prompt=request.ids,
                    params=params,
                    seed=(*own, sample),
                    limit=min(params.max_tokens or most, most),
                    end_ids=(*stops, *(params.stop_token_ids or ())),
                    detokenizer=Detokenizer(self.tokenizer, params.skip_special_tokens),
                    piece=piece or (PIECE_TOKENS if params.stop_texts else None),
                )
                answers.append(answer)
        self._calls += 1
        return answers

    def _looked_up(self, answers: Sequence[Answer]) -> dict[tuple[int, int, int], list[Likeliest]]:
        """By the key of an answer that asks for more than its own log-probabilities."""
        asking = [answer for answer in answers if answer.params.logprobs]
        if not asking:
            return {}
        found = likeliest(self.engine, asking)
        return {answer.key: entry for answer, entry in zip(asking, found, strict=True)}


def _render(
    renderer: Renderer, messages: Sequence[Message], tools: Sequence[Tool] | None, number: int
) -> list[int]:
    schemas = [schema_of(tool) if callable(tool) else dict(tool) for tool in tools or ()]
    row = {"messages": list(messages), "tools": schemas or None}
    checked = to_conversation(row, "chat", number, prompt_only=True)
    return renderer.render_prompt(checked.messages, checked.tools, checked.enable_thinking)
