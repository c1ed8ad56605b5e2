"""Every row tokenised once, up front, into flat arrays that all ranks then map into memory.

The folder is named by everything its content depends on, so a second run, or the other ranks of
this one, only open it:
  tokens.bin int32 [N]   ids of all samples end to end          lengths.npy int32 [n]   tokens of each sample
  mask.bin   bool  [N]   True where the token is trained        trained.npy int32 [n]   trained tokens of each
  report.json            what was kept, cut, dropped; hashes    rows.npy    int32 [n,2] (file, row) it is from

A folder that isn't as it was written (`integrity`) is made again, and a note says so.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from retool.batch import Sample
from retool.config.redact import logger
from retool.data.integrity import (
    BackgroundCheck,
    checked_by_this_run,
    damage,
    is_small,
    read_report,
    seal,
)
from retool.data.read.files import file_identity
from retool.data.read.refused_rows import RefusedRows
from retool.data.read.source import RowSource
from retool.data.render.renderer import Renderer
from retool.data.tokenise import (
    DatasetReport,
    LengthLimit,
    Tokenised,
    map_chunks,
    tokenise_chunk,
)

SCANNED_TOKENS = 1 << 22  # at a time
SECONDS_TO_WAIT_UNSAID = 5.0  # for a lock
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

log = logger("retool.data")


class Dataset:
    """Tokenised samples in memory-mapped files.

    `lengths` and `trained` int32 [n]; index it for a `Sample`.
    """

    def __init__(self, folder: Path, check: BackgroundCheck | None = None) -> None:
        self.folder = folder
        self._check = check
        self.lengths: np.ndarray = np.load(folder / "lengths.npy")
        self.trained: np.ndarray = np.load(folder / "trained.npy")
        self._rows: np.ndarray = np.load(folder / "rows.npy", mmap_mode="r")
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        # Mapped, not read: all processes of a machine share the pages, and only samples in use take
        # memory.
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r")
        self._mask = np.memmap(folder / "mask.bin", np.bool_, "r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = slice(int(self._ends[index] - self.lengths[index]), int(self._ends[index]))
        # Copies: a view would read from the disk later, in the thread that packs, or when the file
        # is gone.
        return Sample(np.array(self._tokens[part]), np.array(self._mask[part]))

    def find_id(self, at_least: int) -> tuple[int, int] | None:
        """(sample, token id) of the first token whose id is `at_least` or more.

        Reads all tokens, a few million at a time.
        """
        for start in range(0, len(self._tokens), SCANNED_TOKENS):
            part = self._tokens[start : start + SCANNED_TOKENS]
            places = np.flatnonzero(part >= at_least)
            if len(places):
                place = start + int(places[0])
                return int(np.searchsorted(self._ends, place, "right")), int(self._tokens[place])
        return None

    def problem(self) -> str | None:
        """What a comparison in the background has found to be wrong, in words for the user."""
        return self._check.problem if self._check is not None else None

    def origin(self, index: int) -> tuple[int, int]:
        """(index into the report's files, row) of a sample."""
        return int(self._rows[index, 0]), int(self._rows[index, 1])


def default_cache_dir() -> Path:
    """The user's cache folder, or a temporary one where none can be written.

    Raises ValueError where that is another user's.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # in containers: no HOME, and no entry in /etc/passwd
        return _own_temporary()
    # Not Path.exists, which raises where a folder above may not be looked into
    there = next(folder for folder in (home, *home.parents) if os.path.exists(folder))
    return home / "retool" if os.access(there, os.W_OK) else _own_temporary()


def _own_temporary() -> Path:
    """A folder below /tmp that nobody else can write.

    Its name can be guessed, so another user may have made it, or a link there.
    """
    folder = Path(tempfile.gettempdir()) / f"retool-{os.getuid()}"
    way_out = "Give another place for the tokenised data: data.cache_dir=/a/folder/of/yours."
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ValueError(
            f"{folder} can't be made ({error.strerror or error}). {way_out}"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(
            f"{folder} is another user's, or a link: what is read from there could be anybody's. {way_out}"
        )
    if found.st_mode & 0o022:
        raise ValueError(
            f"{folder} can be written by other users. chmod 700 {folder}, or: {way_out}"
        )
    return folder


def open_dataset(
    rows: RowSource,
    renderer: Renderer,
    limit: LengthLimit | None = None,
    *,
    num_workers: int | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Dataset, DatasetReport]:
    """Tokenise the rows (or find them tokenised) and map them.

    Ranks may call it together: one of them works. `progress` is called with the number of rows
    done. Raises ValueError, with the first refused rows, when any row can't be used, a column or
    file is missing, or nothing is left to train.
    """
    limit = limit or LengthLimit()
    rows.check_columns()
    folder = Path(cache_dir or default_cache_dir()) / _name(rows, renderer, limit)
    _make(folder.parent)
    with _alone(folder):
        comparing = _is_whole(folder) and _to_compare(folder)
        if not folder.exists():  # never made, or damaged
            task = partial(tokenise_chunk, renderer=renderer, form=rows.form, limit=limit)
            with closing(map_chunks(task, rows.chunks(), num_workers)) as parts:
                _build(folder, rows.paths, parts, progress or (lambda _: None))
            checked_by_this_run(folder)
        report = read_report(folder)["report"]
        said = DatasetReport(**{**report, "files": tuple(report["files"])})
        return Dataset(folder, BackgroundCheck(folder) if comparing else None), said


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache. If another process holds it for long, that is said.

    That process may be another rank of this run, or another run with the same rows.
    """
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=SECONDS_TO_WAIT_UNSAID)
    except Timeout:
        log.warning("note: another process is making the token cache %s: waiting for it.", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _name(rows: RowSource, renderer: Renderer, limit: LengthLimit) -> str:
    """The name of a cache: a hash of everything that its content depends on."""
    rendering = renderer.rendering
    choices = repr((limit, rendering.history, rendering.inline_outputs))
    identity = [*rows.identity(), renderer.fingerprint(), choices, _code()]
    return hashlib.sha256("\0".join(identity).encode()).hexdigest()[:32]


def _is_whole(folder: Path) -> bool:
    """Whether a cache is there, with files of the right sizes.

    A damaged one is said, and renamed out of the way.
    """
    if not os.path.lexists(folder):
        return False
    wrong = damage(folder, everything=False)
    if wrong is not None:
        _discard(folder, wrong)
    return wrong is None


def _to_compare(folder: Path) -> bool:
    """Whether a cache is still to be compared, in the background, with what was written.

    Where that is quick it is done here, once a run.
    """
    if checked_by_this_run(folder):
        return False
    if not is_small(folder):
        return True
    wrong = damage(folder, everything=True)
    if wrong is not None:
        _discard(folder, wrong)
    return False


def _discard(folder: Path, wrong: str) -> None:
    # Not a warning: those of other ranks than the first aren't shown, and any rank may be the one
    # that looks.
    log.error("note: the token cache %s is damaged (%s). It is made again.", folder, wrong)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_building(folder)))
    folder.rename(aside / "damaged")
    shutil.rmtree(aside, ignore_errors=True)


def _building(folder: Path) -> str:
    """What the names of this cache's unfinished folders begin with."""
    return f"building-{folder.name}-"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={folder} can't be written ({error.strerror or error}): choose another "
            "data.cache_dir."
        ) from error


def _code() -> str:
    """Version of everything that decides about tokens: this package's sources and the libraries'."""
    import tokenizers
    import transformers

    sources = [
        path.read_bytes()
        for path in sorted(Path(__file__).parent.rglob("*.*"))
        if path.suffix in (".py", ".jinja")
    ]
    return f"{hashlib.sha256(b''.join(sources)).hexdigest()}:{transformers.__version__}:{tokenizers.__version__}"


def _build(
    folder: Path, files: Sequence[str], parts: Iterable[Tokenised], progress: Callable[[int], None]
) -> None:
    """Tokenise into a folder aside, which gets the cache's name once everything is on disk.

    The caller holds the cache's lock.
    """
    # Left by a process that was killed. Under the lock nobody else is building, so none is in use.
    for torn in folder.parent.glob(f"{_building(folder)}*"):
        shutil.rmtree(torn, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_building(folder)))
    before = [*map(file_identity, files)]
    try:
        report = _write(work, list(files), parts, progress)
        for file, then in zip(files, before, strict=True):
            if file_identity(file) != then:
                raise ValueError(
                    f"{file} changed while it was read. Start again once nobody writes to it."
                )
        seal(work, asdict(report))
        work.rename(folder)
    except OSError as error:
        if error.errno in NO_ROOM:
            way_out = "make room, or choose another data.cache_dir"
            raise ValueError(
                f"data.cache_dir={folder.parent} can't be written ({error.strerror}): {way_out}."
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(
    work: Path, files: list[str], parts: Iterable[Tokenised], progress: Callable[[int], None]
) -> DatasetReport:
    report = DatasetReport(files=tuple(files))
    refusals = RefusedRows()
    # Flat arrays: of a million rows, lists of Python's own numbers take a quarter of a gigabyte
    lengths = array("i")
    trained = array("i")
    rows = array("i")
    places = {file: number for number, file in enumerate(files)}
    content = hashlib.blake2b(digest_size=16)
    with open(work / "tokens.bin", "wb") as tokens, open(work / "mask.bin", "wb") as masks:
        for part in parts:
            for sample in part.samples:
                ids = sample.tokens.tobytes()
                mask = sample.mask.tobytes()
                tokens.write(ids)
                masks.write(mask)
                # With its length, so that no two ways of cutting the same tokens into samples have
                # one hash.
                content.update(len(sample).to_bytes(8, "little") + ids + mask)
            lengths.extend(len(sample) for sample in part.samples)
            trained.extend(sample.trained for sample in part.samples)
            for file, row in part.rows:
                rows.extend((places[file], row))
            for why in part.refusals:
                refusals.add(why)
            report.add(part.report)
            progress(report.rows)
    if refusals.count:
        raise refusals.error(report.rows)
    if not lengths:
        raise ValueError(
            f"no sample is left of {', '.join(files)}: {report.sentence()}. {report.ways_out()}"
        )
    np.save(work / "lengths.npy", np.asarray(lengths, np.int32))
    np.save(work / "trained.npy", np.asarray(trained, np.int32))
    np.save(work / "rows.npy", np.asarray(rows, np.int32).reshape(-1, 2))
    report.content = content.hexdigest()
    return report
