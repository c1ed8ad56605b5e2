"""Trajectories for people: `RUN_DIR/report/*.jsonl`, which `python -m retool.report` shows, one
trajectory a line.

    {"step": 12, "split": "train", "data_source": "aime", "prompt": "…", "ground_truth": "42",
     "reward": -0.8, "stop": "no_call", "num_turns": 4, "info": {"acc": 0, "pred": "41"},
     "segments": [{"role": "assistant", "text": "Let me…", "tokens": ["Let", " me", "…"],
                   "logp": [-0.1, -2.3, -0.5], "advantage": -0.7, "mask": true},
                  {"role": "tool", "text": "…", "mask": false}]}

Only step, prompt and segments with role and text must be there. `tokens` are the texts of a
segment's tokens; `logp`, `advantage` and `mask` are a list with one entry for each of them, or one
value for all. Mask is true where the model sampled the token: only those are trained.
Log-probabilities are natural, of the sampler. Non-finite numbers stand as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retool.config.redact import logger, redact
from retool.files.durable import replacing
from retool.files.untrusted import read_lines

FOLDER = "report"
LINE_BYTES = 8 << 20  # of a transcript: some 300,000 tokens
DIGITS = 4
WINDOW = 12  # tokens that one character, or one special token's text, may be spread over

log = logger("retool.report")


@dataclass(frozen=True)
class Segment:
    """A stretch of a trajectory that one side wrote: `role` is assistant, tool, user or system."""

    role: str
    text: str
    tokens: Sequence[str] = ()
    logp: Sequence[float] = ()
    advantage: Sequence[float] | float | None = None
    mask: Sequence[bool] | bool = False


@dataclass(frozen=True)
class Transcript:
    """A trajectory.

    `step` is the optimizer step it was sampled for, `split` train or val, `info` what the reward
    told beside itself.
    """

    step: int
    prompt: str
    segments: Sequence[Segment]
    reward: float | None = None
    stop: str = ""
    num_turns: int = 0
    data_source: str = ""
    ground_truth: str = ""
    split: str = "train"
    info: Mapping[str, Any] = field(default_factory=dict)


def write_transcripts(run: Path, name: str, transcripts: Iterable[Transcript]) -> Path:
    """Write `run/report/name.jsonl`, all or nothing: a step that is run again after a resume
    replaces what it wrote before.
    """
    path = run / FOLDER / f"{name}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, lasting=False) as file:
            for transcript in transcripts:
                line = json.dumps(to_record(transcript), allow_nan=False)
                file.write(f"{line}\n".encode())
    except OSError as error:  # a full disk: what people read isn't worth a run
        log.warning("%s could not be written (%s): the run goes on.", path, error.strerror or error)
    return path


def to_record(transcript: Transcript) -> dict[str, Any]:
    """A transcript as the JSON object described above, without secrets; lists of one value are that
    value.
    """
    fields = vars(transcript).items()
    record = redact({k: v for k, v in fields if k not in ("segments", "info", "reward")})
    record["reward"] = _number(transcript.reward)
    info: dict[str, Any] = {}
    for name, value in transcript.info.items():
        if _plain(value):
            info[str(name)] = _number(value) if isinstance(value, float) else value
    record["info"] = redact(info)
    record["segments"] = [_segment(segment) for segment in transcript.segments]
    return record


def _segment(segment: Segment) -> dict[str, Any]:
    """A segment, with its tokens unless they spell a secret."""
    text = redact(segment.text)
    record: dict[str, Any] = {"role": segment.role, "text": text}
    if text != segment.text:
        if isinstance(segment.mask, bool):
            record["mask"] = segment.mask
        return record
    by_token = {
        "tokens": list(segment.tokens),
        "logp": [_number(value) for value in segment.logp],
        "advantage": _one_for_all(segment.advantage),
        "mask": _one_for_all(segment.mask),
    }
    record |= {name: value for name, value in by_token.items() if value not in ([], None)}
    return record


def _one_for_all(value: Sequence[float] | Sequence[bool] | float | None) -> Any:
    """Numbers, one for each token; the number itself where all are the same."""
    if not isinstance(value, Sequence):
        return _number(value)
    entries = [_number(entry) for entry in value]
    # GRPO gives all tokens of an answer one advantage: it is written once.
    same = bool(entries) and entries.count(entries[0]) == len(entries)
    return entries[0] if same else entries


def _number(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if type(value).__name__ in ("bool_", "bool"):  # numpy's
        return bool(value)
    return round(float(value), DIGITS) if math.isfinite(value) else None


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def split_by_mask(
    texts: Sequence[str], mask: Sequence[bool], logp: Sequence[float], advantages: Sequence[float]
) -> list[Segment]:
    """Segments of a response from its tokens' texts: what the model sampled is the assistant's, the
    rest the tools' and the template's.

    All four are of one length; `logp` and `advantages` count where `mask` is true.
    """
    segments: list[Segment] = []
    start = 0
    for stop in range(1, len(texts) + 1):
        if stop < len(texts) and bool(mask[stop]) == bool(mask[start]):
            continue
        part = slice(start, stop)
        tokens = list(texts[part])
        text = "".join(tokens)
        if mask[start]:
            logprobs = [float(value) for value in logp[part]]
            worth = [float(value) for value in advantages[part]]
            segments.append(Segment("assistant", text, tokens, logprobs, worth, mask=True))
        else:
            segments.append(Segment("tool", text, tokens, mask=False))
        start = stop
    return segments


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text that each token adds: they join to the text of all.

    A character of several tokens is its last one's; the others add nothing.

    `decode` must keep special tokens and spaces as they are.
    """
    out: list[str] = []
    start = done = 0
    for end in range(1, len(ids) + 1):
        before = decode(list(ids[start:done]))
        text = decode(list(ids[start:end]))
        # Half of a character, whose rest is in the tokens that follow: the last of them shows it.
        if text.endswith("\ufffd") and end < len(ids) and end - done < WINDOW:
            out.append("")
            continue
        out.append(text[len(before) :])
        start = done
        done = end
    return out


def read_transcripts(run: Path) -> Iterator[dict[str, Any] | None]:
    """Every line of `run/report/*.jsonl`, newest file last; None for a line that is torn, or no
    transcript.
    """
    folder = run / FOLDER
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
        if not path.is_file():  # a pipe would have no end
            yield None
            continue
        for line in read_lines(path, LINE_BYTES):
            yield None if line is None else _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    # `type`, as True is an int to `isinstance`.
    if type(record.get("step")) is not int or not isinstance(record.get("prompt"), str):
        return None
    segments = record.get("segments")
    if not isinstance(segments, list) or not all(map(_has_text, segments)):
        return None
    return record


def _has_text(segment: Any) -> bool:
    return isinstance(segment, dict) and isinstance(segment.get("text"), str)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
