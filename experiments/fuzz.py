"""Hand damaged files to the commands that read them: each must succeed, or end with one line that says why.

    python experiments/fuzz.py                           # 750 inputs, some three minutes on one core
    python experiments/fuzz.py --seed 3 --inputs 200
    python experiments/fuzz.py --seed 3 --only 17        # one input again: all that it prints, its files stay

Each input is a small world of sound files, one of which is damaged: a value has another type, a key is gone,
brackets are deep, bytes are cut, flipped or no UTF-8, a directory or a link is in its place. A command reads
it, in a process of its own. It should end with status 0, or with status 2 and one line `NAME.py: error: …`,
and alter no file but its own output. Whatever else happens is listed, and the status is then 1.
"""
import argparse
import csv
import gzip
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import datasets                                           # noqa: F401 these three so that no child needs to
import matplotlib.figure                                  # noqa: F401
import openai                                             # noqa: F401
import pyarrow.parquet
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from runtime.command_line import command_line
from runtime.run_directory import write_json, write_rows
from toy import grammar_pairs, toy_model

COMMANDS = {f"{name}.py": importlib.import_module(name)
            for name in ("benchmarks", "data", "evaluate", "generate", "judge", "reward", "sail")}
OUTCOMES = ("success", "error", "TRACEBACK", "HANG", "CHANGED FILES")
LIMIT = 30                                                 # seconds after which a command hangs


@dataclass
class Kind:
    """A kind of input."""
    share: float                         # how often it is drawn
    command: str                         # {file} is the file that is damaged, URL the judge's host
    files: str                           # patterns: one is drawn, and of its files one is damaged
    own: str = ""                        # what the command may write, beside out/
    on_error: str = ""                   # what it may have written, if it ends with an error


SHORT = "--max-prompt-length 24 --max-response-length 4"
TRAIN = (f"sail.py --variant dpo --model chat --steps 2 --batch-size 2 --eval-limit 2 --save-every 1 {SHORT} "
         "--data FILE --eval-data FILE --out ")
RESUME = TRAIN.replace("FILE", "data/pairs.jsonl") + "run"
VERDICTS = "verdicts.jsonl elsewhere/verdicts.jsonl nowhere"            # also where the user's link leads
JUDGE = "judge.py answers/ours.jsonl answers/theirs.jsonl --model m --verdicts verdicts.jsonl --url URL"
RUN = ("run/args.json run/*.jsonl run/evaluated.json run/checkpoints run/checkpoints/2/progress.json "
       "run/checkpoints/2/*.safetensors")
KINDS = {
    "data": Kind(8, "data.py {file} --score-scale 2", "data/*"),
    "data as tokens": Kind(4, f"data.py {{file}} --model chat {SHORT}", "data/*"),
    "data to train on": Kind(1, TRAIN.replace("FILE", "{file}") + "new", "data/*", "new*"),
    "run, compared": Kind(2, "evaluate.py --compare run --show 2 --out out/results.json", RUN),
    "run, evaluated": Kind(2, "evaluate.py run --reward mine.py:score --eval-limit 2", f"{RUN} run/model/*",
                           "run/evaluated.json"),
    "run, answering": Kind(2, "generate.py --model run --limit 2 --out out/a.jsonl", f"{RUN} run/model/*"),
    "run, for its prompts": Kind(1, "generate.py --model model --data run --limit 2 --out out/a.jsonl", RUN),
    "run, resumed": Kind(2, f"{RESUME} --resume", RUN, "run/*", "run/lock"),
    "checkpoint": Kind(2, "generate.py --model run/checkpoints/2 --limit 2 --out out/a.jsonl", RUN),
    "model": Kind(3, f"generate.py --model chat --data data/pairs.jsonl {SHORT} --out out/a.jsonl", "chat/*"),
    "tokenizer": Kind(3, f"data.py data/pairs.jsonl --model chat {SHORT}", "chat/tokenizer*"),
    "chat template": Kind(0.5, f"data.py data/pairs.jsonl --model model --chat-template {{file}} {SHORT}",
                          "template.json"),
    "toy's model": Kind(0.5, "sail.py --variant dpo --model model --steps 1 --batch-size 2 --eval-limit 2 "
                             "--out new", "model/*.json model/*.safetensors", "new* runs*", "runs*"),
    "reward model": Kind(2, "reward.py --reward classifier --responses answers/ours.jsonl --out out/a.jsonl",
                         "classifier/* answers/ours.jsonl"),
    "responses": Kind(3, "reward.py --reward mine.py:score --responses {file} --out out/scored.jsonl "
                         "--pairs out/pairs.jsonl", "answers/*"),
    "results": Kind(1, "evaluate.py --compare run --out results.json", "results.json", "results.*"),
    "judge's answer": Kind(2, JUDGE, "answer.json", VERDICTS, VERDICTS),
    "judge's redirection": Kind(0.3, f"{JUDGE}/moved", "answer.json", VERDICTS, VERDICTS),
    "judged files": Kind(2, JUDGE, "answers/* verdicts.jsonl", VERDICTS, VERDICTS),
    "questions": Kind(2, f"benchmarks.py --model model --questions {{file}} {SHORT} --out out/a.jsonl",
                      "questions/*.jsonl"),
    "AlpacaEval": Kind(1, f"benchmarks.py --model model --questions {{file}} {SHORT} --out out/a.json",
                       "questions/*.json"),
    "whole disk": Kind(0.1, "data.py /", "data/*")}

# --- a sound world ------------------------------------------------------------------------------------------


def turn(role, content):
    return {"role": role, "content": content}


def sound_row(nth):
    """{a file's name: a row of it}: all formats and all kinds of files that formats.py reads."""
    ask, good, bad = f"review {nth} ?", f"the soup was good {nth} .", f"the soup was bad {nth} ."
    asked, human = [turn("system", "be kind"), turn("user", ask)], f"\n\nHuman: {ask}\n\nAssistant: "
    chosen, rejected = [*asked, turn("assistant", good)], [*asked, turn("assistant", bad)]
    return {
        "pairs.jsonl": dict(prompt=ask, chosen=good, rejected=bad),
        "soft.jsonl.gz": dict(prompt=ask, chosen=good, rejected=bad, preference=0.8, system="be kind",
                              history=[["hi", "hello"]]),
        "scores.json": dict(instruction=ask, input="", chosen=good, rejected=bad, score_chosen=7,
                            score_rejected=2, chosen_finished=False),
        "hh.json.gz": dict(chosen=human + good, rejected=human + bad),
        "sharegpt.jsonl": dict(conversations=[{"from": "human", "value": ask}],
                               chosen={"from": "gpt", "value": good}, rejected={"from": "gpt", "value": bad}),
        "dialogues.parquet": dict(chosen=chosen, rejected=rejected),
        "strings.csv": dict(prompt=json.dumps(asked), chosen=repr(chosen[-1:]), rejected=bad),
        "pku.csv.gz": dict(prompt=ask, response_0=bad, response_1=good, better_response_id=1,
                           safer_response_id=0),
        "ultrafeedback.jsonl": dict(instruction=ask, completions=[dict(overall_score=4.5, response=good),
                                                                  dict(overall_score=2, response=bad)]),
        "summaries.jsonl": dict(info=dict(post=ask, title="T", subreddit="s"), choice=nth % 2,
                                summaries=[dict(text=good), dict(text=bad)]),
        "webgpt.parquet": dict(question=dict(full_text=ask), answer_0=good, answer_1=bad, score_0=0.5,
                               score_1=-0.5),
        "messages.jsonl": dict(messages=[*asked, turn("assistant", [dict(type="text", text=good)])]),
        "prompts.csv": dict(prompt=ask)}


def make_world():
    """Write sound files into the working directory: data, models, a run, and what follows from them."""
    for name in sound_row(0):
        store(Path("data", name), [sound_row(nth)[name] for nth in range(4)])
    model, tokenizer = toy_model()
    for part in (model, tokenizer):
        part.save_pretrained("model")
    write_rows("model/toy-pairs.jsonl", grammar_pairs()[:9])
    tokenizer.chat_template = ("{{ strftime_now('%d') }} {% for m in messages %}"
                               "{{ m['role'] + ' : ' + m['content'] + ' . ' }}{% endfor %}")
    write_json("template.json", {"chat_template": tokenizer.chat_template})
    model.config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    for name, part in (("chat", model), ("classifier", classifier)):
        part.save_pretrained(name)
        tokenizer.save_pretrained(name, save_jinja_files=False)        # the template stands in JSON
    Path("mine.py").write_text("def score(prompts, responses):\n    return [len(each) for each in responses]")
    for name, sides in (("ours", ("chosen", "rejected")), ("theirs", ("rejected", "chosen"))):
        write_rows(f"answers/{name}.jsonl", [dict(prompt=row["prompt"], response=row[side], finished=True)
                                             for row in grammar_pairs()[:3] for side in sides])
    write_json("answer.json", {"id": "1", "choices": [{"index": 0, "message": turn("assistant", "[[A]]")}]})
    write_rows("verdicts.jsonl", [dict(key="ab12", model="m", answer="[[B]]", question="?")] * 2)
    write_rows("questions/mt.jsonl", [dict(question_id=1, category="math", turns=["review ?", "how ?"])] * 2)
    write_rows("questions/arena.jsonl", [dict(uid="1", category="x", prompt="review ?")] * 2)
    store(Path("questions/alpaca.json"), [dict(dataset="d", instruction="review ?")] * 2)
    for command in (RESUME, KINDS["run, evaluated"].command, KINDS["results"].command):
        if run(command.split()) != 0:
            raise SystemExit(f"the sound world is not sound: {Path('stderr').read_text()}")


# --- damage -------------------------------------------------------------------------------------------------

DEEP = "in place of deep nesting"                          # which json.dumps cannot write
VALUES = (0, -1, 1.5, 10**400, float("nan"), float("inf"), None, True, "", "x", "512", "\ud800", [], [None],
          {}, {"a": 1}, [[]], [{"role": "user", "content": None}], DEEP)
OWN = {  # further values of a key
    "chat_template": ({"a": "{{ messages }}"}, [{"name": "a", "template": "x"}], "{{ 1 / 0 }}", "{%"),
    "rope_parameters": ({"rope_type": "dynamic"}, {"rope_type": 5}), "eos_token_id": ([[1]], 10**9),
    "model": ("model", ".", "run"), "data": ("/", "run"), "eval_data": ("run",)}
STRANGE = ("²", "٣", "0", "007", "-1", "writing", "9" * 200, "x\n")          # names beside a checkpoint


def kind_of(path):
    return path.name.removesuffix(".gz").rpartition(".")[2]


def load(path):
    """The value in a file of data or settings. Raises an exception if there is none."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if kind_of(path) == "parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if kind_of(path) == "csv":
        return list(csv.DictReader(io.StringIO(content.decode())))
    if kind_of(path) == "jsonl":
        return [json.loads(line) for line in content.splitlines()]
    return json.loads(content)


def store(path, value, depth=900):
    """Write a value as the file's name says. Raises an exception if such a file cannot hold it."""
    path.parent.mkdir(exist_ok=True)
    rows = value if isinstance(value, list) else [value]
    text = json.dumps(value)
    if kind_of(path) == "parquet":
        return pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    if kind_of(path) == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    if kind_of(path) == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    content = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode(errors="surrogatepass")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def damage_value(path, draw):
    """Replace, delete, repeat or wrap a value somewhere in a file."""
    root = [load(path)]
    holder, key = root, 0
    while isinstance(holder[key], (dict, list)) and holder[key] and draw.random() < 0.8:
        holder = holder[key]
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    how = draw.choice(("replaced", "replaced", "replaced", "deleted", "repeated", "wrapped"))
    new = draw.choice(VALUES + 3 * OWN.get(key, ()))
    if how == "repeated":
        new = [holder[key], holder[key]]
    if how == "wrapped":
        new = {"value": holder[key]}
    holder[key] = new
    if how == "deleted" and holder is not root:
        del holder[key]
    store(path, root[0], draw.choice((90, 400, 900, 100_000)))
    return f"{key} {how}: {repr(new)[:60]}"


def damage_bytes(path, draw):
    """Cut a file, empty it, flip bits of it, put into it what is no UTF-8 or a nil, or double it."""
    content = path.read_bytes()
    place = draw.randrange(len(content))
    before, after = content[:place], content[place:]
    flipped = bytes([after[0] ^ 1 << draw.randrange(8)]) + after[1:]
    how, new = draw.choice([("cut", before), ("emptied", b""), ("flipped", before + flipped),
                            ("no UTF-8", before + b"\xff\xc3(" + after), ("nil", before + b"\0" + after),
                            ("doubled", content + content)])
    path.write_bytes(new)
    return f"{how} at byte {place}"


def damage_place(path, draw):
    """Put a directory, a link or nothing in the place of a file, or a strange name among checkpoints."""
    how = draw.choice(("a strange name", "nothing", "a directory", "link", "nowhere", path.name))
    if how == "a strange name":
        strange = Path("run/checkpoints", draw.choice(STRANGE))
        strange.mkdir()
        return str(strange)
    away = Path("elsewhere", path.name).absolute()
    path.rename(away)
    if how == "a directory":
        path.mkdir()
    elif how != "nothing":
        path.symlink_to(away if how == "link" else how)
    return f"is replaced by {how}"


def damage(path, draw):
    """Damage a file in one way; what was done, in words."""
    way = damage_place
    if path.is_file():
        way = draw.choice([damage_value] * 5 + [damage_bytes] * 2 + [damage_place] * 2)
    try:
        return way(path, draw)
    except (ValueError, TypeError, AttributeError, ArithmeticError):       # such a file cannot hold the value
        return damage_bytes(path, draw)


# --- a command in a process of its own ----------------------------------------------------------------------

class Host(BaseHTTPRequestHandler):
    """A judge that answers with answer.json, or redirects to another host, which writes down that it came."""
    other = None

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server is Host.other:
            Path("asked").touch()
        content = Path("answer.json").read_bytes() if Path("answer.json").is_file() else b""
        self.send_response(307 if "moved" in self.path else 200)
        self.send_header("Location", f"http://127.0.0.1:{Host.other.server_port}/v1/chat/completions")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def start_hosts():
    """Start the judge and the other host; the judge's URL."""
    host, Host.other = (ThreadingHTTPServer(("127.0.0.1", 0), Host) for _ in range(2))
    for server in (host, Host.other):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{host.server_port}/v1"


def run(words):
    """Run a command in a forked process, whose stdout and stderr become files of the working directory. Its
    status; a signal that ended it is below 0."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(LIMIT)
        sys.stdout, sys.stderr = open("stdout", "w"), open("stderr", "w", errors="backslashreplace")
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            os.dup2(stream.fileno(), number)
        if words[0] == "judge.py":
            words = " ".join(words).replace("URL", start_hosts()).split()
        sys.argv = words
        command_line(COMMANDS[words[0]].main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def files_here():
    """{path: what it is} of all that is below the working directory."""
    found = {}
    for path in Path().rglob("*"):
        found[str(path)] = "a directory"
        if path.is_symlink():
            found[str(path)] = f"a link to {os.readlink(path)}"
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found


def trial(number, seed, world, here):
    """Make and run one input in the directory `here`: (its kind, its outcome, what was done and said)."""
    draw = random.Random(f"{seed} {number}")
    name, = draw.choices(list(KINDS), [kind.share for kind in KINDS.values()])
    kind = KINDS[name]
    shutil.copytree(world, here)
    os.chdir(here)
    Path("elsewhere").mkdir()
    path = draw.choice(sorted(Path().glob(draw.choice(kind.files.split()))))
    words, done = kind.command.replace("{file}", str(path)).split(), damage(path, draw)
    before, started = files_here(), time.time()
    status = run(words)
    seconds, after = time.time() - started, files_here()
    own = ["stdout", "stderr", "out", "out/*", *(kind.on_error if status else kind.own).split()]
    changed = []
    for each in sorted(before.keys() | after.keys()):
        if before.get(each) != after.get(each) and not any(fnmatch(each, pattern) for pattern in own):
            changed.append(each)
    lines = [line for line in Path("stderr").read_text(errors="replace").strip().split("\n")
             if not line.startswith("[transformers]")]                 # a warning
    outcome = "TRACEBACK"
    if status == -signal.SIGALRM:
        outcome = "HANG"
    elif changed:
        outcome = "CHANGED FILES"
    elif status == 0:
        outcome = "success"
    elif status == 2 and len(lines) == 1 and lines[0].startswith(f"{words[0]}: error: "):
        outcome = "error"
    return name, outcome, (f"    {' '.join(words)}\n    {path}: {done}; status {status}, {seconds:.1f} s\n"
                           f"    {''.join(lines[-1:])[:300]} {', '.join(changed[:5])}")


def print_table(counts):
    """The table of {kind: Counter of outcomes}."""
    print("| input | " + " | ".join(OUTCOMES) + " |\n|---|" + "---|" * len(OUTCOMES))
    for name, outcomes in {**counts, "all": sum(counts.values(), Counter())}.items():
        print(f"| {name} | " + " | ".join(str(outcomes[outcome]) for outcome in OUTCOMES) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=750)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="run this input alone, and keep its files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    top = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["HF_HOME"] = str(top / "cache")
    world, here = top / "world", top / "here"
    world.mkdir()
    os.chdir(world)
    make_world()
    counts, bad, started = {name: Counter() for name in KINDS}, 0, time.time()
    for number in range(args.inputs) if args.only is None else [args.only]:
        name, outcome, what = trial(number, args.seed, world, here)
        counts[name][outcome] += 1
        if args.only is not None:
            print(f"{Path('stdout').read_text()}{Path('stderr').read_text()}{outcome}:\n{what}\n{here}")
            return sys.exit(outcome.isupper())
        if outcome.isupper():
            bad += 1
            print(f"{outcome}: --seed {args.seed} --only {number}\n{what}", flush=True)
        os.chdir(top)
        shutil.rmtree(here)
    rate, spent = args.inputs / (time.time() - started), os.times()
    rate_alone = args.inputs / (spent.user + spent.system + spent.children_user + spent.children_system)
    shutil.rmtree(top)
    print_table(counts)
    print(f"{bad} of {args.inputs} inputs are bad; {rate:.1f} inputs a second, {rate_alone:.1f} a second of "
          "processor time")
    return sys.exit(bad > 0)


if __name__ == "__main__":
    main()
