"""Trajectories written for people: every validation answer, and a few of each training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from retool.data.render.renderer import Renderer
from retool.metrics.transcripts import (
    Segment,
    Transcript,
    split_by_mask,
    token_texts,
    write_transcripts,
)
from retool.rl.agent.loop import turn_text
from retool.rl.types import Group, Scored

MAX_TRAINING_SHOWN = 8  # trajectories of a training step, with their tokens


def write_validation(folder: Path, step: int, groups: Sequence[Group], renderer: Renderer) -> Path:
    """Every answer of a validation, by turns."""
    made = (
        _transcript(member, step, "val", _turns(member, renderer))
        for group in groups
        for member in group.members
    )
    return write_transcripts(folder, f"val_{step:06d}", made)


def write_training(
    folder: Path,
    step: int,
    groups: Sequence[Group],
    advantages: Sequence[np.ndarray],
    renderer: Renderer,
) -> Path:
    """A few answers of a training step, by tokens, with log-probabilities and advantages.

    `advantages`: an array for each trajectory of `groups`, in order, over all of its tokens.
    """
    members = [member for group in groups for member in group.members]
    shown = list(zip(members, advantages, strict=True))[:MAX_TRAINING_SHOWN]
    made = [
        _transcript(member, step, "train", _tokens(member, advantage, renderer))
        for member, advantage in shown
    ]
    return write_transcripts(folder, f"train_{step:06d}", made)


def _transcript(member: Scored, step: int, split: str, segments: Sequence[Segment]) -> Transcript:
    t = member.trajectory
    prompt = "\n\n".join(
        f"{message['role']}: {message['content']}" for message in t.prompt.messages
    )
    return Transcript(
        step,
        prompt,
        segments,
        member.reward,
        t.stop.value,
        t.num_turns,
        t.prompt.data_source,
        t.prompt.truth_text,
        split,
        {"score": member.score, **member.info},
    )


def _turns(member: Scored, renderer: Renderer) -> list[Segment]:
    return [
        Segment("assistant" if own else "tool", turn_text(renderer, ids), mask=own)
        for own, ids in runs(member)
    ]


def runs(member: Scored) -> Iterator[tuple[bool, list[int]]]:
    """(sampled by the model, ids) of each stretch of a response."""
    t = member.trajectory
    ids = t.tokens[t.prompt_length :]
    mask = t.mask[t.prompt_length :]
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)] if len(ids) else []
    for start, stop in pairwise(edges):
        yield bool(mask[start]), ids[start:stop].tolist()


def _tokens(member: Scored, advantage: np.ndarray, renderer: Renderer) -> list[Segment]:
    t = member.trajectory
    part = slice(t.prompt_length, None)
    texts = token_texts(t.tokens[part].tolist(), lambda ids: turn_text(renderer, ids))
    return split_by_mask(
        texts, t.mask[part].tolist(), t.logp[part].tolist(), advantage[part].tolist()
    )
