"""The rows and the table of a few runs of sail.py: those of ./run.sh, and a first run on a pretrained model.

    python experiments/first_runs.py runs/toy/{sft,dpo,dp,pp,pr} --out experiments/first_command.jsonl
    python experiments/first_runs.py runs/first/{online-dpo,pr} --out experiments/first_run.jsonl

The rows are the first and the last line of each run's eval.jsonl, with the run's name. From results.json,
which `evaluate.py --compare` must have written beside the runs, they take how far a run ends below the best
possible. The table is the one that `evaluate.py --compare` prints.
"""
import argparse
import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from formats import read_rows
from runtime.compare import figures_of, print_groups
from runtime.run_directory import evaluation_of, read_json, write_rows


def rows_of(run):
    """The first and the last evaluation of a run, {run, step, NAME: value, NAME_interval: [low, high], …}. A
    run without a reference, such as SFT, has only the last one, since it starts from an untrained model."""
    first, *_, last = read_rows(run / "eval.jsonl")
    gap = read_json(run.parent / "results.json")[run.name].get("gap")
    if gap:
        last.update(gap=gap["value"], gap_interval=[gap["low"], gap["high"]])
    evaluations = [first, last] if "kl" in first else [last]
    return [{"run": run.name, **evaluation} for evaluation in evaluations]


def table(rows, columns=None):
    """Markdown: what `evaluate.py --compare` prints of the runs with these rows, or its first columns."""
    groups = {}
    for row in rows:
        row = dict(row)
        groups.setdefault(row.pop("run"), [[]])[0].append(evaluation_of(row))
    results = {run: figures_of([evaluations[-1]]) for run, (evaluations,) in groups.items()}
    with redirect_stdout(io.StringIO()) as printed:
        print_groups(groups, results)
    lines = printed.getvalue().replace("| -", "| −").splitlines()
    if columns:
        lines = ["|".join(line.split("|")[:columns + 2]) + "|" for line in lines]
    return "\n".join(lines)


def main():
    """`python experiments/first_runs.py RUN …`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="the file for the rows")
    args = parser.parse_args()
    rows = [row for run in args.runs for row in rows_of(run)]
    write_rows(args.out, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
