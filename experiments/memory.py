"""What a run needs in memory: an estimate from the model's shapes.

    python experiments/memory.py                  the estimate per device for 0.5B, 8B and 70B

`estimate` counts bytes. tests/test_scale.py holds its terms against bytes measured on small models.
"""
import torch

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
    defaults are one pair of 512 + 512 tokens, which alone makes all the logits that sail.micro_batches
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
    computed = packed * (32 * config.hidden_size + 7 * bytes_ * config.intermediate_size) + copied * layer
    return {
        "weights": 4 * (total + adapter) / part,
        "reference": 0 if lora else 4 * total / part + (bytes_ * outside if shard else 0),
        "optimizer": 8 * trained / part,
        "rollout": (bytes_ * (total + adapter) if shard else 0)           # sharded ones are whole, to sample
        + config.num_hidden_layers * keys * (wide + bytes_)
        + max(max(cast, copied * embedding) + wide * keys + 12 * drawn,  # a layer's keys grow by copying; or
              cast + 24 * drawn),        # logits, softmax, its sums in float64, and those of the token before
        "update": 4 * trained / part + gathered
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


if __name__ == "__main__":
    print_estimate()
