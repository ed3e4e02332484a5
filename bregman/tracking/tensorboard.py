"""TensorBoard scalars, written event by event.

Owns the event files of one stage. Uses the record format of the `tensorboard` package without its background thread, so that a disk
error surfaces in the call that met it, and without torch's writer, which imports far more.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from bregman.tracking.disk import disk_errors


class EventWriter:
    """Appends scalars to a new event file in `folder`.

    Each stage has a folder (a TensorBoard "run") of its own: TensorBoard's purge on resume drops every tag of a run from a step on,
    which would take the other stages' curves with it.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
            self._file = open(folder / name, "ab")  # noqa: SIM115
            self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(session_log=start, step=first_step)  # what an earlier process wrote from this step on is void

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of one step, by tag.

        Raises:
            UserError: no space, or not writable.
        """
        value = [self._summary.Value(tag=tag, simple_value=number) for tag, number in values.items()]
        self._write(summary=self._summary(value=value), step=step)

    def close(self) -> None:
        with disk_errors(self._folder):
            self._file.close()

    def _write(self, **fields: object) -> None:
        with disk_errors(self._folder):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._records.flush()
