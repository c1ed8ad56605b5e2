"""The table of families in the docs: every family is in it, with what was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from retool.model.catalogue.families import FAMILIES
from retool.model.catalogue.figures import figures_of, written
from tests.model.figures import BEGIN, DOCS, END, measured, table

AGAIN = "Run python -m tests.model.figures again."
# Another processor rounds otherwise
SPREAD = 4


def test_every_family_is_in_the_table_and_within_its_bounds() -> None:
    found = figures_of()
    assert list(found) == list(FAMILIES), AGAIN
    for family, row in found.items():
        about = " ".join((FAMILIES[family].__doc__ or "").split("\n\n")[0].split())
        assert row.about == about, AGAIN
        assert max(row.logits, row.gradients) < 1e-5 and row.sp < 1e-12, family
        right, of = map(int, row.engine.split(" of "))
        assert right == of > 0 and row.export, family


def test_the_docs_have_the_table_that_was_measured() -> None:
    assert table(figures_of()) == DOCS.read_text().split(BEGIN)[1].split(END)[0], AGAIN
    assert [written(x) for x in (0, 3.7e-7, 1.2e-16)] == ["0", "4e-7", "1e-16"]


def test_the_list_imports_no_torch() -> None:
    program = "import sys; from retool.preflight.models import main; main([]); sys.exit('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "gemma2" in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_figures_are_what_is_measured(tmp_path: Path, family: str) -> None:
    told = figures_of()[family]
    found = measured(family, tmp_path)
    numbers = ("logits", "gradients", "sp")
    for name in numbers:
        assert getattr(found, name) <= SPREAD * getattr(told, name), (name, AGAIN)
    same = dict.fromkeys(numbers, 0.0)
    assert found._replace(**same) == told._replace(**same)
