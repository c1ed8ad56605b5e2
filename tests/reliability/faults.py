"""What can happen to a run, and what is promised then.

Each fault is a function of a `Scene`; `FAULTS` is the list that is drawn from.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from retool.checkpoint.format.tracker import TRACKER
from tests.ranks import free_port

NOTHING = "nothing"


@dataclass
class Scene:
    """A run's surroundings: its folder, its cache and data, its processes while it lasts."""

    out: Path
    cache: Path
    data: Path
    chance: random.Random
    lasts_s: float  # of a run that nothing happens to
    processes: list[BaseProcess] = field(default_factory=list)
    # Of the configuration, besides the usual ones
    keys: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    held: list[object] = field(default_factory=list)  # what is let go when the scene ends

    @property
    def reward(self) -> Path:
        """A copy of the reward's file, RL's alone."""
        return self.out.with_name("reward.py")

    @property
    def newest(self) -> Path | None:
        """The newest finished checkpoint."""
        found = [
            (int(p.name.rpartition("_")[2]), p)
            for p in self.out.glob("global_step_*")
            if p.name.rpartition("_")[2].isdigit()
        ]
        return max(found)[1] if found else None

    def wait(self, share: float = 1.0) -> None:
        """A random time, somewhere in the run."""
        time.sleep(self.chance.random() * self.lasts_s * share)

    def wait_for_a_save(self) -> None:
        """Until the run has saved, or ended."""
        while not (self.out / TRACKER).exists() and any(p.is_alive() for p in self.processes):
            time.sleep(0.005)
        time.sleep(self.chance.random() * 0.2)


@dataclass(frozen=True)
class Fault:
    """A fault and what is promised.

    `before` and `during` act on the first run, `after` between it and the second one of the same
    command; `inside` is the name of a hook that the first run's processes call. `first` and
    `second` say how they may end: exit statuses, and words that must be told where the status isn't
    0. `exact`: once the second is done, the weights are those of a run that nothing happened to.
    """

    name: str
    before: Callable[[Scene], object] = lambda scene: None
    during: Callable[[Scene], object] = lambda scene: None
    after: Callable[[Scene], object] = lambda scene: None
    inside: str = NOTHING
    inside_then: str = NOTHING  # of the second run's
    first: tuple[int, ...] = (0,)
    told: str = ""
    second: int = 0
    told_then: str = ""
    exact: bool = True
    world: int = 1
    said: str = ""  # that the first run must say though it ends well
    traceback: bool = False  # told is an error of the user's own function, with its traceback


# --- while the run lasts ---


def send(scene: Scene, number: int, everyone: bool = True) -> None:
    scene.wait()
    for process in scene.processes if everyone else [scene.chance.choice(scene.processes)]:
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def send_in_a_save(scene: Scene, number: int) -> None:
    while not any(scene.out.glob("global_step_*.tmp")) and any(
        p.is_alive() for p in scene.processes
    ):
        time.sleep(0.001)
    time.sleep(scene.chance.random() * 0.03)
    for process in scene.processes:
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def stop_one_rank(scene: Scene) -> None:
    """SIGSTOP, as a debugger or a frozen container does; it is killed once the others have ended."""
    scene.wait_for_a_save()
    stopped = scene.chance.choice(scene.processes)
    others = [process for process in scene.processes if process is not stopped]
    if stopped.pid is None or not stopped.is_alive():
        return
    os.kill(stopped.pid, signal.SIGSTOP)
    end = time.monotonic() + 90
    while any(process.is_alive() for process in others) and time.monotonic() < end:
        time.sleep(0.05)
    stopped.kill()


def take_folder_away(scene: Scene) -> None:
    scene.wait_for_a_save()
    with contextlib.suppress(OSError):
        scene.out.rename(scene.out.with_name("away"))


def put_folder_back(scene: Scene) -> None:
    away = scene.out.with_name("away")
    if away.exists():
        shutil.rmtree(scene.out, ignore_errors=True)
        away.rename(scene.out)


def change_data(scene: Scene) -> None:
    scene.wait_for_a_save()
    content = scene.data.read_bytes()
    scene.data.write_bytes(content[: len(content) // 2])
    scene.held.append(content)


def restore_data(scene: Scene) -> None:
    scene.data.write_bytes(next(content for content in scene.held if isinstance(content, bytes)))


def hold_port(scene: Scene) -> None:
    other = socket.socket()
    other.bind(("127.0.0.1", scene.port))
    other.listen()
    scene.held.append(other)


def let_port_go(scene: Scene) -> None:
    for held in scene.held:
        if isinstance(held, socket.socket):
            held.close()


def link_oldest(scene: Scene) -> None:
    scene.wait_for_a_save()
    oldest = scene.out / "global_step_1"
    with contextlib.suppress(OSError):
        oldest.rename(scene.out.with_name("big_disk"))
        oldest.symlink_to(scene.out.with_name("big_disk"))


def remove_metrics(scene: Scene) -> None:
    scene.wait_for_a_save()
    (scene.out / "metrics.jsonl").unlink(missing_ok=True)


def leave_things(scene: Scene) -> None:
    """Names that saves use, of things that they didn't make."""
    scene.out.mkdir(parents=True)
    (scene.out / "global_step_2.tmp").mkdir()
    (scene.out / "global_step_2.tmp" / "mine").touch()
    (scene.out / "global_step_3").write_text("mine")
    (scene.out / "global_step_1.old").symlink_to("nowhere")


# --- between two runs ---


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))


def damage_checkpoint(scene: Scene) -> None:
    assert scene.newest is not None
    files = sorted(p for p in scene.newest.rglob("*.*") if p.suffix in (".pt", ".json"))
    files = [p for p in files if "huggingface" not in p.parts]
    path = scene.chance.choice(files)
    how = scene.chance.randrange(4)
    if how == 0:
        path.unlink()
    elif how == 1:
        os.truncate(path, path.stat().st_size // 2)
    else:
        flip(path, scene.chance)


def damage_cache(scene: Scene) -> None:
    path = scene.chance.choice(
        sorted(
            p
            for p in scene.cache.rglob("*")
            if p.is_file() and p.suffix in (".bin", ".npy", ".json")
        )
    )
    how = scene.chance.randrange(3)
    if how == 0:
        path.write_bytes(b"")
    elif how == 1:
        path.unlink()
    else:
        flip(path, scene.chance)


def damage_tracker(scene: Scene) -> None:
    path = scene.out / TRACKER
    how = scene.chance.randrange(4)
    path.unlink()
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    else:
        path.write_bytes((b"", b"\xff\x00six")[how - 2])


def forget_steps(scene: Scene) -> None:
    (scene.out / TRACKER).write_text("0")


def tear_metrics(scene: Scene) -> None:
    with (scene.out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "train/lo')


def ask_for(scene: Scene, **keys: object) -> None:
    scene.keys |= {name.replace("__", "."): str(value) for name, value in keys.items()}


# --- inside the first run's processes ---


def full_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))


def clock_backwards() -> None:
    real = time.time
    begin = time.time()
    time.time = lambda: begin - 100 * (real() - begin) - 86_400


def hung_save() -> None:
    from retool.checkpoint import write
    from retool.run import watchdog

    watchdog.PATIENCE = 0.5
    real = write.write_archive
    write.write_archive = lambda path, content: (
        time.sleep(1000) if "global_step_3" in str(path) else real(path, content)
    )


def quick_watchdog() -> None:
    from retool.run import watchdog

    watchdog.PATIENCE = 0.5


def impatient() -> None:
    from retool.files import lock
    from retool.run import start

    start.sole_user = functools.partial(lock.sole_user, patience_s=0.2)


def flaky_store() -> None:
    from retool.checkpoint import remote
    from tests.checkpoint.test_remote import Flaky

    remote.ATTEMPTS = 2
    Flaky.fail_first = random.Random(os.getpid()).randrange(1, 30)
    real = remote.copy
    remote.copy = lambda folder, url, wait_s, progress: real(folder, url, 0.01, progress)


def known_store() -> None:
    importlib.import_module("tests.checkpoint.test_remote")  # makes it known to fsspec


def failing_logger() -> None:
    from retool.metrics.jsonl import JsonlLogger

    def log(self: object, step: int, metrics: object) -> None:
        raise OSError(28, "No space left on device")

    JsonlLogger.log = log


HOOKS: dict[str, Callable[[], None]] = {
    NOTHING: lambda: None,
    "full disk": full_disk,
    "clock": clock_backwards,
    "hung save": hung_save,
    "quick watchdog": quick_watchdog,
    "impatient": impatient,
    "flaky store": flaky_store,
    "store": known_store,
    "failing logger": failing_logger,
}


def hold_folder(scene: Scene) -> None:
    from retool.files.lock import sole_user

    stack = contextlib.ExitStack()
    stack.enter_context(sole_user(scene.out))
    scene.held.append(stack)


def let_folder_go(scene: Scene) -> None:
    for held in scene.held:
        if isinstance(held, contextlib.ExitStack):
            held.close()


KILLED = (-signal.SIGKILL, 0)
STOPPED = (0, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT, 130)
FAULTS = (
    Fault("nothing"),
    Fault("killed at a random instant", during=lambda s: send(s, signal.SIGKILL), first=KILLED),
    Fault("killed in a save", during=lambda s: send_in_a_save(s, signal.SIGKILL), first=KILLED),
    Fault(
        "one of two ranks killed",
        during=lambda s: send(s, signal.SIGKILL, everyone=False),
        first=(*KILLED, 1),
        world=2,
    ),
    Fault(
        "one of two ranks stopped",
        before=lambda s: ask_for(s, trainer__watchdog_s=15),
        during=stop_one_rank,
        inside="quick watchdog",
        first=(70, *KILLED),
        told="hung",
        world=2,
    ),
    Fault("SIGTERM", during=lambda s: send(s, signal.SIGTERM), first=STOPPED),
    Fault("SIGUSR1", during=lambda s: send(s, signal.SIGUSR1), first=STOPPED),
    Fault("Ctrl-C", during=lambda s: send(s, signal.SIGINT), first=STOPPED),
    Fault("disk full in every save", inside="full disk", first=(1,), told="could not be saved"),
    Fault("metrics can't be written", inside="failing logger", said="logger fails"),
    Fault(
        "run folder renamed",
        during=take_folder_away,
        after=put_folder_back,
        first=(0, 1),
        told="while the run was using it",
    ),
    Fault(
        "run folder renamed, two ranks",
        during=take_folder_away,
        after=put_folder_back,
        first=(0, 1),
        told="while the run was using it",
        world=2,
    ),
    Fault("metrics.jsonl removed", during=remove_metrics),
    Fault(
        "an old checkpoint moved and linked",
        before=lambda s: ask_for(s, trainer__max_ckpt_to_keep=2),
        during=link_oldest,
    ),
    Fault("things with the names of saves", before=leave_things),
    Fault("data cut short in mid-run", during=change_data, after=restore_data),
    Fault("clock going backwards", inside="clock"),
    Fault(
        "remote store fails midway",
        before=lambda s: ask_for(s, trainer__default_hdfs_dir=f"flaky://{s.out.with_name('far')}"),
        inside="flaky store",
        inside_then="store",
    ),
    Fault(
        "a save that never ends",
        before=lambda s: ask_for(s, trainer__watchdog_s=1),
        inside="hung save",
        first=(70,),
        told="A save hung",
    ),
    Fault(
        "folder in use",
        before=hold_folder,
        after=let_folder_go,
        inside="impatient",
        first=(1,),
        told="another run is writing there",
    ),
    Fault(
        "port in use", before=hold_port, after=let_port_go, first=(1,), told="MASTER_PORT", world=2
    ),
    Fault("checkpoint damaged", after=damage_checkpoint),
    Fault("token cache damaged", after=damage_cache),
    Fault("tracker damaged", after=damage_tracker),
    Fault(
        "tracker names no step",
        after=forget_steps,
        second=1,
        told_then="none to go on from",
        exact=False,
    ),
    Fault("metrics.jsonl torn", after=tear_metrics),
    Fault(
        "another seed",
        after=lambda s: ask_for(s, data__seed=7, trainer__total_training_steps=6),
        second=1,
        told_then="data.seed",
        exact=False,
    ),
    Fault(
        "another batch size",
        after=lambda s: ask_for(s, data__train_batch_size=2, trainer__total_training_steps=6),
        second=1,
        told_then="data.train_batch_size",
        exact=False,
    ),
    Fault(
        "a value of the wrong type",
        before=lambda s: ask_for(s, optim__lr="fast"),
        after=lambda s: s.keys.clear(),
        first=(1,),
        told="is not a number",
    ),
)
