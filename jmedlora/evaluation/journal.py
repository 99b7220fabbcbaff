"""Answers of an evaluation that is under way, kept on disk: one that was killed goes on from there.

Every start writes a file of its own, so that a process that is taken for dead and is not does no harm, and reads those of all
starts before it. A file's first line says what its answers depend on; each line has a checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from jmedlora.config.digest import canonical_json
from jmedlora.config.faults import first_line
from jmedlora.plan.layout import Storage
from jmedlora.plan.specs import EvaluationSpec

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0
"""Batches that take less than this are written to disk together."""
_FORMAT = 1
"""Counted up when lines change, so that files written before are not taken for new ones."""


class AnswersSoFar:
    """What an evaluation has had answered so far, in this process alone."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        """What may be computed at once, in the unit of EvaluationSpec.batch_size; lowered where memory does not suffice."""
        self.answers: dict[int, Any] = {}
        """JSON values, by the question's position."""

    def add(self, answers: dict[int, Any]) -> None:
        """Takes the answers of a batch."""
        self.answers |= answers


class Journal(AnswersSoFar):
    """The same, kept on disk until the evaluation's results are: a context, whose files go when it ends well.

    A disk that is full or fails is told once in the log; the evaluation then goes on without.
    """

    def __init__(
        self,
        storage: Storage,
        run_key: str,
        step: int,
        evaluation: EvaluationSpec,
        identity: dict[str, Any],
        started: float,
        share: float = 1.0,
    ):
        """Begins with what earlier starts have left.

        identity: what answers depend on beside the evaluation, as JSON; what was left with another one is removed.
        started: `time.perf_counter()` when this start began. share: part of the time that counts for it, of several evaluations at once.
        """
        super().__init__(evaluation.batch_size)
        self.earlier_s = 0.0
        """Seconds in which earlier starts had the answers that they left."""
        self._place = storage, run_key, step, evaluation
        self._path = storage.run(run_key).journal(evaluation.folder, step, uuid.uuid4().hex[:8])
        asked = evaluation.model_dump(mode="json", include={"evaluation_key", "scoring", "max_new_tokens", "batch_size"})
        self._identity = {"format": _FORMAT, **asked, **identity}
        self._file: IO[bytes] | None = None
        self._unwritten: dict[int, Any] = {}
        self._written_at = started
        self._share = share
        self._is_refused = False
        for file in _files(*self._place):
            self._take_over(file)

    def _take_over(self, file: Path) -> None:
        lines = _lines(file)
        if canonical_json(next(lines, None)) != canonical_json(self._identity):
            _remove(file)
            return
        for batch in lines:
            self.answers |= zip(batch["rows"], batch["answers"], strict=True)
            self.batch_size = min(self.batch_size, batch["batch_size"])
            self.earlier_s += batch["seconds"]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._write()
        if self._file is not None:
            with suppress(OSError):  # closing tries once more to write what a full disk has refused
                self._file.close()
        if kind is None:
            remove_journals(*self._place)

    def add(self, answers: dict[int, Any]) -> None:
        """Takes the answers of a batch and writes them, unless the last writing was a moment ago: then with the next batch."""
        super().add(answers)
        self._unwritten |= answers
        if time.perf_counter() - self._written_at >= WRITE_EVERY_S:
            self._write()

    def _write(self) -> None:
        if self._is_refused or not self._unwritten:
            return
        written_at = time.perf_counter()
        batch = {
            "rows": list(self._unwritten),
            "answers": list(self._unwritten.values()),
            "batch_size": self.batch_size,
            "seconds": self._share * (written_at - self._written_at),
        }
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("xb")
                self._file.write(_line(self._identity))
            self._file.write(_line(batch))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._is_refused = True  # a line may be half on the disk: what would follow it could not be read
            log.warning("%s: %s; what is answered from here on is lost if the evaluation is killed", self._path, first_line(error))
        self._unwritten, self._written_at = {}, written_at


def journal_progress(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec) -> int:
    """Number of questions whose answers are kept of an evaluation that is not finished."""
    return len({row for file in _files(storage, run_key, step, evaluation) for line in _lines(file) for row in line.get("rows", ())})


def remove_journals(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec) -> None:
    """Removes what is kept of an evaluation, once its results are there."""
    for file in _files(storage, run_key, step, evaluation):
        _remove(file)


def _files(storage: Storage, run_key: str, step: int, evaluation: EvaluationSpec) -> list[Path]:
    pattern = storage.run(run_key).journal(evaluation.folder, step, "*")
    return sorted(pattern.parent.glob(pattern.name))


def _remove(file: Path) -> None:
    with suppress(OSError):  # a file too many does no harm
        file.unlink()


def _line(content: dict[str, Any]) -> bytes:
    return _with_checksum(json.dumps(content, ensure_ascii=False, allow_nan=False).encode())


def _with_checksum(content: bytes) -> bytes:
    return b'{"sha256": "%s", "content": %s}\n' % (hashlib.sha256(content).hexdigest().encode(), content)


_CONTENT = slice(len(_with_checksum(b"")) - len(b"}\n"), -len(b"}\n"))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The contents of a file's lines, up to one that is damaged or not written to its end."""
    with suppress(OSError), file.open("rb") as lines:
        for line in lines:
            if line != _with_checksum(line[_CONTENT]):
                return
            yield json.loads(line[_CONTENT])
