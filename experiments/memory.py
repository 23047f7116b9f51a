"""What a run needs in memory: an estimate from the model's shapes.

    python experiments/memory.py                  # the estimate per device for 0.5B to 70B
    python experiments/memory.py --measure DIR    # beside bytes measured on a CPU, of a small model

`estimate` counts the bytes of a run of sail.py, `estimate_frozen` those of evaluate.py, generate.py and a
reward model that scores, `estimate_reward_training` those of reward.py --train. tests/test_scale.py holds
their terms against bytes measured on small models.
"""
import argparse
import copy
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from runtime.run_directory import write_rows
from runtime.training import LOGITS

LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8)
SHAPES = {
    "0.5B": dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
                 num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                 tie_word_embeddings=True),
    "3B": dict(model_type="llama", **{**LLAMA_8B, "hidden_size": 3072, "intermediate_size": 8192,
                                      "num_hidden_layers": 28, "num_attention_heads": 24,
                                      "tie_word_embeddings": True}),
    "8B": dict(model_type="llama", **LLAMA_8B),
    "70B": dict(model_type="llama", **{**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672,
                                       "num_hidden_layers": 80, "num_attention_heads": 64}),
}


def sizes_of(config, classifier=False):
    """(parameters in all, outside the decoder layers, in the largest layer, in linear layers that compute in
    bfloat16, of LoRA per rank) of a language model, or of a classifier with one logit, of this configuration.
    The model is not allocated."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    with torch.device("meta"):
        if classifier:
            config = copy.deepcopy(config)
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config)
            heads = [model.score]
        else:
            model = AutoModelForCausalLM.from_config(config)
            heads = [model.get_output_embeddings()]

    def count(module):
        return sum(p.numel() for p in module.parameters())

    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=count)
    linear = lora = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module not in heads:
            linear += count(module)
            lora += module.in_features + module.out_features
    return count(model), count(model) - count(layers), max(map(count, layers)), linear, lora


def estimate(config, processes=1, shard=False, lora=0, bytes_=2, prompts=8, responses=2, prompt=512,
             response=512, pairs=1):
    """Bytes per device, by what they are for; the whole is their states plus the larger of rollout and
    update.

    bytes_: of the compute dtype. `prompts` prompts are answered at a time, with `responses` each. A step has
    several micro-batches of `pairs` pairs, and gradient checkpointing is on. prompt, response: tokens. One
    pair of 512 + 512 tokens makes all the logits that runtime/training.py allows a forward on a CPU, where
    the vocabulary has 65,536 words or more.
    """
    total, outside, layer, linear, adapter = sizes_of(config)
    adapter *= lora
    trained, part = adapter or total, processes if shard else 1
    frozen = 4 * (total - linear) + bytes_ * linear                # of a model that is not trained
    embedding = config.vocab_size * config.hidden_size
    gathered = 4 * outside + bytes_ * 2 * layer if shard else 0    # one layer computes, the next is coming
    wide = 4 if not shard else bytes_                              # residuals and rotated keys, in autocast
    copied = 0 if shard or bytes_ == 4 else bytes_                 # by autocast, of what is trained
    cast = copied * (adapter or linear)
    return {
        "weights": (frozen + 4 * adapter if lora else 4 * total) / part,
        "reference": 0 if lora else frozen / part + (4 * outside if shard else 0),
        "optimizer": 8 * trained / part,
        "rollout": (4 * outside + bytes_ * (total - outside + adapter) if shard else 0)    # whole, to sample
        + rollout_bytes(config, prompts, responses, prompt, response, wide, bytes_, cast, 4 if lora else 3),
        "update": 4 * trained / part + gathered
        + update_bytes(config, pairs * (prompt + 2 * response), 2 * pairs * response, wide, bytes_, cast,
                       0 if lora else copied * layer, 4 * embedding * (not lora))
        + (4 * outside if shard and not lora else 0),              # a gradient that is not yet sharded
    }


def estimate_frozen(config, models=1, classifier=False, bytes_=2, prompts=64, responses=1, prompt=512,
                    response=512):
    """Bytes of models that are not trained. generate.py holds one and samples from it; evaluate.py holds two,
    a model and the reference, and scores with both what it has sampled; a reward model, which is a
    classifier, scores only."""
    total, _, _, linear, _ = sizes_of(config, classifier)
    found = {"weights": models * (4 * (total - linear) + bytes_ * linear), "sampling": 0, "scoring": 0}
    if not classifier:
        found["sampling"] = rollout_bytes(config, prompts, responses, prompt, response, 4, bytes_, 0, 3)
    if classifier or models > 1:
        found["scoring"] = scoring_bytes(config, classifier, bytes_, prompt, response)
    return found


def scoring_bytes(config, classifier, bytes_, prompt, response):
    """The most that a forward without gradient holds beside the weights: one layer's tensors, or the logits
    of the responses and their log-softmax. Its rows are as many as runtime/training.py allows on a CPU."""
    scored = prompt + response if classifier else response
    rows = max(1, min(32, LOGITS // (scored * config.vocab_size)))
    tokens = rows * (prompt + response)
    layer = tokens * (16 * config.hidden_size + 3 * bytes_ * config.intermediate_size)
    if classifier:
        return layer
    logits, hidden = rows * response * config.vocab_size, (tokens + rows * response) * config.hidden_size
    return max(layer, 8 * logits + 4 * hidden)


def estimate_reward_training(config, lora=0, bytes_=2, pairs=1, prompt=512, response=512):
    """Bytes of reward.py --train, with gradient checkpointing and `pairs` pairs to a micro-batch."""
    total, _, layer, linear, adapter = sizes_of(config, classifier=True)
    adapter *= lora
    trained = adapter or total
    copied = 0 if bytes_ == 4 else bytes_
    weights = 4 * (total - linear) + bytes_ * linear + 4 * adapter if lora else 4 * total
    update = update_bytes(config, pairs * 2 * (prompt + response), 0, 4, bytes_, copied * (adapter or linear),
                          0 if lora else copied * layer, 0)
    return {"weights": weights, "optimizer": 8 * trained, "update": 4 * trained + update}


def rollout_bytes(config, prompts, responses, prompt, response, wide, bytes_, cast, wide_layers):
    """The most that sampling holds beside the weights: while it reads the prompts, of which a layer makes
    `wide_layers` tensors of the intermediate size, or while it decodes."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    read, samples = prompts * prompt, prompts * responses
    keys = config.num_key_value_heads * head                       # of a token, in one layer; so many values
    cache = config.num_hidden_layers * keys * (wide + bytes_)      # of a token
    reading = (cache * read + cast
               + read * (4 * wide * config.hidden_size + wide_layers * bytes_ * config.intermediate_size))
    tokens, logits = samples * (prompt + response), samples * config.vocab_size
    decoding = cache * tokens + max(
        cast + wide * keys * tokens + 12 * logits,     # keys grow by copying, or
        cast + 24 * logits)                # logits, softmax, its sums in float64, and those before
    return max(reading, decoding)


def update_bytes(config, packed, scored, wide, bytes_, cast, cast_layer, gradient):
    """The most that a micro-batch of `packed` tokens, `scored` of them in responses, holds beside the
    gradients. gradient: bytes of the embedding's, which autograd makes anew each time; where it is the output
    layer's too, it holds both and their sum."""
    kept = packed * config.num_hidden_layers * config.hidden_size * wide        # each layer's input
    logits = scored * config.vocab_size
    of_layer = packed * (32 * config.hidden_size + 7 * bytes_ * config.intermediate_size) + cast_layer
    of_head = max(cast + 8 * logits,                               # logits and log-softmax, or
                  12 * logits)                                     # log-softmax and two gradients
    if not config.tie_word_embeddings:
        return max(kept + max(of_layer, of_head), gradient)
    return max(kept + max(gradient + of_layer, of_head), 3 * gradient)


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


def measure(name, prompt=128, samples=32, response=32):
    """Rows of {what, part, measured, estimated}, in MiB, of the weights, the reference, the optimizer, a
    rollout and an update of a model: in full and with an adapter, in float32 and in bfloat16. An update is of
    one pair of `prompt` + `prompt` tokens a micro-batch; a rollout answers 32 prompts."""
    import sail
    from data import Pair
    from generate import load_models, sample
    from runtime.optimizer import optimizer_step
    rows = []
    for lora in (0, 16):
        for dtype, bytes_ in (("float32", 4), ("bfloat16", 2)):
            flags = f"--variant dpo --data none.jsonl --gradient-checkpointing --dtype {dtype}"
            if lora:
                flags += f" --lora {lora}"
            args = sail.parse_args([*flags.split(), "--model", name], micro_batch_size=1)
            policy, reference, tokenizer = load_models(args)
            run = sail.Run(policy, reference, tokenizer, None, [], [], args, progress={"baseline": 0.0})
            run.optimizer, run.scheduler = sail.make_optimizer(policy.parameters(), 10, args)
            ids = torch.randint(5, len(tokenizer), (4, 3, prompt)).tolist()
            pairs = [Pair("", "", "", *each) for each in ids]

            def update(run=run, pairs=pairs, args=args):
                sail.accumulate_gradients(run, pairs, args)
                optimizer_step(run.policy, run.optimizer, run.scheduler, 1.0, 0.0)

            update()
            with PeakBytes() as updating:
                update()
            policy.eval()
            prompts = torch.randint(5, len(tokenizer), (samples, prompt)).tolist()
            with sail.computing_in(dtype, policy), PeakBytes() as sampling:
                sample(policy, tokenizer, prompts, response)
            states = [value for state in run.optimizer.state.values() for value in state.values()]
            measured = {"weights": bytes_of(policy.parameters()),
                        "reference": 0 if lora else bytes_of(reference.parameters()),
                        "optimizer": bytes_of(states), "rollout": sampling.peak, "update": updating.peak}
            sampled = estimate(policy.config, lora=lora, bytes_=bytes_, prompts=samples, responses=1,
                               prompt=prompt, response=response)
            updated = estimate(policy.config, lora=lora, bytes_=bytes_, prompt=prompt, response=prompt)
            for part, found in measured.items():
                wanted = sampled if part == "rollout" else updated
                rows.append(dict(what=f"{'--lora 16' if lora else 'full'}, {dtype}", part=part,
                                 measured=round(found / 2**20), estimated=round(wanted[part] / 2**20)))
    return rows


def bytes_of(tensors):
    """The bytes of tensors in all."""
    return sum(tensor.nbytes for tensor in tensors)


def measured_table(rows):
    """Markdown: measured / estimated, a line for each setting."""
    parts = [*dict.fromkeys(row["part"] for row in rows)]
    lines = ["| | " + " | ".join(parts) + " |", "|---" * (len(parts) + 1) + "|"]
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = [f"{row['measured']} / {row['estimated']}" for row in rows if row["what"] == what]
        name, _, dtype = what.partition(", ")
        name = f"`{name}`" if name.startswith("--") else name
        lines.append(f"| {name}, {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whole(parts):
    """The bytes in all: what is held throughout, and the most that is held for a while."""
    parts = dict(parts)
    kept = [parts.pop(name, 0) for name in ("weights", "reference", "optimizer")]
    return sum(kept) + max(parts.values())


def print_estimate():
    from transformers import AutoConfig

    def config_of(name):
        shape = dict(SHAPES[name])
        return AutoConfig.for_model(shape.pop("model_type"), **shape)

    print("GiB per device: --dtype bfloat16 --gradient-checkpointing, 512 + 512 tokens, one pair per "
          "micro-batch;\n16 samples at a time are --sample-batch-size 8, 64 an evaluation's default. A GPU's "
          "context and buffers,\nabout 1 GiB, come on top, as does a reward model.\n")
    heads = "model processes flags samples weights reference optimizer rollout update".split()
    print("| " + " | ".join([*heads, "in all"]) + " |\n" + "|---" * 10 + "|")
    lora, shard = dict(lora=16), dict(shard=True)
    for name, processes, options, samples in (
            ("0.5B", 1, {}, 16), ("0.5B", 1, {}, 64), ("3B", 1, lora, 16), ("8B", 1, lora, 16),
            ("8B", 1, lora, 64), ("8B", 8, shard, 16), ("8B", 8, {**shard, **lora}, 16),
            ("8B", 16, shard, 16), ("70B", 16, shard, 16), ("70B", 16, {**shard, **lora}, 16)):
        flags = " ".join(f"--{flag} 16" if flag == "lora" else f"--{flag}" for flag in options)
        prompts, responses = (64, 1) if samples == 64 else (8, 2)
        parts = estimate(config_of(name), processes, **options, prompts=prompts, responses=responses)
        figures = [f"{value / 2**30:.1f}" for value in (*parts.values(), whole(parts))]
        print(f"| {name} | {processes} | `{flags}` | {samples} | ".replace("``", "") + " | ".join(figures)
              + " |")
    print("\n| command | model | weights | optimizer | sampling, scoring or update | in all |\n"
          + "|---" * 6 + "|")
    for command, name, function, options in (
            ("generate.py", "8B", estimate_frozen, {}),
            ("evaluate.py", "0.5B", estimate_frozen, dict(models=2)),
            ("evaluate.py", "8B", estimate_frozen, dict(models=2)),
            ("a reward model", "0.5B", estimate_frozen, dict(classifier=True)),
            ("a reward model", "8B", estimate_frozen, dict(classifier=True)),
            ("reward.py --train", "0.5B", estimate_reward_training, {}),
            ("reward.py --train --lora 16", "8B", estimate_reward_training, lora)):
        parts = function(config_of(name), **options)
        kept = parts["weights"] + parts.get("optimizer", 0)
        figures = [parts["weights"], parts.get("optimizer", 0), whole(parts) - kept, whole(parts)]
        print(f"| {command} | {name} | " + " | ".join(f"{value / 2**30:.1f}" for value in figures) + " |")


def main():
    """`python experiments/memory.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", metavar="DIR", help="a model whose bytes are measured, on this CPU")
    args = parser.parse_args()
    if not args.measure:
        return print_estimate()
    torch.set_num_threads(1)
    rows = measure(args.measure)
    write_rows(ROOT / "experiments/memory.jsonl", rows)
    print(measured_table(rows))


if __name__ == "__main__":
    main()
