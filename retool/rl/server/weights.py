"""Hands the trainer's weights to the servers, through a folder that all of them see."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from retool.checkpoint.format.safetensors import WeightsWriter
from retool.checkpoint.hf.side_files import copy_side_files
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.whole import named, whole_units
from retool.rl.server.dialects import (
    DIALECT_OF_OWNER,
    DIALECTS,
    LOGPROBS_MODE,
    VLLM,
    VLLM_SETTINGS,
    logprobs_mode,
    mark_of,
)
from retool.rl.server.fleet import Fleet, Server, ServerOptions

PREFIX = "retool-weights-"  # of the folders that are ours
MEET_SECONDS = 10.0  # that a server may take to say what it is
NOT_FOUND = 404
SETTINGS_SECONDS = 60.0  # vLLM looks its machine over first


@torch.no_grad()
def write_weights(sharded: Sharded, folder: Path, model_folder: Path) -> str:
    """Rank 0 writes a Hugging Face folder, unit by unit as the ranks gather them: nobody holds the
    whole model. What went wrong with that is returned, "" on other ranks.

    Collective on all ranks of the trainer. The dtype is the one that the trainer computes in.
    """
    writer: WeightsWriter | None = None
    problem = ""

    def attempt(action: Callable[[], Any]) -> Any:
        """Where rank 0 can't write, it goes on gathering with the others."""
        nonlocal problem
        try:
            return action() if not problem else None
        except OSError as error:
            problem = f"{folder} can't be written: {error}"
            return None

    def begin() -> WeightsWriter:
        folder.mkdir(parents=True)
        copy_side_files(model_folder, folder, sharded.param_dtype)
        members = [member for unit in sharded.layout.units for member in unit.members]
        shapes = {member.name: member.shape for member in members}
        return WeightsWriter(folder, shapes, sharded.param_dtype)

    first = sharded.mesh.rank == 0
    if first:
        writer = attempt(begin)
    for layout, whole in whole_units(sharded):
        if writer is not None:
            for _, piece in named(layout, whole.cpu()):
                attempt(partial(writer.write, piece))
    if writer is not None:
        attempt(writer.close)
        if problem:
            writer.abandon()
    return problem


def bring(fleet: Fleet, options: ServerOptions, folder: Path) -> None:
    """Have every server load `folder`, side by side. One that can't is left out; one that was left
    out, and answers again, is back.
    """

    def load(server: Server) -> str:
        try:
            _meet(server, options)
            _load(server, options, folder)
        except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
            return str(error) or type(error).__name__
        return ""

    with ThreadPoolExecutor(len(fleet.servers)) as pool:
        problems = list(pool.map(load, fleet.servers))
    for server, problem in zip(fleet.servers, problems, strict=True):
        if problem:
            fleet.leave_out(server, problem)
        else:
            server.lost = ""


def _meet(server: Server, options: ServerOptions) -> None:
    """Ask a server what it is and what its model is called: it may be another one than before."""
    response = httpx.get(f"{server.url}/v1/models", headers=options.headers, timeout=MEET_SECONDS)
    response.raise_for_status()
    match _said(response).get("data"):
        case [dict() as model, *_]:
            pass
        case other:
            raise ValueError(f"/v1/models names no model: {other!r:.60}")
    owner = str(model.get("owned_by"))
    name = options.dialect if options.dialect != "auto" else DIALECT_OF_OWNER.get(owner)
    if name is None:
        raise ValueError(
            f"it says that it is {owner}'s, which isn't known: name its kind in rollout.server.dialect, "
            f"{' or '.join(DIALECTS)}"
        )
    room = model.get("max_model_len")
    if room is not None and room < options.max_length:
        raise ValueError(
            f"it takes {room:,} tokens, and a sequence here may have {options.max_length:,}: start it "
            "with a larger --max-model-len"
        )
    if name == VLLM and options.temperature != 1:
        _require_tempered(server, options)
    server.dialect = DIALECTS[name]
    server.model = str(model["id"])


def _require_tempered(server: Server, options: ServerOptions) -> None:
    """ValueError where it says that its log-probabilities are of another temperature. Ours doesn't say,
    nor does vLLM in the mode in which its weights can't be changed.
    """
    response = httpx.get(
        server.url + VLLM_SETTINGS, headers=options.headers, timeout=SETTINGS_SECONDS
    )
    if response.status_code == NOT_FOUND:
        return
    response.raise_for_status()
    mode = logprobs_mode(_said(response))
    if mode not in ("", LOGPROBS_MODE):
        raise ValueError(
            f"it tells {mode}, which aren't those of rollout.temperature={options.temperature:g}: start "
            f"it with --logprobs-mode {LOGPROBS_MODE}"
        )


def _load(server: Server, options: ServerOptions, folder: Path) -> None:
    """ValueError where the weights weren't loaded."""
    assert server.dialect is not None
    server.mark = mark_of(str(folder))
    for call in server.dialect.load(str(folder), server.mark):
        response = httpx.post(
            server.url + call.path,
            json=dict(call.body),
            headers=options.headers,
            timeout=options.timeout_s,
        )
        if response.status_code == NOT_FOUND:
            raise ValueError(f"it has no {call.path}: {server.dialect.way_out}")
        if not response.is_success:
            raise ValueError(f"{call.path} answered {response.status_code}: {response.text:.300}")
        problem = server.dialect.loaded(_said(response))
        if problem is not None:
            raise ValueError(f"{call.path}: {problem}")


def _said(response: httpx.Response) -> dict[str, Any]:
    """What a server answered; nothing at all says nothing. ValueError for anything but an object."""
    said = response.json() if response.content else {}
    if not isinstance(said, dict):
        raise ValueError(
            f"{response.url.path} answered {said!r:.60}, and no server that is known does"
        )
    return said


def clear(folder: Path) -> None:
    """Remove weights that no server reads any more, and nothing else."""
    for old in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(old, ignore_errors=True)
