"""Where the time of a training step goes: operations by their own time, and on a GPU how long it had nothing to do.

    python scripts/evidence/step_profile.py "0.5b bfloat16 4096" [--compiled] [--steps 3] [--top 25]

Trains qwen-tune on a case of `scripts/bench_train.py`, as that does, with torch's profiler on a few steps after the
warm-up. Profiling itself takes time, so speeds are `bench_train.py`'s. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from training_bench.cases import PRESETS  # noqa: E402
from training_bench.rows import draw_rows, probe_examples, read_records, write_rows  # noqa: E402
from training_bench.shapes import SHAPES  # noqa: E402
from training_bench.sides import build_base, rows_needed, train_ours, wait  # noqa: E402


def main() -> None:
    """Builds the base, trains, and prints where the time went."""
    cases = {case.name: case for preset in PRESETS.values() for case in preset.cases}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=cases)
    parser.add_argument("--compiled", action="store_true", help="with train.torch_compile")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=25)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    case = cases[options.case]
    with tempfile.TemporaryDirectory() as folder:
        base, rows = Path(folder) / "base", Path(folder) / "rows.jsonl"
        build_base(base, SHAPES[case.shape])
        write_rows(rows, draw_rows(case.length, rows_needed(case)))
        probe = probe_examples(read_records(rows), case.length)
        watcher = profiling(case.warm_up_steps, options.steps)
        train_ours(case, base, rows, probe, Path(folder), compiled=options.compiled, watcher=watcher)
    print(watcher.table(options.top))
    print(json.dumps({**vars(options), **watcher.facts()}))


def profiling(first: int, steps: int) -> Any:
    """A callback with the profiler on some steps after the first ones."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()

    class Profiling(TrainerCallback):
        def __init__(self) -> None:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            self.profile = profile(activities=kinds)
            self.seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait()
            if state.global_step == first:
                self.profile.start()
                self.seconds = -time.perf_counter()
            elif state.global_step == first + steps:
                self.seconds += time.perf_counter()
                self.profile.stop()

        def table(self, rows: int) -> str:
            key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
            return str(self.profile.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=60))

        def facts(self) -> dict[str, float | None]:
            events = self.profile.key_averages()
            busy = sum(event.self_device_time_total for event in events) / 1e6 if cuda else None
            return {
                "seconds_per_step": self.seconds / steps,
                "busy_share": busy and busy / self.seconds,
                "operations_per_step": sum(event.count for event in events) / steps,
            }

    return Profiling()


if __name__ == "__main__":
    main()
