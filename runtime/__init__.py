"""The engineering that no reader of the method needs. A script imports it first: until its main runs, Ctrl-C
is then one line, too."""
import sys
from pathlib import Path

from runtime.command_line import say_interrupted

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:      # one of our scripts runs
    sys.excepthook = say_interrupted
