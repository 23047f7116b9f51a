"""The command line that all scripts share: flags, errors in one line, seeds."""
import argparse
import hashlib
import math
import os
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import date
from pathlib import Path


class InputError(ValueError):
    """Bad input from the user: its text says what is wrong, where, and what to do."""


@contextmanager
def foreign(problem):
    """Around one call of code that is not ours, as a library that reads or writes a file: whatever it raises
    becomes InputError(problem), with the first 200 characters of the reason in brackets. Our own code does
    not belong inside, since a fault of ours must show its traceback."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"{problem} ({reason})") from None


class Parser(argparse.ArgumentParser):
    """argparse with short help and one-line errors; `shared` adds flags that several scripts have."""

    def __init__(self, description, arguments=""):
        super().__init__(description=description, usage=f"%(prog)s [flags]{arguments}",
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=35))

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def shared(self, *flags, add=None):
        """Add these flags of SHARED, with `add`, a group's add_argument, if there is one."""
        for flag in flags:
            (add or self.add_argument)(flag, **SHARED[flag])


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`, and finite."""
    def convert(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not in {low:g} … {high:g}")
        return value

    convert.__name__ = kind.__name__           # argparse names it if `text` is no number at all
    return convert


def iso_date(text):
    """An argparse type: a date, as YYYY-MM-DD."""
    return date.fromisoformat(text).isoformat()


DATA_FILES = (".jsonl", ".json", ".csv", ".parquet")
COUNT = dict(metavar="N", type=number(int, 1))
SHARED = {
    "--data": dict(help="a .jsonl, .json, .csv or .parquet file, or a hub name"),
    "--eval-data": dict(help="held-out pairs (one prompt in twenty of --data)"),
    "--prefer": dict(choices=["better", "safer"], default="better", help="label of PKU-SafeRLHF (better)"),
    "--limit": dict(COUNT, help="use the first N pairs only"),
    "--max-prompt-length": dict(COUNT, help="tokens; longer prompts lose their oldest turns (512)"),
    "--max-response-length": dict(COUNT, help="tokens; longer responses are cut on the right (512)"),
    "--sample-batch-size": dict(COUNT, default=64, help="prompts answered at a time (64)"),
    "--date": dict(type=iso_date, help="what a chat template that asks for the date is told (today)"),
    "--seed": dict(type=number(int, 0), default=0, help="random seed (0)"),
    "--trust-remote-code": dict(action="store_true", help="run code that comes with a hub model")}


def command_line(main):
    """Run a script's `main`; bad input, a file that fails, or an optional package that is not there, becomes
    one line on stderr and exit status 2. Ctrl-C becomes one line and exit status 130."""
    if signal.getsignal(signal.SIGINT) is end_interrupted:               # all is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        end_interrupted()
    except (InputError, OSError, ModuleNotFoundError) as error:
        # InputError is raised by all processes alike, and one speaks; other errors may be one's own.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, InputError):
            print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        if not is_open(sys.stdout):
            sys.stdout = None                    # or Python would complain once more at its end
        sys.exit(2)


def show_missing_package(kind, error, trace):
    """A sys.excepthook that shows a missing package in one line, and all else as Python does."""
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    script = Path(sys.argv[0]).name
    print(f"{script}: error: {error}: pip install -r requirements.txt, or run ./run.sh", file=sys.stderr)
    sys.exit(2)


def end_interrupted(*_):
    """A handler of SIGINT that ends the process at once, with one line."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(130)


def is_open(stream):
    """Whether what was written to a stream arrives."""
    try:
        stream.flush()
    except OSError:
        return False
    return True


def one_line(error):
    """What an InputError, an OSError or a missing package tells the user."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"needs a package: pip install {error.name}"
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)       # 2: renamed to
    if path:
        return f"{path}: {error.strerror}"
    if isinstance(error, BrokenPipeError):
        return "standard output is closed"
    return str(error)


@contextmanager
def time_limit(seconds, problem):
    """Around foreign code that may never end: InputError(problem) if it takes longer. Only a main thread, as
    every script's is, has signals to stop it with; elsewhere, no limit."""
    def stop(*_):
        raise InputError(f"{problem}; stopped after {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error):
    """The first line of an exception's text."""
    return str(error).strip().split("\n")[0].rstrip(".")


def format_counts(counter):
    """{'empty response': 4} -> '4 empty response'."""
    return ", ".join(f"{times} {what}" for what, times in counter.items()) or "none"


def seeded(purpose, *numbers):
    """The seed of one stream of random numbers: a hash into the 32 bits that torch keeps on a CPU."""
    return int.from_bytes(hashlib.sha256(repr((purpose, *numbers)).encode()).digest()[:4], "big")
