"""Kill runs of sail.py at random moments, resume them, and compare with a run that nobody killed.

    python experiments/kill.py      # 20 kills, while sampling, in backward, while saving; one and two ranks
    python experiments/kill.py --kills 3

Four kills in five are SIGKILL, the fifth is SIGHUP, as of a terminal that closes, at which a run saves.

Final weights and metrics.jsonl (but for its `seconds`) must be equal bit for bit. Ends with status 1 unless
all are.
"""
import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STEPS = 12
PHASES = {  # name: the module and the function in which the signal comes
    "rollout": ("sail", "roll_out"), "backward": ("sail", "accumulate_gradients"),
    "saving": ("runtime.training", "save_checkpoint")}
ARGUMENTS = ["--variant", "pr", "--mix", "0.5", "--steps", str(STEPS),
             "--batch-size", "8", "--eval-limit", "4", "--eval-every", "5",
             "--max-response-length", "12", "--save-every", "2"]


def victim(phase, nth, delay, rank, number):
    """Run sail.py in this process, to which the signal of this number comes `delay` seconds into the nth call
    of the phase's function."""
    import sail
    module, name = PHASES[phase]
    module = importlib.import_module(module)
    function, calls = getattr(module, name), []

    def watched(*args, **options):
        calls.append(1)
        if len(calls) == nth and os.environ.get("RANK", "0") == str(rank):
            threading.Timer(delay, lambda: os.kill(os.getpid(), number)).start()
        return function(*args, **options)

    setattr(module, name, watched)
    sail.command_line(sail.main)


def launch(ranks, out, base, *more, kill=None):
    """sail.py on so many ranks; kill: the arguments of `victim`. Returns the finished process."""
    start = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
                               if ranks > 1 else [])]
    script = [__file__, "--victim", json.dumps(kill)] if kill else [ROOT / "sail.py"]
    return subprocess.run([*start, *script, *ARGUMENTS, "--model", str(base), "--out", str(out), *more],
                          capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def result_of(out):
    """What must be equal: the weights' bytes and the metrics without their seconds."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]
    return ((out / "model/model.safetensors").read_bytes(), rows,
            [(out / f"{name}.jsonl").read_text() for name in ("eval", "samples")])


def trial(ranks, out, base, seed):
    """One kill and its resumption: (what happened, whether the result equals the unbroken run's)."""
    draw = random.Random(seed)
    phase = list(PHASES)[seed % len(PHASES)]
    nth, rank = draw.randint(1, STEPS // (2 if phase == "saving" else 1)), draw.randrange(ranks)
    delay = draw.uniform(0, 0.02)
    shutil.rmtree(out, ignore_errors=True)
    number = signal.SIGHUP if seed % 5 == 4 else signal.SIGKILL
    killed = launch(ranks, out, base, kill=[phase, nth, delay, rank, number])
    at = len((out / "metrics.jsonl").read_text().splitlines())
    left = sorted(path.name for path in (out / "checkpoints").glob("*"))
    resumed = launch(ranks, out, base, "--resume")
    said = next((line for line in resumed.stdout.splitlines() if "continuing" in line), "from the start")
    survivor = next((said for said in ("has lost another process", "cannot be written", 'sail.py", line')
                     if said in killed.stderr), "silent")
    what = (f"{number.name}, {ranks} rank(s), rank {rank} {delay * 1000:4.1f} ms into {phase} {nth:2}: "
            f"status {killed.returncode}, {at} steps logged, checkpoints {left}; {said.split(',')[0]}; "
            f"status {resumed.returncode}")
    what += f"; the other rank: {survivor}" if ranks > 1 else ""
    assert "line" not in survivor, killed.stderr                       # no traceback
    saved = killed.returncode == 0
    assert saved == (number == signal.SIGHUP) and resumed.returncode == 0, what + resumed.stderr
    return what


def main():
    if sys.argv[1:2] == ["--victim"]:
        kill = json.loads(sys.argv[2])
        del sys.argv[1:3]
        return victim(*kill)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill"))
    args = parser.parse_args()
    from runtime.run_directory import write_rows
    from toy import grammar_pairs, toy_model
    model, tokenizer = toy_model(seed=5)
    model.config.tie_word_embeddings = True                            # as most small pretrained models
    model.tie_weights()
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    write_rows(args.out / "base/toy-pairs.jsonl", grammar_pairs()[:60])
    unbroken, equal, started = {}, 0, time.time()
    for ranks in (1, 2):
        shutil.rmtree(args.out / f"unbroken-{ranks}", ignore_errors=True)
        finished = launch(ranks, args.out / f"unbroken-{ranks}", args.out / "base")
        assert finished.returncode == 0, finished.stderr
        unbroken[ranks] = result_of(args.out / f"unbroken-{ranks}")
    for seed in range(args.seed, args.seed + args.kills):
        ranks = 1 + seed // 3 % 2
        what = trial(ranks, args.out / "killed", args.out / "base", seed)
        same = result_of(args.out / "killed") == unbroken[ranks]
        equal += same
        print(f"{'equal' if same else 'DIFFERENT'}: {what}", flush=True)
    print(f"{equal} of {args.kills} equal the unbroken run bit for bit, {time.time() - started:.0f} s")
    return sys.exit(equal != args.kills)


if __name__ == "__main__":
    main()
