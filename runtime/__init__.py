"""The engineering that no reader of the method needs.

Scripts import this package before torch, so that a missing package or Ctrl-C gives one line, even before a
script's main runs.
"""
import signal
import sys
from pathlib import Path

from runtime.command_line import end_interrupted, show_missing_package

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:      # one of our scripts runs
    sys.excepthook = show_missing_package
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_interrupted)      # an import may swallow Python's KeyboardInterrupt
