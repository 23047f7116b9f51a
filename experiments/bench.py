"""How fast: dpo, dp, pp and pr on random models and pairs, beside TRL's trainers.

    python experiments/bench.py                 # models S and V, each row in a process of its own
    python experiments/bench.py --peer-python TRL/bin/python --rounds 3   # in turn with TRL under that Python
    python experiments/bench.py --overheads     # CPU seconds of dp, pp and pr against dpo's, in turn
    python experiments/bench.py --models DIR --data FILE --batch 4 --steps 6 --prompt 128 --response 128 \\
        --variants dpo dpo-again online-dpo --peer-python TRL/bin/python --rounds 3      # a pretrained model
    python experiments/bench.py --models qwen2-0.5b --dtype bfloat16 --prompt 512 --response 512 \\
        --variants dpo pr --peer-python TRL/bin/python                   # one GPU

The work of a step, the same for both sides: eight pairs in file order, prompts of 64 tokens, responses of 32
to 192 with their end token; float32, SDPA attention, β 0.1, a frozen reference that is run every step,
gradient norm clipped to 1, AdamW. pr, online-dpo and TRL's OnlineDPOTrainer sample two responses of up to 64
tokens to eight prompts at temperature 1 and score them with a function of their words. dpo-again meets each
pair twice, so that the reference's log-probabilities are known before its first step; TRL has
precompute_ref_log_probs for it. A pretrained model takes the first pairs of FILE, a .jsonl file with prompt,
chosen and rejected, that are within --prompt and --response tokens. Seconds are from the drawing of the pairs
to the step (TRL: from the end of a step to the next); the first two steps are left out. "times TRL's speed"
compares tokens per second. --out collects the rows as JSON lines.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ["dpo", "dp", "pp", "pr", "dpo-again", "online-dpo"]
PEERS = {"dpo": "TRL DPO", "dpo-again": "TRL DPO", "pr": "TRL OnlineDPO", "online-dpo": "TRL OnlineDPO"}
NAMES = {"dpo": "dpo", "dpo-again": "dpo, later epochs", "online-dpo": "online DPO, mix 1", "pr": "pr, mix 1"}
OVERHEADS = VARIANTS[:4]
SAMPLED = ("pp", "pr", "online-dpo")
MODELS = {  # Llama shapes but for qwen2-*
    "S": dict(vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
              num_attention_heads=8, num_key_value_heads=8),
    "V": dict(vocab_size=128256, hidden_size=256, intermediate_size=704, num_hidden_layers=2,
              num_attention_heads=8, num_key_value_heads=8),
    "tiny": dict(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2),
    "qwen2-0.5b": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                       num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
}
# As in run.sh: glibc keeps what is freed.
KEEP_MEMORY = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**35), MALLOC_TOP_PAD_=str(2**28))
PAD, BOS, EOS, UNK = range(4)


# --- the work -----------------------------------------------------------------------------------------------

def pairs_of(row):
    """The pairs of row["data"], or random pairs of words: prompts of row["prompt"] tokens, responses of 32 to
    192, or all of row["response"], with the end token that the trainers add."""
    count = row["steps"] * row["batch"]
    if row["variant"] == "dpo-again":
        count //= 2
    if row["data"]:
        return short_pairs(row, count)
    rng, rows = random.Random(1234), []
    lengths = (row["response"], row["response"]) if row["response"] else (32, 192)
    words = min(8192, row["model"]["vocab_size"]) - 4
    for _ in range(count):
        text = [" ".join(f"w{rng.randrange(words)}" for _ in range(size)) for size in (
            row["prompt"], rng.randint(*lengths) - 1, rng.randint(*lengths) - 1)]
        rows.append({"prompt": text[0], "chosen": " " + text[1], "rejected": " " + text[2]})
    return rows


def short_pairs(row, count):
    """The first pairs of row["data"], as messages, whose prompt and responses are short enough."""
    _, tokenizer = model_and_tokenizer(row)
    rows = []
    with open(row["data"], encoding="utf-8") as file:
        for line in file:
            pair = json.loads(line)
            messages = {"prompt": [{"role": "user", "content": pair["prompt"]}]}
            for side in ("chosen", "rejected"):
                messages[side] = [{"role": "assistant", "content": pair[side]}]
            prompt = tokenizer.apply_chat_template(messages["prompt"], add_generation_prompt=True)
            sizes = [len(tokenizer(pair[side])["input_ids"]) + 2 for side in ("chosen", "rejected")]
            if len(prompt["input_ids"]) <= row["prompt"] and max(sizes) <= row["response"]:
                rows.append(messages)
            if len(rows) == count:
                return rows
    sys.exit(f"bench.py: error: {row['data']}: has {len(rows)} pairs of at most {row['prompt']} + "
             f"{row['response']} tokens, wanted {count}")


def model_and_tokenizer(row):
    """The model of a directory, or a Llama or Qwen2 with random weights and a tokenizer of as many words."""
    import torch
    if isinstance(row["model"], str):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        return (AutoModelForCausalLM.from_pretrained(row["model"], dtype=torch.float32),
                AutoTokenizer.from_pretrained(row["model"]))
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                              Qwen2ForCausalLM)
    size = row["model"]["vocab_size"]
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK,
                  **{f"w{i}": i + 4 for i in range(size - 4)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    qwen2 = row["name"].startswith("qwen2")
    config = (Qwen2Config if qwen2 else LlamaConfig)(
        **row["model"], max_position_embeddings=4096, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model = (Qwen2ForCausalLM if qwen2 else LlamaForCausalLM)(config)
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                          eos_token="</s>", unk_token="<unk>")


def reward(prompts, completions, completion_ids=None, **_):
    """A function of the response, for TRL (by ids) and for sail.py (by text)."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [len(set(text.split())) / 64 for text in texts]


# --- one row, in a process of its own -----------------------------------------------------------------------

def ours(row, folder):
    """Run sail.py's own loop; the row's figures from its metrics.jsonl."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import sail
    directory = row["model"]
    if not isinstance(directory, str):
        directory = str(folder / "model")
        for part in model_and_tokenizer(row):
            part.save_pretrained(directory)
    variant = row["variant"].removesuffix("-again")
    route = int(variant != "dpo")
    pairs = pairs_of(row)
    drawn = sail.order_of(len(pairs), 0, bool(route), 0)        # so that it draws in file order
    (folder / "pairs.jsonl").write_text("".join(
        json.dumps(pair) + "\n"
        for _, pair in sorted(zip(drawn, pairs, strict=True), key=lambda each: each[0])))
    (folder / "one.jsonl").write_text(json.dumps(pairs[0]) + "\n")
    mix = ["--mix", "1"] if route else []
    sail.main([
        "--variant", variant, *mix, "--model", directory,
        "--data", str(folder / "pairs.jsonl"),
        "--eval-data", str(folder / "one.jsonl"), "--eval-limit", "1", "--eval-every", "0",
        "--reward", f"{__file__}:reward", "--steps", str(row["steps"]), "--batch-size", str(row["batch"]),
        "--learning-rate", "1e-6", "--max-prompt-length", str(row["prompt"]),
        "--dtype", row["dtype"],
        "--max-response-length", str(row["new_tokens"] if variant in SAMPLED
                                     else row["response"] or 192), "--out", str(folder / "run")])
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return dict(seconds=[line["seconds"] for line in metrics], tokens=[line["tokens"] for line in metrics],
                generation=[line["seconds_rollout"] for line in metrics],
                scoring=[line["seconds_reward"] for line in metrics])


def trl(row, folder):
    """The same work by TRL's DPOTrainer or OnlineDPOTrainer."""
    import copy
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    model, tokenizer = model_and_tokenizer(row)
    if not isinstance(row["model"], str):
        model.generation_config.pad_token_id = PAD
    known = row["variant"] == "dpo-again"
    reference = None if known else copy.deepcopy(model).eval().requires_grad_(False)
    pairs = pairs_of(row)
    ends, seen = [], dict(tokens=[], generation=[])
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=row["batch"], max_steps=row["steps"],
        gradient_checkpointing=False, bf16=row["dtype"] == "bfloat16", use_cpu=not torch.cuda.is_available(),
        learning_rate=1e-6, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        train_sampling_strategy="sequential", beta=0.1, dataloader_pin_memory=False)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    if row["variant"] not in SAMPLED:
        from trl import DPOConfig, DPOTrainer

        class Trainer(DPOTrainer):
            def training_step(self, model, inputs, *more, **options):
                seen["tokens"].append(int(inputs["attention_mask"].sum()))
                return super().training_step(model, inputs, *more, **options)

        trainer = Trainer(model=model, ref_model=reference, args=DPOConfig(
            max_length=None, precompute_ref_log_probs=known, **settings),
            train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, callbacks=[Clock()])
    else:
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        class Trainer(OnlineDPOTrainer):
            def _generate(self, *more, **options):
                started = time.perf_counter()
                output = super()._generate(*more, **options)
                _, prompt_mask, _, mask, _ = output
                seen["generation"].append(time.perf_counter() - started)
                seen["tokens"].append(int(prompt_mask.sum() + mask.sum()))
                return output

        trainer = Trainer(model=model, ref_model=reference, reward_funcs=reward, args=OnlineDPOConfig(
            max_new_tokens=row["new_tokens"], temperature=1.0, max_length=row["prompt"] + row["new_tokens"],
            **settings), train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in pairs]),
            processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return dict(seconds=[end - start for start, end in pairwise(ends)], tokens=seen["tokens"],
                generation=seen["generation"] or [0.0] * row["steps"], scoring=[0.0] * row["steps"])


def measure(row):
    """In the child: run the row, print it with its figures as the last line of standard output."""
    with tempfile.TemporaryDirectory() as folder:
        figures = {"sail": ours, "trl": trl}[row["side"]](row, Path(folder))
    import torch
    gpu = torch.cuda.is_available()
    memory = (torch.cuda.max_memory_allocated() if gpu
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    figures = {name: value[2:] if isinstance(value, list) else value for name, value in figures.items()}
    print(json.dumps({**row, **figures, "gigabytes": memory / 1e9}))


# --- the rows and their tables ------------------------------------------------------------------------------

def run(row, python=sys.executable):
    """Measure a row in a child; returns it with its figures."""
    child = subprocess.run([python, __file__, "--row", json.dumps(row)], env=os.environ | KEEP_MEMORY,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if child.returncode:
        sys.exit(f"bench.py: error: {row['side']} {row['name']} {row['variant']}:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def median(values):
    return statistics.median(values)


def speed(row):
    """Tokens per second."""
    return sum(row["tokens"]) / sum(row["seconds"])


def line_of(name, rounds, peers):
    """A line of the table: one configuration's rounds, beside the peer's."""
    seconds = [second for row in rounds for second in row["seconds"]]
    generation, scoring = (median([each for row in rounds for each in row[part]])
                           for part in ("generation", "scoring"))
    cells = [name, f"{median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})",
             f"{generation:.2f} + {scoring:.2f} + {median(seconds) - generation - scoring:.2f}",
             f"{sum(sum(row['tokens']) for row in rounds) / sum(seconds):,.0f}",
             f"{median([row['gigabytes'] for row in rounds]):.2f}"]
    if peers:
        ratios = [speed(row) / speed(peer) for row, peer in zip(rounds, peers, strict=True)]
        memory = [row["gigabytes"] / peer["gigabytes"] for row, peer in zip(rounds, peers, strict=True)]
        cells += [f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})", f"{median(memory):.2f}"]
    else:
        cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def beside_peer(rows):
    """Markdown: a line for each dtype and variant of --out's rows, medians (ranges) over rounds in turn."""
    heads = ("tokens/s here", "sampling + update, s a step", "tokens/s TRL", "times its speed", "GB",
             "GB TRL", "of its memory")
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for dtype, variant in dict.fromkeys((row["dtype"], row["variant"]) for row in rows):
        of_kind = [row for row in rows if (row["dtype"], row["variant"]) == (dtype, variant)]
        ours, theirs = ([row for row in of_kind if row["side"] == side] for side in ("sail", "trl"))
        ratios = [speed(one) / speed(other) for one, other in zip(ours, theirs, strict=True)]
        shares = [one["gigabytes"] / other["gigabytes"] for one, other in zip(ours, theirs, strict=True)]
        sampling = median([second for row in ours for second in row["generation"]])
        update = median([second for row in ours for second in row["seconds"]]) - sampling
        cells = [with_range([speed(row) for row in ours], 0), f"{sampling:.1f} + {update:.1f}",
                 with_range([speed(row) for row in theirs], 0), with_range(ratios, 2),
                 *(f"{median([row['gigabytes'] for row in side]):.1f}" for side in (ours, theirs)),
                 f"{median(shares):.2f}"]
        lines.append(f"| {NAMES[variant]}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_range(values, digits):
    """"median (smallest–largest)"."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(args):
    """Every model and variant, in turn with the peer; prints a table, keeps the rows."""
    print("| | s/step, median (min–max) | generation + scoring + update | tokens/s | GB | "
          "times TRL's speed | of TRL's memory |\n|" + "---|" * 7, flush=True)
    for model in args.models:
        for variant in args.variants:
            row, rounds, peers = row_of(args, model, variant), [], []
            for _ in range(args.rounds):
                rounds.append(run(row))
                keep(args.out, rounds[-1])
                if args.peer_python and variant in PEERS:
                    peers.append(run({**row, "side": "trl"}, args.peer_python))
                    keep(args.out, peers[-1])
            name = row["name"]
            print(line_of(f"{name} {variant}", rounds, peers), flush=True)
            if peers:
                print(line_of(f"{name} {PEERS[variant]}", peers, []), flush=True)


def row_of(args, name, variant, **more):
    return {"side": "sail", "name": Path(name).name, "model": MODELS.get(name, name), "data": args.data,
            "variant": variant, "steps": args.steps, "batch": args.batch, "prompt": args.prompt,
            "response": args.response, "new_tokens": 64 if args.data else args.response or 64,
            "dtype": args.dtype, **more}


def keep(out, row):
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def overhead_table(rows):
    """Markdown: a line for each model of --overheads' rows, medians (quartiles) over steps of a variant's CPU
    seconds divided by dpo's."""
    lines = ["| model | " + " | ".join(f"{variant} / dpo" for variant in OVERHEADS[1:]) + " |",
             "|---" * len(OVERHEADS) + "|"]
    for row in rows:
        shape, cells = row["model"], []
        for variant in OVERHEADS[1:]:
            ratios = [one / dpo for one, dpo in zip(row[variant], row["dpo"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.3f} ({low:.3f}–{high:.3f})")
        lines.append(f"| {row['name']}: {shape['num_hidden_layers']} layers of width {shape['hidden_size']}, "
                     f"vocabulary {shape['vocab_size']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def overheads(args):
    """dp, pp and pr against dpo on the same pairs, the update alone, on one thread, variants in turn within
    each step. Keeps a row for each model, with each variant's CPU seconds, which count no other work of a
    busy machine, of every step but the first two. Prints the table."""
    sys.path.insert(0, str(ROOT))
    import copy

    import torch

    import sail
    from generate import prepare
    from runtime.settings import Settings
    torch.set_num_threads(1)
    measured = []
    for name in args.models:
        row = row_of(args, name, "dpo")
        model, tokenizer = model_and_tokenizer(row)
        policy, rows = prepare(model, tokenizer), pairs_of(row)
        reference = copy.deepcopy(policy).requires_grad_(False)
        methods = {}
        for variant in OVERHEADS:
            declared = sail.VARIANTS[variant]
            methods[variant] = sail.Method(variant, mix=0.5, response_coef=declared.response_coef,
                                           label_coef=declared.label_coef)
        settings = Settings(learning_rate=1e-6, dtype="float32")
        optimizer, scheduler = sail.make_optimizer(policy.parameters(), 100, settings)
        run_ = sail.Run(policy, reference, tokenizer, None, [], [], settings)
        run_.progress["baseline"] = -0.7
        seconds = {variant: [] for variant in OVERHEADS}
        for step in range(args.steps):
            for variant in random.Random(step).sample(OVERHEADS, len(OVERHEADS)):
                own = sail.VARIANTS[variant]
                pairs = []
                for pair in rows[step * args.batch:][:args.batch]:
                    ids = [tokenizer(pair[side])["input_ids"] for side in ("prompt", "chosen", "rejected")]
                    pairs.append(sail.Pair("", "", "", ids[0], ids[1] + [EOS], ids[2] + [EOS],
                                           own.responses == "policy", own.label == "policy"))
                started = time.process_time()
                sail.accumulate_gradients(run_, pairs, methods[variant])
                sail.optimizer_step(policy, optimizer, scheduler, 1.0, 0.0)
                seconds[variant].append(time.process_time() - started)
        times = {variant: [round(second, 4) for second in seconds[variant][2:]] for variant in OVERHEADS}
        measured.append({"name": row["name"], "model": row["model"], "steps": args.steps, **times})
        keep(args.out, measured[-1])
    print(overhead_table(measured))


def main():
    parser = argparse.ArgumentParser(description="Time the training step.")
    parser.add_argument("--models", nargs="+", default=["S", "V"],
                        help=f"of {', '.join(MODELS)}, or directories")
    parser.add_argument("--data", help="pairs for pretrained models, .jsonl")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=OVERHEADS)
    parser.add_argument("--peer-python", help="a Python that has TRL")
    parser.add_argument("--rounds", type=int, default=1, help="of each row, in turn with the peer's")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--response", type=int, default=0,
                        help="tokens, of every response (data's: 32 to 192; sampled: 64)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", default="runs/bench.jsonl", help="JSON lines, appended to")
    parser.add_argument("--overheads", action="store_true")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 4:
        parser.error("argument --steps: want 4 or more, since the first two are left out")
    if {*args.models} - {*MODELS} and not args.data:
        parser.error("argument --data: want pairs for a pretrained model")
    if args.row:
        measure(args.row)
    elif args.overheads:
        overheads(args)
    else:
        table(args)


if __name__ == "__main__":
    main()
