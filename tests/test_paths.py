"""Unusable paths, wherever a user may write one: a message and exit code 2, with nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, environment
from recipe_texts import mapping, problems_of

from qwen_tune.disk import TEXT_LIMIT_BYTES, UnreadableError, path_fault, read_text_file
from qwen_tune.errors import DataError, RunError
from qwen_tune.runs.directory import RunDir

LONG = "folder/" + "x" * 5000
NO_USER = "~nobody-of-this-name/x"
UNUSABLE = {LONG: "too long", NO_USER: "no such user", "loop/x": "symbolic links", "a\0b": "no path can contain"}
WORDS = [text for text in UNUSABLE if "\0" not in text]  # possible on a command line and in the environment


@pytest.fixture(autouse=True)
def loop(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")


@pytest.mark.parametrize("text", UNUSABLE)
def test_an_impossible_path_is_reported(text):
    assert UNUSABLE[text] in path_fault(text)
    with pytest.raises(UnreadableError, match=UNUSABLE[text]):
        read_text_file(text)


@pytest.mark.parametrize("text", ["here", "not-there", "here/below", ".", "~", "/", "*.jsonl", "ä 🙂"])
def test_a_possible_path_is_accepted(text):
    Path("here").write_text("a file")
    assert path_fault(text) is None


def test_only_small_regular_files_of_text_are_read_whole(tmp_path):
    os.mkfifo("pipe")
    Path("large").write_bytes(b"x" * (TEXT_LIMIT_BYTES + 1))
    Path("binary").write_bytes(b"\xff\xfe")
    for name, what in {
        "pipe": "not a regular file",
        "/dev/zero": "not a regular file",
        ".": "not a regular file",
        "large": "larger than 16 MiB",
        "binary": "codec can't decode",
        "none": "No such file",
    }.items():
        with pytest.raises(UnreadableError, match=what):
            read_text_file(name)
    Path("text").write_text("ä\n")
    assert read_text_file("text") == "ä\n"
    Path("text").write_bytes(b"one\r\ntwo\rthree")
    assert read_text_file("text") == "one\ntwo\nthree"


KEYS = {
    "model.base": lambda text: {"model": {"base": text}},
    "model.chat_template": lambda text: {"model": {"base": "x", "chat_template": text}},
    "run.dir": lambda text: {"run": {"dir": text}},
    "data.train[0].path": lambda text: {"data": {"train": [{"path": text}]}},
    "data.train[0].tools": lambda text: {"data": {"train": [{"path": "x", "tools": text}]}},
    "data.eval[0].path": lambda text: {"data": {"train": [{"path": "x"}], "eval": [{"path": f"{text}*.jsonl"}]}},
}


@pytest.mark.parametrize("text", WORDS)
@pytest.mark.parametrize("key", KEYS)
def test_keys_that_hold_a_path(key, text):
    [problem] = problems_of(json.dumps(mapping(**KEYS[key](text))))
    assert f"{key}: got " in problem
    assert f"not a usable path ({path_fault(text)})" in problem
    assert len(problem) < 500


@pytest.mark.parametrize("text", WORDS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("preview", "recipe.yaml", "--html", "PATH"),
        ("merge", "PATH"),
        ("merge", "run", "--output", "PATH"),
        ("merge", "run", "--base", "PATH"),
        ("push", "PATH", "me/model"),
        ("chat", "PATH", "Hello"),
        ("validate", "PATH"),
    ],
    ids=" ".join,
)
def test_arguments_that_hold_a_path(qwen_tune, tmp_path, arguments, text):
    result = qwen_tune(*(text if word == "PATH" else word for word in arguments), cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "usable path" in last or "cannot be read" in last or "does not exist" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop"]


@pytest.mark.parametrize("text", WORDS)
@pytest.mark.parametrize("variable", ["QWEN_TUNE_CACHE", "XDG_CACHE_HOME"])
def test_variables_that_hold_a_path(qwen_tune, workspace, variable, text):
    changes = {"QWEN_TUNE_CACHE": "", variable: text}
    result = qwen_tune("prepare", "recipe.yaml", cwd=workspace, **changes)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(f"{variable}: got ")
    assert "set QWEN_TUNE_CACHE to a folder" in line


@pytest.mark.parametrize("key", ["model.chat_template", "data.train[0].tools"])
@pytest.mark.parametrize("path", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_not_waited_for(qwen_tune, workspace, key, path):
    os.mkfifo(workspace / "pipe")
    result = qwen_tune("preview", "recipe.yaml", f"{key}={path}", cwd=workspace)
    assert result.returncode == 2
    assert f"{path}: the " in result.stderr
    assert "it is not a regular file" in result.stderr


DEEP = 100_000


def test_too_deeply_nested_files_are_refused(qwen_tune, workspace):
    (workspace / "tiny-qwen").unlink()
    shutil.copytree(TINY, workspace / "tiny-qwen")
    (workspace / "deep.jinja").write_text("{% if messages %}" * DEEP + "<|im_end|>" + "{% endif %}" * DEEP)
    result = qwen_tune("preview", "recipe.yaml", "model.chat_template=deep.jinja", cwd=workspace)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert result.stderr.startswith("chat template: ")
    (workspace / "tools.json").write_text("[" * DEEP + "]" * DEEP)
    result = qwen_tune("preview", "recipe.yaml", "data.train[0].tools=tools.json", cwd=workspace)
    assert (result.returncode, "nested too deeply" in result.stderr) == (2, True)
    config = workspace / "tiny-qwen" / "config.json"
    config.write_text(config.read_text().rstrip()[:-1] + ', "deep": ' + "[" * DEEP + "]" * DEEP + "}")
    for command in ("preview", "estimate", "train"):
        result = qwen_tune(command, "recipe.yaml", cwd=workspace)
        assert (result.returncode, "nested too deeply" in result.stderr) == (2, True)
        assert "Traceback" not in result.stderr


def test_checking_where_a_run_can_be_written_leaves_nothing(tmp_path):
    target = tmp_path / "a" / "b"
    RunDir(target).check("", overwrite=False, resume="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
    Path("file").write_text("")
    for place in (Path("/proc/x"), Path("/proc/self/fd/x"), Path("file"), Path("file/x"), Path("/dev/null/x")):
        with pytest.raises(RunError, match=r"(the run directory cannot be written|is not a directory).*run\.dir="):
            RunDir(place).check("", overwrite=False, resume="auto")


def test_a_run_that_cannot_be_written_is_refused_before_anything_is_loaded(workspace):
    code = (
        "import sys\nfrom qwen_tune.cli import run_command\n"
        "code = run_command(['train', 'recipe.yaml', 'run.dir=/proc/x'])\n"
        "print(code, [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=workspace, env=environment(), capture_output=True, text=True
    )
    assert result.stdout == "2 []\n"
    assert result.stderr.startswith("/proc/x: the run directory cannot be written")


def test_no_home_folder(monkeypatch):
    from qwen_tune.data.cache import cache_folder

    monkeypatch.delenv("QWEN_TUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "loop/x")
    with pytest.raises(DataError, match="set QWEN_TUNE_CACHE"):
        cache_folder("prepared")
