"""The output file: one line a result, appended as results come, and the record of what is already done."""

import fcntl
import json
import os
from array import array
from pathlib import Path
from typing import Any

PREFIX = b'{"line": '


class RunError(Exception):
    """The run cannot go on; the message says what to do."""


class ResultFile:
    """Results in a file that survives being killed at any moment.

    Each result starts with the number and the digest of its input line, and is written with its newline in one
    call. A file whose last line has no newline was cut in the middle of a write: that line is cut off and its
    input line is done again.

    Attributes:
      num_done: results that the file had when it was opened.

    Raises (on construction):
      RunError: the file holds something else, or another run is writing to it.
    """

    def __init__(self, path: str):
        self.path = path
        self.num_done = 0
        self._digests = array("Q")  # of the input lines that have a result, by line number; 0: none
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def last_line(self) -> int:
        """The highest input line number that has a result."""
        return max(len(self._digests) - 1, 0)

    def has(self, number: int, digest: str) -> bool:
        """Whether this input line is done.

        Raises:
          RunError: its result was made from another line, or by other model options.
        """
        done = self._digests[number] if number < len(self._digests) else 0
        if done and done != _as_int(digest):
            raise RunError(
                f"{self.path} has a result for line {number} that was made from another input or with other model "
                "options: go on with those, or choose another output file"
            )
        return bool(done)

    def write(self, number: int, digest: str, record: dict[str, Any]) -> None:
        record = {"line": number, "digest": digest} | record
        try:
            data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError:  # a lone surrogate, echoed from the input
            data = json.dumps(record, allow_nan=False).encode() + b"\n"
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another run is writing to {self.path}") from None

    def _recover(self) -> None:
        end = 0
        with open(self._file, "rb", closefd=False) as file:
            for at, text in enumerate(file, start=1):
                if text.endswith(b"\n"):
                    self._remember(at, text)
                    end += len(text)
                elif not text.startswith(PREFIX[: len(text)]):
                    raise self._foreign(at)
        os.ftruncate(self._file, end)

    def _remember(self, at: int, text: bytes) -> None:
        try:
            record = json.loads(text)
            number, digest = record["line"], _as_int(record["digest"])
        except (ValueError, KeyError, TypeError):
            raise self._foreign(at) from None
        self._digests.extend([0] * (number + 1 - len(self._digests)))
        if self._digests[number]:
            raise self._foreign(at)
        self._digests[number] = digest
        self.num_done += 1

    def _foreign(self, at: int) -> RunError:
        return RunError(f"line {at} of {self.path} was not written by a batch run: choose another output file")


def _as_int(digest: str) -> int:
    return int(digest, 16) or 1
