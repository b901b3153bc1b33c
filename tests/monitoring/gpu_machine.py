"""A machine with GPUs for tests: a compiled fake NVML, and a process that samples it as a trainer would.

The process loads the library exactly as on a real machine: pynvml asks the loader for `libnvidia-ml.so.1`,
and LD_LIBRARY_PATH decides which one that is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAMPLING_PROCESS = """
import json, sys
from obsinfra.monitoring.gpu_sampler import create_gpu_sampler
sampler = create_gpu_sampler()
for line in sys.stdin:
    try:
        what, _, code = line.strip().partition(" ")
        if what == "sample":
            said = [[metric.name, dict(labels), value] for metric, labels, value in sampler.sample()]
        elif what == "describe":
            said = sampler.describe()
        elif what == "state":
            said = {"reason": sampler.reason, "errors": sampler.errors, "torch": "torch" in sys.modules}
        elif what == "close":
            said = sampler.close()
        elif what == "run":
            said = exec(json.loads(code))
    except BaseException as error:
        said = {"raised": repr(error)}
    print(json.dumps(said), flush=True)
"""


def build_nvml(folder: Path, *flags: str) -> Path:
    """Compile the stand-in into `folder`, which is made."""
    source = Path(__file__).parent / "fake_nvml" / "fake_nvml.c"
    folder.mkdir()
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags, "-o", library, source],
        check=True,
        timeout=120,
    )
    return folder


class GpuMachine:
    """GPUs as `fake_nvml.c` tells of them, and one process sampling them.

    Args:
        folder: for the machine's state.
        library: folder with `libnvidia-ml.so.1`.
        environment: further variables of the process.
        state: the machine's first state.
    """

    def __init__(
        self, folder: Path, library: Path, environment: Mapping[str, str], state: Mapping[str, Any]
    ) -> None:
        self._file = folder / "nvml_state"
        self._state: dict[str, Any] = {}
        self.set(state)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SAMPLING_PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **inherited,
                "LD_LIBRARY_PATH": str(library),
                "FAKE_NVML_STATE": str(self._file),
                **environment,
            },
        )

    def set(self, changes: Mapping[str, Any]) -> None:
        """Change readings; None takes one away."""
        self._state.update(changes)
        lines = [f"{key} {value}\n" for key, value in self._state.items() if value is not None]
        new = self._file.with_suffix(".new")
        new.write_text("".join(lines))
        new.replace(self._file)

    def ask(self, what: str) -> Any:
        """`sample`, `describe`, `state`, `close` or `run CODE` in the process; what it answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the sampling process ended: {self._process.wait()}"
        answer = json.loads(line)
        assert not (isinstance(answer, dict) and "raised" in answer), answer
        return answer

    def run(self, code: str) -> None:
        """Execute Python in the process."""
        self.ask(f"run {json.dumps(code)}")

    def values(self) -> dict[tuple[str, ...], float]:
        """One sample: (metric without prefix, label values…) → value."""
        return {
            (name.removeprefix("obsinfra_"), *labels.values()): value
            for name, labels, value in self.ask("sample")
        }

    def end(self) -> str:
        """End the process; what it wrote to stderr."""
        _, said = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, said
        return said
