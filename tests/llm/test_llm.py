"""`retool.LLM` against transformers' `generate`, and what its users rely on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retool import LLM, SamplingParams
from retool.llm.answer import Detokenizer
from retool.llm.outputs import RequestOutput
from tests.llm.models import write_model

MESSAGES = [{"role": "user", "content": "What does <|im_end|> mean?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
TEXTS = ["How much is 3 + 4?", "One apple", "Add them up: 12, 7 and 9. Then stop."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", max_model_len=640) as llm:
        yield llm


def reference_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_greedy_answers_are_transformers(folder: Path, llm: LLM) -> None:
    reference = reference_of(folder)
    outputs = llm.generate(TEXTS, GREEDY)
    assert [output.prompt for output in outputs] == TEXTS
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        want = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        answer = output.outputs[0]
        assert answer.token_ids == want[0, ids.shape[1] :].tolist()
        assert answer.text == llm.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert output.finished and answer.finish_reason in ("stop", "length")


def test_prompts_may_be_texts_ids_or_mappings(llm: LLM) -> None:
    ids = llm.tokenizer(TEXTS[0])["input_ids"]
    forms = [TEXTS[0], ids, {"prompt": TEXTS[0]}, {"prompt_token_ids": ids}]
    alone = [llm.generate(form, GREEDY) for form in forms]
    together = llm.generate(forms, GREEDY)
    want = alone[0][0].outputs[0].token_ids
    assert all(len(outputs) == 1 for outputs in alone) and len(together) == 4
    everything = [*together, *(outputs[0] for outputs in alone)]
    assert {tuple(output.outputs[0].token_ids) for output in everything} == {tuple(want)}
    assert together[1].prompt is None and together[1].prompt_token_ids == ids


def test_n_and_seed(folder: Path, llm: LLM) -> None:
    """A seed gives the same answers wherever the prompt stands; without one a program repeats itself,
    its calls don't.
    """
    seeded = SamplingParams(n=3, seed=5, max_tokens=8)
    (alone,) = llm.generate(TEXTS[1], seeded)
    among = llm.generate(TEXTS, [GREEDY, seeded, GREEDY])[1]
    tokens = [answer.token_ids for answer in alone.outputs]
    assert tokens == [answer.token_ids for answer in among.outputs]
    assert [answer.index for answer in alone.outputs] == [0, 1, 2]
    assert len(set(map(tuple, tokens))) == 3

    numpys = SamplingParams(n=3, seed=np.int64(5), max_tokens=8, stop=None, stop_token_ids=None)
    assert [answer.token_ids for answer in llm.generate(TEXTS[1], numpys)[0].outputs] == tokens

    free = SamplingParams(max_tokens=8)
    programs = []
    for _ in range(2):
        with LLM(folder, device="cpu", seed=1) as again:
            calls = [again.generate([TEXTS[0], TEXTS[0]], free) for _ in range(2)]
        programs.append([output.outputs[0].token_ids for call in calls for output in call])
    assert programs[0] == programs[1]
    assert len(set(map(tuple, programs[0]))) == 4


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_logprobs_are_the_models(folder: Path, llm: LLM, temperature: float) -> None:
    """At temperature 0 they are those of 1."""
    reference = reference_of(folder)
    params = SamplingParams(temperature=temperature, top_p=0.9, max_tokens=6, seed=1, logprobs=3)
    (plain,) = llm.generate(TEXTS[0], SamplingParams(max_tokens=6, seed=1, logprobs=0))
    (output,) = llm.generate([TEXTS[0]], params)
    answer = output.outputs[0]
    ids = torch.tensor([output.prompt_token_ids + answer.token_ids])
    with torch.no_grad():
        logp = (reference(ids).logits[0] / (temperature or 1)).log_softmax(-1)
    assert answer.logprobs is not None and plain.outputs[0].logprobs is not None
    for place, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        want = logp[len(output.prompt_token_ids) + place - 1]
        top = want.topk(3).indices.tolist()
        assert set(entry) == {token, *top}
        assert next(iter(entry)) == token
        assert all(abs(entry[i].logprob - want[i]) < 1e-4 for i in entry)
        assert [entry[i].rank for i in top] == [1, 2, 3]
        assert entry[token].rank == int((want > want[token]).sum()) + 1
        assert entry[token].decoded_token == llm.tokenizer.decode([token])
    assert answer.cumulative_logprob == pytest.approx(
        sum(entry[t].logprob for t, entry in zip(answer.token_ids, answer.logprobs, strict=True))
    )
    assert [set(entry) for entry in plain.outputs[0].logprobs] == [
        {token} for token in plain.outputs[0].token_ids
    ]
    assert llm.generate(TEXTS[0], GREEDY)[0].outputs[0].logprobs is None
    (everything,) = llm.generate(TEXTS[0], SamplingParams(max_tokens=1, logprobs=10**6))
    assert len(everything.outputs[0].logprobs[0]) == llm.engine.config.vocab


@pytest.mark.parametrize("seed", range(4))
def test_stop_texts_end_an_answer_where_they_are_complete(llm: LLM, seed: int) -> None:
    """Whatever the tokens are: the text before it, and the draws of an answer without it."""
    free = SamplingParams(max_tokens=60, seed=seed, ignore_eos=True)
    (whole,) = llm.generate(TEXTS[0], free)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    begins_before = text[len(text) // 2 - 2 : len(text) // 2 + 9]  # and is complete after it
    stops = ["never", begins_before, stop]
    params = SamplingParams(max_tokens=60, seed=seed, ignore_eos=True, stop=stops, logprobs=0)
    answer = llm.generate([TEXTS[1], TEXTS[0]], params)[1].outputs[0]
    count = len(answer.token_ids)
    assert answer.text == text[: text.find(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.token_ids == whole.outputs[0].token_ids[:count]
    decode = llm.tokenizer.decode
    assert stop in decode(answer.token_ids) and stop not in decode(answer.token_ids[:-1])
    assert [[*entry] for entry in answer.logprobs] == [[token] for token in answer.token_ids]
    endless = SamplingParams(max_tokens=18, seed=seed, ignore_eos=True, stop="never")
    assert len(llm.generate(TEXTS[0], endless)[0].outputs[0].token_ids) == 18
    kept = SamplingParams(
        max_tokens=60, seed=seed, ignore_eos=True, stop=stop, include_stop_str_in_output=True
    )
    assert llm.generate(TEXTS[0], kept)[0].outputs[0].text == answer.text + stop


def test_stop_tokens_and_ends(llm: LLM) -> None:
    (whole,) = llm.generate(TEXTS[0], GREEDY)
    token = whole.outputs[0].token_ids[4]
    first = whole.outputs[0].token_ids.index(token)
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[token])
    answer = llm.generate(TEXTS[0], params)[0].outputs[0]
    assert answer.token_ids == whole.outputs[0].token_ids[: first + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", token)
    assert answer.text == llm.tokenizer.decode(answer.token_ids)  # one of the user's is text
    answers = llm.generate(
        [TEXTS[0]] * 8, [SamplingParams(max_tokens=99, seed=i) for i in range(8)]
    )
    ended = [o.outputs[0] for o in answers if o.outputs[0].finish_reason == "stop"]
    assert ended, "no answer of eight met an end: the test shows nothing"
    for answer in ended:
        assert answer.token_ids[-1] in llm.renderer.end_of_turn_ids and answer.stop_reason is None
        assert "<|im_end|>" not in answer.text
    shown = [SamplingParams(max_tokens=99, seed=i, skip_special_tokens=False) for i in range(8)]
    texts = [o.outputs[0].text for o in llm.generate([TEXTS[0]] * 8, shown)]
    assert not any(text.endswith("<|im_end|>") for text in texts)
    ignoring = SamplingParams(max_tokens=10**6, seed=3, ignore_eos=True)
    (output,) = llm.generate([5] * 600, ignoring)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == llm.max_model_len


def test_an_answer_ends_where_the_models_files_or_its_template_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model's files know its end of text alone, and a prompt may be what `render` made."""
    monkeypatch.setattr("retool.llm.llm.eos_ids", lambda _: (9,))
    with LLM(folder, device="cpu") as llm:
        turn = llm.turn_request(llm.renderer, [5], GREEDY)
        assert (
            {*turn.ends}
            == {9, *llm.renderer.end_of_turn_ids}
            == {*llm.text_request("a", GREEDY).ends}
        )


def test_chat_renders_as_training_does(llm: LLM) -> None:
    """What a message says is text; functions are tools; several conversations are several."""

    def add(numbers: list[int]) -> int:
        """Adds numbers.

        Args:
            numbers: What to add.
        """
        return sum(numbers)

    one = llm.chat(MESSAGES, GREEDY, tools=[add])
    two = llm.chat([MESSAGES, MESSAGES], GREEDY, tools=[add])
    assert [o.outputs[0].token_ids for o in two] == [one[0].outputs[0].token_ids] * 2
    ids = one[0].prompt_token_ids
    assert ids == llm.render(MESSAGES, [add])
    end = llm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == llm.render([{"role": "user", "content": "Hi"}], [add]).count(end)
    assert one[0].prompt is not None
    assert '"name": "add"' in one[0].prompt and "What to add." in one[0].prompt
    assert llm.generate([ids], GREEDY)[0].outputs[0].token_ids == one[0].outputs[0].token_ids
    with pytest.raises(ValueError, match=r"message 0: unknown role"):
        llm.chat([{"role": "robot", "content": "Hi"}])


def test_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, seed=2, ignore_eos=True)
    (want,) = llm.generate(TEXTS[2], params)
    steps = list(llm.stream(TEXTS[2], params))
    texts = [step.outputs[0].text for step in steps]
    assert len(steps) > 5 and all(b.startswith(a) for a, b in pairwise(texts))
    assert [step.finished for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].outputs == want.outputs
    # One that isn't read to its end leaves nothing in the engine
    begun = llm.stream(TEXTS[0], params)
    next(begun)
    begun.close()
    assert llm.engine.idle()


def test_text_grows_by_whole_characters(llm: LLM) -> None:
    """A half that was shown could not be taken back."""
    text = "ä 日本 😀!"
    detokenizer = Detokenizer(llm.tokenizer, skip_special_tokens=True)
    shown = []
    for token in llm.tokenizer(text)["input_ids"]:
        detokenizer.add([token])
        shown.append(detokenizer.text)
    assert shown[-1] == text and all(text.startswith(part) for part in shown)
    assert len(shown) > len(text), "no character of several tokens: the test shows nothing"


def test_streams_may_be_read_beside_others(llm: LLM) -> None:
    """Each gets the tokens that it gets alone, also when another one is left in the middle."""

    def tokens(output: RequestOutput) -> list[int]:
        return output.outputs[0].token_ids

    params = [SamplingParams(max_tokens=n, seed=2, ignore_eos=True) for n in (40, 24)]
    wanted = [tokens(llm.generate(TEXTS[0], own)[0]) for own in params]
    first, second, left = (llm.stream(TEXTS[0], own) for own in (*params, params[0]))
    next(left)
    for begun, other in zip(first, second, strict=False):
        if len(tokens(begun)) == len(tokens(other)) == 12:
            left.close()
            assert tokens(llm.generate(TEXTS[0], params[1])[0]) == wanted[1]
    ends = [[begun, *first][-1], [other, *second][-1]]
    assert [tokens(output) for output in ends] == wanted
    assert llm.engine.idle() and not llm.engine.scheduler.sequences


def test_an_interruption_leaves_the_engine_empty(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(TEXTS, GREEDY)
    assert llm.engine.idle()
    assert len(llm.generate(TEXTS, GREEDY)) == 3


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "prompt 1 is empty"),
        ([], "prompt 1 is empty"),
        ([5] * 640, "prompt 1 has 640 tokens, and the model takes 640"),
        ([5, 10**6], "prompt 1 has token id 1,000,000"),
        ([5, -1], "prompt 1 has token id -1"),
        ({"text": "Hi"}, "a text or a list of token ids"),
    ],
)
def test_prompts_that_cannot_be_answered(llm: LLM, prompt: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        llm.generate(["Hello", prompt], GREEDY)
    assert llm.engine.idle()
    with pytest.raises(ValueError, match="a text or a list of token ids"):
        llm.generate(np.array([5, 6]))


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"stop": [""]}]
)
def test_parameters_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_a_runs_folder_is_its_newest_export(folder: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        shutil.copytree(folder, tmp_path / "run" / f"global_step_{step}" / "huggingface")
    with LLM(tmp_path / "run", device="cpu") as llm:
        assert llm.folder == tmp_path / "run" / "global_step_10" / "huggingface"
    with LLM(tmp_path / "run" / "global_step_2", device="cpu") as llm:
        assert llm.folder.parent.name == "global_step_2"
    with pytest.raises(ValueError, match="takes 1,024"):
        LLM(folder, max_model_len=1025)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        LLM(folder, max_model_len=0)
    with pytest.raises(ValueError, match=r"^max_num_seqs=0"):
        LLM(folder, max_num_seqs=0)
    with pytest.raises(ValueError, match="was closed"):
        llm.generate("Hi")
    with pytest.raises(ValueError, match="holds no model"):
        LLM(tmp_path)
    (tmp_path / "unmerged" / "global_step_3" / "actor").mkdir(parents=True)
    (tmp_path / "unmerged/global_step_3/actor/model_world_size_1_rank_0.pt").touch()
    with pytest.raises(ValueError, match=r"retool\.checkpoint merge .*global_step_3"):
        LLM(tmp_path / "unmerged")
