"""The long version of tests/faults/test_kills.py: SIGKILL trainer, writer or both, 2,000 times.

    python benchmarks/torture_checkpoint.py [--kills 2000] [--seed 0] [--folder DIR]

After every kill the newest checkpoint verifies, no more than promised is lost, and its state is bit for bit
that of a run that nobody disturbed; the next round resumes from it. Ends with 1 at the first kill after which
that is not so, and leaves the folder for a look. Ctrl-C or SIGTERM ends it early, with the figures so far.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "faults"))

from killing_spree import COMMIT_EVERY, SNAPSHOT_EVERY, Spree, Victim

VICTIMS: tuple[Victim, ...] = ("trainer", "writer", "trainer", "both")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to use; a temporary one")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=arguments.folder))
    spree = Spree(folder, arguments.seed)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had it ignored, in the background
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    print(f"{arguments.kills} kills, seed {arguments.seed}, in {folder}; load {os.getloadavg()[0]:.1f}")
    print(f"a snapshot every {SNAPSHOT_EVERY} steps, a commit every {COMMIT_EVERY}", flush=True)
    try:
        for number in range(arguments.kills):
            victim = VICTIMS[number % len(VICTIMS)]
            try:
                spree.kill(victim)
            except AssertionError as error:
                print(f"kill {number + 1}, of {victim}: {error}")
                return 1
            if (number + 1) % 100 == 0:
                print(f"{number + 1} kills, {time.monotonic() - began:.0f} s", flush=True)
    except KeyboardInterrupt:
        print(f"ended after {spree.kills.total()} kills, {time.monotonic() - began:.0f} s")
    for name, times in sorted(spree.kills.items()):
        lost = [steps for whom, steps in spree.lost if whom == name]
        middle = statistics.median(lost)
        print(f"{name:<8} killed {times} times; steps lost: median {middle:g}, most {max(lost)}")
    print("every newest checkpoint verified, and was what an uninterrupted run has")
    return 0


if __name__ == "__main__":
    sys.exit(main())
