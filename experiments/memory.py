"""What a run needs in memory: an estimate from the model's shapes.

    python experiments/memory.py                  the estimate per device for 0.5B to 70B

`estimate` counts bytes. tests/test_scale.py holds its terms against bytes measured on small models.
"""
import torch

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


def sizes_of(config):
    """(parameters in all, outside the decoder layers, in the largest layer, in linear layers that compute in
    bfloat16, of LoRA per rank) of a model with this configuration, which is not allocated."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=count)
    linear = lora = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
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


def whole(parts):
    return parts["weights"] + parts["reference"] + parts["optimizer"] + max(parts["rollout"], parts["update"])


def print_estimate():
    from transformers import AutoConfig
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
        shape = dict(SHAPES[name])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        prompts, responses = (64, 1) if samples == 64 else (8, 2)
        parts = estimate(config, processes, **options, prompts=prompts, responses=responses)
        figures = [f"{value / 2**30:.1f}" for value in (*parts.values(), whole(parts))]
        print(f"| {name} | {processes} | `{flags}` | {samples} | ".replace("``", "") + " | ".join(figures)
              + " |")


if __name__ == "__main__":
    print_estimate()
