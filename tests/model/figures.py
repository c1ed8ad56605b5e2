"""What each family's numbers are off by: the table of docs/models.md and of `retool models`.

    python -m tests.model.figures

measures every tiny model of `tiny` on a CPU, in minutes, and writes `retool/model/catalogue/figures.json`
and the table. `test_figures.py` holds them against the families that there are.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from retool.batch import pack
from retool.checkpoint.hf.export import export_weights
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.checkpoint.hf.side_files import copy_side_files
from retool.engine import SamplingParams
from retool.model.catalogue.families import FAMILIES, parse_model_config, read_model_config
from retool.model.catalogue.figures import FIGURES, Figures, figures_of, written
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from tests.data.test_real_templates import EXPECTED
from tests.engine.models import engine_of, load, prompts, run
from tests.engine.test_engine import generated
from tests.model import tiny
from tests.model.test_decoder import logits, relative, sample
from tests.model.test_ranks import computed
from tests.ranks import run_ranks

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN = "<!-- figures: python -m tests.model.figures -->\n\n"
END = "\n<!-- end of figures -->\n"
LENGTHS = 17, 1, 40, 9
NEW = 24  # tokens of each prompt
PROMPTS = 5
# The published template of a model of the family, among those that are tested
TEMPLATES = {
    "llama": "meta-llama-Llama-3.1-8B-Instruct",
    "qwen3": "Qwen-Qwen3-0.6B",
    "qwen3_moe": "Qwen3-Instruct-2507",
    "mistral": "mistralai-Mistral-Nemo-Instruct-2407",
    "smollm3": "HuggingFaceTB-SmolLM3-3B",
    "granite": "ibm-granite-granite-3.3-2B-Instruct",
    "granitemoehybrid": "ibm-granite-granite-4.0",
    "gemma2": "google-gemma-2-2b-it",
    "phi3": "Phi-4-mini-instruct",
}
# How files ask for windows
WINDOWS: list[dict[str, Any]] = [
    {"sliding_window": 4},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
]


def cases(family: str) -> list[str]:
    """The tiny models of a family."""
    return [name for name, (kind, *_) in tiny.FAMILIES.items() if kind.model_type == family]


def takes_windows(family: str, folder: Path) -> bool:
    """Whether a file of the family may ask for windows."""
    content = json.loads((folder / "config.json").read_text())
    rest = {name: value for name, value in content.items() if name != "layer_types"}
    for asked in WINDOWS:
        try:
            if parse_model_config({**rest, **asked, "model_type": family}).windowed:
                return True
        except ValueError:
            continue
    return False


def against_transformers(folder: Path, reference: Any) -> tuple[float, float]:
    """Relative differences in fp32: of logits, and of the gradient that is off most."""
    rng = np.random.default_rng(0)
    samples = [sample(rng, n) for n in LENGTHS]
    model = load_pretrained(folder, make_mesh(device="cpu"))
    found = model(pack(samples), logits)
    rows = [reference(torch.from_numpy(s.tokens.astype(np.int64))[None]).logits[0] for s in samples]
    wanted = torch.cat(rows)
    direction = torch.from_numpy(rng.normal(size=tuple(wanted.shape)).astype(np.float32))
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    gradients = tiny.stored_gradients(reference)
    worst = max(
        relative(part, gradients[name]) for name, part in parts_of(model, model.grad).items()
    )
    return relative(found, wanted), worst


def parts_of(model: Sharded, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each parameter's part of the master weights, or of the gradient."""
    return {
        member.name: whole[unit.start + member.offset :][: member.numel].view(member.shape)
        for unit, member in model.layout.members
    }


def over_two_ranks(folder: Path, case: str) -> float:
    """The relative difference of what two ranks of a sequence compute, in fp64: of logits, or of all
    gradients together, whichever is larger.
    """
    alone, gradients = computed(str(folder), [case], 1)[case]
    apart = run_ranks(computed, 2, str(folder), [case], 2)
    together = np.concatenate([rank[case][0] for rank in apart])
    by_logits = np.linalg.norm(together - alone) / np.linalg.norm(alone)
    whole = {name.split()[0]: gradient for name, gradient in gradients.items()}
    off = 0.0
    for rank in apart:
        for name, found in rank[case][1].items():
            parameter, start = name.split()
            off += np.square(found - whole[parameter][int(start) :][: len(found)]).sum()
    size = sum(np.square(gradient).sum() for gradient in whole.values())
    return float(max(by_logits, (off / size) ** 0.5))


def sampled_alike(folder: Path, reference: Any) -> tuple[int, int]:
    """How many of the engine's greedy tokens are `generate`'s, of how many."""
    steady = read_model_config(folder).steady_length
    ids = prompts(PROMPTS, steady - NEW if steady else 40, 131)
    engine = engine_of(folder, load(folder))
    for i, prompt in enumerate(ids):
        engine.start(i, prompt, SamplingParams(max_tokens=NEW, temperature=0))
    done = run(engine)
    alike = 0
    for i, prompt in enumerate(ids):
        pairs = zip(done[i].tokens, generated(reference, prompt, NEW), strict=True)
        alike += sum(ours == theirs for ours, theirs in pairs)
    return alike, NEW * PROMPTS


def exported_alike(folder: Path, out: Path, reference: Any) -> bool:
    """Whether transformers computes the same bits from an export."""
    mesh = make_mesh(device="cpu")
    model = load_pretrained(folder, mesh)
    copy_side_files(folder, out, torch.float32)
    # Unit after unit, as they lie
    weights = [
        model.master[unit.start + member.offset :][: member.numel]
        for unit in model.layout.units
        for member in unit.members
    ]
    export_weights(model.layout, mesh, torch.cat(weights), out, None, torch.float32)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        return torch.equal(loaded(ids).logits, reference(ids).logits)


def measured(family: str, work: Path) -> Figures:
    """The worst of a family's tiny models."""
    off = []
    alike = []
    exports = []
    windows = []
    for case in cases(family):
        folder = work / case
        reference = tiny.make(folder, case)
        off.append((*against_transformers(folder, reference), over_two_ranks(work, case)))
        alike.append(sampled_alike(folder, reference))
        exports.append(exported_alike(folder, work / f"{case} exported", reference))
        windows.append(takes_windows(family, folder))
    by_logits, by_gradients, by_rank = (max(column) for column in zip(*off, strict=True))
    right, of = (sum(column) for column in zip(*alike, strict=True))
    template = EXPECTED[TEMPLATES[family]].split() if family in TEMPLATES else []
    return Figures(
        about=" ".join((FAMILIES[family].__doc__ or "").split("\n\n")[0].split()),
        logits=float(f"{by_logits:.1e}"),
        gradients=float(f"{by_gradients:.1e}"),
        sp=float(f"{by_rank:.1e}"),
        engine=f"{right} of {of}",
        export=all(exports),
        template=f"{template.count('yes')} of {len(template)}" if template else "",
        windows=any(windows),
    )


def table(found: dict[str, Figures]) -> str:
    """The rows of docs/models.md."""
    lines = [
        "| `model_type` | logits | gradients | sp 2 | engine | export | template | windows |",
        "|---|---:|---:|---:|---:|---|---:|---|",
    ]
    for family, row in found.items():
        numbers = " | ".join(map(written, (row.logits, row.gradients, row.sp)))
        same = "same" if row.export else "differs"
        windows = "yes" if row.windows else "refused"
        lines.append(
            f"| `{family}` | {numbers} | {row.engine} | {same} | {row.template} | {windows} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    found: dict[str, Figures] = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as work:
            found[family] = measured(family, Path(work))
        print(family, found[family], flush=True)
    content = {family: row._asdict() for family, row in found.items()}
    FIGURES.write_text(json.dumps(content, indent=1) + "\n")
    before, rest = DOCS.read_text().split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(before + BEGIN + table(figures_of()) + END + after)


if __name__ == "__main__":
    main()
