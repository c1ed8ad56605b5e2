"""What is handed out: the sdist and the wheel, and the commands of an installed one."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from examples.quickstart import data, model
from retool import __distribution__, __version__
from retool.data.template.choose import TEMPLATES

TEMPLATE = TEMPLATES["hermes"].read_text()

NOT_PYTHON = {".jinja", ".html", ".css", ".js", ".txt", ".typed"}


@pytest.fixture(scope="module")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files by their endings."""
    pytest.importorskip("hatchling", reason="the development tools have it")
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(build, cwd=repository, check=True, capture_output=True)
    stem = f"{__distribution__.replace('-', '_')}-{__version__}"
    files = {"sdist": out / f"{stem}.tar.gz", "wheel": out / f"{stem}-py3-none-any.whl"}
    assert sorted(files.values()) == sorted(out.iterdir())
    return files


def tracked(repository: Path, *folders: str) -> set[str]:
    """Files of the repository as git lists them, or as they lie there."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    found = subprocess.run(listed, cwd=repository, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a clone")
    return {name for name in found.stdout.splitlines() if (repository / name).is_file()}


def test_the_wheel_has_all_of_the_package_and_nothing_else(
    repository: Path, built: dict[str, Path]
) -> None:
    with ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        about = wheel.read(metadata).decode()
        entry_points = wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == tracked(repository, "retool")
    assert {Path(name).suffix for name in packaged} - {".py"} >= NOT_PYTHON - {".txt"}
    assert f"Name: {__distribution__}\n" in about and "Provides-Extra: wandb" in about
    assert "retool = retool.__main__:run" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_has_what_a_clone_has(repository: Path, built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("retool", "tests", "examples", "benchmarks", "constraints", "docs")
    assert names >= tracked(repository, *folders)
    assert names >= {"README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"}
    assert {name.partition("/")[0] for name in names if "/" in name} == set(folders)


def test_commands_run_from_the_wheel(built: dict[str, Path], tmp_path: Path) -> None:
    """Unpacked elsewhere, it finds its own files, not the clone's."""
    ZipFile(built["wheel"]).extractall(tmp_path)
    asked = (
        "import retool, sys; from pathlib import Path; from retool.__main__ import main;"
        f"assert Path(retool.__file__).is_relative_to({str(tmp_path)!r}), retool.__file__;"
        "main(['--version']); main(['sft', '--help']);"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    said = run([sys.executable, "-c", asked], tmp_path)
    assert said.startswith(f"retool {__version__}\nusage: retool sft ")
    assert "data.train_files" in said


def test_pip_installs_the_wheel_and_its_command(built: dict[str, Path], tmp_path: Path) -> None:
    """Into an empty environment, but for what it needs: this one's packages."""
    there = tmp_path / "there"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(there), str(built["wheel"])], check=True, capture_output=True)
    script = str(there / "bin" / "retool")
    assert run([script, "--version"], there) == f"retool {__version__}\n"
    assert run([script, "sft", "--help"], there).startswith("usage: retool sft ")


TEN_LINES = """
import retool

rows = [
    {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]}
] * 16
result = retool.sft(model="model", data=rows, output_dir="run", batch_size=4, learning_rate=3e-3, epochs=12)
with retool.LLM("run") as llm:
    (output,) = llm.chat(rows[0]["messages"][:1], retool.SamplingParams(temperature=0))
print(output.outputs[0].text)
"""


@pytest.mark.slow
def test_from_the_wheel_to_a_trained_model_in_ten_lines(
    built: dict[str, Path], tmp_path: Path
) -> None:
    ZipFile(built["wheel"]).extractall(tmp_path)
    tokenizer = model.train_tokenizer(model.render(data.make_problems(60, seed=0), TEMPLATE))
    model.write_tokenizer(tmp_path / "model", tokenizer, TEMPLATE)
    model.write_model(tmp_path / "model", tokenizer, 1)
    (tmp_path / "script.py").write_text(TEN_LINES)
    said = run([sys.executable, "script.py"], tmp_path)
    assert said.splitlines()[-1] == "It."


def run(words: list[str], package: Path) -> str:
    """What a command prints, with the package that lies in `package`."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        words, cwd=package, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout
