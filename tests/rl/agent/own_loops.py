"""Loops that the tests' runs are given, as a user's file would hold them."""

from __future__ import annotations

import asyncio

from retool.rl.agent.loops import Ending, TrajectoryOver


async def compacting(row, generate, tools):
    """Goes on from a summary, once for each number of the sample: sample 2 is three sequences."""
    asked = [*row["prompt"]]
    rounds = row["sample"] % 3
    while True:
        turn = await generate(asked, max_tokens=12)
        if rounds == 0:
            return Ending(turn, reward=len(turn.text) / 100)
        rounds -= 1
        asked += [turn.message, {"role": "user", "content": "Sum up."}]
        try:
            turn = await generate(asked, max_tokens=12)
        except TrajectoryOver:
            return turn
        asked = [*row["prompt"], {"role": "user", "content": f"So far: {turn.text}"}]


async def breaking(row, generate, tools):
    """Of the samples of each question: one does well, one raises, one never returns, one returns
    nothing.
    """
    turn = await generate(row["prompt"])
    how = row["sample"] % 4
    if how == 1:
        raise OSError("the notebook is away")
    if how == 2:
        await asyncio.sleep(600)
    return None if how == 3 else turn


async def compacting_or_breaking(row, generate, tools):
    """Sample 3 of each question raises."""
    if row["sample"] == 3:
        raise OSError("the notebook is away")
    return await compacting(row, generate, tools)


async def asking_again(row, generate, tools):
    """Two turns, what stands between them isn't the model's; samples are of several lengths."""
    turn = await generate(row["prompt"], max_tokens=6 + 2 * row["sample"])
    return await generate([*turn.ids, *generate.encode(" and so on")], max_tokens=8)
