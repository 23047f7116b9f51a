"""What a run needs in memory: an estimate from the model's shapes, and measurements.

    python experiments/memory.py                  the estimate per device for 0.5B, 8B and 70B
    python experiments/memory.py --measure        memory of dpo, dp, pp, pr: full, LoRA, sharded, on this CPU
    python experiments/memory.py --flat           memory after step 200 against step 20, every variant

`estimate` counts bytes. tests/test_scale.py holds its terms against measured ones on small models.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8)
SHAPES = {
    "0.5B": dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
                 num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                 tie_word_embeddings=True),
    "8B": dict(model_type="llama", **LLAMA_8B),
    "70B": dict(model_type="llama", **{**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672,
                                       "num_hidden_layers": 80, "num_attention_heads": 64}),
}


def sizes_of(config):
    """(parameters in all, outside the decoder layers, in the largest layer, of LoRA per rank) of a model
    with this configuration, which is not allocated."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=count)
    lora = sum(m.in_features + m.out_features for m in model.modules()
               if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings())
    return count(model), count(model) - count(layers), max(map(count, layers)), lora


def estimate(config, processes=1, shard=False, lora=0, bytes_=2, samples=16, tokens=1024,
             packed=1536, scored=1024):
    """Bytes per device, by what they are for; the whole is their states plus the larger of rollout and
    update.

    bytes_: of the compute dtype. samples of `tokens` tokens each are drawn at a time. A step has several
    micro-batches of `packed` tokens, `scored` of them in responses, and gradient checkpointing is on. The
    defaults are one pair of 512 + 512 tokens, which alone makes all the logits that generate.micro_batches
    allows a forward, where the vocabulary has 65,536 words or more.
    """
    total, outside, layer, adapter = sizes_of(config)
    adapter *= lora
    trained, part = adapter or total, processes if shard else 1
    gathered = bytes_ * (outside + 2 * layer) if shard else 0     # one layer computes, the next is on its way
    wide = 4 if not shard else bytes_            # autocast leaves residuals and rotated keys in float32, and
    copied = 0 if shard or bytes_ == 4 else bytes_   # copies weights: what is trained, others while in use
    embedding = config.vocab_size * config.hidden_size
    cast = copied * (adapter or total - embedding * (not config.tie_word_embeddings))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head * samples * tokens                            # of one layer
    drawn, logits = samples * config.vocab_size, scored * config.vocab_size
    buckets = 0 if shard or processes == 1 else 4 * trained   # DDP's own copy of the gradients
    computed = packed * (32 * config.hidden_size + 7 * bytes_ * config.intermediate_size) + copied * layer
    return {
        "weights": 4 * (total + adapter) / part,
        "reference": 0 if lora else 4 * total / part + (bytes_ * outside if shard else 0),
        "optimizer": 8 * trained / part,
        "rollout": (bytes_ * (total + adapter) if shard else 0)           # sharded ones are whole, to sample
        + config.num_hidden_layers * keys * (wide + bytes_)
        + max(max(cast, copied * embedding) + wide * keys + 12 * drawn,  # a layer's keys grow by copying; or
              cast + 24 * drawn),        # logits, softmax, its sums in float64, and those of the token before
        "update": 4 * trained / part + buckets + gathered
        + packed * config.num_hidden_layers * config.hidden_size * wide    # each layer's input is kept; then
        + max(computed,                                                # what one layer computes, or
              max(cast, copied * embedding) + 8 * logits,              # logits and log-softmax, or
              copied * embedding + 12 * logits)                        # log-softmax and two gradients
        + (4 * outside if shard and not lora else 0),                  # a gradient that is not yet sharded
    }


def whole(parts):
    return parts["weights"] + parts["reference"] + parts["optimizer"] + max(parts["rollout"], parts["update"])


def print_estimate():
    from transformers import AutoConfig
    print("GiB per device: bfloat16 compute, float32 weights; 8 prompts on the route at a time (16 samples "
          "of 512 + 512 tokens),\none pair per micro-batch, --gradient-checkpointing\n")
    print("| model | processes | flags | weights | reference | optimizer | rollout | update | in all |\n"
          + "|---" * 9 + "|")
    for name, processes, flags, options in (
            ("0.5B", 1, "", {}), ("0.5B", 8, "`--shard`", dict(shard=True)),
            ("8B", 1, "`--lora 16`", dict(lora=16)), ("8B", 8, "`--shard`", dict(shard=True)),
            ("8B", 8, "`--shard --lora 16`", dict(shard=True, lora=16)),
            ("8B", 16, "`--shard`", dict(shard=True)),
            ("70B", 16, "`--shard`", dict(shard=True)),
            ("70B", 16, "`--shard --lora 16`", dict(shard=True, lora=16))):
        shape = dict(SHAPES[name])
        parts = estimate(AutoConfig.for_model(shape.pop("model_type"), **shape), processes, **options)
        print(f"| {name} | {processes} | {flags} | " + " | ".join(
            f"{value / 2**30:.1f}" for value in (*parts.values(), whole(parts))) + " |")


# --- measured

class PeakBytes(TorchDispatchMode):
    """Inside, `peak` becomes the most bytes that tensors made inside hold at a time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage, made = tensor.untyped_storage(), function.namespace == "aten" and not any(
                    isinstance(each, torch.Tensor)
                    and each.untyped_storage()._cdata == tensor.untyped_storage()._cdata
                    for each in tree_leaves((args, kwargs)))
                if made and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, storage, size):
        self.known.discard(storage)
        self.live -= size


def resident(what="VmRSS"):
    """This process's memory now, or at its peak ("VmHWM"), in bytes."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def in_a_process(arguments, ranks=1):
    """sail.py with these arguments in a process of its own; its memory: before loading, per step, at its
    peak. What is freed goes back to the kernel at once, so that it does not count."""
    start = ([] if ranks == 1 else
             ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)])
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run(
            [sys.executable, *start, __file__, "--one", folder, *arguments, "--out", folder + "/run"],
            text=True, capture_output=True,
            env={"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", **os.environ})
        if finished.returncode:
            raise SystemExit(finished.stderr)
        return json.loads(Path(folder, "memory.json").read_text())


def one(folder):
    """The child of in_a_process."""
    import sail
    steps, step, load = [], sail.training_step, sail.load_everything
    before = []

    def loading(*args):
        before.append(resident())
        return load(*args)

    def watched(*args):
        result = step(*args)
        steps.append(resident())
        return result

    sail.load_everything, sail.training_step = loading, watched
    sail.main()
    if os.environ.get("RANK", "0") == "0":
        figures = dict(before=before[0], steps=steps, peak=resident("VmHWM"))
        Path(folder, "memory.json").write_text(json.dumps(figures))


def checkpoint(folder, name):
    """A random model of bench.py's, saved."""
    from bench import MODELS, model_and_tokenizer
    for part in model_and_tokenizer(dict(name=name, model=MODELS[name])):
        part.save_pretrained(folder)


def measure(name, steps):
    """Print the table of peak memory."""
    from bench import pairs_of
    print(f"model {name}, {steps} steps of 8 pairs, prompts 64, responses up to 64, micro-batches of 2, MiB "
          "above the memory before loading:\npeak, loading and saving included / after the last step; of two"
          " ranks, sharded, the first\n"
          "| | full | --lora 8 | --shard, two ranks | --shard --lora 8 |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(folder + "/model", name)
        row = dict(prompt=64, response=64, steps=steps, batch=8, model=dict(vocab_size=8192))
        Path(folder, "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs_of(row)))
        common = ["--model", folder + "/model", "--data", folder + "/pairs.jsonl",
                  "--reward", f"{ROOT}/experiments/bench.py:reward", "--steps", str(steps),
                  "--batch-size", "8", "--micro-batch-size", "2", "--eval-every", "0", "--eval-limit", "1",
                  "--max-prompt-length", "64", "--max-response-length", "64"]
        for variant in ("dpo", "dp", "pp", "pr"):
            cells = []
            for ranks, more in ((1, []), (1, ["--lora", "8"]), (2, ["--shard"]),
                                (2, ["--shard", "--lora", "8"])):
                figures = in_a_process([*common, "--variant", variant, *more], ranks)
                cells.append(" / ".join(f"{(figure - figures['before']) / 2**20:.0f}"
                                        for figure in (figures["peak"], figures["steps"][-1])))
            print(f"| {variant} | " + " | ".join(cells) + " |", flush=True)


def flat(steps):
    """Print memory after step 200 against step 20."""
    from toy import toy_model
    with tempfile.TemporaryDirectory() as folder:
        for part in toy_model(seed=5):
            part.save_pretrained(folder)
        print(f"| variant | after step 20, MiB | after step {steps} | |\n|---|---|---|---|")
        for variant in ("sft", "dpo", "dp", "pp", "pr", "spin"):
            found = in_a_process(["--model", folder, "--data", "toy:grammar", "--variant", variant,
                                  "--steps", str(steps), "--batch-size", "8", "--eval-every", "0",
                                  "--eval-limit", "4"])["steps"]
            print(f"| {variant} | {found[19] / 2**20:.1f} | {found[-1] / 2**20:.1f} | "
                  f"{found[-1] / found[19] - 1:+.2%} |", flush=True)


def main():
    if sys.argv[1:2] == ["--one"]:
        folder = sys.argv[2]
        del sys.argv[1:3]
        return one(folder)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--model", default="M", help="of bench.py's, to measure (M)")
    parser.add_argument("--steps", type=int, help="(measure: 3, flat: 200)")
    args = parser.parse_args()
    if args.measure:
        measure(args.model, args.steps or 3)
    if args.flat:
        flat(args.steps or 200)
    if not args.measure and not args.flat:
        print_estimate()


if __name__ == "__main__":
    main()
