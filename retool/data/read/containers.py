"""Values from files or memory as plain Python containers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa


def plain(value: Any) -> Any:
    """`value` as dicts, lists and Python scalars: of numpy's, Arrow's and other containers."""
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        value = value.to_pylist()
    elif isinstance(value, pa.Scalar):
        value = value.as_py()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def without_nulls(value: Any) -> Any:
    """`value` without null fields: parquet writes a null for a field that only other rows have.

    Nulls that are elements of a list stay. To keep a null field of `arguments` or `tools`, write
    them as a JSON string.
    """
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value
