"""The options that both commands have. Imports nothing heavy: `--help` waits for no torch."""

from __future__ import annotations

import argparse

from retool.rl.agent.formats.table import AUTO, FORMATS

CODE = "code"  # what --tools says for the code interpreter of this machine
NO_TOOLS = "none"
# What these commands say for a run's keys, in errors; what they have no option for is left out
OWN_WORDS = {
    "data.chat_template": "--chat-template",
    "Name the column with data.prompt_key": "Rename the column",
    "with data.name, or as": "as",
    ", or read it with a function of yours (data.custom_cls.path, name)": "",
    ", or decode it in a function of yours (data.custom_cls.path, name)": "",
    "model.trust_remote_code=true": "--trust-remote-code",
}
OF_ENVIRONMENTS = ("environment_kwargs", "rows", "row", "play")
OF_QUESTIONS = ("system", "column")


def add_options(parser: argparse.ArgumentParser, tools: str | None, max_tokens: int) -> None:
    """The options of both commands: which model, how it samples, and its tools. `tools` are those
    without the option; None: the interpreter, and none in an environment.
    """
    add_model(parser)
    sampling = parser.add_argument_group("how it samples")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0: the likeliest token (default: %(default)s)",
    )
    sampling.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    sampling.add_argument("--top-k", type=int, default=-1, help="-1: all (default: %(default)s)")
    sampling.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        help="most tokens of an answer, the tools' text included (default: %(default)s)",
    )
    sampling.add_argument(
        "--seed", type=int, default=0, help="another seed, other answers (default: %(default)s)"
    )
    group = parser.add_argument_group("its tools")
    group.add_argument(
        "--tools",
        default=tools,
        metavar="code|none|FILE",
        help="code: the code interpreter on this machine; FILE: a YAML file of tools, as "
        f"multi_turn.tool_config_path has it (default: {tools or 'code, none in an environment'})",
    )
    group.add_argument(
        "--format",
        default=AUTO,
        metavar="NAME",
        help=f"how the model writes calls: {', '.join(FORMATS)}, or a function of yours, FILE.py/NAME "
        "(default: what its chat template wants)",
    )
    group.add_argument(
        "--isolation",
        choices=("auto", "strict", "best_effort"),
        default="auto",
        help="best_effort: run programs even where this machine can't give every guarantee "
        "(default: the tool's own, else strict)",
    )
    group.add_argument(
        "--session",
        action="store_true",
        help="the code interpreter's variables and files live on: over the conversation in chat, over "
        "an answer in generate",
    )
    add_loading_options(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, the folder of a run, or a hub id"
    )


def add_environment(parser: argparse.ArgumentParser) -> argparse._ActionsContainer:
    """A world that answers the model, in the place of the user; the group, for more of it."""
    group = parser.add_argument_group("an environment")
    group.add_argument(
        "--environment",
        metavar="FILE.py/NAME",
        help="have the model play in it, with rewards; or verifiers:NAME, openenv:NAME",
    )
    group.add_argument(
        "--environment-kwargs",
        metavar="{KEY: VALUE}",
        help="what it is made with, as multi_turn.environment.kwargs in RL",
    )
    return group


def add_episode(group: argparse._ActionsContainer) -> None:
    """Which episodes are played in the terminal, and by whom."""
    group.add_argument(
        "--rows",
        metavar="FILE",
        help="rows of RL, one of which it begins with (default: an empty one)",
    )
    group.add_argument(
        "--row", type=int, default=0, metavar="N", help="which of them (default: %(default)s)"
    )
    group.add_argument(
        "--play", action="store_true", help="you make the turns, in the place of the model"
    )


def require_effect(options: argparse.Namespace) -> None:
    """ValueError for an option that the others leave without effect."""
    in_world = options.environment is not None
    where = "in an environment" if in_world else "without --environment"
    for name in OF_QUESTIONS if in_world else OF_ENVIRONMENTS:
        if getattr(options, name, None):
            raise ValueError(f"--{name.replace('_', '-')} has no effect {where}: leave it out.")


def add_max_num_seqs(parser: argparse._ActionsContainer) -> None:
    """Where many answers are sampled at once, how many."""
    parser.add_argument(
        "--max-num-seqs",
        type=int,
        default=256,
        help="answers that are sampled at once (default: %(default)s)",
    )


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """How it is loaded."""
    loading = parser.add_argument_group("how it is loaded")
    loading.add_argument(
        "--chat-template", help="hermes, or a jinja file; the model's own otherwise"
    )
    loading.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bf16", "fp16", "fp32"),
        help="default: %(default)s",
    )
    loading.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    loading.add_argument(
        "--max-model-len", type=int, help="most tokens of a conversation (default: the model's)"
    )
    loading.add_argument("--trust-remote-code", action="store_true")
