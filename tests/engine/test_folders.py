"""The engine's folders import one way, and no two of its files import each other."""

from __future__ import annotations

from graphlib import TopologicalSorter

from tests.test_architecture import MODULES, PACKAGE, imported


def test_kernels_then_schedule_then_what_runs_them() -> None:
    engine = [path for path in MODULES if path.is_relative_to(PACKAGE / "engine")]
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in engine
        if path.stem != "__init__"
    }
    graph = {
        name: {other for other in names for full in imported(path) if full.startswith(f"{other}.")}
        for name, path in names.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises where there is a circle
    values = "retool.engine.types"  # everybody may know these
    for name, others in graph.items():
        others = others - {values}
        if ".kernels." in name:
            assert all(".kernels." in other for other in others), name
        if ".schedule." in name:
            allowed = "retool.engine.kernels.draws"
            assert all(".schedule." in other or other == allowed for other in others), name
