"""Commands as processes of their own that do not import everything anew: forked from one that has.

`python fork_server.py MODULE …` imports the modules and then forks a child for each line that it reads: JSON with the
command's arguments, directory and environment. It answers with the child's number, and at its end with its exit code
and what it said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = ("trl.trainer.sft_trainer", "qwen_tune.training.trainer", "qwen_tune.train")
"""What a run imports, and what most of its time goes into on a tiny model."""


class ForkServer:
    """Runs `qwen-tune` commands; what it has imported has read the environment that it was started with."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *arguments: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        self.start(*arguments, cwd=cwd, **changes)
        return self.wait()

    def start(self, *arguments: str, cwd: Path, **changes: str) -> int:
        """Begins a command; returns its process's number."""
        assert self._process.stdin
        order = {"arguments": [str(word) for word in arguments], "cwd": str(cwd), "environment": changes}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def wait(self) -> subprocess.CompletedProcess[str]:
        """The end of the command that was begun."""
        return subprocess.CompletedProcess([], *self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


@contextmanager
def fork_server(modules: Sequence[str], environment: dict[str, str]) -> Iterator[ForkServer]:
    """A server for the length of a block."""
    command = [sys.executable, __file__, *modules]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        yield ForkServer(process)
        assert process.stdin
        process.stdin.close()


def _serve() -> None:
    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _run(order, out.fileno(), err.fileno())
            print(child, flush=True)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        print(json.dumps([code, *texts]), flush=True)


def _run(order: dict[str, object], out: int, err: int) -> None:
    """The child: the same as the console script's process from here on."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(str(order["cwd"]))
    assert isinstance(order["environment"], dict)
    os.environ.update(order["environment"])
    code = 1
    try:
        from qwen_tune.cli import run_command

        assert isinstance(order["arguments"], list)
        code = run_command(order["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
