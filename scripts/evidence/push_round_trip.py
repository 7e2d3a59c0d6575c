"""Pushes a run's adapter and merged model to a server on this machine, and gets them back, in both upload modes.

    python scripts/evidence/push_round_trip.py RUN BASE_ID

The server is the tests' own, which speaks the Hub's protocol; client and command are the real ones. A second push must
send nothing. What comes back into an empty cache is compared with what was pushed, file by file.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from fakes.hub_write_server import serve_hub  # noqa: E402

TOKEN = "hf_evidence"
GET = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1]))"


def main() -> None:
    """Both modes, both parts."""
    run, base = Path(sys.argv[1]).resolve(), sys.argv[2]
    for mode in ("lfs", "xet"):
        with serve_hub(token=TOKEN, lfs=mode == "lfs") as hub, tempfile.TemporaryDirectory() as cache:
            environment = {
                **os.environ,
                **{"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": cache, "HF_HUB_OFFLINE": "0"},
                "HF_HUB_DISABLE_XET": "1" if mode == "lfs" else "0",
            }
            for part in ("adapter", "merged"):
                where = [str(run), f"me/{part}", "--what", part, "--base-id", base, "--license", "apache-2.0"]
                for turn in ("first", "second"):
                    hub.forget()
                    start = time.monotonic()
                    subprocess.run([sys.executable, "-m", "qwen_tune", "push", *where], env=environment, check=True)
                    seconds = time.monotonic() - start
                    sent = sum(size for *_, size in hub.requests)
                    print(f"{mode}, {part}, {turn} push: {seconds:.1f} s, {sent:,} bytes in requests")
                    assert turn == "first" or not (hub.received("lfs") or hub.received("regular"))
                got = subprocess.run(
                    [sys.executable, "-c", GET, f"me/{part}"],
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                compare(run / part, Path(got.stdout.strip().splitlines()[-1]))


def compare(pushed: Path, got: Path) -> None:
    """Says how many files are the same; a weight file that is not ends the script."""
    same = [
        file.name
        for file in pushed.iterdir()
        if (got / file.name).is_file() and digest(file) == digest(got / file.name)
    ]
    weights = {file.name for file in pushed.glob("*.safetensors")}
    assert weights <= set(same), weights - set(same)
    print(f"  {len(same)} of {len(list(got.iterdir()))} files as they lay in {pushed.name}/, all weights among them")


def digest(file: Path) -> str:
    """sha256 as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


if __name__ == "__main__":
    main()
