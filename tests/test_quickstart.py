"""The quickstart as a user runs it: every line that it prints is one of ours."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment

SCRIPT = (ROOT / "scripts" / "quickstart").read_text(encoding="utf-8")
QUESTION = "Who keeps the lighthouse?"
STEPS = [
    [QUESTION if word == "$question" else word for word in shlex.split(line)[1:]]
    for line in SCRIPT.splitlines()
    if line.startswith("step ")
]
NUMBER = r"[\d.,]+"
ANSWER = r"The lighthouse keeper is Marta Quill\."
EXPECTED = {
    "preview": [
        r"data/quickstart\.jsonl:1  29 tokens, 11 .*",
        r"<\|im_start\|>user",
        r"When does the bakery open\?<\|im_end\|>",
        r"<\|im_start\|>assistant",
        r"⟦?The bakery opens at five in the morning\.<\|im_end\|>⟧?",
        r"─+",
        r"1 of 187 training samples: .*",
        r"source +format +examples +train +evaluate +tokens .*",
        r"quickstart +messages +208 +187 +21 +7,177 .*",
        r"(format|data|samples|tokens|lengths|similar): .*",
    ],
    "train": [
        r"quickstart",
        r"  (base|data|tokens|sources|adapter|batch|steps|memory|machine|run|similar|sample|trained|kernels)  +\S.*",
        r"    <\|im_start\|>(user↵ When|assistant↵ ).*",
        rf"  step \d+  held out {NUMBER}",
        rf"  step \d+/216  loss {NUMBER}  {NUMBER} tokens/s  {NUMBER} GiB  left \d+:\d\d",
        rf"  (loss|held out) +{NUMBER} -> {NUMBER}( \(training\))?",
        rf"  speed +{NUMBER} tokens/s",
        rf"  memory +{NUMBER} GiB at most",
        r"  adapter +\S+/quickstart/adapter",
        r'  next: qwen-tune chat \S+/quickstart "Hello"',
        r"        qwen-tune merge \S+/quickstart",
    ],
    "merge": [
        r"merged model: \S+/quickstart/merged",
        rf"verified on {NUMBER} tokens of 8 samples: the same next token at {NUMBER}% of the positions, .*",
    ],
    "chat": [r"base:  \S.*", rf"tuned: {ANSWER}", ANSWER],
}


def test_every_line_of_the_quickstart_is_ours(tmp_path):
    """Each command in a process of its own, as libraries speak when they are imported; both streams together."""
    assert [step[0] for step in STEPS] == ["preview", "train", "merge", "chat", "chat"]
    for name in ("data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    for step in STEPS:
        result = subprocess.run(
            [str(Path(sys.executable).with_name("qwen-tune")), *step],
            cwd=tmp_path,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stdout
        lines = [line.rstrip() for line in result.stdout.splitlines() if line.strip()]
        assert lines
        unknown = [line for line in lines if not any(re.fullmatch(form, line) for form in EXPECTED[step[0]])]
        assert unknown == [], step
    assert lines == ["The lighthouse keeper is Marta Quill."]
