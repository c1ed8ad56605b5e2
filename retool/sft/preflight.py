"""Everything wrong with an SFT run before it starts, at once.

`preflight` reads configuration, file headers, every row (tokenised once, into the cache that the
run then uses), and of weights only what tells them apart; it needs no GPU and starts nothing.
`python -m retool.sft … --check` stops after it; with `trainer.n_gpus_per_node` and
`trainer.device_memory_gb` it plans for another box.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from retool.config import Fault, Parsed
from retool.data.__main__ import parser as audit_parser
from retool.data.cache import open_dataset
from retool.data.read.files import columns_of
from retool.data.read.library import Part
from retool.data.read.names import resolve_files
from retool.data.read.row_format import RowFormat
from retool.data.read.source import RowSource
from retool.data.read.user_function import load_function
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.data.tokenise import LengthLimit
from retool.metrics import missing_extras
from retool.perf import GIB
from retool.preflight.borrowed import check_longest
from retool.preflight.checks import check_run, notes_of
from retool.preflight.machine import check_host_memory
from retool.preflight.model_folder import check_ids, check_tokenizer, with_model, with_renderer
from retool.preflight.plan import attempt, gpu_memory, host_bytes
from retool.preflight.resume import check_checkpoint, find_checkpoint, template_date
from retool.preflight.training_memory import OUTSIDE, SLACK
from retool.preflight.world import Box, box_of, check_experts, read_world
from retool.sft.config import DataConfig, SFTConfig, contradictions
from retool.sft.identity import with_identity
from retool.sft.plan import SFTReport, Split, choose_for, remedies, why_unrecorded

# a predicted peak this many times the device's memory is a fault; a closer one only a note
HOPELESS_PEAK_SHARE = 1.25
Name = Literal["train", "val"]
Progress = Callable[[int], None]


def preflight(
    parsed: Parsed[SFTConfig],
    planning: bool = False,
    environment: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> SFTReport:
    """Check everything.

    Every rank may call it: one tokenises, the others wait and open the same files.

    `planning` (`--check`) allows another number of GPUs than are here; `environment` (default: the
    process's) says what the launcher started; `progress` is called with the number of rows read.
    """
    config = parsed.config
    faults = [
        *parsed.faults,
        *contradictions(parsed.config),
        *missing_extras(parsed.config.trainer.logger),
    ]
    launcher = os.environ if environment is None else environment
    box = box_of(config.trainer, planning, launcher)
    world, trouble = read_world(
        config.trainer.nnodes, config.trainer.n_gpus_per_node, planning, launcher
    )
    # Before the data is read: a run that goes on shows the date of the day on which it began.
    report = find_checkpoint(SFTReport(config, world, faults=tuple(faults + trouble)))
    report = with_model(report, config.model.partial_pretrain)
    report = _with_data(check_run(report, box, launcher), progress)
    # After the data: the longest sample decides what must fit.
    report = _with_memory(report, box)
    report = check_checkpoint(with_identity(report))
    if report.faults:
        return report
    return replace(
        report,
        notes=(*report.notes, *_notes(report), *notes_of(report, box, launcher, planning=planning)),
    )


# --- data ---


def _with_data(report: SFTReport, progress: Progress | None) -> SFTReport:
    """Check the data files, then read every row of those that are sound, if the tokenizer is."""
    config = report.config
    faults = list[Fault]()
    custom = config.data.custom_cls
    if custom.path is not None and custom.name is not None:
        load = partial(load_function, custom.path, custom.name)
        attempt("data.custom_cls", load, faults)
    train = _files(config, "train", faults)
    val = _files(config, "val", faults)
    report = report.blame(*faults)
    folder = report.folder
    if faults or folder is None or report.model is None:
        return report
    # transformers needs a model type that it can read to find the tokenizer
    if any(check_tokenizer(folder, config.data.chat_template, report.options.pretrained_key)):
        return report
    day = template_date(config.data.template_date, report.then)
    report, renderer = with_renderer(report, rendering_of(config, day))
    if renderer is None:
        return report
    report = _with_split(report, renderer, "train", train, progress)
    report = _with_split(report, renderer, "val", val, progress)
    report = report.blame(*_id_faults(report), *_padding_faults(report))
    report = report.blame(*check_longest(report.model, report.longest, "data.max_length"))
    return report.blame(*_batch_faults(report))


def _batch_faults(report: SFTReport) -> Iterator[Fault]:
    """A batch of more samples than there are."""
    wanted = report.config.data.train_batch_size
    samples = wanted if report.train is None else len(report.train.dataset)
    if samples < wanted:
        problem = f"is more than the {samples} training samples: an epoch has no full batch."
        yield Fault(f"data.train_batch_size={wanted}", problem, f"Use at most {samples}.")


def _padding_faults(report: SFTReport) -> Iterator[Fault]:
    """Padding that would change what the model computes: its rope goes by a document's length."""
    data = report.config.data
    model = report.model
    padded = not report.config.use_remove_padding
    if padded and model is not None and 0 < model.steady_length < data.max_length:
        problem = (
            f"pads samples to {data.max_length:,} tokens, and beyond {model.steady_length:,} this model "
            "turns all keys by other angles: padding would change what it computes."
        )
        yield Fault("use_remove_padding=false", problem, "Leave it out: samples are packed then.")


def _id_faults(report: SFTReport) -> Iterator[Fault]:
    """Samples with tokens that the model's embedding has no row for."""
    for key, split in (("data.train_files", report.train), ("data.val_files", report.val)):
        if split is None or report.model is None or split.said.highest_id < report.model.vocab:
            continue
        # Searched for only where there is one: it goes through every sample
        sample, token = split.dataset.find_id(report.model.vocab) or (0, split.said.highest_id)
        file, row = split.dataset.origin(sample)
        yield from check_ids(report, token, key, f"{split.files[file]}, row {row}")


def _files(config: SFTConfig, name: Name, faults: list[Fault]) -> list[str]:
    """The resolved files of data.train_files or data.val_files, with a fault for each that can't be
    used.
    """
    wanted = config.data.train_files if name == "train" else config.data.val_files or ()
    custom = config.data.custom_cls.path is not None
    form = row_format(config)
    part = part_of(config.data, name)
    found: list[str] = []
    for entry in wanted:
        where = f"data.{name}_files={entry}"
        files = attempt(where, partial(resolve_files, entry, custom, part), faults)
        for file in files or []:
            if not custom:
                # Only the columns: of a file in a form that nobody knows no row needs to be read.
                attempt(where, partial(_check_columns, form, file), faults)
            found.append(file)
    return found


def _check_columns(form: RowFormat, file: str) -> None:
    form.check(file, columns_of(file))


def part_of(data: DataConfig, name: Name) -> Part:
    """Which split and configuration are read, where a data set has several."""
    split = data.train_split if name == "train" else data.val_split
    return Part(split, data.name, f"data.{name}_split")


def row_format(config: SFTConfig) -> RowFormat:
    """Which columns make a conversation."""
    data = config.data
    multi = config.data.multiturn
    return RowFormat(
        multiturn=multi.enable,
        messages_key=multi.messages_key,
        tools_key=multi.tools_key,
        enable_thinking_key=multi.enable_thinking_key,
        prompt_key=data.prompt_key,
        response_key=data.response_key,
        format=data.format,
    )


def rendering_of(config: SFTConfig, day: str) -> Rendering:
    """How conversations become tokens; `day` is what the template shows where it asks for a date."""
    data = config.data
    return Rendering(
        chat_template=data.chat_template,
        template_kwargs=data.apply_chat_template_kwargs,
        template_date=day,
        drop_reasoning=data.drop_reasoning,
        reasoning_in_content=data.reasoning_in_content,
        history=data.multiturn.history,
        inline_outputs=data.multiturn.inline_outputs,
    )


def _with_split(
    report: SFTReport, renderer: Renderer, name: Name, files: list[str], progress: Progress | None
) -> SFTReport:
    if not files:
        return report
    split = _read(report.config, renderer, name, files, progress)
    if not isinstance(split, Split):
        return report.blame(*split)
    return replace(report, train=split) if name == "train" else replace(report, val=split)


def _read(
    config: SFTConfig, renderer: Renderer, name: Name, files: list[str], progress: Progress | None
) -> Split | list[Fault]:
    """Tokenise (or find tokenised) every row; a fault for each of the first rows that can't be
    used.
    """
    data = config.data
    rows = RowSource(
        files,
        row_format(config),
        function_file=data.custom_cls.path,
        function_name=data.custom_cls.name,
        max_rows=data.train_max_samples if name == "train" else data.val_max_samples,
    )
    try:
        dataset, said = open_dataset(
            rows,
            renderer,
            LengthLimit(data.max_length, data.truncation),
            num_workers=data.num_workers,
            cache_dir=data.cache_dir,
            progress=progress,
        )
    except (ValueError, OSError) as error:
        # The first line sums up, the others are refused rows: each becomes a fault of its own.
        first, *refused = str(error).splitlines()
        audit = f"{audit_command(config, files)} shows more."
        return [
            Fault(f"data.{name}_files", first, audit if refused else ""),
            *(Fault(f"data.{name}_files", row) for row in refused),
        ]
    return Split(tuple(files), dataset, said, tuple(rows.words()))


def audit_command(config: SFTConfig, files: Sequence[str]) -> str:
    """The audit of these files, as this run would read them."""
    data = config.data
    multi = config.data.multiturn
    given: dict[str, Any] = {
        "--model": config.model.partial_pretrain,
        "--max-length": data.max_length,
        "--history": multi.history,
        "--inline-outputs": multi.inline_outputs,
        "--chat-template": data.chat_template,
        "--template-date": data.template_date,
        "--template-kwargs": json.dumps(dict(data.apply_chat_template_kwargs)),
        "--format": data.format,
        "--messages-key": multi.messages_key,
        "--tools-key": multi.tools_key,
        "--enable-thinking-key": multi.enable_thinking_key,
        "--prompt-key": data.prompt_key,
        "--response-key": data.response_key,
        "--rows": f"{data.custom_cls.path}:{data.custom_cls.name}"
        if data.custom_cls.path
        else None,
    }
    # Compared with the audit's own defaults: a command to paste should hold no word that changes
    # nothing.
    usual = vars(audit_parser().parse_args(["audit", "FILE", "--model", ""])) | {
        "template_kwargs": "{}"
    }
    words = [
        word
        for flag, value in given.items()
        if value != usual[flag[2:].replace("-", "_")]
        for word in (flag, str(value))
    ]
    switches = {
        "--single-turn": not multi.enable,
        "--drop-reasoning": data.drop_reasoning,
        "--reasoning-in-content": data.reasoning_in_content,
    }
    words += [flag for flag, on in switches.items() if on]
    return shlex.join(["python", "-m", "retool.data", "audit", *files, *words])


# --- memory ---


def _with_memory(report: SFTReport, box: Box) -> SFTReport:
    """Choose batches and recomputation, and predict the memory, once there is a model and a layout
    that works.
    """
    config = report.config
    model = report.model
    sp = config.ulysses_sequence_parallel_size
    processes = report.world.processes
    if model is None or processes % sp or sp > model.heads:
        return report
    # Told by `check_run` already: such a layout has no memory to predict.
    if any(check_experts(report.options, processes, model)):
        return report
    choice = choose_for(report)
    report = replace(report, choice=choice)
    if choice.prediction.host and not box.elsewhere:
        report = report.blame(
            *check_host_memory(
                host_bytes(report),
                f"model.activation_offload={config.model.activation_offload}".lower(),
            )
        )
    memory = gpu_memory(report.options)
    if memory is None or choice.prediction.peak <= HOPELESS_PEAK_SHARE * memory * GIB:
        return report
    problem = (
        f"the predicted peak is {choice.prediction.peak / GIB:.1f} GiB, and a GPU has {memory:.1f}."
    )
    return report.blame(Fault("memory", problem, remedies(report)))


def _notes(report: SFTReport) -> Iterator[str]:
    """What is allowed but probably not meant."""
    config = report.config
    model = report.model
    choice = report.choice
    memory = gpu_memory(report.options)
    assert model is not None and choice is not None
    data = config.data
    dp = report.world.processes // config.ulysses_sequence_parallel_size
    if report.val is None and config.trainer.test_freq != -1:
        yield f"trainer.test_freq={config.trainer.test_freq} does nothing without data.val_files."
    files = [set(split.files) for split in (report.train, report.val) if split is not None]
    both = set.intersection(*files) if len(files) == 2 else ()
    if both:
        yield (
            f"{min(both)} is in data.train_files and in data.val_files: val/loss is of rows that are "
            "trained."
        )
    if data.train_batch_size < dp:
        yield (
            f"data.train_batch_size={data.train_batch_size} leaves {dp - data.train_batch_size} of {dp} "
            "data-parallel groups idle."
        )
    if 0 < model.max_position < report.longest:
        yield (
            f"samples have up to {report.longest} tokens, more than the {model.max_position} positions "
            "that the model was made for."
        )
    if memory is not None and choice.fits is False:
        need = (choice.prediction.peak * SLACK + OUTSIDE) / GIB
        yield f"{need:.1f} GiB with what CUDA itself takes may not fit in {memory:.1f}. {remedies(report)}"
    if data.micro_batch_size_per_gpu is not None and data.max_token_len_per_gpu is not None:
        yield "data.micro_batch_size_per_gpu is set, so data.max_token_len_per_gpu isn't used."
    if data.record_micro_batches is True and (why := why_unrecorded(report)):
        yield f"data.record_micro_batches=true records nothing: {why}."
