"""Validation statistics: mean@N, best@k, worst@k and majority votes per data source, by bootstrap."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from retool.rl.metrics import reward_metrics, spread_of
from retool.rl.types import FAILURE, Group

DRAWS = 1000
SEED = 42


def draws(n: int, k: int) -> np.ndarray:
    """int [1000, k]: indices of `k` of `n` samples, drawn with replacement; the same for every
    question.
    """
    # Legacy RandomState: numpy promises that its stream never changes, so figures of different runs
    # compare.
    return np.random.RandomState(SEED).randint(0, n, (DRAWS, k))


def subset_sizes(n: int) -> list[int]:
    """2, 4, 8 … and n itself."""
    if n < 2:
        return []
    powers = [2**i for i in range(1, n.bit_length())]
    return [*(power for power in powers if power < n), n]


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
            out[f"{name}@{k}/mean"] = float(found.mean())
            out[f"{name}@{k}/std"] = float(found.std())
    return out


def majority(chosen: np.ndarray, answers: Sequence[str], values: np.ndarray) -> float:
    """The value of the answer that most of the chosen samples give; of equally many, the one that
    comes first.
    """
    votes = Counter(answers[i] for i in chosen)
    # Counters keep their order: of equally many the first that was counted
    winner, _ = votes.most_common(1)[0]
    first = next(i for i in chosen if answers[i] == winner)
    return float(values[first])


def validation_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics by data source, each the mean over the questions that have it.

    val-core/{source}/acc/ holds mean@N, best@N/mean and maj@N/mean; everything else is under
    val-aux. `acc` is `Scored.accuracy`. Lost samples are in none.
    """
    by_source: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_source[group.prompt.data_source].append(group)
    metrics: dict[str, float] = {}
    for source, asked in by_source.items():
        answered = [group for group in asked if group.sound]
        if answered:
            samples = max(len(group.members) for group in asked)
            metrics |= _source_metrics(source, answered, samples)
    return metrics


def _source_metrics(source: str, groups: Sequence[Group], samples: int) -> dict[str, float]:
    """Of the questions of one source, of which the most asked was sampled `samples` times."""
    values: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        for name, value in _group_statistics(group).items():
            values[name].append(value)
    core = {f"acc/mean@{samples}", f"acc/best@{samples}/mean", f"acc/maj@{samples}/mean"}
    metrics = {}
    # A question has fewer statistics where its answers can't be told apart: each mean has its own
    for name, numbers in values.items():
        kind = "core" if name in core else "aux"
        metrics[f"val-{kind}/{source}/{name}"] = float(np.mean(numbers))
    turns = [float(member.trajectory.num_turns) for group in groups for member in group.sound]
    return metrics | spread_of(f"val-aux/{source}/num_turns", turns)


def _group_statistics(group: Group) -> dict[str, float]:
    """One question's statistics of accuracy, with votes where its reward tells answers, and score."""
    members = group.sound
    asked = len(group.members)
    infos = [member.info for member in members]
    judged = [info for info in infos if FAILURE not in info]
    # A majority needs answers to vote for. A sample whose reward failed votes for "", which no
    # answer is.
    answers = None
    if judged and all("pred" in info for info in judged):
        answers = [str(info.get("pred", "")) for info in infos]
    accuracy = question_statistics([member.accuracy for member in members], answers, asked)
    score = question_statistics([member.score for member in members], None, asked)
    several = reward_metrics(members)
    return {
        **{f"{name}@{asked}": value for name, value in several.items()},
        **{f"acc/{name}": value for name, value in accuracy.items()},
        **{f"score/{name}": value for name, value in score.items()},
    }
