"""Being asked to stop: SIGTERM or SIGUSR1 to any worker, or a launcher that died. All ranks agree once a step.

torchrun passes TERM on and kills after 30 seconds; of USR1 it dies itself unless told otherwise, so start it with
`--signals-to-handle SIGTERM,SIGUSR1` (and, for a large model, a longer `--shutdown-timeout` or TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
"""

from __future__ import annotations

import ctypes
import signal
import sys
from types import FrameType

import torch
import torch.distributed as dist

from retool.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
GRACE = 600  # seconds from a request to stop to the end of the process, whatever it hangs in


class StopRequest:
    """Remembers a signal to stop; `agreed` is True on every rank as soon as one has had one.

    Make it when there is something to save: until then a signal ends the process at once. A process that isn't done
    `GRACE` seconds later (a peer is dead, a disk hangs) is ended by an alarm.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before = {s: signal.signal(s, self._remember) for s in SIGNALS}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            signal.alarm(GRACE)
        self.received = number

    def agreed(self, mesh: Mesh) -> bool:
        """Collective, on the host alone: the device isn't waited for."""
        flag = torch.tensor(int(self.received is not None))
        if mesh.world_group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.world_group)
        return bool(flag)

    def restore(self) -> None:
        """Give the signals back."""
        signal.alarm(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Ask Linux for a SIGTERM when the launcher dies, so that no worker is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
