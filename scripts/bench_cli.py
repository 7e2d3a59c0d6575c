"""Start-up times of the commands that must answer at once.

    .venv/bin/python scripts/bench_cli.py [--runs 7]

Prints one JSON line: the median wall time in seconds of whole processes, and the limit that each is held to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "help": (["--help"], 0.3),
    "train --help": (["train", "--help"], 0.3),
    "validate": (["validate", "recipes/quickstart.yaml"], 0.5),
}


def main() -> None:
    """Measures each command and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    result = {}
    for name, (arguments, limit) in COMMANDS.items():
        seconds = [wall_time(arguments) for _ in range(options.runs + 1)][1:]  # the first one warms the disk cache
        result[name] = {"median_s": round(statistics.median(seconds), 3), "limit_s": limit}
    print(json.dumps(result))


def wall_time(arguments: list[str]) -> float:
    """Seconds from start to end of one process."""
    command = [str(Path(sys.executable).with_name("qwen-tune")), *arguments]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
