"""What all scripts share: errors that take one line, and seeds."""
import hashlib
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input from the user: its text says what is wrong, where, and what to do."""


@contextmanager
def foreign(problem):
    """A context for one call of code that is not ours, such as a library that reads or writes a file. Any
    exception becomes InputError(problem), with the first 200 characters of the reason in brackets. Our own
    code does not belong inside, since a fault of ours must show its traceback."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"{problem} ({reason})") from None


DATA_FILES = (".jsonl", ".json", ".csv", ".parquet")

def command_line(main):
    """Run a script's `main`; bad input, a file that fails, or an optional package that is not there, becomes
    one line on stderr and exit status 2. Ctrl-C becomes one line and exit status 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")            # escapes half a surrogate pair
    if signal.getsignal(signal.SIGINT) is end_interrupted:               # the imports are done
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        end_interrupted()
    except (InputError, OSError, ModuleNotFoundError) as error:
        # All processes raise the same InputError, so rank 0 alone reports it. Any other error may occur in
        # a single process.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, InputError):
            print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        if not is_open(sys.stdout):
            sys.stdout = None                    # otherwise Python would complain once more when it ends
        sys.exit(2)


def show_missing_package(kind, error, trace):
    """A sys.excepthook that shows a missing package in one line, and any other exception as Python does."""
    if not issubclass(kind, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    script = Path(sys.argv[0]).name
    print(f"{script}: error: {error}; pip install -r requirements.txt, or run ./run.sh", file=sys.stderr)
    sys.exit(2)


def end_interrupted(*_):
    """A handler of SIGINT that ends the process at once, with one line."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(130)


def is_open(stream):
    """Whether text that is written to a stream reaches its reader."""
    try:
        stream.flush()
    except OSError:
        return False
    return True


def one_line(error):
    """The message for the user, in one line, of an InputError, an OSError or a missing package."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"a package is missing: pip install {error.name}"
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)   # 2: the target of a rename
    if path:
        return f"{path}: {error.strerror}"
    if isinstance(error, BrokenPipeError):
        return "standard output is closed"
    return " ".join(str(error).split("\n"))               # a library's error may have several lines


def first_line(error):
    """The first line of an exception's text."""
    return str(error).strip().split("\n")[0].rstrip(".")


def format_counts(counter):
    """{'empty response': 4} -> '4 empty response'."""
    return ", ".join(f"{times} {what}" for what, times in counter.items()) or "none"


def seeded(purpose, *numbers):
    """The seed for one stream of random numbers: a hash of its purpose and numbers. It has 32 bits, because
    torch keeps no more of a seed on a CPU."""
    return int.from_bytes(hashlib.sha256(repr((purpose, *numbers)).encode()).digest()[:4], "big")
