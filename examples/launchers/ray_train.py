"""Ray: python examples/launchers/ray_train.py --workers 16 retool.sft data.train_files=/data/train.parquet …

On a cluster's head, or by `ray job submit`. A worker takes one GPU (`--cpu`: none); all machines see
the run's folder at the same path, as ever. What fails is started again by Ray, and the run goes on from
its last checkpoint. Needs `pip install 'retool-train[ray]'` on all machines.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import ray
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(settings: dict[str, Any]) -> None:
    """A worker: what `python -m retool.sft` is under torchrun, which sets the same variables."""
    # Ray's has one backend; a run makes a group of its own, with gloo beside NCCL
    dist.destroy_process_group()
    command = importlib.import_module(f"{settings['command']}.__main__")
    status = command.main(settings["keys"])
    if status:
        raise RuntimeError(f"{settings['command']} ended with {status}: its log says why.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--cpu", action="store_true", help="train on CPUs")
    parser.add_argument(
        "--address", default="auto", help="of the cluster (default: the running one)"
    )
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--storage", help="a folder for Ray's own notes, seen by all machines")
    parser.add_argument("command", choices=("retool.sft", "retool.rl"))
    parser.add_argument("keys", nargs="*")
    args = parser.parse_args()
    ray.init(address=args.address)
    trainer = TorchTrainer(
        train,
        train_loop_config={"command": args.command, "keys": args.keys},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu),
        run_config=RunConfig(
            name="retool",
            storage_path=args.storage,
            failure_config=FailureConfig(max_failures=args.restarts),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
