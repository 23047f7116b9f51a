"""The fuzzer: it tells a fault from an error, and some seconds of it find none."""
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fuzz
import pytest

from runtime.command_line import InputError


def fail():
    raise InputError("this file is damaged")


def fault():
    return {}["missing"]


def quiet():
    sys.exit(2)


@pytest.mark.parametrize("main, outcome", [
    (lambda: Path("out").mkdir(), "success"), (fail, "error"), (fault, "TRACEBACK"), (quiet, "TRACEBACK"),
    (lambda: os.kill(os.getpid(), 9), "TRACEBACK"), (lambda: time.sleep(60), "HANG"),
    (lambda: Path("mine").unlink(), "CHANGED FILES"), (lambda: Path("x").touch(), "CHANGED FILES"),
    (lambda: Path("mine").write_text("x") and fail(), "CHANGED FILES")])
def test_what_a_command_does_is_told(main, outcome, tmp_path, monkeypatch):
    world = tmp_path / "world"
    world.mkdir()
    for name in ("mine", "data.jsonl"):
        (world / name).write_text('{"prompt": "Q"}\n')
    monkeypatch.chdir(world)
    monkeypatch.setattr(fuzz, "LIMIT", 1)
    monkeypatch.setattr(fuzz, "KINDS", {"kind": fuzz.Kind(1, "data.py {file}", "*.jsonl")})
    monkeypatch.setitem(fuzz.COMMANDS, "data.py", SimpleNamespace(main=main))
    name, told, what = fuzz.trial(0, 0, world, tmp_path / "here")
    assert (name, told) == ("kind", outcome), what


def test_some_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    finished = subprocess.run([sys.executable, fuzz.__file__, "--inputs", "30", "--seed", "1"], text=True,
                              capture_output=True, env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert re.search("^0 of 30 inputs are bad", finished.stdout, re.MULTILINE), finished.stdout
    assert finished.returncode == 0 and not list(tmp_path.glob("fuzz-*"))
