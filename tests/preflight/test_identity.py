"""What makes a run this run is compared by name, and a model's weights are known by a few pieces of
every tensor.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from retool.preflight.identity import PIECE, PIECES, Trait, changed_keys, changes, weights_checksum

NOW = {
    "samples": Trait("data.train_files", 40),
    "their content": Trait("data.train_files", "ab"),
    "questions": Trait("data.seed", 3, strict=True),
}


def test_what_is_another_is_said_by_key_and_what_is_not_known_is_not_compared() -> None:
    same = {name: trait.value for name, trait in NOW.items()}
    assert changes(same, NOW) == [] and changes({"samples": 40, "older": 1}, NOW) == []
    (data, seed) = changes({"samples": 41, "their content": "cd", "questions": None}, NOW)
    assert (data.where, data.words, data.strict) == (
        "data.train_files",
        "samples: then 41, now 40; their content: then cd, now ab",
        False,
    )
    assert (seed.where, seed.words, seed.strict) == (
        "data.seed",
        "questions: then null, now 3",
        True,
    )


def test_other_keys_are_told_but_for_those_of_where_it_runs() -> None:
    then = {
        "optim.lr": 1e-5,
        "trainer.resume_mode": "auto",
        "data.val_files": ["a", "b"],
        "gone": 1,
    }
    now = {"optim.lr": 1e-4, "trainer.resume_mode": "resume_path", "data.val_files": None, "new": 2}
    assert list(changed_keys(then, now)) == [
        "optim.lr: then 1e-05, now 0.0001.",
        "data.val_files: then [a,b], now null.",
    ]


def test_a_change_in_any_tensor_is_another_model(tmp_path: Path) -> None:
    """Whichever matrix was trained, where a training changes it all over; and whatever the file is
    called or split into.
    """
    torch.manual_seed(0)
    tensors = {
        f"model.layers.{i}.weight": torch.randn(PIECES * PIECE // 64 + 40, 64).bfloat16()
        for i in range(3)
    }
    tensors["model.norm.weight"] = torch.ones(8)

    def known(changed: dict[str, torch.Tensor]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file({**tensors, **changed}, folder / "model.safetensors")
        return weights_checksum(folder)

    assert known({}) == known({})
    others = [known({name: tensor + 0.1}) for name, tensor in tensors.items()]
    last = tensors["model.layers.1.weight"].clone()
    last.view(-1)[-1] += 1
    assert (
        len(
            {
                known({}),
                *others,
                known({"model.layers.1.weight": last}),
                known({"model.layers.1.weight": last.float()}),
            }
        )
        == 7
    )
