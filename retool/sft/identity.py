"""What makes an SFT run this run: its model, and which samples each of its steps trains on."""

from __future__ import annotations

from dataclasses import replace

from retool.preflight.identity import Trait, model_traits
from retool.sft.plan import SFTReport

FILES = "data.train_files"


def with_identity(report: SFTReport) -> SFTReport:
    """The report with what is known of the run's identity, without model or data if these couldn't
    be read.
    """
    data = report.config.data
    found: dict[str, Trait] = {}
    if (
        report.folder is not None
        and report.model is not None
        and not _blamed(report, "model.partial_pretrain")
    ):
        found |= model_traits(report.folder, report.model, "model.partial_pretrain")
    if report.train is not None:
        # Counts first, the hash last: a message that says how many rows there were tells more than
        # a hash.
        said = report.train.said
        found["training samples"] = Trait(FILES, said.samples)
        found["their tokens"] = Trait(FILES, said.tokens)
        found["their trained tokens"] = Trait(FILES, said.trained_tokens)
        found["their content and order"] = Trait(FILES, said.content[:16])
        found["the date in the chat template"] = Trait("data.template_date", data.template_date)
    for key in ("shuffle", "seed", "train_batch_size"):
        found[f"data.{key}"] = Trait(f"data.{key}", getattr(data, key))
    return replace(report, identity=found)


def _blamed(report: SFTReport, key: str) -> bool:
    return any(fault.where.startswith(key) for fault in report.faults)
