"""Tokens and masks: against goldens, against text written out by hand, and against a rollout of the
same conversation.
"""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from retool.checkpoint.hf.side_files import write_template
from retool.data.read.chunk import RowError
from retool.data.read.files import iter_chunks
from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.data.tokens.load import load_tokenizer
from tests.real_data import real

TEMPLATES = ("chatml", "smollm2", "qwen3", "llama3", "hermes")


def trained(tokenizer, sample):
    """The text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.mask.astype(int), [0]])))
    return [
        tokenizer.decode(sample.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def replay(renderer, conversation):
    """The conversation as a rollout makes it: prompt, sampled turn, glue, sampled turn, …"""
    messages = conversation.messages
    turns = conversation.assistant_turns
    bodies = {
        piece.turn: piece
        for pieces in renderer.pieces(conversation)
        for piece in pieces
        if piece.turn is not None
    }
    stream = renderer.render_prompt(
        messages[: turns[0]], conversation.tools, conversation.enable_thinking
    )
    mask = [False] * len(stream)
    history = list(messages[: turns[0]])
    for i, following in zip(turns, [*turns[1:], len(messages)], strict=True):
        sampled = renderer.encoder.encode([bodies[i]], begins=False)[0]
        end = renderer.tokenizer.convert_ids_to_tokens(sampled[-1])
        history.append({"role": "assistant", "content": bodies[i].text.removesuffix(end)})
        responses = messages[i + 1 : following]
        last = following == len(messages)
        glue = renderer.render_tool_turn(
            history,
            responses,
            conversation.tools,
            conversation.enable_thinking,
            generation_prompt=not last,
        )
        history += responses
        stream += sampled + glue
        mask += [True] * len(sampled) + [False] * len(glue)
    return stream, mask


def test_goldens_differ_only_by_the_two_newlines(qwen_tokenizer):
    renderer = Renderer(qwen_tokenizer)
    newline = qwen_tokenizer.encode("\n")
    differing = 0
    for line in real("goldens/qwen2_5_chat_template_goldens.jsonl").read_text().splitlines():
        golden = json.loads(line)
        conversation = to_conversation(golden, golden["source"], 0, prompt_only=True)
        assert renderer.text(conversation.messages, conversation.tools) == golden["text"]
        assert (
            renderer.text(conversation.messages, conversation.tools, generation_prompt=True)
            == golden["text_generation_prompt"]
        )
        (sample,) = renderer.render(conversation)
        assert sample.tokens.tolist() == golden["input_ids"]
        other = np.flatnonzero(sample.mask != np.array(golden["assistant_masks"], bool))
        turns = len(conversation.assistant_turns)
        assert len(other) == 2 * turns, golden["source"]
        assert [sample.tokens[i] for i in other] == newline * (2 * turns)
        assert not sample.mask[other].any()
        differing += len(other)
    assert differing > 100


def check_replay(renderer, conversation):
    (sample,) = renderer.render(conversation)
    stream, mask = replay(renderer, conversation)
    assert sample.tokens.tolist() == stream
    assert sample.mask.tolist() == mask
    return sample


def test_gsm8k_rows_replay_as_rollouts(qwen_tokenizer):
    renderer = Renderer(qwen_tokenizer)
    for chunk in iter_chunks([str(real("gsm8k-tool-sft/test.parquet"))], limit=1300):
        for index, row in chunk:
            if index % 50 == 0:
                sample = check_replay(renderer, to_conversation(row, chunk.file, index))
                assert 0.1 < sample.mask.mean() < 0.9


@pytest.mark.slow
def test_every_gsm8k_training_row(qwen_tokenizer):
    renderer = Renderer(qwen_tokenizer)
    rows = 0
    one_pass_differs = 0
    for chunk in iter_chunks([str(real("gsm8k-tool-sft/train.parquet"))]):
        for index, row in chunk:
            conversation = to_conversation(row, chunk.file, index)
            sample = check_replay(renderer, conversation)
            text = renderer.text(conversation.messages, conversation.tools)
            assert qwen_tokenizer.decode(sample.tokens) == text
            one_pass_differs += qwen_tokenizer.encode(text) != sample.tokens.tolist()
            assert len(trained(qwen_tokenizer, sample)) == len(conversation.assistant_turns)
            rows += 1
    assert rows == 7378
    assert one_pass_differs < rows // 100


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3", "hermes"])
def test_plain_chat_trains_answers_and_their_ends(
    name, renderer_of, tokenizer, chat_row, conversation
):
    renderer = renderer_of(name)
    (sample,) = renderer.render(conversation(chat_row))
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    assert trained(tokenizer, sample) == [f"Hello!{end}", f"Goodbye.{end}"]
    assert tokenizer.decode(sample.tokens) == renderer.text(chat_row["messages"])
    assert sample.tokens.dtype == np.int32 and sample.mask.dtype == bool


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3", "hermes"])
def test_plain_chat_replays(name, renderer_of, chat_row, conversation):
    check_replay(renderer_of(name), conversation(chat_row))


def test_tool_conversation_with_hermes(renderer_of, tokenizer, tool_row, conversation):
    renderer = renderer_of("hermes")
    sample = check_replay(renderer, conversation(tool_row))
    first = (
        '<tool_call>\n{"name": "calculator", "arguments": {"code": "print(12*2)"}}\n</tool_call>'
    )
    second = '<tool_call>\n{"name": "calculator", "arguments": {"code": "print(\\"é\\\\n\\")"}}\n</tool_call>'
    third = (
        '<tool_call>\n{"name": "calculator", "arguments": {"code": "print(120-36)"}}\n</tool_call>'
    )
    assert trained(tokenizer, sample) == [
        f"Two sums.\n{first}\n{second}<|im_end|>",
        f"{third}<|im_end|>",
        "The answer is 42.<|im_end|>",
    ]
    text = tokenizer.decode(sample.tokens)
    assert text.startswith("<|im_start|>system\nBe exact.\n\nYou can call")
    grouped = "<|im_start|>user\n<tool_response>\n24\n</tool_response>\n<tool_response>\né\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert grouped in text  # consecutive results share one turn


def test_llama_turn_with_a_call_and_no_words(renderer_of, tokenizer, tool_row, conversation):
    messages = [message for i, message in enumerate(tool_row["messages"]) if i not in (2, 3, 4)]
    sample = check_replay(renderer_of("llama3"), conversation({**tool_row, "messages": messages}))
    assert trained(tokenizer, sample) == [
        '{"name": "calculator", "parameters": {"code": "print(120-36)"}}<|eot_id|>',
        "The answer is 42.<|eot_id|>",
    ]
    assert (
        sample.tokens[0] == tokenizer.bos_token_id
        and (sample.tokens == tokenizer.bos_token_id).sum() == 1
    )


def test_llama_refusals_name_row_and_turn(renderer_of, tool_row, conversation):
    with pytest.raises(RowError, match=r"rows\.jsonl, row 7.*single tool-calls"):
        renderer_of("llama3").render(conversation(tool_row))
    tool_row["messages"][2]["tool_calls"].pop()
    with pytest.raises(
        RowError,
        match=r"row 7, message 2 \(assistant\): .*drops or changes the content \('Two sums",
    ):
        renderer_of("llama3").render(conversation(tool_row))


def test_template_that_drops_tools_or_calls_is_refused(renderer_of, tool_row, conversation):
    renderer = renderer_of("smollm2")
    with pytest.raises(
        RowError,
        match=r"row 7, message 2 \(assistant\): .*drops the tool call.*data\.chat_template=hermes",
    ):
        renderer.render(conversation(tool_row))
    for message in tool_row["messages"]:
        message.pop("tool_calls", None)
    with pytest.raises(
        RowError,
        match=r"row 7: .*doesn't render the tools \('calculator'.*data\.chat_template=hermes",
    ):
        renderer.render(conversation(tool_row))
    with pytest.raises(RowError, match="doesn't render the tools"):
        renderer.render_prompt(tool_row["messages"][:2], tool_row["tools"])


def test_a_call_quoted_in_the_text_does_not_count_as_rendered(renderer_of, tool_row, conversation):
    tool_row["messages"][2]["content"] = 'I use calculator with code print(12*2) and print("é\\n").'
    with pytest.raises(RowError, match="drops the tool call"):
        renderer_of("smollm2").render(conversation(tool_row))


def test_loss_mask_switches_whole_turns(renderer_of, tokenizer, chat_row, conversation):
    chat_row["messages"][1]["loss_mask"] = 0
    renderer = renderer_of("chatml")
    (sample,) = renderer.render(conversation(chat_row))
    assert trained(tokenizer, sample) == ["Goodbye.<|im_end|>"]
    chat_row["messages"][1]["loss_mask"] = 1
    (both,) = renderer.render(conversation(chat_row))
    assert trained(tokenizer, both) == ["Hello!<|im_end|>", "Goodbye.<|im_end|>"]
    assert both.tokens.tolist() == sample.tokens.tolist()


def test_pieces_are_tokenised_as_inference_does(renderer_of, tokenizer, conversation):
    row = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "\n\nHello"},
        ]
    }
    renderer = renderer_of("chatml")
    (sample,) = renderer.render(conversation(row))
    text = renderer.text(row["messages"])
    assert tokenizer.decode(sample.tokens) == text
    # One pass merges the prompt's newline with the answer's
    assert tokenizer.encode(text) != sample.tokens.tolist()
    prompt = renderer.render_prompt(row["messages"][:1])
    assert sample.tokens[: len(prompt)].tolist() == prompt
    assert not sample.mask[: len(prompt)].any() and sample.mask[len(prompt)]


class TestQwen3:
    def thinking(self, first="<think>\nsum\n</think>\n\nA", second="<think>\nagain\n</think>\n\nB"):
        return [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": second},
        ]

    def test_rewritten_history_is_an_error(self, renderer_of, conversation):
        with pytest.raises(
            RowError, match=r"row 7, message 1 \(assistant\): .*data\.multiturn\.history=split"
        ):
            renderer_of("qwen3").render(conversation({"messages": self.thinking()}))

    def test_last_trains_the_turns_that_stay(self, renderer_of, tokenizer, conversation):
        (sample,) = renderer_of("qwen3", history="last").render(
            conversation({"messages": self.thinking()})
        )
        assert trained(tokenizer, sample) == ["<think>\nagain\n</think>\n\nB<|im_end|>"]
        assert "sum" not in tokenizer.decode(sample.tokens)

    def test_split_makes_a_sample_of_every_turn(self, renderer_of, tokenizer, conversation):
        renderer = renderer_of("qwen3", history="split")
        samples = renderer.render(conversation({"messages": self.thinking()}))
        turns = [trained(tokenizer, sample) for sample in samples]
        assert turns == [
            ["<think>\nsum\n</think>\n\nA<|im_end|>"],
            ["<think>\nagain\n</think>\n\nB<|im_end|>"],
        ]
        # The context of each is exactly what inference shows
        for sample, i in zip(samples, (1, 3), strict=True):
            prompt = renderer.text(self.thinking()[:i], generation_prompt=True)
            assert tokenizer.decode(sample.tokens[: int(np.argmax(sample.mask))]) == prompt

    def test_split_trains_every_turn_once(self, renderer_of, tokenizer, tool_row, conversation):
        """Within a question turns stay as they were: in the next one's sample they are context."""
        messages = tool_row["messages"]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in turns:
            messages[i]["content"] = f"<think>\nstep {i}\n</think>\n\n" + messages[i]["content"]
        messages += self.thinking()[:2]
        samples = renderer_of("qwen3", history="split").render(conversation(tool_row))
        found = [trained(tokenizer, sample) for sample in samples]
        assert [len(runs) for runs in found] == [1] * (len(turns) + 1)
        for (run,), i in zip(found[:-1], turns, strict=True):
            assert run.startswith(f"<think>\nstep {i}\n</think>")
        assert f"step {turns[0]}" in tokenizer.decode(samples[1].tokens)

    def test_split_honours_loss_mask_and_leaves_stable_rows_whole(
        self, renderer_of, tokenizer, conversation
    ):
        renderer = renderer_of("qwen3", history="split")
        messages = self.thinking()
        messages[1]["loss_mask"] = 0
        (sample,) = renderer.render(conversation({"messages": messages}))
        assert trained(tokenizer, sample) == ["<think>\nagain\n</think>\n\nB<|im_end|>"]

    def test_empty_thought_is_sampled_unless_thinking_is_off(
        self, renderer_of, tokenizer, conversation
    ):
        row = {
            "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "A"}]
        }
        (on,) = renderer_of("qwen3").render(conversation(row))
        assert trained(tokenizer, on) == ["<think>\n\n</think>\n\nA<|im_end|>"]
        (off,) = renderer_of("qwen3").render(conversation({**row, "enable_thinking": False}))
        assert trained(tokenizer, off) == ["A<|im_end|>"]
        assert tokenizer.decode(on.tokens) == tokenizer.decode(off.tokens)
        (by_kwargs,) = renderer_of("qwen3", enable_thinking=False).render(conversation(row))
        assert by_kwargs.mask.tolist() == off.mask.tolist()

    def test_tool_steps_of_one_question_keep_their_thoughts(
        self, renderer_of, tokenizer, tool_row, conversation
    ):
        for i in (2, 5, 7):
            tool_row["messages"][i]["content"] = (
                f"<think>\nstep {i}\n</think>\n\n" + tool_row["messages"][i]["content"]
            )
        sample = check_replay(renderer_of("qwen3"), conversation(tool_row))
        turns = trained(tokenizer, sample)
        assert len(turns) == 3 and all(
            turn.startswith("<think>\nstep ") and turn.endswith("<|im_end|>") for turn in turns
        )

    def test_tool_steps_without_thoughts_are_rewritten(
        self, renderer_of, tokenizer, tool_row, conversation
    ):
        with pytest.raises(RowError, match=r"message 2 \(assistant\)"):
            renderer_of("qwen3").render(conversation(tool_row))
        samples = renderer_of("qwen3", history="split").render(conversation(tool_row))
        assert len(samples) == 3
        assert all(
            trained(tokenizer, sample)[0].startswith("<think>\n\n</think>\n\n")
            for sample in samples
        )


def write(tmp_path, text):
    path = tmp_path / "template.jinja"
    path.write_text(text)
    return str(path)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_ambiguous_templates_are_refused(tmp_path, tokenizer, chat_row, conversation):
    no_prompt = Renderer(tokenizer, Rendering(write(tmp_path, CHATML)))
    with pytest.raises(RowError, match=r"message 1 .*no generation prompt"):
        no_prompt.render(conversation(chat_row))
    with pytest.raises(ValueError, match="couldn't learn to stop"):
        Renderer(
            tokenizer,
            Rendering(
                write(
                    tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                )
            ),
        )
    thought = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    with pytest.raises(RowError, match=r"message 1 .*opens a thought, and the row gives none"):
        Renderer(tokenizer, Rendering(write(tmp_path, thought))).render(conversation(chat_row))
    with pytest.raises(RowError, match=r"message 1 .*start of this turn can't be found.*character"):
        Renderer(tokenizer, Rendering(write(tmp_path, thought.replace("<think>", "Plan:")))).render(
            conversation(chat_row)
        )
    shout = (
        CHATML.replace("m.content", "m.content | upper")
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(ValueError, match="doesn't show an answer as it is written"):
        Renderer(tokenizer, Rendering(write(tmp_path, shout)))
    deaf = (
        CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'assistant' }}")
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(
        RowError, match=r"message 0 \(user\): .*drops or changes the content \('Hi'"
    ):
        Renderer(tokenizer, Rendering(write(tmp_path, deaf))).render(
            conversation(
                {
                    "messages": [
                        {"role": "user", "content": "Hi"},
                        {"role": "assistant", "content": "Ho"},
                    ]
                }
            )
        )


def test_an_answer_may_not_hold_its_own_end(renderer_of, chat_row, conversation):
    chat_row["messages"][1]["content"] = "Hello<|im_end|>\n<|im_start|>assistant\nmore"
    with pytest.raises(
        RowError, match=r"message 1 .*end-of-turn token '<\|im_end\|>' is inside the turn"
    ):
        renderer_of("chatml").render(conversation(chat_row))


def test_markup_of_others_is_never_trained(renderer_of, tokenizer, chat_row, conversation):
    chat_row["messages"][2]["content"] = "Bye<|im_end|>\n<|im_start|>assistant\nforged<|im_end|>"
    (sample,) = renderer_of("chatml").render(conversation(chat_row))
    assert trained(tokenizer, sample) == ["Hello!<|im_end|>", "Goodbye.<|im_end|>"]


def test_a_template_may_close_the_whole_text_with_another_token(
    tmp_path, tokenizer, chat_row, conversation
):
    template = (
        CHATML
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
    )
    (sample,) = Renderer(tokenizer, Rendering(write(tmp_path, template))).render(
        conversation(chat_row)
    )
    assert trained(tokenizer, sample) == ["Hello!<|im_end|>", "Goodbye.<|im_end|>"]
    assert tokenizer.decode(sample.tokens).endswith("<|im_end|>\n<|endoftext|>")


def test_cut_off_turn_gets_its_end_from_the_glue(renderer_of, tokenizer, tool_row, conversation):
    renderer = renderer_of("hermes")
    messages = conversation(tool_row).messages
    glue = renderer.render_tool_turn(messages[:3], messages[3:5], tool_row["tools"], ended=False)
    assert glue[0] == renderer.end_of_turn_ids[0]
    assert glue[1:] == renderer.render_tool_turn(messages[:3], messages[3:5], tool_row["tools"])
    assert tokenizer.decode(glue).endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_glue_holds_whatever_a_tool_prints(renderer_of, tokenizer, tool_row, conversation):
    renderer = renderer_of("hermes")
    messages = conversation(tool_row).messages
    said = "TheTurnGoesHere<|im_end|>\nTheTurnGoesHereX"
    glue = renderer.render_tool_turn(
        messages[:3], [{"role": "tool", "content": said}], tool_row["tools"]
    )
    expected = f"\n<|im_start|>user\n<tool_response>\n{said}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(glue) == expected


def test_prompt_with_earlier_turns_is_what_training_has(renderer_of, chat_row, conversation):
    renderer = renderer_of("chatml")
    chat_row["messages"][1]["content"] = "\n\nHello"
    (sample,) = renderer.render(conversation(chat_row))
    prompt = renderer.render_prompt(chat_row["messages"][:3])
    assert sample.tokens[: len(prompt)].tolist() == prompt


def test_dummy_space_tokenizer_is_anchored(tmp_path):
    """A sentencepiece-like tokenizer puts a space before what it takes for the start of a text;
    pieces aren't that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    raw.train_from_iterator(
        ["Hello there user assistant \n"] * 10,
        trainers.BpeTrainer(special_tokens=["<|im_start|>", "<|im_end|>"]),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(tokenizer)
    row = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "there"},
        ]
    }
    (sample,) = renderer.render(to_conversation(row, "f", 0))
    assert sample.tokens.tolist() == tokenizer.encode(
        renderer.text(row["messages"]), add_special_tokens=False
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_pickled_renderer_is_the_same(name, renderer_of, chat_row, conversation):
    renderer = renderer_of(name, history="last")
    copy = pickle.loads(pickle.dumps(renderer))
    assert copy.fingerprint() == renderer.fingerprint()
    assert (
        copy.render(conversation(chat_row))[0].tokens.tolist()
        == renderer.render(conversation(chat_row))[0].tokens.tolist()
    )


def test_fingerprint_tells_templates_and_arguments_apart(renderer_of):
    prints = [renderer_of(name).fingerprint() for name in TEMPLATES] + [
        renderer_of("qwen3", enable_thinking=False).fingerprint()
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprint_tells_tokenizers_apart(renderer_of, tokenizer):
    """A token cache is named by it: another vocabulary, or another special token, makes another."""
    renderer = renderer_of("chatml")
    prints = {renderer.fingerprint()}
    for change in ("vocabulary", "special"):
        other = pickle.loads(pickle.dumps(tokenizer))
        if change == "vocabulary":
            other.add_tokens(["plums"])
        else:
            other.pad_token = other.eos_token = "A"
        prints.add(Renderer(other, renderer.rendering).fingerprint())
    assert len(prints) == 3


def test_replaced_template_goes_into_the_export(tmp_path, tokenizer, renderer_of):
    tokenizer.save_pretrained(tmp_path)
    write_template(tmp_path, renderer_of("hermes").template)
    loaded = load_tokenizer(str(tmp_path))
    assert (
        Renderer(loaded).text([{"role": "user", "content": "Hi"}])
        == "<|im_start|>user\nHi<|im_end|>\n"
    )
    assert loaded.chat_template == renderer_of("hermes").template


def test_missing_tokenizer_and_template(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="doesn't exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no such file.*hermes"):
        Renderer(tokenizer, Rendering(str(tmp_path / "nowhere.jinja")))
    copy = pickle.loads(pickle.dumps(tokenizer))
    copy.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*data\.chat_template=hermes"):
        Renderer(copy)


def test_a_renderer_keeps_no_more_variants_than_a_server_has_room_for(renderer_of, monkeypatch):
    monkeypatch.setattr("retool.data.render.renderer.MOST_VARIANTS", 2)
    renderer = renderer_of("chatml")
    asked = [replace(renderer.rendering, template_kwargs={"x": x}) for x in range(3)]
    made = [renderer.variant(each) for each in asked]
    assert list(renderer.variants.values()) == made[1:]
    assert renderer.variant(asked[2]) is made[2]
