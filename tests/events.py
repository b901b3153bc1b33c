"""What the package logs to its `system` channel while a block runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obsinfra.monitoring.logging_config import configure_logging, shutdown_logging


@contextmanager
def captured_events() -> Iterator[list[dict[str, Any]]]:
    """A list that has every event at the end of the block, of whatever level and thread."""
    events: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        configure_logging(Path(folder), level="debug", terminal=False)
        try:
            yield events
        finally:
            shutdown_logging()
            lines = (Path(folder) / "system.jsonl").read_text().splitlines()
            events.extend(json.loads(line) for line in lines)
