"""The figures of a run as TensorBoard events (--log tensorboard), beside metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Events:
    """`add(record)` writes the numbers of a step. Raises ImportError without tensorboard."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError("--log tensorboard needs TensorBoard: pip install tensorboard.") from error
        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        self.writer = EventFileWriter(str(folder / "tensorboard"))

    def add(self, record: dict[str, Any]) -> None:
        values = [self.summary.Value(tag=k, simple_value=v) for k, v in record.items() if k != "step" and v is not None]
        self.writer.add_event(self.event(step=record["step"], summary=self.summary(value=values)))

    def close(self) -> None:
        self.writer.close()
