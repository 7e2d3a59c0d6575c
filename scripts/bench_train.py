"""Training speed and memory of qwen-tune, TRL and Unsloth, in turns, on the same rows, bases and adapters.

    python scripts/bench_train.py --preset cpu
    python scripts/bench_train.py --preset gpu [--unsloth-site FOLDER] [--budget-seconds 480] [--out FILE]

Bases have the true shapes of Qwen2.5 and random weights, made here. Rows are random token ids with the lengths of
chats, the same for all sides, with loss on a little over half of them. Every side trains a LoRA of rank 16 (alpha 32,
no dropout) on all linear layers in a process of its own; a step has as nearly as a side allows the tokens of one pack.
Only real tokens count, not padding; the first steps do not, nor do loading and preparing rows. Speeds are medians over
three windows of steps and all rounds; the limit is that of the largest matrix product of this machine, measured first,
over the fewest operations that a token takes (`training_bench/shapes.py`).

Before the first step each side computes loss and gradient over the same few rows with the same adapters: a side that
differs from qwen-tune by more than the tolerance in any round gets no ratio, and one that trains other parameters, on
another share of labels, or under other checkpointing than the case says (`training_bench/fairness.py`). The exit code
is 1 then, as it is for a loss that is not finite and a gradient of zero. What was not run is in the result, with the
reason. Prints progress on stderr and one JSON line at the end; with --out also after every measurement, so that a run
that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training_bench.cases import COMPARED, PRESETS, SIDES, Case
from training_bench.fairness import TOLERANCES, probe_differences, unlike
from training_bench.rows import describe, draw_rows, labelled, write_rows
from training_bench.shapes import ALPHA, RANK, SHAPES, flops_per_token
from training_bench.sides import rows_needed, run_job

ROOT = Path(__file__).resolve().parent.parent
RESULT = "bench_train result: "
LONGEST_SECONDS = 300  # of one measurement
OVERTIME = 1.2  # what was begun within the budget is ended after so many times of it


def main() -> None:
    """Runs cases and sides in turns and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--rounds", type=int, help="times that every side is measured in a case")
    parser.add_argument("--budget-seconds", type=float, help="start nothing new after so many")
    parser.add_argument("--only", nargs="*", help="cases by name, such as '7b bfloat16 4096'")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=COMPARED)
    parser.add_argument("--unsloth-site", type=Path, help="folder of packages with Unsloth and what it wants")
    parser.add_argument("--work", type=Path, help="where bases are written (15 GB for 7b); default: TMPDIR")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(RESULT + json.dumps(run_job(json.loads(options.job))))
        return
    if options.preset is None:
        parser.error("--preset is needed")
    known = [case.name for case in PRESETS[options.preset].cases]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        bench = Bench(options, Path(folder))
        bench.run()
    print(json.dumps(bench.result))
    sys.exit(not bench.good())


class Bench:
    """One run: what is left of the budget, what was measured, and what was not."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.preset = PRESETS[options.preset]
        self.cases = [case for case in self.preset.cases if not options.only or case.name in options.only]
        self.rounds = options.rounds or self.preset.rounds
        self.budget = options.budget_seconds or self.preset.budget_seconds
        self.start = time.monotonic()
        self.measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.not_run: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.lengths: dict[str, tuple[list[int], int]] = {}
        self.machine: dict[str, Any] = {}
        self.result: dict[str, Any] = {}

    def run(self) -> None:
        """Round by round through all cases, as long as there is time."""
        try:
            self.machine = self.child({"do": "machine"})
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            sys.exit(f"the machine could not be looked at: {self.why(error, 'machine')}")
        cuda = not self.machine["device"].startswith("cpu")
        absent = self.absent(cuda)
        for side, reason in absent.items():
            self.not_run.append({"side": side, "reason": reason})
        sides = [side for side in self.options.sides if side not in absent]
        for number in range(1, self.rounds + 1):
            for case in self.cases:
                if cuda == (case.held == "float32"):
                    self.leave_out(case, "all", number, "needs a GPU" if not cuda else "is for a CPU")
                    continue
                for side in sides:
                    if any(entry["case"] == case.name and entry["side"] == side for entry in self.failed):
                        continue
                    if self.elapsed() > self.budget:
                        self.leave_out(case, side, number, f"the budget of {self.budget:.0f} s was used")
                        continue
                    self.measure(case, side, number)
                    self.write()
        self.write()

    def measure(self, case: Case, side: str, number: int) -> None:
        """One side of a case once."""
        began = self.elapsed()
        try:
            job = {"do": "measure", "side": side, "case": case.facts(), **self.files(case)}
            found = self.child(job, self.options.unsloth_site if side == "unsloth" else None)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            why = self.why(error, f"{case.name}-{side}".replace(" ", "-"))
            self.failed.append({"case": case.name, "side": side, "round": number, "why": why})
            self.say(f"{case.name}: {side} failed: {why}")
            return
        self.measured.setdefault(case.name, {}).setdefault(side, []).append(found)
        speed = statistics.median(found["tokens_per_second"])
        self.say(f"{case.name}: {side} {speed:,.0f} tokens/s, {self.elapsed() - began:.0f} s in all")

    def why(self, error: subprocess.CalledProcessError | subprocess.TimeoutExpired, name: str) -> str:
        """The line that says why a process failed; all that it said goes to a file beside --out."""
        text = error.stderr or ""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        if self.options.out:
            self.options.out.with_name(f"{self.options.out.stem}-{name}.log").write_text(text)
        if isinstance(error, subprocess.TimeoutExpired):
            return f"took more than {error.timeout:.0f} s"
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [str(error)]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupted)\b", line)]
        return (errors or lines)[-1][:300]

    def files(self, case: Case) -> dict[str, str]:
        """The base and the rows of a case, made when they are first needed."""
        base, rows = self.folder / case.shape, self.folder / f"{case.name.replace(' ', '-')}.jsonl"
        if not (base / "config.json").exists():
            self.child({"do": "base", "base": str(base), "shape": case.shape})
        if not rows.exists():
            drawn = draw_rows(case.length, rows_needed(case))
            write_rows(rows, drawn)
            self.lengths[case.name] = [len(row["input_ids"]) for row in drawn], labelled(drawn)
        return {"base": str(base), "rows": str(rows)}

    def child(self, job: Mapping[str, Any], site: Path | None = None) -> Any:
        """What a process of its own answers."""
        paths = [*([str(site)] if site else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
        if site:
            # Two versions of a library must not meet: of the other packages only the interpreter's own stay.
            paths.pop()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "QWEN_TUNE_CACHE": str(self.folder / "cache"),
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        }
        command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.folder,
            timeout=min(LONGEST_SECONDS, max(60, OVERTIME * self.budget - self.elapsed())),
        )
        [answer] = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        return json.loads(answer.removeprefix(RESULT))

    def absent(self, cuda: bool) -> dict[str, str]:
        """Sides that this machine cannot run, and why."""
        site = self.options.unsloth_site
        reasons = {}
        if not cuda:
            reasons |= dict.fromkeys(("trl-liger", "unsloth"), "runs on a GPU alone")
        if find_spec("liger_kernel") is None:
            reasons["trl-liger"] = "no package liger_kernel"
        if not (site and (site / "unsloth").is_dir()) and find_spec("unsloth") is None:
            reasons["unsloth"] = "no package unsloth; --unsloth-site names a folder that has it"
        return {side: reason for side, reason in reasons.items() if side in self.options.sides}

    def leave_out(self, case: Case, side: str, number: int, reason: str) -> None:
        """Notes what was not run."""
        self.not_run.append({"case": case.name, "side": side, "round": number, "reason": reason})

    def elapsed(self) -> float:
        """Seconds since this began."""
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        """Progress."""
        print(f"{self.elapsed():5.0f} s  {text}", file=sys.stderr, flush=True)

    def write(self) -> None:
        """The result so far."""
        self.result = {
            "preset": self.options.preset,
            "seconds": round(self.elapsed()),
            "machine": self.machine,
            "adapter": {"r": RANK, "alpha": ALPHA, "dropout": 0, "on": "all seven linear layers"},
            "sides": {side: SIDES[side] for side in self.options.sides},
            "cases": [self.summary(case) for case in self.cases if case.name in self.measured],
            "failed": self.failed,
            "not_run": self.not_run,
        }
        if self.options.out:
            self.options.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def summary(self, case: Case) -> dict[str, Any]:
        """Of a case: each side's medians and spread, and the ratios to qwen-tune."""
        lengths, labels = self.lengths[case.name]
        least = flops_per_token(SHAPES[case.shape], lengths, labels)
        limit = self.machine["ceiling_flops"] / least
        sides = {side: combined(found, limit) for side, found in self.measured[case.name].items()}
        ours = sides.get("ours")
        tolerances = TOLERANCES[case.held]
        ratios: dict[str, Any] = {}
        for side, other in sides.items():
            if ours is None or side == "ours":
                continue
            rounds = self.measured[case.name]["ours"], self.measured[case.name][side]
            other["probe_differs_by"] = probe_differences(*rounds)
            other["no_ratio_because"] = unlike(side, case.held, *rounds)
            memory = next(key for key in ("peak_allocated_bytes", "peak_rss_bytes") if key in ours)
            ratios[f"ours/{side}"] = (
                {
                    "speed": round(ours["tokens_per_second"] / other["tokens_per_second"], 3),
                    "memory": round(ours[memory] / other[memory], 3),
                }
                if not other["no_ratio_because"]
                else None
            )
        return {
            "case": case.name,
            **case.facts(),
            "rows": describe(case.length),
            "tokens_per_step_wanted": case.length,
            "flops_per_token": round(least),
            "limit_tokens_per_second": round(limit),
            "tolerances": {"loss": tolerances[0], "grad_norm": tolerances[1]},
            "sides": sides,
            "ratios": ratios,
        }

    def good(self) -> bool:
        """Whether something was measured, nothing failed, and all sides compute the same."""
        cases = self.result["cases"]
        agree = all(ratio is not None for case in cases for ratio in case["ratios"].values())
        return bool(cases) and agree and not self.failed


def combined(found: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Medians over windows and rounds; what is the same every time as it is."""
    speeds = [speed for one in found for speed in one["tokens_per_second"]]
    speed = statistics.median(speeds)
    peaks = {key: max(one[key] for one in found) for key in found[0] if key.startswith("peak_") and key != "peak_of"}
    return {
        **{key: round(value, 4) if isinstance(value, float) else value for key, value in found[0].items()},
        "tokens_per_second": round(speed, 1),
        "share_of_limit": round(speed / limit, 4),
        "spread": round((max(speeds) - min(speeds)) / speed, 3),
        "windows": [round(speed, 1) for speed in speeds],
        "rounds": len(found),
        **peaks,
    }


if __name__ == "__main__":
    main()
