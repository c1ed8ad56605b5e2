"""The model that a run begins with: its configuration, its weights, its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from retool.checkpoint.flat.fill import match_names, require_tied
from retool.checkpoint.format.tracker import checkpoints
from retool.checkpoint.hf.side_files import MORE_TEMPLATES
from retool.checkpoint.hf.weights import SafetensorsSource
from retool.config import Fault
from retool.data.render.renderer import Renderer, make_renderer
from retool.data.render.rendering import Rendering
from retool.data.tokens.load import load_tokenizer, other_tokens
from retool.model.borrowed.config import Implementation
from retool.model.borrowed.read import read_any_config
from retool.model.build import plan_layout
from retool.model.config import ModelConfig
from retool.model.hub import MAX_JSON_BYTES, eos_ids, find_model, read_json_object
from retool.preflight.plan import RunReport, attempt, not_allowed
from retool.preflight.resume import export_of

R = TypeVar("R", bound=RunReport)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them is one
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def with_model(report: R, name: str) -> R:
    """The report with the model's folder and configuration, and what is wrong with its weights and
    tokenizer.
    """
    key = report.options.pretrained_key
    template = report.options.chat_template
    faults = list[Fault]()
    folder = attempt(key, lambda: find_model(name), faults) if name else None
    if folder is None:
        return report.blame(*faults)
    model, faults = check_model(folder, key, report.options.model.impl)
    faults += check_tokenizer(folder, template, key)
    return replace(report.blame(*faults), folder=folder, model=model)


def check_model(
    folder: Path, key: str, impl: Implementation
) -> tuple[ModelConfig | None, list[Fault]]:
    """The configuration of a model folder, and its faults: every shard is looked at, and every
    parameter's shape.
    """
    where = f"{key}={folder}"
    if not folder.is_dir():
        way_out = "Give a Hugging Face model folder with config.json, tokenizer and safetensors."
        return None, [Fault(where, "is not a folder.", way_out)]
    if not os.access(folder, os.R_OK | os.X_OK):
        return None, [not_allowed(where, "it")]
    has_config = (folder / "config.json").is_file()
    # A common slip: the run's folder in the place of the model in it.
    newest = None if has_config else next(checkpoints(folder), None)
    if newest is not None:
        export = export_of(newest[1])
        given = str(export)
        if export is None:
            given = f"{newest[1]}, once merged (python -m retool.checkpoint merge)"
        way_out = f"Give the model of its newest checkpoint: {given}."
        return None, [Fault(where, "is a run's folder, not a model's.", way_out)]

    faults = list[Fault]()
    config = attempt(where, lambda: read_any_config(folder, impl), faults)
    if not has_config:
        return None, faults  # it says where the model is: missing weights are no news then
    source = attempt(where, lambda: SafetensorsSource(folder), faults)
    if config is not None and source is not None:
        layout = plan_layout(config, 1)
        attempt(where, lambda: match_names(layout, source), faults)
        attempt(where, lambda: require_tied(layout, source), faults)
    return config, faults


def with_renderer(report: R, rendering: Rendering) -> tuple[R, Renderer | None]:
    """The report with what the tokenizer and the chat template tell, and the renderer; None where they
    can't be used.

    The model's folder must be there. Only where `check_tokenizer` found no fault can transformers load
    what is in it.
    """
    key = report.options.pretrained_key
    folder = report.folder
    assert folder is not None
    faults = list[Fault]()

    def make() -> Renderer:
        tokenizer = load_tokenizer(str(folder), report.options.model.trust_remote_code)
        return make_renderer(tokenizer, rendering)

    renderer = attempt(key, make, faults)
    # A checkpoint's export says anew what ends a text
    attempt(key, lambda: eos_ids(folder), faults)
    report = report.blame(*faults)
    if renderer is None:
        return report, None
    # The date becomes part of the configuration: a checkpoint must tell it to the run that goes on
    if renderer.shows_date:
        data = replace(report.config.data, template_date=rendering.template_date)
        report = replace(report, config=replace(report.config, data=data))
    notes = (*report.notes, *other_tokens(renderer.tokenizer, folder))
    return replace(report, turn_ends=renderer.end_of_turn_ids, notes=notes), renderer


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


def check_tokenizer(folder: Path, chat_template: str | None, key: str) -> Iterator[Fault]:
    """Faults of the tokenizer's files, and of the chat template.

    That is the model's own, or `chat_template`: a file, or hermes.
    """
    where = f"{key}={folder}"
    if not os.access(folder, os.R_OK | os.X_OK) or not (folder / "config.json").is_file():
        return
    if not any((folder / name).is_file() for name in TOKENIZERS):
        problem = "has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)."
        yield Fault(where, problem, "Copy the model's tokenizer files there.")

    # `os.path` says no to a text that can't be a path, such as the template itself; Path.is_file raises
    files = [path for path in tokenizer_files(folder, chat_template) if os.path.isfile(path)]
    closed = [path for path in files if not os.access(path, os.R_OK)]
    yield from (not_allowed(where, path.name) for path in closed)
    huge = [path for path in files if path.stat().st_size > MAX_JSON_BYTES]
    for path in huge:
        problem = f"has {path.stat().st_size:,} bytes: that is no file of a tokenizer."
        yield Fault(str(path), problem, "Fetch it again.")
    if huge or closed:
        return
    if chat_template is None:
        yield from _check_own_template(folder, where)
    elif chat_template != "hermes" and not os.path.isfile(chat_template):
        given = f"data.chat_template={chat_template}"
        yield Fault(given, "no such file.", "Give a Jinja file, or hermes.")


def _check_own_template(folder: Path, where: str) -> Iterator[Fault]:
    """A fault unless the tokenizer's settings, or a file beside them, hold a chat template."""
    settings = folder / "tokenizer_config.json"
    try:
        inside = settings.is_file() and bool(read_json_object(settings).get("chat_template"))
    except ValueError:
        yield Fault(str(settings), "isn't a JSON object.", "Fetch it again.")
        return
    if not inside and not any((folder / name).is_file() for name in TEMPLATES):
        way_out = "Add data.chat_template=hermes, or a file of your own."
        yield Fault(where, "has no chat template.", way_out)


def check_ids(report: RunReport, highest: int, where: str, found: str) -> Iterator[Fault]:
    """A fault unless the embedding has a row for every token id up to `highest`; `found` says where
    that one is.
    """
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
