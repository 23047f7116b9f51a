"""Run by torchrun from the tests, on two ranks, of which the second never comes to where they meet."""
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import runtime.processes as processes
from runtime.command_line import command_line


@processes.fails_together
def load_data():
    if processes.rank() == 1:
        time.sleep(600)


def main():
    processes.PATIENCE = timedelta(seconds=3)
    with processes.process_group():
        load_data()


command_line(main)
