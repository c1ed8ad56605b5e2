"""The weights of a Hugging Face folder, one file or several with an index."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from retool.checkpoint.format.safetensors import INDEX, SINGLE, SafetensorsFile
from retool.model.hf.names import COMPUTED
from retool.model.hub import read_json_object, require_no_adapter


class SafetensorsSource:
    """The weights of a Hugging Face folder: one `model.safetensors`, or several with an index.

    ValueError where it isn't certain which tensors are the model's.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._open: dict[str, SafetensorsFile] = {}
        self._map = self._weight_map()

    def __repr__(self) -> str:
        return str(self.folder)

    def _weight_map(self) -> dict[str, str]:
        """Name → file name."""
        if not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is not a folder. Give a local Hugging Face model folder (config.json and "
                "*.safetensors)."
            )
        require_no_adapter(self.folder)
        if (self.folder / SINGLE).exists():
            self._require_one_model()
            return dict.fromkeys(self._opened(SINGLE).entries, SINGLE)
        if (self.folder / INDEX).exists():
            weight_map = self._indexed(self.folder / INDEX)
            self._require_all_placed(weight_map)
            return weight_map
        raise ValueError(f"{self.folder} holds neither {SINGLE} nor {INDEX}.{self._hint()}")

    def _hint(self) -> str:
        """What there is instead."""
        # Pickled weights run code when they are loaded, so they aren't read
        if bins := sorted(p.name for p in self.folder.glob("*.bin")):
            again = f"AutoModelForCausalLM.from_pretrained({str(self.folder)!r}, dtype='auto')"
            return (
                f" It has {bins[0]}, and reading that can run code. If you trust it, save it again with "
                f"transformers, {again}.save_pretrained(…), and copy the tokenizer's files."
            )
        if quantised := sorted(p.name for p in self.folder.glob("*.gguf")):
            return f" {quantised[0]} isn't read: give the model that it was made of."
        if others := sorted(p.name for p in self.folder.glob("*.safetensors")):
            way_out = "fetch the index too, or the files under transformers' names"
            return f" It has {others[0]}: {way_out}."
        return ""

    def _require_one_model(self) -> None:
        """ValueError where an index names other files that are there: one of the two is left over."""
        index = self.folder / INDEX
        if not index.exists():
            return
        others = set(self._indexed(index, whole=False).values()) - {SINGLE}
        if there := sorted(name for name in others if (self.folder / name).is_file()):
            raise ValueError(
                f"{self.folder} holds {SINGLE}, and {INDEX} with {there[0]}: two sets of weights. Take "
                "away the one that isn't this model's."
            )

    def _require_all_placed(self, weight_map: dict[str, str]) -> None:
        """ValueError where a file has a tensor that the index places elsewhere, or nowhere."""
        for name in sorted(set(weight_map.values())):
            entries = self._opened(name).entries
            strays = [tensor for tensor in entries if weight_map.get(tensor) != name]
            if strays := [tensor for tensor in strays if not tensor.endswith(COMPUTED)]:
                more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
                raise ValueError(
                    f"{self.folder / name} holds {strays[0]}{more}, which {INDEX} doesn't place there. "
                    "Fetch both again."
                )

    def _indexed(self, index: Path, whole: bool = True) -> dict[str, str]:
        """The index; ValueError where a file is missing and it must be `whole`."""
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
        if missing and whole:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise ValueError(
                f"{self.folder} lacks {', '.join(missing[:8])}{more}, named by {INDEX}. Fetch the "
                "missing files."
            )
        return weight_map

    def _opened(self, file_name: str) -> SafetensorsFile:
        if file_name not in self._open:
            self._open[file_name] = SafetensorsFile(self.folder / file_name)
        return self._open[file_name]

    def _file(self, name: str) -> SafetensorsFile:
        file_name = self._map[name]
        file = self._opened(file_name)
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
