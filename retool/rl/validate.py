"""Validation statistics: mean@N, best@k, worst@k and majority votes per data source, by bootstrap."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from retool.rl.metrics import spread_of
from retool.rl.types import FAILURE, Group

DRAWS = 1000
SEED = 42


def draws(n: int, k: int) -> np.ndarray:
    """int [1000, k]: indices of `k` of `n` samples, drawn with replacement; the same for every
    question.
    """
    return np.random.RandomState(SEED).randint(0, n, (DRAWS, k))


def subset_sizes(n: int) -> list[int]:
    """2, 4, 8 … and n itself."""
    return [*(2**i for i in range(1, n.bit_length()) if 2**i < n), n] if n > 1 else []


def question_statistics(
    accuracy: Sequence[float], answers: Sequence[str] | None, asked: int | None = None
) -> dict[str, float]:
    """Of one question's N samples: mean@N, std@N, and for k = 2, 4, 8 … N best@k, worst@k and, with
    `answers`, maj@k (mean and std over the draws). Every std divides by the count, not by one less,
    as verl's metrics of these names do. N is `asked` where some of that many were lost: the others
    are drawn from, under the names of all.
    """
    values = np.asarray(accuracy, np.float64)
    n = asked or len(values)
    out = {f"mean@{n}": float(values.mean())}
    if n > 1:
        out[f"std@{n}"] = float(values.std())
    for k in subset_sizes(n):
        chosen = draws(len(values), k)
        kinds = {"best": values[chosen].max(1), "worst": values[chosen].min(1)}
        if answers is not None:
            kinds["maj"] = np.array([majority(row, answers, values) for row in chosen])
        for name, found in kinds.items():
            out |= {f"{name}@{k}/mean": float(found.mean()), f"{name}@{k}/std": float(found.std())}
    return out


def majority(chosen: np.ndarray, answers: Sequence[str], values: np.ndarray) -> float:
    """The value of the answer that most of the chosen samples give; of equally many, the one that
    comes first.
    """
    winner = Counter(answers[i] for i in chosen).most_common(1)[0][0]
    return float(values[next(i for i in chosen if answers[i] == winner)])


def validation_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """val-core/{source}/acc/{mean@N, best@N/mean, maj@N/mean}; everything else under val-aux. `acc`
    is `Scored.accuracy`. Each number is a mean over the questions of its source that have it; lost
    samples are in none.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    turns: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        source = group.prompt.data_source
        members = group.sound
        asked = len(group.members)
        if not members:
            continue
        infos = [member.info for member in members]
        told = [info for info in infos if FAILURE not in info]
        answers = (
            [str(info.get("pred", "")) for info in infos]
            if told and all("pred" in info for info in told)
            else None
        )
        for name, value in question_statistics(
            [member.accuracy for member in members], answers, asked
        ).items():
            found[source][f"acc/{name}"].append(value)
        for name, value in question_statistics(
            [member.score for member in members], None, asked
        ).items():
            found[source][f"score/{name}"].append(value)
        turns[source] += [member.trajectory.num_turns for member in members]
    out: dict[str, float] = {}
    for source, numbers in found.items():
        most = max(len(group.members) for group in groups if group.prompt.data_source == source)
        core = {f"acc/mean@{most}", f"acc/best@{most}/mean", f"acc/maj@{most}/mean"}
        for name, values in numbers.items():
            out[f"val-{'core' if name in core else 'aux'}/{source}/{name}"] = float(np.mean(values))
        out |= spread_of(f"val-aux/{source}/num_turns", turns[source])
    return out
