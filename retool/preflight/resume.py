"""Resuming from a checkpoint: which one, whether it can be loaded, and whether it belongs to this
run.

No weights are read: `retool.run.resume` loads. Preflight asks first (`find_checkpoint`,
`check_checkpoint`), for `--check` and for the run alike. The run asks again only where it takes
another one after all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from retool import checkpoint
from retool.checkpoint.flat.fill import match_names
from retool.checkpoint.format.folder import DATA, model_folder
from retool.checkpoint.format.tracker import STEP, TRACKER, candidates, checkpoints
from retool.checkpoint.resume import problems
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.shards.states import data_state, extra_state
from retool.config import Fault
from retool.config.options import RunOptions
from retool.data.template.dates import today
from retool.model.build import plan_layout
from retool.model.config import ModelConfig
from retool.preflight.identity import Change, changed_keys, changes, flat, shown
from retool.preflight.machine import may_look_into
from retool.preflight.plan import RunReport, attempt

R = TypeVar("R", bound=RunReport)


def find_checkpoint(report: R) -> R:
    """The report with the checkpoint that `trainer.resume_mode` names, and what that knows of the
    run that wrote it. Only small files are read.
    """
    trainer = report.options.trainer
    root = Path(trainer.default_local_dir)
    if trainer.resume_mode == "disable":
        return report
    if trainer.resume_mode == "resume_path":
        given = trainer.resume_from_path
        faults = list[Fault]()
        found = (
            attempt(_where(report.options), lambda: _given(Path(given)), faults) if given else None
        )
        report = report.blame(*faults)
    elif not may_look_into(root):  # told with what else the run's folder must allow
        found = None
    else:
        found = checkpoint.latest(root, trainer.resume_fallback)
        if found is None and any(checkpoints(root)):
            return report.blame(_nothing_whole(report.options, root))
    return with_checkpoint(report, found)


def _nothing_whole(options: RunOptions, root: Path) -> Fault:
    """The fault where there are checkpoints and none can be used: to begin anew beside them would
    silently lose them.
    """
    reasons = "; ".join(
        f"{folder.name}: {' and '.join(problems(folder)[:2])}"
        # Three will do to see what is wrong with all
        for folder in candidates(root, say=False)[:3]
    )
    problem = (
        "holds checkpoints, but none to go on from "
        f"({reasons or f'{TRACKER} names a step before all of them'})."
    )
    older = "Resume from an older one: trainer.resume_mode=resume_path trainer.resume_from_path=…"
    anew = "or begin anew: trainer.resume_mode=disable (what is there is moved aside)"
    return Fault(_where(options), problem, f"{older}; {anew}.")


def with_checkpoint(report: R, found: Path | None) -> R:
    """The report with `found` as the checkpoint to resume from, and a fault if it isn't a complete
    one.
    """
    if found is None:
        return replace(report, resume=None, then={})
    trouble = list(_incomplete(report.options, found))
    then: Mapping[str, Any] = {}
    if not trouble:
        try:
            then = record_in(data_state(found))
        except ValueError as error:
            trouble = [
                Fault(
                    _where(report.options),
                    str(error),
                    "Resume from an older one (trainer.resume_from_path).",
                )
            ]
    return replace(report.blame(*trouble), resume=found, then=then)


def check_checkpoint(report: R) -> R:
    """The report with everything that keeps the run from resuming its checkpoint, and notes of what
    has changed since.

    Ask when everything else is known: what preflight couldn't read isn't compared.
    """
    found = report.resume
    then = report.then
    where = _where(report.options)
    if found is None or any(fault.where == where for fault in report.faults):
        return report
    if then.get("command", report.options.command) != report.options.command:
        problem = (
            f"{found} was saved by python -m {then['command']}: its steps aren't those of "
            f"{report.options.command}."
        )
        return report.blame(
            Fault(where, problem, f"To train on from its weights, {_anew(report.options, found)}.")
        )
    if report.options.command == "retool.rl" and not then:
        problem = f"{found} wasn't saved by retool.rl, so nothing says which questions come next."
        return report.blame(
            Fault(where, problem, f"To train on from its weights, {_anew(report.options, found)}.")
        )
    # A key that is wrong by itself is no news twice
    known = {fault.where.partition("=")[0] for fault in report.faults}
    other = [
        change
        for change in changes(then.get("identity", {}), report.identity)
        if change.where not in known
    ]
    asked = report.options.trainer.resume_mode == "resume_path"
    # Who names a checkpoint means that one: only what would make its state meaningless is refused
    # then.
    refused = [change for change in other if change.strict or not asked]
    trouble = [_refusal(report, found, change) for change in refused]
    if report.model is not None and not any(
        change.where == report.options.pretrained_key for change in refused
    ):
        trouble += _unloadable(report.options, found, report.model)
    notes = [
        f"{change.where}: {found} is of another run ({change.words}); it goes on all the same."
        for change in other
    ]
    told = [] if trouble else [*notes, *changed_keys(then.get("config", {}), flat(report.config))]
    return replace(report.blame(*trouble), notes=(*report.notes, *told))


def template_date(given: str | None, then: Mapping[str, Any]) -> str:
    """The date that a chat template is given for today's: the one asked for, else that of the run
    that goes on, else today's.
    """
    return given or then.get("config", {}).get("data.template_date") or today()


def record_in(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint's data state says of the run that wrote it: empty for another program's."""
    if "run" in state:
        return state["run"]
    # Before checkpoints kept more
    older = {
        "stream": "retool.rl",
        "train_batch_size": "retool.sft",
    }
    return next(({"command": command} for key, command in older.items() if key in state), {})


def _given(path: Path) -> Path:
    """The checkpoint that the user named: actor/ in it means the whole."""
    return path.parent if path.name == "actor" and (path.parent / DATA).is_file() else path


def _where(options: RunOptions) -> str:
    trainer = options.trainer
    if trainer.resume_mode == "resume_path":
        return f"trainer.resume_from_path={trainer.resume_from_path}"
    return f"trainer.default_local_dir={trainer.default_local_dir}"


def _incomplete(options: RunOptions, found: Path) -> Iterator[Fault]:
    """Faults of a path that is no folder, no checkpoint, or a checkpoint without what training
    needs to go on.
    """
    where = _where(options)
    folder = model_folder(found)
    if not found.is_dir():
        yield Fault(
            where, "is not a folder.", _instead(found, Path(options.trainer.default_local_dir))
        )
        return
    missing = [
        kind
        for kind in ("model", "optim")
        if not any(folder.glob(f"{kind}_world_size_*_rank_*.pt"))
    ]
    if len(missing) == 2 and not export_of(found):
        remedy = _instead(found, Path(options.trainer.default_local_dir))
        yield Fault(where, f"holds no {missing[0]}_world_size_N_rank_R.pt.", remedy)
    elif missing:
        lacks = {"model": "weights", "optim": "the optimizer"}
        problem = (
            f"{found} was saved without {' and '.join(lacks[kind] for kind in missing)}, so training "
            "can't go on from it."
        )
        saving = (
            f"and save with {options.checkpoint_key}save_contents=[model,optimizer,extra,hf_model] "
            "next time"
        )
        yield Fault(
            where, problem, f"To start from its weights, {_anew(options, found)}; {saving}."
        )
    elif wrong := problems(found):
        way_out = "Resume from an older one (trainer.resume_from_path)"
        by_itself = (
            ""
            if options.trainer.resume_fallback
            else ", or have the newest whole one taken: trainer.resume_fallback=true"
        )
        yield Fault(where, f"is not complete: {'; '.join(wrong[:3])}.", f"{way_out}{by_itself}.")


def _instead(path: Path, run: Path) -> str:
    """What the user may have meant by a path that is no checkpoint; `run` is the run's own folder."""
    if (newest := next(checkpoints(path), None)) is not None:
        return f"It is a run's folder: give its newest checkpoint, {newest[1]}."
    above = next(
        (folder for folder in path.absolute().parents if STEP.fullmatch(folder.name)), None
    )
    if above is not None and path.exists():
        return f"It is a part of a checkpoint: give {above}."
    here = next(checkpoints(run), None)
    wanted = f"Give a checkpoint such as {'…/global_step_250' if here is None else here[1]}."
    return (
        f"It is a model, to begin a run with. {wanted}"
        if (path / "config.json").is_file()
        else wanted
    )


def _unloadable(options: RunOptions, found: Path, model: ModelConfig) -> Iterator[Fault]:
    """Faults of shards whose tensors aren't the model's, and of state that can't be read."""
    folder = model_folder(found)
    # The layout for one process: names and shapes are the same for any number of them.
    layout = plan_layout(model, 1)
    try:
        match_names(layout, ShardSource(folder))
        match_names(layout, ShardSource(folder, "exp_avg"))
        extra_state(folder, 0)
    except ValueError as error:
        yield Fault(
            _where(options),
            str(error),
            f"Give {options.pretrained_key} the model that it is of, or resume from another one.",
        )


def _refusal(report: RunReport, found: Path, change: Change) -> Fault:
    """The fault of another run's checkpoint: what differs, and every way out."""
    now = flat(report.config).get(change.where)
    before = report.then.get("config", {}).get(change.where)
    told = before is None or before == now or change.words.startswith(f"{change.where}: ")
    was = "" if told else f"; then {change.where}={shown(before)}"
    problem = f"{found} is of another run ({change.words}{was})."
    if change.strict:
        remedy = f"Put that back, or begin anew from its weights: {_anew(report.options, found)}."
    else:
        same = f"trainer.resume_mode=resume_path trainer.resume_from_path={found}"
        remedy = (
            "Put that back, choose another trainer.default_local_dir, or go on from it all the same: "
            f"{same}"
        )
    return Fault(change.where if now is None else f"{change.where}={shown(now)}", problem, remedy)


def export_of(found: Path) -> Path | None:
    """The model that a checkpoint holds for others to load, if it does."""
    folder = model_folder(found) / "huggingface"
    return folder if any(folder.glob("*.safetensors")) else None


def _anew(options: RunOptions, found: Path) -> str:
    export = export_of(found)
    name = "DIR" if export is None else str(export)
    merge = (
        ""
        if export is not None
        else f" (made by python -m retool.checkpoint merge {found} --out DIR)"
    )
    return f"give {options.pretrained_key}={name}{merge} and another trainer.default_local_dir"
