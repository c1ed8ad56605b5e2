"""flash-attn's paged kernels are tried before they are used."""

from __future__ import annotations

import pytest
import torch

from retool.rl.engine import attention as paged

INPUTS = torch.device("cpu"), torch.float32, 16, 16


@pytest.mark.parametrize("wrong", ["", "_flash_decode", "_flash_chunks"])
def test_paged_kernels_that_compute_wrongly_are_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for flash, torchs in (("_flash_decode", paged._torch_decode), ("_flash_chunks", paged._torch_chunks)):
        monkeypatch.setattr(paged, flash, lambda q, data, pages, right=torchs, name=flash: right(q, data, pages) * (0.5 if name == wrong else 1))
    error = paged.paged_error.__wrapped__(*INPUTS)
    assert (0.05 < error < 0.6) if wrong else error == 0


def test_they_are_not_used_then(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0), torch.bfloat16, 16, 256
    monkeypatch.setattr(paged, "find_spec", lambda _: True)
    monkeypatch.setattr(paged, "paged_error", lambda *_: 0.004)
    assert paged.has_paged_flash(*gpu) and not paged.has_paged_flash(*INPUTS)
    monkeypatch.setattr(paged, "paged_error", lambda *_: float("nan"))
    with pytest.warns(UserWarning, match=r"wrongly .* heads of 16 \(relative error nan\)"):
        assert not paged.has_paged_flash(*gpu)
