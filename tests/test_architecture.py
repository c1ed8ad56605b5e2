"""The shape of the code: imports go one way, importing is cheap, files and functions stay small."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "retool"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import from itself and from rooms of a lower floor; `sft` and `rl`, `data`,
# `checkpoint` and `engine` are on one floor. The sandbox stands alone: nothing of retool is
# imported by it, and it runs in an interpreter that can't import retool.
LEVELS = {
    "files": 0,
    "sandbox": 0,
    "batch": 0,
    "perf": 0,
    "processes": 0,
    "config": 1,
    "metrics": 2,
    "parallel": 2,
    "optim": 3,
    "model": 3,
    "data": 4,
    "checkpoint": 4,
    "engine": 4,
    "preflight": 5,
    "run": 6,
    "doctor": 6,
    "sft": 7,
    "rl": 7,
    "llm": 8,
    "report": 8,
    "talk": 9,
    "serve": 10,
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a module's syntax tree."""
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.fixture(scope="module", autouse=True)
def syntax_trees() -> Iterator[None]:
    """They are kept for this file's tests and no longer: a hundred megabytes."""
    yield
    nodes.cache_clear()


@functools.cache
def imported(path: Path) -> list[str]:
    """Full names of everything that a module imports, wherever in it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{source}.{alias.name}" for alias in node.names]
    return names


def test_every_part_has_a_level() -> None:
    assert {part_of(p) for p in MODULES} - {"__init__", "__main__"} <= set(LEVELS)


def imports_upwards(path: Path) -> Iterator[str]:
    """What a module imports from its own floor or a higher one, but for its own room."""
    mine = part_of(path)
    # `retool` itself imports nothing; what it names for type checkers is loaded when asked for:
    # `test_importing_is_cheap`
    if mine == "__main__" or (mine == "__init__" and "if TYPE_CHECKING:" in path.read_text()):
        return
    for name in imported(path):
        if not name.startswith("retool."):
            continue
        other = name.split(".")[1]
        if other in ("__version__", "__distribution__", mine):
            continue
        if LEVELS[other] >= LEVELS[mine]:
            yield f"{path.relative_to(ROOT)} imports {name}"


# All modules in one test: one for each would take as long again for being started and told of.
def test_imports_go_one_way() -> None:
    assert not [wrong for path in MODULES for wrong in imports_upwards(path)]


def folder_imports(room: Path) -> dict[str, set[str]]:
    """Which folders of a room import which; "." is the room's own files, its command aside."""
    found: dict[str, set[str]] = {}
    for path in room.rglob("*.py"):
        inner = path.relative_to(room)
        if inner.name in ("__init__.py", "__main__.py"):
            continue
        mine = inner.parts[0] if len(inner.parts) > 1 else "."
        prefix = f"retool.{room.name}."
        for name in imported(path):
            if not name.startswith(prefix):
                continue
            first = name.removeprefix(prefix).split(".")[0]
            other = first if (room / first).is_dir() else "."
            if other != mine:
                found.setdefault(mine, set()).add(other)
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Folders that import each other, directly or by way of others."""
    reached = {start: set(ends) for start, ends in arrows.items()}
    for _ in reached:
        for ends in reached.values():
            ends |= {far for end in ends for far in reached.get(end, ())}
    return sorted(folder for folder, ends in reached.items() if folder in ends)


ROOMS = sorted(path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")


# Some of these rooms' own files are used by their folders, and some use them.
MIXED = {"model", "rl"}


def test_folders_of_a_room_form_no_circle() -> None:
    circles = {}
    for room in ROOMS:
        arrows = folder_imports(room)
        if room.name in MIXED:
            arrows = {folder: others - {"."} for folder, others in arrows.items() if folder != "."}
        if room.name != "engine" and circle(arrows):
            circles[room.name] = circle(arrows)
    assert not circles


FOREIGN = (
    "torch.distributed.fsdp",
    "torch.distributed._composable",
    "deepspeed",
    "verl",
    "trl",
)
VAGUE = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


def test_no_other_sharding_and_no_vague_names() -> None:
    assert not [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        for name in imported(path)
        if name.startswith(FOREIGN)
    ]
    assert not [path for path in MODULES if path.stem in VAGUE or "manager" in path.stem]


def too_large(path: Path) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").count("\n")
    if lines > 420:
        yield f"{path.relative_to(ROOT)}: {lines} lines"
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            size = (node.end_lineno or 0) - node.lineno + 1
            if size > (280 if isinstance(node, ast.ClassDef) else 80):
                yield f"{path.relative_to(ROOT)}: {node.name} has {size} lines"


def test_files_functions_and_classes_stay_small() -> None:
    assert not [wrong for path in MODULES for wrong in too_large(path)]


WORDS_AND_SIGNS = re.compile(r"\w+|[^\w\s]")
MOST_FILES = 14  # of a folder
# A part that stands alone
LARGER = {"sandbox"}
# Folders of files that are alike, as long as one wishes: which names each of their files has
ALIKE = {"model/families": {"read_config", "costs", "Block"}}


def code_lines(path: Path) -> list[str]:
    """Lines that aren't empty and aren't comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def test_there_is_air_between_the_lines() -> None:
    lines = [line for path in MODULES for line in code_lines(path)]
    words = sum(len(WORDS_AND_SIGNS.findall(line)) for line in lines)
    assert words / len(lines) <= 11
    assert sum("# fmt: skip" in line for line in lines) <= 20
    wide = {
        f"{path.relative_to(ROOT)}: {line}"
        for path in MODULES
        for line in path.read_text(encoding="utf-8").splitlines()
        if len(line) > 120
    }
    assert not wide


def test_one_assignment_a_statement() -> None:
    """But for swaps and real pairs."""
    pairs = [
        node
        for path in MODULES
        for node in nodes(path)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    ]
    assert len(pairs) <= 30


def test_folders_can_be_taken_in_at_a_glance() -> None:
    folders = {path.parent for path in MODULES} - {PACKAGE / name for name in LARGER | set(ALIKE)}
    sizes = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    assert max(sizes.values()) <= MOST_FILES
    assert sizes[PACKAGE] <= 6


def names_of(path: Path) -> set[str]:
    """What a module defines or imports at its top."""
    names = set[str]()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_files_of_a_list_are_alike() -> None:
    assert all((PACKAGE / folder / "__init__.py").is_file() for folder in ALIKE)
    different = {
        str(path.relative_to(PACKAGE)): missing
        for folder, names in ALIKE.items()
        for path in (PACKAGE / folder).glob("*.py")
        if path.name != "__init__.py" and (missing := names - names_of(path))
    }
    assert not different


@pytest.mark.parametrize("module", ["retool", "retool.sft.config"])
def test_importing_is_cheap(module: str) -> None:
    """Nothing heavy is pulled in, and a second import from a warm disk takes well under a second."""
    program = (
        f"import sys, time; start = time.perf_counter();import {module}; took = time.perf_counter() "
        "- start;heavy = {'torch', 'transformers', 'flash_attn', 'datasets', 'pyarrow', "
        "'accelerate'} & set(sys.modules);assert not heavy, heavy; print(took)"
    )
    took = min(
        float(
            subprocess.run(
                [sys.executable, "-c", program], check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(2)
    )
    assert took < (0.2 if module == "retool" else 1.5)


def test_typed_and_templates_are_packaged() -> None:
    assert (PACKAGE / "py.typed").is_file()
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'packages = ["retool"]' in settings and 'requires-python = ">=3.10"' in settings


def own_files() -> Iterator[Path]:
    for top in ("retool", "tests", "examples", "benchmarks", "constraints", ".ci"):
        yield from (
            p
            for p in (ROOT / top).rglob("*")
            if p.is_file() and p.suffix not in {".pyc", ".parquet", ".safetensors", ".pt"}
        )
    yield from (
        p
        for p in ROOT.iterdir()
        if p.is_file() and p.suffix in {".toml", ".md", ""} and p.name != ".git"
    )


def test_no_machine_and_no_registry_is_named() -> None:
    """What is installed from where is the user's choice, and no file knows the machine that it was
    written on.
    """
    dot = re.escape(".")
    hosts = [
        f"pypi{dot}org",
        f"pythonhosted{dot}org",
        f"download{dot}pytorch",
        f"npmjs{dot}(org|com)",
        f"anaconda{dot}org",
        f"ghcr{dot}io",
    ]
    places = [f"/{'work'}/(main|shared)", f"/{'opt'}/(wheels|pypi)", f"/{'root'}/{dot}pyenv"]
    named = re.compile("|".join(hosts + places))
    for path in own_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found = named.search(text)
        assert found is None, f"{path.relative_to(ROOT)} names {found and found.group()}"


def test_tests_do_without_what_a_clone_lacks() -> None:
    """A test that reads the real data elsewhere fails where there is none; these skip."""
    tests = ROOT / "tests"
    place = re.compile("shared.{1,5}data")
    reads = [path for path in tests.rglob("*.py") if place.search(path.read_text(encoding="utf-8"))]
    assert reads == [tests / "real_data.py"]
