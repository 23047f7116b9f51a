"""The tests of on_accelerator.py, in a process of their own: torch never forgets an accelerator."""
import subprocess
import sys
from pathlib import Path


def test_on_an_accelerator():
    file = Path(__file__).with_name("on_accelerator.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout
