"""What a run's checkpoints are worth nothing without: the same questions in the same order, and the same reference model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from retool.rl.preflight import Questions, Report, uses_reference

SAMPLE = 1 << 20  # bytes at the end of each file of weights that its checksum is of


def fingerprint(questions: Questions | None) -> tuple[int, int]:
    """(questions, checksum of their tokens)."""
    checksum, prompts = 0, questions.prompts if questions else []
    for prompt in prompts:
        checksum = zlib.crc32(prompt.ids.tobytes(), checksum)
    return len(prompts), checksum


def stream_identity(report: Report) -> dict[str, int]:
    """What decides which question stands where in the stream, and what KL is measured against; a checkpoint keeps it."""
    data, counts = report.config.data, dict(zip(("questions", "their checksum"), fingerprint(report.train), strict=True))
    identity = {"data.seed": data.seed, "data.shuffle": int(data.shuffle), **counts}
    if uses_reference(report.config) and report.folder is not None:
        identity["checksum of the reference model"] = weights_checksum(report.folder)
    return identity


def weights_checksum(folder: Path) -> int:
    """Checksum of the sizes and ends of a model folder's weights."""
    checksum = 0
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - SAMPLE))
            checksum = zlib.crc32(file.read(), zlib.crc32(size.to_bytes(8, "little"), checksum))
    return checksum


def refuse_another_run(data_state: Mapping, now: Mapping[str, int], found: Path) -> None:
    """ValueError where a checkpoint is none of RL's, or its stream was another one: its position and kept groups mean nothing then."""
    anew = "another trainer.default_local_dir, with actor_rollout_ref.model.path at its huggingface folder"
    if "stream" not in data_state:
        raise ValueError(f"{found} wasn't saved by retool.rl (but by retool.sft?): its steps aren't this run's. Use {anew}.")
    then = data_state["stream"]
    other = [f"{name}: then {then[name]}, now {value}" for name, value in now.items() if then.get(name, value) != value]
    if other:
        raise ValueError(
            f"{found} was trained on other questions, or against another reference ({'; '.join(other)}), so the run can't go on from its "
            f"place. Use the same data, seed and model, or start anew: {anew}."
        )
