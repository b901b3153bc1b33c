"""moto's S3 server as a process of its own, to be killed and started again at the same address."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from typing import Any

from waiting import wait_for


class S3Server:
    """Empty at each start. `s3` is the address of a bucket's prefix, `options` are what fsspec needs."""

    def __init__(self) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port: int = found.getsockname()[1]
        self.options: dict[str, Any] = {
            "key": "testing",
            "secret": "testing",
            "endpoint_url": f"http://127.0.0.1:{self.port}",
            "client_kwargs": {"region_name": "us-east-1"},
            "config_kwargs": {"connect_timeout": 2, "read_timeout": 20, "retries": {"max_attempts": 0}},
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, bucket: str) -> None:
        """Start it, with an empty bucket."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
        )
        wait_for(lambda: self._answers("GET", "/"), "moto's server answers")
        assert self._answers("PUT", f"/{bucket}")

    def kill(self) -> None:
        """As a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self, method: str, path: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
