"""Which GPU each process of `make test-gpu` has."""

from __future__ import annotations

from tests.conftest import gpu_of_worker


def test_workers_share_the_gpus() -> None:
    workers = [f"gw{number}" for number in range(5)]
    shared = {"TEST_GPUS": "2"}
    assert [gpu_of_worker(worker, shared) for worker in workers] == ["0", "1", "0", "1", "0"]
    given = {**shared, "CUDA_VISIBLE_DEVICES": "3,6,7"}
    assert [gpu_of_worker(worker, given) for worker in workers] == ["3", "6", "7", "3", "6"]
    assert gpu_of_worker("gw4", {}) == "4"
