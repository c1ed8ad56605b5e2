"""What must be the same on all ranks of a run: settings, model, data, code.

[Note: silent differences] Every rank reads the configuration, the model and the data by itself. With
another learning rate, another copy of a model or another order of samples on one of them a run would
go on, and train something that nobody asked for. So before it begins all ranks compare.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from retool.checkpoint.format.folder import model_folder, recorded_files
from retool.preflight.identity import digest, flat, shown
from retool.preflight.plan import RunReport
from retool.preflight.ranks.alike import Shared
from retool.preflight.versions import OWN_CODE, versions

# Of these keys a machine may have values of its own. What is behind a path is compared by its
# content: see `Identity` and `RunReport.fingerprints`. Rank 0 alone logs.
OWN_VALUE = re.compile(
    r".*(path|_files|_dir|_workers|\.urls|base_url|key_variable)"
    r"|data\.(format|chat_template)|model\.partial_pretrain|algorithm\.adv_estimator"
    r"|reward_model\.(functions|judge\.(prompt|cache))|trainer\.(nnodes|n_gpus_per_node|device_memory_gb)"
    r"|trainer\.(logger|project_name|experiment_name)"
    r"|actor_rollout_ref\.(actor\.policy_loss\.loss_mode|rollout\.multi_turn\.(tools|format))"
)
# What decides how text becomes tokens, and tokens text
TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template).*|.*\.(model|tiktoken|py)"
)
DECIDING = ("python", "retool", OWN_CODE, "torch", "transformers", "tokenizers")
SAME_COMMAND = "Start the same command on all machines, in the same environment."
SAME_FILES = "Every machine needs the same files, and the same versions of the packages."
SAME_PACKAGES = "Install the same everywhere."


def shared_by_all(report: RunReport) -> tuple[Shared, ...]:
    """What this rank must have in common with the others, as far as preflight could find it out."""
    return (
        *_settings(report),
        *_content(report),
        *_tokenizer(report),
        *_checkpoint(report),
        *_packages(report),
    )


def _settings(report: RunReport) -> Iterator[Shared]:
    entries: dict[str, list[str]] = {}
    for key, value in flat(report.config).items():
        parent, _, name = key.rpartition(".")
        if value == {}:
            entries.setdefault(key, [])
        elif parent:
            entries.setdefault(parent, []).append(name)
        # A date is set once the template was read, which a fault may have come before
        unknown = key == "data.template_date" and bool(report.faults)
        if not unknown and not OWN_VALUE.fullmatch(key):
            yield Shared(key, "", shown(value), SAME_COMMAND)
    # An entry that one rank alone has, of arguments for a template, say, is compared with nothing
    for key, names in entries.items():
        if not OWN_VALUE.fullmatch(key):
            yield Shared(key, "its entries", ", ".join(sorted(names)) or "none", SAME_COMMAND)


def _content(report: RunReport) -> Iterator[Shared]:
    """Rows, and what else makes the run this run."""
    rows = report.fingerprints
    for key, (count, content) in rows.items():
        # None, because there are none or because they couldn't be read: then a fault says so
        if count or not report.faults:
            yield Shared(key, "", f"{count} rows of content {content[:12]}", SAME_FILES)
    keys = flat(report.config)
    for name, trait in report.identity.items():
        compared = trait.where in keys and not OWN_VALUE.fullmatch(trait.where)
        value = shown(trait.value)
        # The address of an object says nothing
        if not compared and trait.where not in rows and " at 0x" not in value:
            yield Shared(trait.where, name, value, SAME_FILES)


def _tokenizer(report: RunReport) -> Iterator[Shared]:
    """The tokenizer's files and the chat template: turns that come later aren't in any prompt."""
    if report.folder is None:
        return
    parts = list[str | bytes]()
    for path in sorted(report.folder.iterdir()):
        if TOKENIZER.fullmatch(path.name) and path.is_file() and os.access(path, os.R_OK):
            parts += (path.name, path.read_bytes())
    yield Shared(report.options.pretrained_key, "the tokenizer's files", digest(*parts), SAME_FILES)
    given = report.options.chat_template
    if given is not None:
        value = digest(Path(given).read_bytes()) if os.path.isfile(given) else given
        yield Shared("data.chat_template", "its content", value, SAME_FILES)


def _checkpoint(report: RunReport) -> Iterator[Shared]:
    """The checkpoint to go on from, by what is recorded of its files.

    Not where it is the newest in the run's folder: that is one folder for all, whose listing may
    be late on some.
    """
    trainer = report.options.trainer
    if trainer.resume_mode == "auto" and report.options.saves:
        return
    value = "none"
    if report.resume is not None:
        files = recorded_files(model_folder(report.resume))
        value = f"{report.resume.name} ({digest(repr(sorted(files.items())))})"
    yield Shared("trainer.resume_from_path", "the checkpoint", value, SAME_FILES)


def _packages(report: RunReport) -> Iterator[Shared]:
    """What computes, where machines may have installations of their own."""
    if report.world.nodes < 2:
        return
    found = versions()
    found["python"] = found["python"].rpartition(".")[0]  # a patch changes no number
    for name in DECIDING:
        yield Shared("packages", name, found[name] or "none", SAME_PACKAGES)
