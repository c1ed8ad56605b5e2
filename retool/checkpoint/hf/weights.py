"""The weights of a Hugging Face folder, one file or several with an index."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from retool.checkpoint.format.safetensors import INDEX, SINGLE, SafetensorsFile
from retool.model.hub import read_json_object


class SafetensorsSource:
    """The weights of a Hugging Face folder: one `model.safetensors`, or several with an index.

    Files are mapped on first use.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._map = self._weight_map()
        self._open: dict[str, SafetensorsFile] = {}

    def __repr__(self) -> str:
        return str(self.folder)

    def _weight_map(self) -> dict[str, str]:
        """Name → file name.

        Where there is one file and an index too, the one file counts, as it does for transformers.
        """
        if not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is not a folder. Give a local Hugging Face model folder (config.json and "
                "*.safetensors)."
            )
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(SafetensorsFile(self.folder / SINGLE).entries, SINGLE)
        if (self.folder / INDEX).exists():
            return self._indexed(self.folder / INDEX)
        # Pickled weights run code when they are loaded, so they aren't read
        bins = sorted(p.name for p in self.folder.glob("*.bin"))
        hint = f" It has {bins[0]}: save it again as safetensors." if bins else ""
        raise ValueError(f"{self.folder} holds neither {SINGLE} nor {INDEX}.{hint}")

    def _indexed(self, index: Path) -> dict[str, str]:
        try:
            weight_map: dict[str, str] = read_json_object(index)["weight_map"]
            missing = sorted(
                {
                    f
                    for f in weight_map.values()
                    # A name with a folder in it could lead out of this one
                    if f != Path(f).name or not (self.folder / f).is_file()
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not a safetensors index ({error!r}). Fetch it again."
            ) from error
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise ValueError(
                f"{self.folder} lacks {', '.join(missing[:8])}{more}, named by {INDEX}. Fetch the "
                "missing files."
            )
        return weight_map

    def _file(self, name: str) -> SafetensorsFile:
        file_name = self._map[name]
        if file_name not in self._open:
            self._open[file_name] = SafetensorsFile(self.folder / file_name)
        file = self._open[file_name]
        if name not in file.entries:
            raise ValueError(
                f"{self.folder / file_name} lacks {name}, which {INDEX} places there. Fetch both again."
            )
        return file

    def names(self) -> Collection[str]:
        return self._map.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return self._file(name).entries[name][0]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._file(name).read(name, start, stop)
