"""The reward of the campaign's runs: it breaks while a file `broken` lies beside it."""

from pathlib import Path


def digits(data_source, solution_str, ground_truth, extra_info):
    """The share of digits in what the model wrote."""
    if Path(__file__).with_name("broken").exists():
        raise LookupError("no judge today")
    share = sum(c.isdigit() for c in solution_str) / max(len(solution_str), 1)
    return {"score": share, "acc": float(share > 0.5)}
