"""Answer files of AlpacaEval, MT-Bench and Arena-Hard, which their own judges read.

    python experiments/benchmarks.py --model M --questions Q --out answers.jsonl

Q is the benchmark's file of questions, told by its columns. Responses are sampled at temperature 1, or at
FastChat's for each category of MT-Bench.
"""
import json
import os
import sys
import time
import uuid
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from formats import is_text, read_rows
from generate import FLAGS, Answers, answer, load_answerer
from runtime.command_line import InputError, command_line, format_counts, seeded
from runtime.run_directory import has_columns, refuse_output, write_rows, write_text
from runtime.settings import Parser, flag_of, setting

BENCHMARKS = {  # name: the columns that identify its questions; the last one holds what is asked
    "MT-Bench": "question_id category turns", "Arena-Hard": "uid category prompt",
    "AlpacaEval": "dataset instruction"}
MT_BENCH_TEMPERATURES = {  # FastChat's; 0.7 for other categories
    "stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}


def load_questions(source, limit=None):
    """A benchmark's questions, told by their columns: (its name in BENCHMARKS, rows, turns). turns: what the
    user says, two texts a row for MT-Bench, else one. Raises InputError where a row cannot be asked."""
    rows = list(islice(read_rows(source), limit))
    columns = set().union(*rows)
    name = next((name for name, needed in BENCHMARKS.items() if columns.issuperset(needed.split())), None)
    if name is None:
        known = "; ".join(f"{', '.join(needed.split())} ({name})" for name, needed in BENCHMARKS.items())
        raise InputError(f"{source}: columns {', '.join(sorted(columns)) or '(no rows)'} fit no benchmark's "
                         f"questions; want one of: {known}")
    *others, asked = BENCHMARKS[name].split()
    turns = [row.get(asked) if name == "MT-Bench" else [row.get(asked)] for row in rows]
    for nth, (row, texts) in enumerate(zip(rows, turns, strict=True), 1):
        complete = isinstance(texts, list) and len(texts) == 1 + (name == "MT-Bench")
        if (not complete or not all(isinstance(row.get(other), (str, int)) for other in others)
                or not all(is_text(text) and text.strip() for text in texts)):
            raise InputError(f"{source}: row {nth}: want {', '.join(others)} and text in {asked}")
    return name, rows, turns


def answer_row(benchmark, row, answers, name):
    """The row of an answer file: of AlpacaEval's model_outputs.json, of FastChat's or arena-hard-auto's
    model_answer/*.jsonl. The same answers get the same id; no judge reads `tstamp`."""
    key, now = row.get("question_id", row.get("uid")), time.time()
    answer_id = str(uuid.uuid5(uuid.NAMESPACE_OID, repr((name, key, answers))))
    if benchmark == "MT-Bench":
        return {"question_id": key, "answer_id": answer_id, "model_id": name,
                "choices": [{"index": 0, "turns": answers}], "tstamp": now}
    if benchmark == "Arena-Hard":
        return {"uid": key, "ans_id": answer_id, "model": name, "tstamp": now,
                "messages": [{"role": "user", "content": row["prompt"]},
                             {"role": "assistant", "content": {"answer": answers[0]}}]}
    return {"dataset": row["dataset"], "instruction": row["instruction"], "output": answers[0],
            "generator": name}


def answer_benchmark(model, tokenizer, benchmark, rows, turns, args):
    """The rows of the benchmark's answer file; a second turn is asked after the model's own first answer."""
    temperatures = [1.0 if args.temperature is None else args.temperature] * len(rows)
    if benchmark == "MT-Bench" and args.temperature is None:
        temperatures = [MT_BENCH_TEMPERATURES.get(row["category"], 0.7) for row in rows]
    _, *above, name = Path(os.path.abspath(args.model)).parts
    name = "-".join(above[-2:]) or name if name == "model" else name   # runs/toy/pr/model is toy-pr
    dialogues = [[] for _ in rows]
    for texts in zip(*turns, strict=True):
        for dialogue, text in zip(dialogues, texts, strict=True):
            dialogue.append({"role": "user", "content": text})
        prompts = dialogues if benchmark == "MT-Bench" else texts      # one turn: as in training data
        for temperature in sorted(set(temperatures)):
            places = [place for place, own in enumerate(temperatures) if own == temperature]
            asked = [prompts[place] for place in places]
            answers, account = answer(model, tokenizer, asked, temperature, args)
            if account.dropped:
                raise InputError(f"questions that cannot be asked: {format_counts(account.dropped)}")
            print(f"at temperature {temperature:g}: {len(asked)} questions\n{account}")
            for place, row in zip(places, answers, strict=True):
                dialogues[place].append({"role": "assistant", "content": row["response"]})
    return [answer_row(benchmark, row, [turn["content"] for turn in dialogue[1::2]], name)
            for row, dialogue in zip(rows, dialogues, strict=True)]


@dataclass
class Questions(Answers):
    """The settings of benchmarks.py."""
    questions: str | None = setting(None, "a file of AlpacaEval, MT-Bench or Arena-Hard")
    out: str | None = setting(None, "the benchmark's answer file")
    temperature: float | None = setting(None, "0: the likeliest token each time (1; for MT-Bench, FastChat's "
                                              "for each category)", low=0)
    data: None = setting(None)                             # these two are not a benchmark's
    n: None = setting(None)


def main(argv=None):
    """`python experiments/benchmarks.py --model M --questions Q --out FILE`."""
    parser = Parser("Answer a benchmark's questions. Defaults in brackets.")
    parser.add_settings(Questions, "questions", *FLAGS)
    args = Questions(**vars(parser.parse_args(argv)))
    for name in ("model", "questions", "out"):
        if getattr(args, name) is None:
            parser.error(f"argument {flag_of(name)}: is needed")
    benchmark, rows, turns = load_questions(args.questions, args.limit)
    if (Path(args.out).suffix == ".json") != (benchmark == "AlpacaEval"):
        raise InputError(f"--out {args.out}: {benchmark}'s judge wants a file that ends in "
                         f"{'.json' if benchmark == 'AlpacaEval' else '.jsonl'}")
    own = {"MT-Bench": has_columns("question_id", "answer_id"), "Arena-Hard": has_columns("uid", "ans_id"),
           "AlpacaEval": lambda text: text.startswith('[\n {\n  "dataset": ')}
    refuse_output(args.out, own[benchmark], args.questions)
    model, tokenizer = load_answerer(args)
    torch.manual_seed(seeded("answers", args.seed))
    rows = answer_benchmark(model, tokenizer, benchmark, rows, turns, args)
    if benchmark == "AlpacaEval":
        write_text(args.out, json.dumps(rows, indent=1))
    else:
        write_rows(args.out, rows)
    print(f"{len(rows)} questions of {benchmark} answered in {args.out}")


if __name__ == "__main__":
    command_line(main)
