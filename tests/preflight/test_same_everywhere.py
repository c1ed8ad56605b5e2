"""Ranks whose settings, model, data or code differ don't train together: what differs is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from retool.checkpoint.format.checksums import BLOCK
from retool.config import Fault, read
from retool.preflight import same_everywhere
from retool.preflight.ranks.alike import Shared, unlike
from retool.preflight.same_everywhere import SAME_COMMAND, SAME_FILES, shared_by_all
from retool.preflight.versions import OWN_CODE, code_hash, versions
from retool.sft.config import SYNONYMS, SFTConfig
from retool.sft.plan import SFTReport
from retool.sft.preflight import preflight
from tests.sft.test_command import words

HOSTS = ["one", "one", "two", "two"]


def shared(value: str, name: str = "", where: str = "optim.lr") -> Shared:
    return Shared(where, name, value, SAME_COMMAND)


def test_who_has_what() -> None:
    said = [[shared("1")], [shared("1")], [shared("2")], [shared("2")]]
    (fault,) = unlike(HOSTS, said)
    assert fault == Fault(
        "optim.lr", "isn't the same on all ranks: 1 (on one), 2 (on two).", SAME_COMMAND
    )
    said[3] = [shared("1")]
    (fault,) = unlike(HOSTS, said)
    assert "1 (ranks 0, 1, 3 on one, two), 2 (rank 2 on two)" in fault.problem
    assert [*unlike(HOSTS, said, ["optim.lr"])] == [], "it is wrong for another reason"
    assert [*unlike(HOSTS, [[shared("1")]] * 4)] == []
    assert [*unlike(HOSTS, [[], *[[shared("1")]] * 3])] == [], "one couldn't find it out"


def test_much_that_differs_is_told_in_one_sentence() -> None:
    names = ("a", "b", "c", "d", "e")
    (fault,) = unlike(["x", "y"], [[shared(value, name) for name in names] for value in ("1", "2")])
    assert fault.problem.endswith("c 1 (on x), 2 (on y); and 2 more.")


@pytest.fixture(scope="module")
def of_rank_0(work: Path) -> SFTReport:
    return report_of(work)


def report_of(work: Path, *more: str) -> SFTReport:
    found = preflight(read(SFTConfig, [*words(work, work / "run"), *more], SYNONYMS))
    assert not found.faults, found.faults
    return found


def differences(*reports: SFTReport) -> dict[str, Fault]:
    hosts = [f"host-{number}" for number in range(len(reports))]
    return {fault.where: fault for fault in unlike(hosts, [*map(shared_by_all, reports)])}


def other_weight(there: Path) -> None:
    weights = there / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def other_order(there: Path) -> None:
    table = pq.read_table(there / "train.parquet")
    pq.write_table(table.take([1, 0, *range(2, len(table))]), there / "train.parquet")


def other_tokenizer(there: Path) -> None:
    """A template that differs where no sample shows it."""
    template = there / "model" / "chat_template.jinja"
    template.write_text("{% if never %}other{% endif %}" + template.read_text())


def test_copies_that_differ(work: Path, of_rank_0: SFTReport, tmp_path: Path) -> None:
    """At other paths, which may differ; only what was changed is named."""
    there = Path(shutil.copytree(work, tmp_path / "there"))
    assert differences(of_rank_0, report_of(there)) == {}
    for change in (other_weight, other_order, other_tokenizer):
        change(there)
    found = differences(of_rank_0, report_of(there))
    model = found.pop("model.partial_pretrain")
    data = found.pop("data.train_files")
    assert found == {} and model.remedy == data.remedy == SAME_FILES
    assert data.problem.startswith("isn't the same on all ranks: 52 rows of content ")
    assert "the model's weights " in model.problem and "the tokenizer's files " in model.problem
    assert "(on host-0)" in model.problem and "hidden" not in model.problem


def test_settings_that_differ(work: Path, of_rank_0: SFTReport) -> None:
    """Not those by which a machine finds its own things, nor who logs."""
    config = of_rank_0.config
    own = replace(config.data, num_workers=7, cache_dir="/elsewhere")
    quiet = replace(config.trainer, logger=(), experiment_name="mine")
    assert differences(of_rank_0, replace(of_rank_0, config=replace(config, data=own))) == {}
    assert differences(of_rank_0, replace(of_rank_0, config=replace(config, trainer=quiet))) == {}
    fast = replace(config, optim=replace(config.optim, lr=0.5), data=replace(config.data, seed=9))
    found = differences(of_rank_0, of_rank_0, replace(of_rank_0, config=fast))
    assert set(found) == {"optim.lr", "data.seed"}
    assert "0.001 (on host-0, host-1), 0.5 (on host-2)" in found["optim.lr"].problem
    dated = replace(of_rank_0, config=replace(config, data=replace(config.data, template_date="1")))
    assert set(differences(of_rank_0, dated)) == {"data.template_date"}
    shown = replace(config.data, apply_chat_template_kwargs={"year": 1})
    (fault,) = differences(
        of_rank_0, replace(of_rank_0, config=replace(config, data=shown))
    ).values()
    assert fault.where == "data.apply_chat_template_kwargs"
    assert "its entries none (on host-0), year (on host-1)" in fault.problem
    # It found no data, and so never came to the template that shows the date
    lost = of_rank_0.blame(Fault("data.train_files=none.parquet", "doesn't exist.", "Copy it."))
    assert differences(lost, dated) == {}


def test_packages_and_code_of_several_machines(
    of_rank_0: SFTReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one machine all ranks have the same."""
    apart = replace(of_rank_0, world=replace(of_rank_0.world, nodes=2))
    here = [one for one in shared_by_all(apart) if one.where == "packages"]
    assert {one.name for one in here} == set(same_everywhere.DECIDING)
    changed = {**versions(), "torch": "1.0", OWN_CODE: "00", "datasets": "0", "triton": ""}
    monkeypatch.setattr(same_everywhere, "versions", lambda: changed)
    there = [one for one in shared_by_all(apart) if one.where == "packages"]
    (fault,) = unlike(["x", "y"], [here, there])
    assert "retool's code" in fault.problem and "torch" in fault.problem
    assert "datasets" not in fault.problem
    assert not [one for one in shared_by_all(of_rank_0) if one.where == "packages"]
    (tmp_path / "a.py").write_text("x = 1")
    before = code_hash.__wrapped__(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert code_hash.__wrapped__(tmp_path) != before


def test_checkpoints_that_differ(of_rank_0: SFTReport, tmp_path: Path) -> None:
    """Two machines' own checkpoints of one name, of which one is of another run."""
    reports = list[Any]()
    for number in range(2):
        folder = tmp_path / str(number) / "global_step_3"
        folder.mkdir(parents=True)
        files = f'{{"model.pt": {{"size": 1, "crc32": [{number}]}}}}'
        (folder / "checksums.json").write_text(f'{{"block": {BLOCK}, "files": {files}}}')
        named = replace(of_rank_0.config.trainer, resume_mode="resume_path")
        config = replace(of_rank_0.config, trainer=named)
        reports.append(replace(of_rank_0, config=config, resume=folder))
    (fault,) = differences(*reports).values()
    assert fault.where == "trainer.resume_from_path" and "global_step_3 (" in fault.problem
    assert differences(reports[0], reports[0]) == {}
