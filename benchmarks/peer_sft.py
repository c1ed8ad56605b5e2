"""What `peers.py` starts in every process of a peer's job: its own SFT trainer over the workloads of
`sft.py`, with a clock at the end of each step. It imports nothing of retool.

    torchrun --nproc_per_node=2 benchmarks/peer_sft.py trl '{"workload": "full", "model": …}'

Tokens per second are those of a mean step over the time from the third step's end to the last one's;
peaks are the first rank's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from workloads import COUNTED, DOCUMENTS, STEPS, documents_of, lengths_of

OPTIONS = "PEER_SFT_OPTIONS"  # for the data set, which verl makes by itself
Options = dict[str, Any]
ends: list[float] = []


def documents(options: Options) -> list[Any]:
    lengths = lengths_of(options["workload"], scale=options["scale"])
    return documents_of(lengths, options["vocabulary"])


def tick() -> None:
    """A step has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ends.append(time.perf_counter())


def report(options: Options) -> None:
    """The first rank writes what the steps took. A job that failed early has nothing to say."""
    counted = ends[COUNTED.start - 1 :]
    if int(os.environ.get("RANK", "0")) or len(counted) < 2:
        return
    seconds = (counted[-1] - counted[0]) / (len(counted) - 1)
    tokens = lengths_of(options["workload"], scale=options["scale"]).sum() / STEPS
    cuda = torch.cuda.is_available()
    found = {
        "tokens_per_second_per_gpu": tokens / seconds / int(os.environ.get("WORLD_SIZE", "1")),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan"),
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else float("nan"),
        "steps": len(ends),
    }
    Path(options["out"]).write_text(json.dumps(found))


# --- TRL ---


def train_with_trl(options: Options) -> None:
    """SFTTrainer under FSDP2, documents packed without padding."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            tick()

    sharding: Options = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
    }
    config = SFTConfig(
        output_dir=str(Path(options["out"]).with_suffix("")),
        per_device_train_batch_size=options["batch"],
        gradient_accumulation_steps=DOCUMENTS[options["workload"]] // world // options["batch"],
        max_steps=STEPS,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        max_length=None,
        packing=False,
        padding_free=cuda,
        use_liger_kernel=cuda,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        learning_rate=1e-5,
        dataset_num_proc=1,
        model_init_kwargs={
            "dtype": "float32",
            "attn_implementation": "flash_attention_2" if cuda else "sdpa",
        },
        **(sharding if cuda else {}),
    )
    trainer = SFTTrainer(
        model=options["model"],
        args=config,
        train_dataset=Dataset.from_list([{"input_ids": d.tolist()} for d in documents(options)]),
        processing_class=AutoTokenizer.from_pretrained(options["model"]),
        callbacks=[Clock()],
    )
    trainer.train()


# --- verl ---


class Workload(torch.utils.data.Dataset):
    """verl's `data.custom_cls`: rows that are tokens already, every one trained."""

    def __init__(self, **_: Any) -> None:
        self.rows = [torch.from_numpy(d).long() for d in documents(json.loads(os.environ[OPTIONS]))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.rows[index]
        places = torch.arange(len(ids))
        return {"input_ids": ids, "position_ids": places, "loss_mask": torch.ones_like(ids)}


def train_with_verl(options: Options) -> None:
    """Its SFT trainer, with the keys that `peers.py` chose."""
    import verl.trainer.sft_trainer as trainer

    one_step = trainer.TrainingWorker.train_batch

    def timed(worker: Any, *inputs: Any, **named: Any) -> Any:
        found = one_step(worker, *inputs, **named)
        tick()
        return found

    trainer.TrainingWorker.train_batch = timed
    os.environ[OPTIONS] = json.dumps(options)
    always = [
        "data.train_files=/dev/null",
        f"data.custom_cls.path={Path(__file__).resolve()}",
        "data.custom_cls.name=Workload",
        f"data.train_batch_size={DOCUMENTS[options['workload']]}",
        "data.num_workers=0",
        f"model.path={options['model']}",
        "engine.strategy=fsdp2",
        "optim.lr=1e-5",
        "trainer.logger=[console]",
        "trainer.total_epochs=1",
        "trainer.resume_mode=disable",
        "trainer.save_freq=-1",
        f"trainer.default_local_dir={Path(options['out']).with_suffix('')}",
        f"hydra.run.dir={Path(options['out']).with_suffix('')}",
    ]
    sys.argv = [sys.argv[0], *always, *options["keys"]]
    trainer.main()


PEERS: dict[str, Callable[[Options], None]] = {"trl": train_with_trl, "verl": train_with_verl}


def main() -> None:
    peer, text = sys.argv[1:3]
    options: Options = json.loads(text)
    try:
        PEERS[peer](options)
    finally:
        report(options)


if __name__ == "__main__":
    main()
