"""A checkpoint's place in the stream of questions is only used in the same stream, its KL only against the same reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from retool.rl.identity import refuse_another_run, weights_checksum

NOW = {"data.seed": 1, "data.shuffle": 1, "questions": 40, "their checksum": 123, "checksum of the reference model": 9}
FOUND = Path("global_step_3")


def test_the_same_stream_goes_on() -> None:
    refuse_another_run({"stream": dict(NOW)}, NOW, FOUND)
    refuse_another_run({"stream": {"data.seed": 1}}, NOW, FOUND)  # an older one that said less


@pytest.mark.parametrize(("key", "value"), [("data.seed", 2), ("questions", 41), ("their checksum", 5), ("checksum of the reference model", 8)])
def test_another_one_is_refused_by_name(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key}: then {value}, now {NOW[key]}"):
        refuse_another_run({"stream": {**NOW, key: value}}, NOW, FOUND)


def test_a_checkpoint_of_another_command_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_step_3 wasn't saved by retool.rl .* huggingface"):
        refuse_another_run({"epoch": 1}, NOW, FOUND)


def test_weights_are_told_apart_by_size_and_end(tmp_path: Path) -> None:
    sums = set()
    for k, weights in enumerate((b"abc", b"abd", b"zabd")):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "model.safetensors").write_bytes(weights)
        sums.add(weights_checksum(tmp_path / str(k)))
    assert len(sums) == 3
