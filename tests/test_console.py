"""Output without a terminal: in a log file, to a reader that closes the pipe, on a stream with a small encoding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import environment

from qwen_tune.console import shown_path


def command(*arguments: str, cwd: Path, lines: int | None = None, **changes: str) -> tuple[int, list[str], str]:
    """Runs a command without a terminal: exit code, lines of output, and standard error.

    With `lines`, the reader closes the pipe after that many.
    """
    settings = {**environment(**changes)}
    del settings["COLUMNS"]
    words = [str(Path(sys.executable).with_name("qwen-tune")), *arguments]
    with subprocess.Popen(
        words, cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdout
        assert process.stderr
        if lines is None:
            output, errors = process.communicate()
        else:
            output = "".join(process.stdout.readline() for _ in range(lines))
            process.stdout.close()
            errors = process.stderr.read()
    return process.returncode, output.splitlines(), errors


def test_characters_that_a_stream_cannot_encode_are_replaced(workspace):
    """Also in an error, which contains the recipe's name."""
    few = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, output, errors = command("preview", "recipe.yaml", "--rows", "1", cwd=workspace, **few)
    assert (code, errors) == (0, "")
    assert "[[The bakery opens at five in the morning.<|im_end|>]]" in output
    code, _, errors = command("preview", "größe.yaml", cwd=workspace, **few)
    assert code == 2
    assert "does not exist" in errors
    assert "Traceback" not in errors


def test_a_reader_that_closes_the_pipe_early_is_not_an_error(workspace):
    row = (workspace / "rows.jsonl").read_text().splitlines()[0]
    (workspace / "rows.jsonl").write_text(f"{row}\n" * 5000)  # far more than a pipe holds
    shown = ("recipe.yaml", "data.eval=null", "--all")
    for form in ([], ["--json"]):
        code, output, errors = command("preview", *shown, *form, cwd=workspace, lines=1)
        assert (code, len(output), errors) == (0, 1, "")


def test_training_continues_when_nobody_reads_its_output_any_more(workspace):
    code, output, errors = command("train", "recipe.yaml", cwd=workspace, lines=1)
    assert (code, output, errors) == (0, ["small"], "")
    assert json.loads((workspace / "runs" / "small" / "run.json").read_text())["state"] == "finished"


def test_a_log_file_has_unwrapped_lines_and_relative_paths(workspace):
    deep = workspace / "a-folder-with-a-rather-long-name" / "and-another-one-inside-it-that-is-long-as-well"
    deep.mkdir(parents=True)
    name = f"run.dir={deep.relative_to(workspace)}/run"
    code, output, errors = command("train", "recipe.yaml", name, "export.merge=true", cwd=workspace)
    assert (code, errors) == (0, "")
    shown = deep.relative_to(workspace)
    assert f"  run      {shown}/run" in output
    assert f"  adapter   {shown}/run/adapter" in output
    assert f'  next: qwen-tune chat {shown}/run "Hello"' in output
    assert not any(str(workspace) in line for line in output)
    code, output, _ = command("merge", f"{shown}/run", "--overwrite", cwd=workspace)
    assert (code, output) == (0, [f"merged model: {shown}/run/merged"])


def test_paths_are_shown_relative_to_the_working_directory(own_folder):
    here = Path.cwd()
    assert shown_path(here / "runs" / "a") == "runs/a"
    assert shown_path("runs/a") == "runs/a"
    assert shown_path(here.parent) == str(here.parent)
