"""The layers of isolation, the guarantees they uphold, and the plan that says which are in use here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LAYERS = (
    "user_namespace", "mount_namespace", "pid_namespace", "network_namespace", "ipc_namespace", "landlock", "landlock_scopes",
    "seccomp", "separate_uid", "cgroup",
)  # fmt: skip

# Guarantee → what upholds it, strongest first; one is enough, all that are there are applied.
GUARANTEES: dict[str, tuple[str, ...]] = {
    "no network": ("network_namespace", "seccomp"),
    "no host files": ("mount_namespace", "landlock"),
    "no writes outside the work folder": ("mount_namespace", "landlock"),
    "no devices": ("mount_namespace", "landlock"),
    "no host processes or signals": ("pid_namespace", "separate_uid", "landlock_scopes", "seccomp"),
    "nothing outlives the call": ("pid_namespace", "seccomp"),
    "no kernel surface, no privileges": ("seccomp",),
    "limits hold": ("cgroup", "always: rlimits, and a supervisor that sums the call's processes"),
    "no secrets": ("always: exec'd server with an environment of its own, no inherited descriptors",),
    "no state between calls": ("mount_namespace", "always: a fork per call, its folder removed"),
}

HOW_TO_GET = {
    "network_namespace": "allow user namespaces (docker run --security-opt seccomp=unconfined, sysctl user.max_user_namespaces)",
    "mount_namespace": "allow user namespaces, or use Linux 5.13 or newer with Landlock enabled (lsm=landlock,…)",
    "pid_namespace": "allow user namespaces",
    "landlock": "use Linux 5.13 or newer with Landlock enabled (lsm=landlock,…), and a container runtime whose filter permits it",
    "seccomp": "use a kernel built with CONFIG_SECCOMP_FILTER",
}


@dataclass(frozen=True)
class Plan:
    """What the fork server applies. `present` are the layers in use; `missing` says why each other one isn't.

    `first_uid` is the host uid of slot 0 (slot n gets the n-th after it), 0 where programs keep the caller's. `landlock` is the
    ABI version in use. `outer_user`: the server first enters a user namespace of its own, to be allowed the rest.
    `exact_tasks`: RLIMIT_NPROC counts a call by itself. `hidden` are folders of Python's that the unprivileged uid
    can't read and that no mount can show it: the server copies what programs need of them.
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
        return [name for name in GUARANTEES[guarantee] if name in self.present or name.startswith("always: ")]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "present": sorted(self.present)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Plan:
        return Plan(**{**fields, "present": frozenset(fields["present"])})

    def unmet(self) -> dict[str, str]:
        """Guarantees without any mechanism, each with the reasons and the way out."""
        faults = {}
        for guarantee, names in GUARANTEES.items():
            if not self.mechanisms(guarantee):
                reasons = "; ".join(f"{name}: {self.missing.get(name, 'absent')}" for name in names)
                faults[guarantee] = f"{reasons}. To get it: {' / '.join(HOW_TO_GET[name] for name in names if name in HOW_TO_GET)}."
        return faults
