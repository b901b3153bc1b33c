"""A short real training, measured by itself, and a small server that plays its record to the page.

The record is what the exporter would have said at each step: real losses and gradient norms of an MLP on
scikit-learn's digits, real phase times, real processor and memory figures, real checkpoint files.
"""

from __future__ import annotations

import copy
import io
import json
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import torch
from sklearn.datasets import load_digits

from obsinfra.catalog.alerts import BY_KEY
from obsinfra.catalog.metrics import LOST_CAUSES, PHASES
from obsinfra.monitoring.page import CONTENT_SECURITY_POLICY, asset

BATCH = 16
EPOCHS = 8
CHECKPOINT_EVERY = 150
WIDTH = 512
SERIES = (
    "step", "loss", "grad_norm", "learning_rate", "samples_per_second", "step_time_seconds",
    "cpu_ratio", "memory_ratio", "gpu_ratio", "gpu_memory_ratio",
)  # fmt: skip

Json = dict[str, Any]


@dataclass
class Record:
    """What the training left behind: one document per step, and the columns the documents share."""

    documents: list[Json] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in SERIES})
    validation: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.documents)


class _Clock:
    """Adds the wall time of a block to its phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._name, self._since = "other", time.perf_counter()

    def enter(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[self._name] += now - self._since
        self._name, self._since = name, now


def train_digits(folder: Path) -> Record:
    """Train for `EPOCHS` epochs and record every step; checkpoints are written below `folder`."""
    torch.manual_seed(7)
    process = psutil.Process()
    psutil.cpu_percent(), process.cpu_percent()
    record = Record()
    started = time.time()
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32) / 16
    targets = torch.tensor(labels)
    train_x, train_y, held_x, held_y = inputs[:1500], targets[:1500], inputs[1500:], targets[1500:]
    sizes = (64, WIDTH, WIDTH, WIDTH, 10)
    layers: list[torch.nn.Module] = []
    for inward, outward in pairwise(sizes):
        layers += [torch.nn.Linear(inward, outward), torch.nn.ReLU()]
    layers.pop()
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps_per_epoch = len(train_x) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps_per_epoch)
    startup = time.time() - started
    clock = _Clock()
    recent: deque[float] = deque(maxlen=50)
    sampled = 0.0
    checkpoints: list[Json] = []
    validation: dict[str, float] = {}
    host: Json = {}
    step = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(train_x))
        for batch in range(steps_per_epoch):
            began = time.perf_counter()
            clock.enter("data")
            rows = order[batch * BATCH : (batch + 1) * BATCH]
            x, y = train_x[rows], train_y[rows]
            clock.enter("forward")
            logits = model(x)
            loss = torch.nn.functional.cross_entropy(logits, y)
            clock.enter("backward")
            optimizer.zero_grad()
            loss.backward()
            clock.enter("optimizer")
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            clock.enter("other")
            step += 1
            took = time.perf_counter() - began
            recent.append(took)
            rate = BATCH * len(recent) / sum(recent)
            if step % CHECKPOINT_EVERY == 0:
                clock.enter("checkpoint")
                checkpoints.insert(0, _checkpoint(model, folder, step))
                clock.enter("other")
            if batch == steps_per_epoch - 1:
                clock.enter("validation")
                with torch.no_grad():
                    held = model(held_x)
                    validation = {
                        "loss": torch.nn.functional.cross_entropy(held, held_y).item(),
                        "accuracy": (held.argmax(1) == held_y).float().mean().item(),
                    }
                record.validation.append((step, validation))
                clock.enter("other")
            if time.time() - sampled > 0.25:
                sampled, host = time.time(), _host(process, folder)
            accuracy = (logits.argmax(1) == y).float().mean().item()
            uptime = time.time() - started
            productive = sum(clock.seconds[name] for name in ("forward", "backward", "optimizer"))
            lost = dict.fromkeys(LOST_CAUSES, 0.0)
            lost |= {name: clock.seconds[name] for name in ("data", "checkpoint", "validation")}
            lost |= {"startup": startup, "outside_step": clock.seconds["other"]}
            point = {
                "step": step, "loss": loss.item(), "grad_norm": norm.item(),
                "learning_rate": schedule.get_last_lr()[0], "samples_per_second": rate,
                "step_time_seconds": median(recent), "cpu_ratio": host["cpu_ratio"],
                "memory_ratio": host["memory_ratio"], "gpu_ratio": None, "gpu_memory_ratio": None,
            }  # fmt: skip
            record.time.append(time.time())
            for name, value in point.items():
                record.columns[name].append(value)
            latest = {name: point[name] for name in SERIES[1:6]} | {
                "loss_scale": 1.0, "validation": dict(validation), "train": {"accuracy": accuracy},
            }  # fmt: skip
            remaining = EPOCHS * steps_per_epoch - step
            record.documents.append(
                {
                    "now": time.time(),
                    "uptime_seconds": uptime,
                    "progress": {
                        "epoch": epoch, "epochs": EPOCHS, "step": step, "steps_per_epoch": steps_per_epoch,
                        "samples": step * BATCH, "eta_seconds": remaining * uptime / step,
                    },
                    "goodput": {"ratio": productive / uptime, "lost_seconds": lost},
                    "phases": dict(clock.seconds),
                    "latest": latest,
                    "host": dict(host),
                    "checkpoints": copy.deepcopy(checkpoints[:20]),
                }
            )  # fmt: skip
    identity = {
        "id": "digits-20260101-120000-beef", "model": "digits", "rank": 0, "world_size": 1,
        "host": os.uname().nodename, "device": "cpu", "precision": "fp32", "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(started)),
        "state": "running", "resumed_from_step": None,
    }  # fmt: skip
    for document in record.documents:
        document["run"] = dict(identity)
    return record


def _checkpoint(model: torch.nn.Module, folder: Path, step: int) -> Json:
    began = time.perf_counter()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    target = folder / f"step-{step}.pt"
    with target.open("wb") as file:
        file.write(buffer.getbuffer())
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    size = target.stat().st_size
    return {"step": step, "kind": "regular", "at": time.time(), "bytes": size, "seconds": seconds}


def _host(process: psutil.Process, folder: Path) -> Json:
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    return {
        "cpu_ratio": psutil.cpu_percent() / 100, "process_cpu_ratio": process.cpu_percent() / 100,
        "memory_ratio": used / memory.total, "memory_used_bytes": used, "memory_limit_bytes": memory.total,
        "resident_bytes": process.memory_info().rss, "disk_free_bytes": psutil.disk_usage(str(folder)).free,
    }  # fmt: skip


class Player:
    """Serves the page and plays a record: at any time the trainer has just finished `position` steps.

    Attributes:
        changes: laid over the next answers at top level, e.g. alerts, or another run's identity.
    """

    def __init__(self, record: Record, position: int) -> None:
        self._record = record
        self._lock = threading.Lock()
        self._position = position
        self._stride = 1
        self._generation_start = 0
        self.changes: Json = {}
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def start(self) -> None:
        """Begin to answer; after `stop` on the same port again."""
        player = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                player._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet: pytest shows what matters."""

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def stop(self) -> None:
        """The trainer is gone: its port refuses."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def advance(self, steps: int) -> None:
        with self._lock:
            self._position = min(len(self._record), self._position + steps)

    def halve(self) -> None:
        """The history has reached its bound: every second point goes, clients must begin again."""
        with self._lock:
            self._stride *= 2

    def document(self, since: int = 0) -> Json:
        """The answer of `/api/live?since=…`; the cursor carries the stride it was handed out under."""
        with self._lock:
            position, stride, changes = self._position, self._stride, copy.deepcopy(self.changes)
        cursor, known = divmod(since, 1_000_000)
        reset = since > 0 and cursor != stride
        first = known if since > 0 and not reset else 0
        rows = [row for row in range(first, position) if row % stride == 0]
        answer = copy.deepcopy(self._record.documents[position - 1])
        done = [entry for entry in self._record.validation if entry[0] <= position]
        answer |= {
            "version": 1,
            "alerts": [],
            "alert_mode": "in-process",
            "commands": [],
            "gpus": [],
            "thresholds": {key: alert.threshold for key, alert in BY_KEY.items()},
            "series": {"time": [self._record.time[row] for row in rows]}
            | {name: [column[row] for row in rows] for name, column in self._record.columns.items()},
            "validation_series": {
                "step": [step for step, _ in done],
                "metrics": {name: [values[name] for _, values in done] for name in ("loss", "accuracy")},
            },
            "next": stride * 1_000_000 + position,
            "reset": reset,
        }
        for key, value in changes.items():
            answer[key] = answer[key] | value if isinstance(value, dict) else value
        return answer

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        if parts.path == "/api/live":
            since = int(parse_qs(parts.query).get("since", ["0"])[0])
            found = json.dumps(self.document(since)).encode(), "application/json"
        else:
            found = asset(parts.path) or (b"", "")
        body, content_type = found
        request.send_response(200 if content_type else 404)
        request.send_header("Content-Type", content_type or "text/plain")
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        request.end_headers()
        request.wfile.write(body)
