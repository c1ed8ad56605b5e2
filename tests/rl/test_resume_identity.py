"""A checkpoint's place in the stream of questions is only used in the same stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from retool.rl.build import refuse_other_questions

NOW = {"data.seed": 1, "data.shuffle": 1, "questions": 40, "their checksum": 123}


def test_the_same_stream_goes_on() -> None:
    refuse_other_questions(dict(NOW), NOW, Path("global_step_3"))
    refuse_other_questions({}, NOW, Path("global_step_3"))  # another program's checkpoint says nothing


@pytest.mark.parametrize(("key", "value"), [("data.seed", 2), ("questions", 41), ("their checksum", 5)])
def test_another_one_is_refused_by_name(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key}: then {value}, now {NOW[key]}"):
        refuse_other_questions({**NOW, key: value}, NOW, Path("global_step_3"))
