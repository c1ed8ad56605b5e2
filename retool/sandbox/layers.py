"""The layers of isolation, the guarantees they uphold, and the plan that says which are in use
here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LAYERS = (
    "user_namespace",
    "mount_namespace",
    "pid_namespace",
    "network_namespace",
    "ipc_namespace",
    "landlock",
    "landlock_scopes",
    "seccomp",
    "listener",
    "separate_uid",
    "cgroup",
)

# Guarantee → what upholds it, strongest first; one is enough, all that are there are applied. "a +
# b": both together. The attack suite shows each of these in each mode (docs/sandbox.md has the
# table): a mechanism is listed for what it was seen to hold alone.
GUARANTEES: dict[str, tuple[str, ...]] = {
    "no network": ("network_namespace", "seccomp"),
    "no host files": ("mount_namespace", "landlock"),
    "no host file names": ("mount_namespace",),
    "no writes outside the work folder": ("mount_namespace", "landlock + seccomp"),
    "no devices": ("mount_namespace", "landlock"),
    "no host processes or signals": ("pid_namespace", "seccomp"),
    "nothing outlives the call": ("pid_namespace", "seccomp"),
    "no kernel surface, no privileges": ("seccomp",),
    "limits hold": ("cgroup", "seccomp"),
    "the host's work goes first": ("always: niceness, which nobody can take back",),
    "no secrets": (
        "always: exec'd server with an environment of its own, no inherited descriptors",
    ),
    "no state between calls": ("mount_namespace + seccomp", "landlock + seccomp"),
}

# What a guarantee is about, where its name doesn't say it all.
MEANING = {
    "no host file names": (
        "programs can ask whether there is a file of a name they guess, its size and "
        "dates, or a process of a number"
    ),
}

_NAMESPACES = (
    "allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0 or "
    "user.max_user_namespaces; in a container docker run --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined)"
)
HOW_TO_GET = {
    "network_namespace": _NAMESPACES,
    "mount_namespace": _NAMESPACES,
    "pid_namespace": _NAMESPACES,
    "landlock": (
        "use Linux 5.13 or newer with Landlock enabled (lsm=landlock,…), and a container runtime "
        "whose filter permits it"
    ),
    "seccomp": "use a kernel built with CONFIG_SECCOMP_FILTER",
}


def parts(mechanism: str) -> list[str]:
    """The layers that a mechanism needs together."""
    return [] if mechanism.startswith("always: ") else mechanism.split(" + ")


def ways_out(guarantee: str) -> list[str]:
    """What can be done about a guarantee that isn't met, each once."""
    wanted = [name for mechanism in GUARANTEES[guarantee] for name in parts(mechanism)]
    return list(dict.fromkeys(HOW_TO_GET[name] for name in wanted if name in HOW_TO_GET))


@dataclass(frozen=True)
class Plan:
    """What the fork server applies.

    `present` are the layers in use; `missing` says why each other one isn't.

    `first_uid` is the host uid of slot 0 (slot n gets the n-th after it), 0 where programs keep the
    caller's. `landlock` is the ABI version in use. `outer_user`: the server first enters a user
    namespace of its own, to be allowed the rest. `exact_tasks`: RLIMIT_NPROC counts a call by
    itself. `hidden` are folders of Python's that the unprivileged uid can't read and that no mount
    can show it: the server copies what programs need of them.
    """

    present: frozenset[str]
    missing: dict[str, str] = field(default_factory=dict)
    first_uid: int = 0
    slots: int = 64
    landlock: int = 0
    outer_user: bool = False
    hidden: list[str] = field(default_factory=list)
    cgroup: str = ""
    exact_tasks: bool = True

    @property
    def uids(self) -> range:
        """The host uids of programs; empty where they keep the caller's."""
        return range(self.first_uid, self.first_uid + self.slots if self.first_uid else 0)

    def mechanisms(self, guarantee: str) -> list[str]:
        """What upholds `guarantee` here."""
        return [
            mechanism
            for mechanism in GUARANTEES[guarantee]
            if self.present.issuperset(parts(mechanism))
        ]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "present": sorted(self.present)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Plan:
        return Plan(**{**fields, "present": frozenset(fields["present"])})

    def unmet(self) -> dict[str, str]:
        """Guarantees without any mechanism, each with the reasons and the way out."""
        faults = {}
        for guarantee, mechanisms in GUARANTEES.items():
            if self.mechanisms(guarantee):
                continue
            absent = dict.fromkeys(
                name
                for mechanism in mechanisms
                for name in parts(mechanism)
                if name not in self.present
            )
            reasons = "; ".join(f"{name}: {self.missing.get(name, 'absent')}" for name in absent)
            meaning = f"{MEANING[guarantee]}; " if guarantee in MEANING else ""
            faults[guarantee] = f"{meaning}{reasons}. To get it: {' / '.join(ways_out(guarantee))}."
        return faults
