"""Machines and their network, and how long a collective takes there: latency · messages + bytes /
bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retool.model.traffic.exchanges import Exchange
from retool.perf import peak_flops

# Of a data sheet's FLOP/s and of a link's bandwidth: what is reached
ACHIEVED_FLOPS = 0.4
ACHIEVED_LINK = 0.8
# Bytes a second, one way, from a GPU to others of its machine, from NVIDIA's data sheets; a name's
# first word that is here counts
LINKS: Mapping[str, float] = {
    "A100": 300e9,
    "H100": 450e9,
    "H200": 450e9,
    "GH200": 450e9,
    "B200": 900e9,
    "GB200": 900e9,
}
PCIE = 32e9
# Planned for where nobody knows the GPU
USUAL_GPU = "H100"


@dataclass(frozen=True)
class Machines:
    """Bandwidths are bytes a second: `inside` from one GPU to others of its machine, `between` from
    a machine to others, all its network cards together. Latencies are seconds of a message. `flops`:
    of one GPU, what it really reaches.
    """

    per_machine: int
    inside: float
    between: float
    flops: float
    latency_inside: float = 3e-6
    latency_between: float = 15e-6
    # How much longer an all-gather and a reduce-scatter take than rings would: NCCL's are rings,
    # gloo's reduce-scatter is an all-reduce
    gather: float = 1.0
    scatter: float = 1.0

    def spans(self, exchange: Exchange) -> bool:
        """Whether ranks of several machines take part."""
        return exchange.ranks * exchange.stride > self.per_machine

    def seconds(self, exchange: Exchange) -> float:
        """Of one collective, while every other group of the machine does the same.

        All-gathers, reduce-scatters and all-reduces go round a ring, which enters and leaves each
        machine once; an all-to-all sends each other rank its part.
        """
        sent = exchange.sent
        if exchange.collective == "all-gather":
            sent *= self.gather
        elif exchange.collective == "reduce-scatter":
            sent *= self.scatter
        here = min(exchange.ranks, max(1, self.per_machine // exchange.stride))
        machines = exchange.ranks // here
        if machines == 1:
            return (exchange.ranks - 1) * self.latency_inside + sent / self.inside
        leaving = sent * (self.per_machine // here)
        hops = exchange.ranks - 1
        far = machines * hops // exchange.ranks
        if exchange.collective == "all-to-all":
            # Each of the ranks here sends this part of what it sends to other machines
            far = exchange.ranks - here
            leaving *= here * far / hops
        elif exchange.collective == "all-reduce":
            far *= 2
            hops *= 2
        latency = far * self.latency_between + (hops - far) * self.latency_inside
        return latency + max(sent / self.inside, leaving / self.between)


def assumed(per_machine: int, gbit: float, gpu: str = USUAL_GPU) -> Machines:
    """Machines of these GPUs, as data sheets describe them, with a network of `gbit` Gbit/s each."""
    words = gpu.replace("-", " ").split()
    link = next((LINKS[word] for word in words if word in LINKS), PCIE)
    peak = peak_flops(gpu) or peak_flops(USUAL_GPU)
    assert peak is not None
    return Machines(
        per_machine,
        inside=ACHIEVED_LINK * link,
        between=ACHIEVED_LINK * gbit * 1e9 / 8,
        flops=ACHIEVED_FLOPS * peak,
    )
