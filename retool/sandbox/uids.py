"""The host uids that programs run as, and the user namespace that lends the right to isolate them."""

from __future__ import annotations

import os
import pwd
import socket

from . import kernel

# Ranges of uids that this process holds, by their first; the kernel frees them when it ends
_claims: dict[int, socket.socket] = {}


def free_uids(count: int) -> int:
    """The first of `count` consecutive uids that no account has and no other sandbox of this
    machine uses.

    A name in the abstract socket space is the claim: nothing is left behind by a crash.
    """
    taken = {account.pw_uid for account in pwd.getpwall()}
    for first in range(61200, 1 << 30, max(count, 64)):
        if first in _claims:
            return first
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0retool-sandbox-uids-{first}")
        except OSError:
            claim.close()
            continue
        if taken.isdisjoint(range(first, first + count)):
            _claims[first] = claim
            return first
        claim.close()
    raise ValueError(f"no {count} consecutive uids are free for programs.")


def enter_user_namespace(uids: range) -> None:
    """Become root of a new user namespace, so that the other namespaces may be made.

    An ordinary user can map itself only. Root without CAP_SYS_ADMIN (a container's) maps `uids`
    too, for the programs; that must be written from outside, by a process that stayed there.
    """
    uid = os.geteuid()
    gid = os.getegid()
    target = os.getpid()
    if not uids:
        kernel.unshare(kernel.CLONE_NEWUSER)
        # The kernel lets nobody without rights write a gid map before setgroups is given up
        _write_maps("self", f"0 {uid} 1", f"0 {gid} 1", deny_groups=True)
        return
    reader, writer = os.pipe()
    helper = os.fork()
    if helper == 0:
        code = 1
        try:
            os.close(writer)
            if not os.read(reader, 1):
                os._exit(1)  # refused over there
            # first inside, first outside, how many
            programs = f"{uids.start} {uids.start} {len(uids)}"
            uid_map = f"0 {uid} 1\n{programs}"
            gid_map = f"0 {gid} 1\n{programs}"
            _write_maps(str(target), uid_map, gid_map, deny_groups=False)
            code = 0
        finally:
            os._exit(code)
    os.close(reader)
    try:
        kernel.unshare(kernel.CLONE_NEWUSER)
        os.write(writer, b"1")
    finally:
        os.close(writer)
    if os.waitpid(helper, 0)[1]:
        raise OSError(
            "mapping the programs' uids into the user namespace is refused "
            "(CAP_SETUID and CAP_SETFCAP do it)"
        )


def _write_maps(process: str, uid_map: str, gid_map: str, deny_groups: bool) -> None:
    texts = {"setgroups": "deny"} if deny_groups else {}
    for name, text in {**texts, "uid_map": uid_map, "gid_map": gid_map}.items():
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)
