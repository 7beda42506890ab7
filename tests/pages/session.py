"""A folder in which a page's blocks run in order, as a reader would type them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.pages import forked
from tests.pages.reader import ROOT, Block, Command, commands

_SECONDS = 300
_TRIES = 20
# One process runs all Python blocks of a page: a later one uses the names of an earlier one.
_PYTHON = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
names = {"__name__": "__main__"}
for line in sys.stdin:
    name, text = json.loads(line)
    try:
        exec(compile(text, name, "exec"), names)
        error = ""
    except BaseException:
        error = traceback.format_exc()
    sys.stdout.flush()
    print(json.dumps(error), file=answers, flush=True)
"""
_VARYING = (
    (r"\b[0-9a-f]{8}\b", "CRC"),
    (r"\b[\d.]+ s\b", "N s"),
    (r"\b\d+ MB/s", "N MB/s"),
    (r"\bpeak [\d.]+ \w?B", "peak N B"),
    (r"\bat most \d+ MiB", "at most N MiB"),
    (r"\b\d+ threads?", "N threads"),
    (r"\breader +\w+ \(\w+\)", "reader R (FS)"),
    (r"\b\d\.\de-0[6-9]", "tiny"),
)
"""What differs from run to run, and from machine to machine."""
_INTERRUPTED = (
    (r"\b(kept:|resumed) +\d+( of| tensors)", r"\1 N\2"),
    (r"(tensors|shards), [\d.]+ \w?B", r"\1, N B"),
)


class Session:
    """Use as a context; raises AssertionError where a page does not do what it says.

    Its command `streammap` is forked from a process that has torch, unless `installed` asks for
    the one that a user has.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str], *, installed: bool = False
    ) -> None:
        self.folder = folder
        ours = [] if installed else [str(forked.folder())]
        self.environment = {
            **os.environ,
            "PATH": ":".join([*ours, str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder.parent / "home"),
            "HF_HOME": str(folder.parent / "home" / "hf"),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there
            **environment,
        }
        self.log = folder.parent / "python.log"
        self.python: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Session":
        self.folder.mkdir(exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.python is not None:
            assert self.python.stdin is not None
            assert self.python.stdout is not None
            self.python.stdin.close()
            self.python.wait(timeout=_SECONDS)
            self.python.stdout.close()

    def run(self, block: Block) -> None:
        """Run a block, or write the file that it is."""
        if block.file:
            path = self.folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.language == "python":
            self._run_python(block)
        else:
            for command in commands(block):
                self.run_command(block, command)

    def _run_python(self, block: Block) -> None:
        if self.python is None:
            with self.log.open("w") as log:
                self.python = subprocess.Popen(
                    [sys.executable, "-c", _PYTHON],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=self.folder,
                    env=self.environment,
                )
        assert self.python.stdin is not None
        assert self.python.stdout is not None
        self.python.stdin.write(json.dumps([str(block), block.text]) + "\n")
        self.python.stdin.flush()
        answer = self.python.stdout.readline()
        error = json.loads(answer) if answer else f"the process died: {self.log.read_text()}"
        assert not error, f"{block}\n{error}"

    def run_command(self, block: Block, command: Command) -> None:
        if command.output[:1] == ("^C",):
            said = self._interrupt(command.line)
            expected = pattern(command.output[1:], *_INTERRUPTED)
            assert expected.fullmatch(alike(said, *_INTERRUPTED)), (
                f"{block}: {command.line}\n{said}"
            )
            return
        code, said = self._shell(command.line)
        where = f"{block}: {command.line}\nexit code {code}\n{said}"
        assert "Traceback (most recent call last)" not in said, where
        assert code == 0 or (code == 1 and set(command.output) - {"..."}), where
        if command.output:
            is_resumed = any(line.startswith("resumed") for line in command.output)
            extra = _INTERRUPTED if is_resumed else ()
            assert pattern(command.output, *extra).fullmatch(alike(said, *extra)), where

    def _shell(self, line: str) -> tuple[int, str]:
        ran = subprocess.run(
            ["bash", "-c", line],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=self.environment,
            timeout=_SECONDS,
            check=False,
        )
        return ran.returncode, ran.stdout

    def _interrupt(self, line: str) -> str:
        """Run a command, and press Ctrl-C once a tensor is journalled."""
        for _ in range(_TRIES):
            before = set(self.folder.iterdir())
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.folder,
                env=self.environment,
            )
            while process.poll() is None and not self._is_journalled():
                time.sleep(0.0005)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=_SECONDS)
            if process.returncode == 130 and "kept" in said:
                return said
            for path in set(self.folder.iterdir()) - before:  # too early, or too late: again
                subprocess.run(["rm", "-r", path], check=True)
        raise AssertionError(f"{line}: never interrupted in the middle")

    def _is_journalled(self) -> bool:
        journals = self.folder.glob("*/.streammap-run/journal.jsonl")
        return any(b'"tensors"' in path.read_bytes() for path in journals)


def alike(text: str, *more: tuple[str, str]) -> str:
    """The text with what varies taken out, and columns one space apart."""
    for form, word in (*_VARYING, *more):
        text = re.sub(form, word, text)
    return "\n".join(re.sub(" +", " ", line).strip() for line in text.strip().split("\n"))


def pattern(lines: tuple[str, ...], *more: tuple[str, str]) -> re.Pattern[str]:
    """What output must match: `...` stands for any lines, or for the rest of one."""
    parts = []
    for line in lines:
        if line == "...":
            parts.append(r"(?:.*\n)*?")
            continue
        whole, dots = line.removesuffix(" ..."), line.endswith(" ...")
        parts.append(re.escape(alike(whole, *more)) + (".*" if dots else "") + r"\n")
    ends_open = lines[-1:] == ("...",)
    joined = "".join(parts[:-1] if ends_open else parts).removesuffix(r"\n")
    if ends_open:
        joined += r"(?:\n.*)*" if joined else r"[\s\S]*"
    return re.compile(joined)
