"""What can be known to be wrong before anything heavy: processes, devices, model folder, tokenizer,
weights, output folder, resume.

Each check returns every fault it finds and raises none. `check_run` and `notes_of` are what every
command asks; its own preflight (`retool.sft.preflight`) adds what its configuration and data say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from retool.checkpoint.flat.fill import match_names, require_tied
from retool.checkpoint.format.tracker import STEP, checkpoints
from retool.checkpoint.hf.side_files import MORE_TEMPLATES
from retool.checkpoint.hf.weights import SafetensorsSource
from retool.config import Fault
from retool.config.options import RunOptions, TrainerConfig, resume_notes
from retool.files.lock import in_use
from retool.model.attention.dispatch import choose_backend, why_not
from retool.model.build import DTYPES, plan_layout
from retool.model.config import ModelConfig
from retool.model.families.read import read_model_config
from retool.model.hub import MAX_JSON_BYTES, find_model, read_json
from retool.perf import GIB
from retool.preflight.machine import (
    DEFAULT_PORT,
    check_compiler,
    check_host_memory,
    check_output,
    check_port,
    check_store,
    free_bytes,
    gpu_notes,
    port_is_free,
)
from retool.preflight.plan import (
    RunReport,
    World,
    checkpoint_bytes,
    host_bytes,
    kept_checkpoints,
    setting_of,
)
from retool.preflight.resume import export_of

T = TypeVar("T")
R = TypeVar("R", bound=RunReport)


def attempt(where: str, action: Callable[[], T], faults: list[Fault], remedy: str = "") -> T | None:
    """`action()`, or None with its ValueError or OSError among the faults."""
    try:
        return action()
    except (ValueError, OSError) as error:
        faults.append(Fault(where, str(error), remedy))
        return None


@dataclass(frozen=True)
class Box:
    """The machine that is checked: this one, or (`elsewhere`) another that `--check` plans for, as
    its keys describe it. `memory` is GiB of a GPU, where a key says it.
    """

    elsewhere: bool = False
    memory: float | None = None


def box_of(trainer: TrainerConfig, planning: bool, environment: Mapping[str, str]) -> Box:
    """`planning` (--check) without a launcher is for another box where some key says what that has."""
    described = any(
        value is not None
        for value in (trainer.nnodes, trainer.n_gpus_per_node, trainer.device_memory_gb)
    )
    elsewhere = planning and described and "WORLD_SIZE" not in environment
    return Box(elsewhere, trainer.device_memory_gb)


def read_world(
    nnodes: int | None, per_node: int | None, planning: bool, environment: Mapping[str, str]
) -> tuple[World, list[Fault]]:
    """The launcher's world. `planning` without a launcher: the box that the keys describe.

    Otherwise they must not contradict it.
    """
    launched = "WORLD_SIZE" in environment
    if planning and not launched:
        nodes = nnodes or 1
        each = per_node or 1
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
            said = (
                f"the launcher started {actual}"
                if launched
                else f"there is no launcher, so it is {actual}"
            )
            way_out = f"Use torchrun {flag}={given}, or leave the key out."
            faults.append(Fault(f"{key}={given}", f"contradicts the launcher: {said}.", way_out))
    return World(processes, nodes, each), faults


def check_mesh(options: RunOptions, processes: int, heads: int | None) -> Iterator[Fault]:
    """Sizes that must divide the number of processes, and heads that must be enough for the ranks
    of an sp group.
    """
    sp = options.sp
    fsdp_size = options.fsdp.fsdp_size
    legal = [n for n in range(1, processes + 1) if processes % n == 0]
    yield from check_heads(f"{options.sp_key}={sp}", sp, processes, heads)
    if fsdp_size > 0 and processes % fsdp_size:
        problem = f"does not fit {processes} processes: it must divide the world size."
        yield Fault(
            f"{options.fsdp_key}fsdp_size={fsdp_size}", problem, f"Use -1, {_choices(legal)}."
        )


def check_heads(where: str, size: int, processes: int, heads: int | None) -> Iterator[Fault]:
    """A group of `size` ranks that share the attention heads divides the processes, and has a query
    head for each rank.
    """
    fit = [
        n for n in range(1, processes + 1) if processes % n == 0 and (heads is None or n <= heads)
    ]
    if processes % size:
        count = f"{processes} process{'es' if processes > 1 else ''}"
        start = (
            f", or start {size}: torchrun --nproc_per_node={size} (to plan only: "
            f"trainer.n_gpus_per_node={size} --check)"
        )
        way_out = f"Use {_choices(fit)}{start if processes == 1 else ''}."
        yield Fault(where, f"does not fit {count}: it must divide the world size.", way_out)
    if heads is not None and size > heads:
        yield Fault(
            where,
            f"exceeds the model's {heads} query heads: each rank needs one.",
            f"Use {_choices(fit)}.",
        )


def _choices(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check_device(device: str, per_node: int, box: Box) -> Iterator[Fault]:
    """A GPU for each process of this machine, or GPUs that can be planned for."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not found and (box.memory is None or not box.elsewhere):
        remedy = (
            "Use trainer.device=auto, or mend the driver; to plan for GPUs elsewhere, add --check "
            "trainer.device_memory_gb=80."
        )
        yield Fault("trainer.device=cuda", "this machine has no usable GPU.", remedy)
    if not found or device == "cpu" or box.elsewhere:
        return
    if per_node > found:
        yield Fault(
            f"{per_node} processes on this machine",
            f"but {found} GPUs.",
            f"Start {found}: torchrun --nproc_per_node={found}.",
        )
    here = torch.cuda.get_device_properties(0).total_memory / GIB
    if box.memory is not None and box.memory > here:
        problem = f"this machine's GPU has {here:.1f} GiB, and the run would be planned for more."
        yield Fault(
            f"trainer.device_memory_gb={box.memory:g}",
            problem,
            "Leave it out: it is for --check, to plan for another box.",
        )


def check_attention(options: RunOptions, head_dim: int, box: Box) -> Iterator[Fault]:
    """The attention kernel asked for is installed, and computes with this dtype and head size on
    this device: it is tried where it is.
    """
    attn = options.model.attn
    asked = options.fsdp.param_dtype
    device = options.trainer.device
    if attn in ("auto", "reference"):
        return
    on_gpu = device != "cpu" and (box.elsewhere or torch.cuda.is_available())
    where = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if on_gpu
        else torch.device("cpu")
    )
    dtype = DTYPES["bf16" if asked == "auto" else asked]
    reason = why_not(attn, where, dtype, head_dim, there=not box.elsewhere)
    if not reason and not box.elsewhere:
        try:
            choose_backend(where, dtype, head_dim, attn)
        except ValueError as error:
            reason = str(error).removesuffix(".")
    if reason:
        other = (
            f", or {options.fsdp_key}param_dtype=bf16"
            if on_gpu and asked not in ("auto", "bf16")
            else ""
        )
        yield Fault(
            f"{options.model_key}attn={attn}",
            f"{reason}.",
            f"Use {options.model_key}attn=auto{other}.",
        )


def check_model(
    folder: Path, key: str = "model.partial_pretrain"
) -> tuple[ModelConfig | None, list[Fault]]:
    """config.json and the weights of a model folder: every shard there, and every parameter with
    its shape.
    """
    where = f"{key}={folder}"
    if not folder.is_dir():
        return None, [
            Fault(
                where,
                "is not a folder.",
                "Give a Hugging Face model folder with config.json, tokenizer and safetensors.",
            )
        ]
    faults: list[Fault] = []
    if (
        not (folder / "config.json").is_file()
        and (newest := next(checkpoints(folder), None)) is not None
    ):
        export = export_of(newest[1])
        given = (
            f"{newest[1]}, once merged (python -m retool.checkpoint merge)"
            if export is None
            else str(export)
        )
        return None, [
            Fault(
                where,
                "is a run's folder, not a model's.",
                f"Give the model of its newest checkpoint: {given}.",
            )
        ]
    config = attempt(where, lambda: read_model_config(folder), faults)
    if not (folder / "config.json").is_file():
        # Which says where the model is: that a tokenizer isn't there either is no news
        return (
            None,
            faults,
        )
    source = attempt(where, lambda: SafetensorsSource(folder), faults)
    if config is not None and source is not None:
        layout = plan_layout(config, 1)
        attempt(where, lambda: match_names(layout, source), faults)
        attempt(where, lambda: require_tied(layout, source), faults)
    return config, faults


def tokenizer_files(folder: Path, chat_template: str | None) -> Iterator[Path]:
    """What is read to load a tokenizer: its files, and its templates or `chat_template`."""
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    )
    yield from (
        folder / name
        for name in (*names, "tokenizer.model", "chat_template.jinja", "chat_template.json")
    )
    yield from sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    if chat_template is not None and chat_template != "hermes":
        yield Path(chat_template)


def check_tokenizer(
    folder: Path, chat_template: str | None, key: str = "model.partial_pretrain"
) -> Iterator[Fault]:
    """The tokenizer's files and a chat template, the model's own or `chat_template` (a file, or
    hermes).
    """
    where = f"{key}={folder}"
    if not (folder / "config.json").is_file():
        return
    if (
        not (folder / "tokenizer.json").is_file()
        and not (folder / "tokenizer.model").is_file()
        and not (folder / "vocab.json").is_file()
    ):
        yield Fault(
            where,
            "has no tokenizer (tokenizer.json, tokenizer.model or vocab.json).",
            "Copy the model's tokenizer files there.",
        )
    if huge := [
        path
        for path in tokenizer_files(folder, chat_template)
        if path.is_file() and path.stat().st_size > MAX_JSON_BYTES
    ]:
        for path in huge:
            yield Fault(
                str(path),
                f"has {path.stat().st_size:,} bytes: that is no file of a tokenizer.",
                "Fetch it again.",
            )
        return
    if chat_template is not None:
        if chat_template != "hermes" and not Path(chat_template).is_file():
            yield Fault(
                f"data.chat_template={chat_template}",
                "no such file.",
                "Give a Jinja file, or hermes.",
            )
        return
    settings = folder / "tokenizer_config.json"
    try:
        inside = settings.is_file() and bool(read_json(settings).get("chat_template"))
    except ValueError:
        yield Fault(str(settings), "isn't a JSON object.", "Fetch it again.")
        return
    if not inside and not any(
        (folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")
    ):
        yield Fault(
            where, "has no chat template.", "Add data.chat_template=hermes, or a file of your own."
        )


# --- what every command asks ---


def with_model(report: R, name: str, key: str, chat_template: str | None) -> R:
    """With the model's folder and configuration, and what is wrong with its weights and tokenizer."""
    faults = list[Fault]()
    folder = attempt(key, lambda: find_model(name), faults) if name else None
    if folder is None:
        return report.blame(*faults)
    model, faults = check_model(folder, key)
    return replace(
        report.blame(*faults, *check_tokenizer(folder, chat_template, key)),
        folder=folder,
        model=model,
    )


def check_run(report: R, box: Box, environment: Mapping[str, str], saves: bool = True) -> R:
    """With every fault of sizes, devices, this machine and the run's folder; `report.model` may be
    missing.
    """
    options = report.options
    model = report.model
    world = report.world
    found = [*check_mesh(options, world.processes, model.heads if model else None)]
    found += check_device(options.trainer.device, world.per_node, box)
    found += check_attention(options, model.head_dim if model else 64, box)
    if not box.elsewhere:
        found += check_port(environment)
        compiles = options.model.use_compile
        found += check_compiler(
            False if compiles == "auto" and options.trainer.device == "cpu" else compiles,
            options.model_key,
        )
    found += check_output(
        Path(options.trainer.default_local_dir), checkpoint_bytes(report) if saves else 0.0
    )
    found += check_run_folder(Path(options.trainer.default_local_dir))
    found += check_store(options.trainer.default_hdfs_dir, "trainer.default_hdfs_dir")
    if model is not None and not box.elsewhere:
        offloads = [
            name for name in ("param_offload", "optimizer_offload") if getattr(options.fsdp, name)
        ]
        found += check_host_memory(
            host_bytes(report), " ".join(f"{options.fsdp_key}{name}=true" for name in offloads)
        )
    return report.blame(*found)


def check_run_folder(folder: Path) -> Iterator[Fault]:
    """The run's folder is no model's and no checkpoint: a run would write among their files."""
    where = f"trainer.default_local_dir={folder}"
    another = "Choose another trainer.default_local_dir"
    if STEP.fullmatch(folder.name) and folder.is_dir():
        yield Fault(
            where,
            "is a checkpoint, not a run's folder.",
            f"{another}; to go on from it, {folder.parent}.",
        )
    elif (folder / "config.json").is_file():
        yield Fault(where, "is a model's folder: a run would write among its files.", f"{another}.")


def check_ids(report: RunReport, highest: int, where: str, found: str) -> Iterator[Fault]:
    """The embedding has a row for every token id up to `highest`; `found` says where that one is."""
    if report.model is not None and highest >= report.model.vocab:
        problem = (
            f"{found} has token id {highest:,}, and the model's embedding has {report.model.vocab:,} "
            "rows."
        )
        remedy = (
            "The tokenizer isn't this model's, or tokens were added to it and not to the model: "
            "use the model's own tokenizer, or resize the embedding (transformers: "
            "model.resize_token_embeddings(len(tokenizer))) and save both."
        )
        yield Fault(where, problem, remedy)


def notes_of(
    report: RunReport,
    box: Box,
    environment: Mapping[str, str],
    *,
    planning: bool,
    saves: bool = True,
) -> Iterator[str]:
    """What is allowed but probably not meant, and what this machine may run out of later, or shares
    with somebody.
    """
    options = report.options
    trainer = report.options.trainer
    if saves and report.step_then >= report.steps:
        more = (
            "raise trainer.total_epochs or trainer.total_training_steps to train on, or start anew with "
            "trainer.resume_mode=disable"
        )
        yield f"nothing is left to train: step {report.step_then:,} of {report.steps:,} is done; {more}."
    if isinstance(trainer.save_freq, int) and trainer.save_freq > report.steps:
        yield (
            f"trainer.save_freq={trainer.save_freq} is more than the {report.steps} steps: only the last "
            "is saved."
        )
    yield from resume_notes(options)
    if (
        trainer.resume_mode == "disable"
        and saves
        and (old := next(checkpoints(Path(trainer.default_local_dir)), None))
    ):
        yield (
            f"trainer.resume_mode=disable: {old[1]} and what else that run wrote are moved to a folder "
            "previous_N there."
        )
    each = checkpoint_bytes(report)
    kept = kept_checkpoints(report)
    free = free_bytes(Path(trainer.default_local_dir))
    if kept > 1 and each * kept > free:
        fit = max(1, int(free // each) - 1)
        yield (
            f"{kept} checkpoints of {each / GIB:.1f} GiB need more than the {free / GIB:.1f} GiB "
            f"that are free in {trainer.default_local_dir}: add trainer.max_ckpt_to_keep={fit}."
        )
    if planning and in_use(Path(trainer.default_local_dir)):
        yield (
            f"another run is writing in {trainer.default_local_dir} now: this one would wait for ten "
            "seconds and then be refused."
        )
    if box.elsewhere:
        if report.world.processes > 1 and not port_is_free(DEFAULT_PORT):
            yield (
                f"port {DEFAULT_PORT}, torchrun's own choice, is taken here: start with torchrun "
                "--standalone, or --master_port."
            )
    elif trainer.device != "cpu":
        yield from gpu_notes(
            report.world.per_node, setting_of(options, report.world).compute, environment
        )
