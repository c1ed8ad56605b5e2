"""What this machine offers: guarantee → mechanism, and why each missing layer is missing."""

from __future__ import annotations

import os
import platform
import time

from .embedded import Sandbox
from .layers import GUARANTEES, LAYERS, MEANING, Plan, ways_out
from .probe import find


def report(plan: Plan) -> str:
    """The findings as text."""
    user = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    lines = [
        f"Linux {platform.release()} {platform.machine()}, Python {platform.python_version()}, as {user}",
        "",
        "Layers",
    ]
    details = {
        "landlock": f" (ABI {plan.landlock})",
        "cgroup": f" ({plan.cgroup})",
        "separate_uid": f" ({plan.first_uid} to {plan.first_uid + plan.slots - 1})",
    }
    for name in LAYERS:
        if name in plan.present:
            state = f"yes{details.get(name, '')}"
        else:
            state = f"no   {plan.missing[name]}"
        lines.append(f"  {name:18} {state}")
    lines += ["", "Guarantees"]
    for guarantee in GUARANTEES:
        mechanisms = [name.removeprefix("always: ") for name in plan.mechanisms(guarantee)]
        lines.append(f"  {guarantee:34} {', '.join(mechanisms) or 'NOTHING'}")
    if plan.hidden:
        lines += [
            "",
            f"Note: the programs' uid can't read {', '.join(plan.hidden)}, and nothing can be "
            "mounted: at each start the server",
            "copies what programs need of it. A Python installed outside /root avoids that.",
        ]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """One closing sentence, or several: what strict isolation says, and the way out."""
    unmet = plan.unmet()
    if not unmet:
        return "strict isolation: every guarantee has a mechanism."
    lines = ["strict isolation: REFUSED."]
    for guarantee, why in unmet.items():
        meaning = f": {MEANING[guarantee]}" if guarantee in MEANING else ""
        ways = "; ".join(ways_out(guarantee))
        if ways:
            lines.append(f"  nothing guarantees “{guarantee}”{meaning}. Do one of: {ways}.")
        else:
            lines.append(f"  {guarantee}: {why}")
    lines.append("  Or accept what is missing with isolation=best_effort.")
    return "\n".join(lines)


def trial() -> str:
    """Start the sandbox and run a program, because layers that work one by one may not work
    together.
    """
    begun = time.perf_counter()
    with Sandbox(isolation="best_effort", workers=1) as sandbox:
        started = time.perf_counter()
        result = sandbox.run_blocking("import numpy, sympy\nprint(sympy.factorint(2 * 3 * 7))")
        ended = time.perf_counter()
    outcome = (
        "works" if result.ok else f"FAILED: {result.status} {result.reason} {result.stderr[-300:]}"
    )
    times = f"server warm after {started - begun:.1f} s, program {1000 * (ended - started):.0f} ms"
    return f"A program with numpy and sympy {outcome} ({times})."


def main() -> int:
    """Print everything; 0 where strict isolation is possible and a program runs."""
    plan = find()
    print(report(plan), "", verdict(plan), sep="\n", flush=True)
    outcome = trial()
    print(outcome)
    return int(bool(plan.unmet()) or "FAILED" in outcome)
