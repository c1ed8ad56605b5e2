"""What can be known to be wrong before anything heavy: processes, devices, model folder, tokenizer, weights, output folder.

Each check returns every fault it finds and raises none. A command's own preflight (`retool.sft.preflight`) puts them together
with what its configuration and data say, shows one table, and the plan.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retool.checkpoint.hf import SafetensorsSource
from retool.checkpoint.source import match_names
from retool.config import Fault
from retool.memory import plan_layout
from retool.metrics import printable
from retool.model.config import ModelConfig, read_model_config
from retool.perf import GIB

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """How many processes there are, or would be on the box that is planned for."""

    processes: int
    nodes: int
    per_node: int


def attempt(where: str, action: Callable[[], T], faults: list[Fault], remedy: str = "") -> T | None:
    """`action()`, or None with its ValueError or OSError among the faults."""
    try:
        return action()
    except (ValueError, OSError) as error:
        faults.append(Fault(where, str(error), remedy))
        return None


def read_world(nnodes: int | None, per_node: int | None, planning: bool, environment: Mapping[str, str]) -> tuple[World, list[Fault]]:
    """The launcher's world. `planning` without a launcher: the box that the keys describe. Otherwise they must not contradict it."""
    launched = "WORLD_SIZE" in environment
    if planning and not launched:
        nodes, each = nnodes or 1, per_node or 1
        return World(nodes * each, nodes, each), []
    processes = int(environment.get("WORLD_SIZE", 1))
    each = int(environment.get("LOCAL_WORLD_SIZE", processes))
    nodes = int(environment.get("GROUP_WORLD_SIZE", max(1, processes // each)))
    faults = []
    for key, given, actual, flag in (
        ("trainer.nnodes", nnodes, nodes, "--nnodes"),
        ("trainer.n_gpus_per_node", per_node, each, "--nproc_per_node"),
    ):
        if given is not None and given != actual:
            said = f"the launcher started {actual}" if launched else f"there is no launcher, so it is {actual}"
            way_out = f"Use torchrun {flag}={given}, or leave the key out."
            faults.append(Fault(f"{key}={given}", f"contradicts the launcher: {said}.", way_out))
    return World(processes, nodes, each), faults


def check_mesh(processes: int, sp: int, fsdp_size: int, heads: int | None) -> Iterator[Fault]:
    """Sizes that must divide the number of processes, and heads that must be enough for the ranks of an sp group."""
    legal = [n for n in range(1, processes + 1) if processes % n == 0]
    fit = [n for n in legal if heads is None or n <= heads]
    key = f"ulysses_sequence_parallel_size={sp}"
    if processes % sp:
        yield Fault(key, f"does not fit {processes} processes: it must divide the world size.", f"Use {_choices(fit)}.")
    if heads is not None and sp > heads:
        yield Fault(key, f"exceeds the model's {heads} query heads: each rank needs one.", f"Use {_choices(fit)}.")
    if fsdp_size > 0 and processes % fsdp_size:
        problem = f"does not fit {processes} processes: it must divide the world size."
        yield Fault(f"model.fsdp_config.fsdp_size={fsdp_size}", problem, f"Use -1, {_choices(legal)}.")


def _choices(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check_device(device: str, per_node: int, attn: str, planning: bool) -> Iterator[Fault]:
    """A GPU for each process of this machine, and the attention kernels asked for."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not found and not planning:
        yield Fault("trainer.device=cuda", "this machine has no usable GPU.", "Use trainer.device=auto, or mend the driver.")
    if found and device != "cpu" and per_node > found and not planning:
        yield Fault(f"{per_node} processes on this machine", f"but {found} GPUs.", f"Start {found}: torchrun --nproc_per_node={found}.")
    if attn == "flash" and find_spec("flash_attn") is None:
        yield Fault("model.attn=flash", "needs the package flash-attn.", "pip install 'retool[flash]', or use model.attn=auto.")
    if attn not in ("auto", "reference") and not planning and (device == "cpu" or not found):
        yield Fault(f"model.attn={attn}", "needs a GPU.", "Use model.attn=auto.")


def check_model(folder: Path, key: str = "model.partial_pretrain") -> tuple[ModelConfig | None, list[Fault]]:
    """config.json and the weights of a model folder: every shard there, and every parameter with its shape."""
    where = f"{key}={folder}"
    if not folder.is_dir():
        return None, [Fault(where, "is not a folder.", "Give a Hugging Face model folder with config.json, tokenizer and safetensors.")]
    faults: list[Fault] = []
    config = attempt(where, lambda: _model_config(folder), faults)
    source = attempt(where, lambda: SafetensorsSource(folder), faults)
    if config is not None and source is not None:
        attempt(where, lambda: match_names(plan_layout(config, 1), source), faults)
    return config, faults


def _model_config(folder: Path) -> ModelConfig:
    try:
        return read_model_config(folder)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}. Fetch it again.") from error


def check_tokenizer(folder: Path, chat_template: str | None, key: str = "model.partial_pretrain") -> Iterator[Fault]:
    """The tokenizer's files and a chat template, the model's own or `chat_template` (a file, or hermes)."""
    where = f"{key}={folder}"
    if not folder.is_dir():
        return
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file() and not (folder / "vocab.json").is_file():
        yield Fault(where, "has no tokenizer (tokenizer.json, tokenizer.model or vocab.json).", "Copy the model's tokenizer files there.")
    if chat_template is not None:
        if chat_template != "hermes" and not Path(chat_template).is_file():
            yield Fault(f"data.chat_template={chat_template}", "no such file.", "Give a Jinja file, or hermes.")
        return
    settings = folder / "tokenizer_config.json"
    try:
        inside = settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (ValueError, AttributeError):
        yield Fault(str(settings), "isn't a JSON object.", "Fetch it again.")
        return
    if not inside and not any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        yield Fault(where, "has no chat template.", "Add data.chat_template=hermes, or a file of your own.")


def check_output(folder: Path, needed: float, key: str = "trainer.default_local_dir") -> Iterator[Fault]:
    """The output folder can be made and written, and its disk has room for `needed` bytes. Nothing is left behind."""
    existing, where = _existing(folder), f"{key}={folder}"
    if not existing.is_dir():
        yield Fault(where, f"{existing} is a file, not a folder.", f"Choose another {key}.")
        return
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Fault(where, f"can't be written: {error.strerror or error}.", f"Choose another {key}, or change the folder's permissions.")
        return
    free = free_bytes(folder)
    if free < needed:
        problem = f"needs {needed / GIB:.1f} GiB for a checkpoint, and its disk has {free / GIB:.1f} GiB free."
        yield Fault(where, problem, "Free space, choose another folder, or save less (trainer.checkpoint.save_contents).")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk where `folder` is, or would be made."""
    return shutil.disk_usage(_existing(folder)).free


def device_memory_gib(given: float | None, device: str) -> float | None:
    """GiB of one GPU: as given, else this machine's; None on the CPU."""
    if given is not None or device == "cpu" or not torch.cuda.is_available():
        return given
    return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0))).total_memory / GIB


def show_faults(faults: Sequence[Fault], console: Console) -> None:
    """Where, what, and the way out: one table on a terminal, a line each elsewhere. Values are shown as text, never as markup."""
    title = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}, nothing started"
    if not console.is_terminal:
        _print_lines([title, *(f"  {fault}" for fault in faults)], console)
        return
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading, style in (("where", "bold"), ("what is wrong", ""), ("the way out", "green")):
        table.add_column(heading, style=style, overflow="fold")
    for fault in faults:
        table.add_row(*(Text(printable(part)) for part in (fault.where, fault.problem, fault.remedy)))
    console.print(table)


def show_plan(plan: Sequence[tuple[str, str]], notes: Sequence[str], console: Console) -> None:
    """The plan in plain words, a line or two a topic; notes stand out."""
    if not console.is_terminal:
        lines = [f"{topic}: {line}" for topic, words in plan for line in words.splitlines()]
        _print_lines([*lines, *(f"note: {note}" for note in notes)], console)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for topic, words in plan:
        table.add_row(Text(printable(topic)), Text("\n".join(map(printable, words.splitlines()))))
    for note in notes:
        table.add_row(Text("note", style="yellow"), Text(printable(note), style="yellow"))
    console.print(table)


def _print_lines(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
