"""The engineering that no reader of the method needs.

Scripts import it before torch: a missing package and Ctrl-C are then one line, also before their main runs.
"""
import sys
from pathlib import Path

from runtime.command_line import show_in_one_line

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:      # one of our scripts runs
    sys.excepthook = show_in_one_line
