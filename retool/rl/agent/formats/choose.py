"""Chooses the format of calls that a chat template shows."""

from __future__ import annotations

from typing import Any

from retool.data.render.renderer import Renderer
from retool.data.template.discover import QUESTION, TOOL
from retool.rl.agent.formats.table import AUTO, FORMATS, find_format
from retool.rl.agent.reading.call import Call
from retool.rl.agent.reading.form import Format, read_calls

ARGUMENTS = {"place": 'the "Old" Town', "days": 3}
CALL = {
    "type": "function",
    "id": "0abcdefgh",
    "function": {"name": "look_up", "arguments": ARGUMENTS},
}
WITH_A_CALL = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def choose_format(
    name: str,
    renderer: Renderer,
) -> tuple[str, Format]:
    """(name, format): the one that is named, or for `auto` the one that the chat template wants.

    ValueError as `find_format` says.
    """
    chosen = name if name != AUTO else template_format(renderer)
    return chosen, find_format(chosen)


def template_format(renderer: Renderer) -> str:
    """The name of the format that the chat template wants: the one in which it shows a call.

    Of a template that shows none, the one whose signs are in what it tells the model of tools, or
    among the tokenizer's own tokens. Hermes, where there is no sign of any.
    """
    shown = shown_format(renderer)
    if shown is not None:
        return shown
    tokens = {str(token.content) for token in renderer.tokenizer.added_tokens_decoder.values()}
    for place in (renderer.source, tokens):
        for name, form in FORMATS.items():
            if any(sign in place for sign in form.signs):
                return name
    return next(iter(FORMATS))


def shown_format(renderer: Renderer) -> str | None:
    """The name of the format in which the chat template shows a call; None where it shows none."""
    try:
        before = renderer.text([QUESTION], [TOOL], generation_prompt=True)
        text = renderer.text([QUESTION, WITH_A_CALL], [TOOL])
    except ValueError:  # no tools, or no calls, in this template
        return None
    turn = _after_prompt(before, text)
    places = [place for end in renderer.ends.known if (place := turn.find(end)) >= 0]
    said = turn[: min(places, default=len(turn))]
    for name, form in FORMATS.items():
        if any(_same(call) for call in read_calls(form, said, [TOOL])):
            return name
    return None


def _after_prompt(
    prompt: str,
    text: str,
) -> str:
    """What `text` has after the prompt; or, where it goes on in another way, after what both begin
    with, up to a tag or a word that isn't the same.
    """
    if text.startswith(prompt):
        return text[len(prompt) :]
    pairs = zip(prompt, text, strict=False)
    differs = next((k for k, (one, other) in enumerate(pairs) if one != other), len(text))
    return text[max(text.rfind(sign, 0, differs) for sign in ">] \n") + 1 :]


def _same(call: Call) -> bool:
    arguments: Any = call.arguments
    return call.name == CALL["function"]["name"] and arguments == ARGUMENTS
