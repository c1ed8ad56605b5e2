"""Loading new weights from a folder, with the requests that vLLM's and SGLang's servers know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from retool.llm.folder import model_of
from retool.rl.server.dialects import mark_of
from retool.serve.engine_thread import EngineThread, Origin
from retool.serve.errors import Refusal
from retool.serve.fields import Fields

RELOAD = "reload_weights"  # vLLM's method for it


@dataclass
class Weights:
    """Brings other weights. `may_change`: the server's owner allows it."""

    engine: EngineThread
    may_change: bool
    changes: int = 0

    async def from_disk(self, body: Any) -> dict[str, Any]:
        """SGLang's `/update_weights_from_disk`."""
        fields = Fields(body)
        folder = fields.take("model_path", str, "")
        version = fields.optional("weight_version", str)
        for name in ("flush_cache", "abort_all_requests", "is_async", "torch_empty_cache"):
            fields.take(name, bool, False)
        for name in ("keep_pause", "recapture_cuda_graph"):
            fields.take(name, bool, False)
        fields.optional("load_format", str)
        fields.finish()
        await self._load(folder, "model_path", version)
        return {"success": True, "message": f"loaded {folder}", "num_paused_requests": 0}

    async def collective_rpc(self, body: Any) -> dict[str, Any]:
        """vLLM's `/collective_rpc`, of which there is `reload_weights`."""
        fields = Fields(body)
        method = fields.take("method", str, "")
        fields.take("args", list, [])
        fields.optional("timeout", float)
        given = Fields(fields.take("kwargs", dict, {}), "kwargs")
        folder = given.take("weights_path", str, "")
        given.take("is_checkpoint_format", bool, True)
        given.finish()
        fields.finish()
        if method != RELOAD:
            raise Refusal(400, f"method {method!r} isn't supported: there is {RELOAD}.", "method")
        await self._load(folder, "kwargs.weights_path", None)
        # One for each worker, of which there is one, and the method returns nothing
        return {"results": [None]}

    async def _load(self, folder: str, field: str, version: str | None) -> None:
        if not self.may_change:
            raise Refusal(
                403,
                "this server's weights can't be changed: start it with --allow-weight-updates.",
            )
        if not folder:
            raise Refusal(400, f"{field} is missing: the folder of a model.", field)
        try:
            found = model_of(Path(folder))
            await self.engine.load(partial(self._loaded, found, mark_of(folder), version))
        except (ValueError, OSError) as error:
            raise Refusal(400, str(error), field) from error

    def _loaded(self, folder: Path, mark: str, version: str | None) -> Origin:
        """On the engine's thread, where no answer can come between the weights and their name."""
        self.engine.llm.load(folder)
        self.changes += 1
        return Origin(mark, version or str(self.changes))
