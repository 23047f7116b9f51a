"""A policy: load it, adapt it, score with it, and sample from exactly the distribution that is scored.

    python generate.py --model M --data D --out responses.jsonl     # prompt, response, tokens, finished
    python generate.py --model RUN --n 4                            # four answers to each held-out prompt

SAIL's second term is the score of the distribution that was sampled from. So `sample` draws from the full
softmax, whatever the checkpoint's generation_config says, and hands on the very ids it drew; `sequence_logps`
scores these ids under the same softmax. The two log-probabilities differ by rounding alone, because decoding
with a cache of keys and scoring a whole row add numbers up in different orders. `sampler_gap` in
metrics.jsonl is the root mean square of this difference in log π(y|x) over a step's responses. In float32 it
is negligible; in bfloat16 it is some tenths of a nat, although the output layer computes in float32 ("Sampler
gap" in experiments/README.md).

Shapes: B rows; T tokens of prompt, response and padding; P tokens of the prompt; V ids in the vocabulary; N
tokens that are scored.
"""
import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runtime.command_line import InputError, command_line, first_line, foreign, seeded
from runtime.packing import allow_packing, is_packed, packed_logits, register_packing
from runtime.processes import (
    computing_in, default_dtype, divided, fails_together, gathered, of_rank_0, own_device, progress, rank,
    sent, shard, with_equal_counts)
from runtime.run_directory import is_run_directory, refuse_output_of_rows, trained_weights, write_rows
from runtime.saved_model import base_of
from runtime.settings import Parser, Settings, read_run, same_as, setting
from runtime.training import micro_batches

import torch
from torch.nn.utils.rnn import pad_sequence

from data import SIDES, collate, encode, end_token_ids, load_tokenizer, print_report, response_text
from formats import TextPair, load_held_out, load_pairs, train_and_held_out

# --- load and adapt -----------------------------------------------------------------------------------------


def load_policy(name, trust_remote_code=False, lengths=(0, 0), whole=True, chat_template=None):
    """Load (model, tokenizer): a causal language model in float32 without dropout, on the CPU. name: a
    directory, which is loaded without the network, a run's checkpoint, or a hub name. Ids beyond the
    tokenizer's last one get no probability, in sampling and scoring alike. lengths: the most tokens of a
    prompt and of a response. With whole=False the model is built on the meta device, without weights.
    chat_template: see `set_chat_template`. Raises InputError as `load_tokenizer`, `load_model` and `prepare`
    do, or if the model has too few positions for both lengths together."""
    from transformers import AutoModelForCausalLM
    tokenizer = load_tokenizer(name, trust_remote_code, chat_template=chat_template)
    model = load_model(AutoModelForCausalLM, name, trust_remote_code, whole=whole)
    prepare(model, tokenizer, name)
    model.generation_config.eos_token_id = sorted(end_token_ids(tokenizer, model))      # saved with the model
    model.generation_config._from_model_config = False    # otherwise other tools take config.json's end token
    # The rest is saved as it came, even if transformers finds it inconsistent, as a top_p without sampling.
    model.generation_config._original_object_hash = hash(model.generation_config)
    positions = positions_of(model)
    if sum(lengths) > positions:
        raise InputError(f"{name} takes {positions} tokens, fewer than --max-prompt-length "
                         f"{lengths[0]} plus --max-response-length {lengths[1]}; lower them")
    return model, tokenizer


def load_model(auto_class, name, trust_remote_code=False, may_lack=frozenset(), may_leave=frozenset(),
               whole=True, **options):
    """Load auto_class.from_pretrained(name) in float32 and eval mode, without the network if `name` is a
    directory. For a run's checkpoint, the run's base model is loaded and the trained weights are put into it.
    With whole=False the model is built on the meta device from its configuration alone.

    Raises InputError if there is no such model, if the model's files lack a weight, which transformers would
    fill with random numbers, or if they hold a tensor of another shape, or one that has no place in the
    model, which transformers would drop. may_lack: the names of weights that the files may lack. may_leave:
    the names of tensors that may be dropped."""
    from transformers import AutoConfig
    run = base_of(name)
    if run is not None:
        trained = trained_weights(name) if whole else {}
        model = load_model(auto_class, run.model, trust_remote_code, may_lack | trained.keys(), may_leave,
                           whole, **options)
        if whole:
            model = with_trained(model, trained, run.lora, name, may_lack, may_leave)
        model.name_or_path = str(name)
        return model
    from transformers.utils import logging
    logging.set_verbosity_error()                   # missing weights are reported below, in one line
    logging.disable_progress_bar()
    kind = auto_class.__name__.removeprefix("AutoModelFor")
    options.update(trust_remote_code=trust_remote_code, local_files_only=Path(name).is_dir())
    if not whole:
        with foreign(f"{name}: cannot be loaded as a {kind} model"), torch.device("meta"):
            config = AutoConfig.from_pretrained(name, **options)
            return auto_class.from_config(config, trust_remote_code=trust_remote_code).float().eval()
    with foreign(f"{name}: cannot be loaded as a {kind} model"):
        model, loading = auto_class.from_pretrained(name, output_loading_info=True, dtype=torch.float32,
                                                    ignore_mismatched_sizes=True, **options)
    unlike = sorted(each for each, *_ in loading["mismatched_keys"])
    if unlike:                                      # transformers itself would report them in many lines
        raise InputError(f"{name}: cannot be loaded as a {kind} model ({len(unlike)} tensors of its files "
                         f"have other shapes than its configuration says, such as {', '.join(unlike[:3])})")
    left_over = sorted(set(loading["unexpected_keys"]) - may_leave)
    if left_over:                                   # transformers has taken out those that it calls harmless
        raise InputError(f"{name}: its files hold {len(left_over)} tensors for which its configuration has "
                         f"no place, such as {', '.join(left_over[:3])}; without them the model is wrong")
    lacking = loading["missing_keys"] - may_lack
    if lacking:
        raise InputError(f"{name} lacks weights that a {kind} model needs, such as "
                         f"{', '.join(sorted(lacking)[:3])}; give a trained model")
    return model.float().eval()


def with_trained(model, trained, lora, name, may_lack=frozenset(), may_leave=frozenset()):
    """Put the parameters that a run has trained, {name: tensor}, into its base model, in place, and return
    the model, in eval mode. An adapter of rank `lora` is merged into the base; lora=None means full
    fine-tuning. name: the checkpoint or run, for error messages. Raises InputError if the parameters are not
    exactly those that such a run trains, except for `may_lack` and `may_leave` as in `load_model`."""
    tuner = None
    if lora:
        tuner = add_adapter(model, lora)
    expected = {each for each, parameter in model.named_parameters() if parameter.requires_grad}
    unlike = sorted(expected - trained.keys() - may_lack | trained.keys() - expected - may_leave)
    if unlike:
        raise InputError(f"{name} does not fit its base, as a {type(model).__name__}: only one of them has "
                         f"{', '.join(unlike[:3])}")
    with foreign(f"{name} does not fit its base"):
        model.load_state_dict(trained, strict=False)
    if lora:
        model = tuner.merge_and_unload().requires_grad_(True)
    return model.eval()


def positions_of(model):
    """The greatest number of tokens that a model can both sample and score; inf if its config names none.
    Beyond a certain length, the rotary encodings longrope and dynamic rescale all positions, which
    invalidates cached keys, so this length is their maximum."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in rope.values() if isinstance(each, dict)] or [rope]  # one for each kind of layer
    for kind in kinds:
        rope_type = kind.get("rope_type") or "default"
        if rope_type == "longrope" or "dynamic" in rope_type:
            positions = min(positions, kind.get("original_max_position_embeddings") or positions)
    return positions


def prepare(model, tokenizer, name="model"):
    """Prepare a model, in place, for sampling and scoring, and return it. Dropout is switched off for good,
    the output layer computes in float32, the ids beyond the tokenizer's last one are masked, and packed rows
    are allowed if the model can take them. Raises InputError if the model lacks the id of an end token, or if
    it cannot be sampled from and scored, which is not tried on the meta device."""
    switch_dropout_off(model)
    known = max(tokenizer.get_vocab().values()) + 1
    head = model.get_output_embeddings()
    rows = head.weight.shape[0]
    if max(end_token_ids(tokenizer, model)) >= rows:     # other ids without a row may never occur in a text
        raise InputError(f"{name}: the tokenizer has {known} ids, the model only {rows}, and an end token is "
                         "among the ids that the model lacks; is this the wrong tokenizer?")
    try:
        if model.device.type != "meta":
            allow_packing(model)                         # before ids are masked, since it compares logits
            try_out(model)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise InputError(f"{name}: {type(model).__name__} lacks logits_to_keep, position_ids, or the usual "
                         f"cache, which scoring and sampling need ({first_line(error)})") from None
    compute_in_float32(head)
    if rows > known:
        def mask_unknown(_, __, logits):
            unknown = torch.arange(known, rows, device=logits.device)
            return logits.index_fill(-1, unknown, torch.finfo(logits.dtype).min)

        head.register_forward_hook(mask_unknown)
    return model


def compute_in_float32(layer):
    """Let an output layer compute in float32, also under autocast to bfloat16. This makes the
    log-probabilities of sampling and of scoring differ less."""
    def in_float32(forward, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden.float())

    layer.forward = partial(in_float32, layer.forward)


def switch_dropout_off(model):
    """Set the rate of every dropout, and the noise of a router, to 0. They then stay off in train mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            is_noise = "drop" in attribute or "jitter" in attribute  # a dropout rate, or a router's noise
            if is_noise and isinstance(value, float):
                setattr(module, attribute, 0.0)


@torch.no_grad()
def try_out(model):
    """Sample two tokens for each of two prompts and score them, as training will. A model that cannot do this
    raises its own exception."""
    prompts, no_ends = [[0, 1, 1], [1]], torch.tensor([], dtype=torch.long, device=model.device)
    responses, _ = draw(model, prompts, no_ends, 2, 1, 1.0)
    sequence_logps(model, *collate(prompts, responses, model.device))


def load_models(args):
    """Load (policy, reference, tokenizer) of a run of sail.py, adapted and placed, all processes together.
    The reference is None for sft. If the policy trains an adapter and the reference is its base model, the
    reference is the policy without the adapter. Raises InputError as `load_parts` does."""
    models, tokenizer = load_parts(args)
    place(models, args)
    policy, reference = models[0], None
    if len(models) == 2:
        reference = models[1]
    elif args.reference:
        reference = AdapterReference(policy)
    return policy, reference, tokenizer


@fails_together
def load_parts(args):
    """Load ([policy], tokenizer) on the CPU, or ([policy, reference], tokenizer) if the reference needs a
    model of its own. With --shard only rank 0 loads weights, and the other ranks get models on the meta
    device. Raises InputError as `load_policy` and `refuse_other_ids` do."""
    options = dict(trust_remote_code=args.trust_remote_code, whole=has_weights(args),
                   chat_template=args.chat_template,
                   lengths=(args.max_prompt_length, args.max_response_length))
    policy, tokenizer = load_policy(args.model, **options)
    models = [policy]
    if args.reference == args.model and not args.lora:
        models.append(copy.deepcopy(policy).requires_grad_(False))
    elif args.reference and args.reference != args.model:
        reference, other = load_policy(args.reference, **options)
        models.append(reference.requires_grad_(False))
        refuse_other_ids((args.model, policy, tokenizer), (args.reference, reference, other))
    if args.lora:
        add_adapter(policy, args.lora, args.seed)
    return models, tokenizer


def refuse_other_ids(model, reference):
    """Raises InputError if the reference has another vocabulary than the model, or no embeddings for ids of
    its vocabulary for which the model has some. Both are (name, model, tokenizer)."""
    vocabulary = model[2].get_vocab()
    if reference[2].get_vocab() != vocabulary:
        raise InputError(f"the reference {reference[0]} has another vocabulary than {model[0]}")
    ours, theirs = (part[1].get_input_embeddings().weight.shape[0] for part in (model, reference))
    if theirs < min(ours, max(vocabulary.values()) + 1):
        raise InputError(f"the reference {reference[0]} has only {theirs} ids, and {model[0]} has {ours}")


def has_weights(settings):
    """Whether this process loads a model's weights. With --shard only rank 0 loads them, and it sends the
    other processes their parts."""
    return rank() == 0 or not settings.shard


@fails_together
def place(models, settings):
    """Move models, in place, to where they compute: to this process's device or, with --shard, in parts to
    all processes. The first model is trained. Linear layers that are frozen, except those that make logits,
    are held in bfloat16 if that is the dtype. All processes call this together."""
    device = own_device()
    for model in models:
        if settings.dtype == "bfloat16":
            hold_frozen_in_bfloat16(model)
        if settings.shard:
            copy_settings_of_rank_0(model)
            shard(model, device, settings.dtype)
        else:
            model.to(device)
    if settings.gradient_checkpointing:
        models[0].activation_checkpointing_enable({"use_reentrant": False})


def load_frozen(name, dtype, **options):
    """Load (model, tokenizer) as `load_policy` does, for a model that is not trained, and move the model to
    this process's device. If `dtype` is "bfloat16", its linear layers except the output layer are held in
    bfloat16; all other weights are float32."""
    model, tokenizer = load_policy(name, **options)
    model.requires_grad_(False)
    if dtype == "bfloat16":
        hold_frozen_in_bfloat16(model)
    return model.to(own_device()), tokenizer


def hold_frozen_in_bfloat16(model):
    """Hold the frozen weights of linear layers in bfloat16, in place. Autocast would round them to bfloat16
    at each forward, so the results are the same and take less memory. The embedding and the output layers
    stay in float32, since autocast does not round them."""
    kept = [model.get_input_embeddings().weight, *(head.weight for head in heads_of(model))]
    if model.get_output_embeddings() is not None:
        kept.append(model.get_output_embeddings().weight)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not any(module.weight is weight for weight in kept):
            if not module.weight.requires_grad:
                module.to(torch.bfloat16)


def heads_of(model):
    """The linear layers that make the logits of a sequence classifier. The list is empty for a language
    model."""
    heads = []
    for name, module in model.named_children():
        if name in ("score", "classifier"):
            heads += [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    return heads


def copy_settings_of_rank_0(model):
    """Copy rank 0's attention setting and generation_config, which has the end tokens, to the ranks without
    weights. All ranks take part."""
    attention = model.config.get_text_config()._attn_implementation
    ends = getattr(model, "generation_config", None)                 # a classifier has none
    attention, model.generation_config = of_rank_0((attention, ends))
    if attention == "packed":
        register_packing()
        model.set_attn_implementation("packed")


def add_adapter(model, rank, seed=0):
    """Add a new LoRA adapter (arXiv 2106.09685) of this rank, with alpha 2·rank, to every linear layer but
    the output layer, in place. After that only the adapter and the head of a classifier are trained. Returns
    the object of peft that can merge the adapter. This seeds torch."""
    import peft
    device = model.device
    model.requires_grad_(False)
    torch.manual_seed(seeded("adapter", seed))
    heads = heads_of(model)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                             task_type="SEQ_CLS" if heads else "CAUSAL_LM",
                             base_model_name_or_path=model.name_or_path)
    tuner = peft.LoraModel(model, config, "default")                 # this changes the model itself
    for head in heads:
        head.requires_grad_(True)
    model.to(device)
    return tuner


class AdapterReference:
    """The reference of a policy that trains an adapter. It is called like a model and computes with the
    policy, whose adapter it scales by 0. Nothing is copied. A call leaves the adapter's scale and the set of
    trained parameters as they were, even if the call fails."""

    def __init__(self, policy):
        self.policy = policy
        self.parameters = policy.parameters
        self.config = policy.config

    def __call__(self, **inputs):
        layers = [module for module in self.policy.modules() if hasattr(module, "set_scale")]
        try:
            for layer in layers:
                layer.set_scale("default", 0)
            return self.policy(**inputs)
        finally:
            for layer in layers:
                layer.set_scale("default", 1)


# --- score --------------------------------------------------------------------------------------------------

def sequence_logps(model, input_ids, attention_mask, response_mask):
    """log π(y|x), the sum of the log-probabilities of each row's response tokens: (B,), in float32 at least.

    input_ids, attention_mask, response_mask: (B, T), padded on either side; response_mask is 1 on the
    response's tokens, its end token included. If they are on the CPU, the CPU never has to wait for a GPU."""
    rows, tokens = scored_tokens(model, input_ids, response_mask)
    logps = response_logits(model, input_ids, attention_mask, response_mask).log_softmax(-1)          # (N, V)
    return sum_rows(logps.gather(-1, tokens[:, None])[:, 0], rows, len(input_ids))


def sequence_logps_and_revkl(model, reference, input_ids, attention_mask, response_mask):
    """(log π, log π_ref, RevKL), (B,) each. RevKL is Σ_tokens KL(π_ref(·|context) ‖ π(·|context)), exact over
    the vocabulary (arXiv 2606.31524). Each model makes one forward, and no gradient flows through the
    reference."""
    rows, tokens = scored_tokens(model, input_ids, response_mask)
    batch = input_ids, attention_mask, response_mask
    ours = response_logits(model, *batch).log_softmax(-1)              # (N, V)
    with torch.no_grad():
        theirs = response_logits(reference, *batch).log_softmax(-1)    # (N, V)
    our_logps = ours.gather(-1, tokens[:, None])[:, 0]                 # (N,)
    their_logps = theirs.gather(-1, tokens[:, None])[:, 0]
    revkl = (theirs.exp() * (theirs - ours)).sum(-1)
    return tuple(sum_rows(values, rows, len(input_ids)) for values in (our_logps, their_logps, revkl))


def response_tokens(pair):
    """How many tokens of a pair's responses are scored."""
    return len(pair.chosen_ids) + len(pair.rejected_ids)


def collate_pairs(pairs):
    """Collate the chosen responses of B pairs and then the rejected ones, to be scored in one forward:
    (input_ids, attention_mask, response_mask), (2B, T) each."""
    prompts = [pair.prompt_ids for pair in pairs]
    chosen = [pair.chosen_ids for pair in pairs]
    rejected = [pair.rejected_ids for pair in pairs]
    return collate(prompts + prompts, chosen + rejected)


def pair_logps(model, pairs, dtype="float32"):
    """log π(y|x) of the chosen and the rejected responses of B pairs, (2, B)."""
    with computing_in(dtype, model):
        return sequence_logps(model, *collate_pairs(pairs)).unflatten(0, (2, len(pairs)))


@torch.no_grad()
def reference_logps(reference, pairs, dtype="float32"):
    """The reference's log-probabilities of the pairs, (2, B), without gradient. They are taken from the pairs
    if `score_once` has entered them in all of these, and computed otherwise."""
    known = [pair.reference_logps for pair in pairs]
    if any(logps is None for logps in known):
        return pair_logps(reference, pairs, dtype)
    return sent(torch.stack(known, 1), next(reference.parameters()).device)                           # (2, B)


@torch.no_grad()
def score_once(reference, policy, pairs, dtype="float32"):
    """Enter the reference's log-probabilities into pairs of the data, in place, so that no step computes them
    again. All processes call this together: each scores a part of the pairs, and then gets the numbers of the
    others. On a CPU the batches depend only on the pairs and the number of processes, so a run that is
    continued computes the same bits. policy: tells how large the batches may be."""
    def score(share):
        scored = []
        batches = with_equal_counts(micro_batches(share, response_tokens, policy), policy)
        for micro, weight in progress(batches, "batches of the reference's log-probabilities"):
            logps = pair_logps(reference, micro, dtype)
            if weight:                                                 # the weight is 0 for a repeated batch
                scored += logps.T.cpu()
        return scored

    for pair, logps in zip(pairs, divided(score, pairs), strict=True):
        pair.reference_logps = logps


def scored_tokens(model, input_ids, response_mask):
    """(the row, the id) of each response token, (N,) each, one row after another, on the model's device."""
    device = next(model.parameters()).device
    scored = response_mask[:, 1:].bool()                               # (B, T−1): place t predicts token t+1
    return sent(scored.nonzero()[:, 0], device), sent(input_ids[:, 1:][scored], device)


def sum_rows(values, rows, n):
    """Sum values (N,) over the tokens of each of n rows: (n,). rows: (N,), the row of each value."""
    return values.new_zeros(n).index_add(0, rows, values)


def response_logits(model, input_ids, attention_mask, response_mask):
    """The logits (N, V) that predict the N tokens of response_mask (B, T), one row after another, in float32
    at least. The model computes logits only at positions where they are needed for some row."""
    if is_packed(model):                                     # the same logits, faster: see runtime/packing.py
        logits = packed_logits(model, input_ids, attention_mask, response_mask)
    else:
        device = next(model.parameters()).device
        scored = response_mask[:, 1:].bool()
        columns = scored.any(0).nonzero()[:, 0]                        # the columns that any row needs
        rows, places = scored[:, columns].nonzero(as_tuple=True)       # (N,) each
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)    # (B, T): padding does not count
        output = model(
            input_ids=sent(input_ids, device), attention_mask=sent(attention_mask, device),
            position_ids=sent(position_ids, device), logits_to_keep=sent(columns, device), use_cache=False)
        logits = output.logits[sent(rows, device), sent(places, device)]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# --- sample -------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompt_ids, max_response_length, num_responses=1, temperature=1.0,
           batch_size=64):
    """Draw `num_responses` responses to each prompt, a list of ids, from the full softmax at `temperature`.
    At temperature 0 each token is the likeliest one. The draws use torch's global random state.

    Returns (responses, finished, logps), each with a list of num_responses entries per prompt. responses: the
    generated ids, up to and including the first end token. finished: whether the response has an end token;
    if not, it was cut at max_response_length. logps: the sum of the log-probabilities with which the ids were
    drawn. Raises InputError if the logits are not finite."""
    end_ids = torch.tensor(sorted(end_token_ids(tokenizer, model)), device=model.device)
    by_length = sorted(range(len(prompt_ids)), key=lambda place: len(prompt_ids[place]))
    responses, logps = [None] * len(prompt_ids), [None] * len(prompt_ids)
    starts = range(0, len(prompt_ids), batch_size)
    for start in progress(starts, f"batches of responses to {len(prompt_ids)} prompts"):
        batch = by_length[start:start + batch_size]
        rows, sums = draw(model, [prompt_ids[place] for place in batch], end_ids, max_response_length,
                          num_responses, temperature)
        for nth, place in enumerate(batch):
            of_prompt = slice(nth * num_responses, (nth + 1) * num_responses)
            responses[place], logps[place] = rows[of_prompt], sums[of_prompt]
    ends, finished = set(end_ids.tolist()), []
    for group in responses:
        finished.append([ids[-1] in ends for ids in group])
    return responses, finished, logps


def draw(model, prompt_ids, end_ids, max_response_length, num_responses, temperature):
    """Draw the responses of one batch for `sample`: (responses, log-probabilities), with num_responses
    consecutive entries per prompt. A prompt is read once for all its responses, and a finished response
    leaves the batch."""
    from transformers import DynamicCache
    prompts = [torch.tensor(ids, device=model.device) for ids in prompt_ids]
    tokens = pad_sequence(prompts, batch_first=True, padding_side="left")                           # (B, P)
    mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = next_logits(model, tokens, mask, positions, cache)                                     # (B, V)
    if cache.get_seq_length() != tokens.shape[1]:
        raise ValueError("it keeps no cache of its prompt")            # `prepare` has tried each model once
    cache.batch_repeat_interleave(num_responses)
    logits = logits.repeat_interleave(num_responses, 0)
    mask = mask.repeat_interleave(num_responses, 0)
    positions = positions[:, -1:].repeat_interleave(num_responses, 0)                               # (B, 1)
    responses = [[] for _ in range(len(mask))]
    going = list(responses)                                            # responses without an end token so far
    logps = torch.zeros(len(mask), dtype=torch.float64, device=model.device)
    rows = torch.arange(len(mask), device=model.device)                # the places of `going` in `logps`
    what = f"tokens of responses to {len(prompt_ids)} prompts"
    for length in progress(range(1, max_response_length + 1), what):
        tokens, token_logps = draw_tokens(logits, temperature)                                      # (B, 1)
        logps[rows] += token_logps[:, 0]
        for response, token in zip(going, tokens[:, 0].tolist(), strict=True):
            response.append(token)
        going_on = (~torch.isin(tokens[:, 0], end_ids)).nonzero()[:, 0]
        if not len(going_on) or length == max_response_length:
            break
        if len(going_on) < len(going):
            cache.batch_select_indices(going_on)
            tokens, mask, positions, rows = (each[going_on] for each in (tokens, mask, positions, rows))
            going = [going[row] for row in going_on.tolist()]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions + 1
        logits = next_logits(model, tokens, mask, positions, cache)
    return responses, logps.tolist()


def next_logits(model, tokens, mask, positions, cache):
    """The logits after each row's last token, (B, V), in float32. The keys and values of the tokens are added
    to the cache."""
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1,
                   cache=cache, use_cache=True).logits
    return logits[:, -1].float()


def draw_tokens(logits, temperature):
    """Draw a token for each row from the softmax of logits (B, V) at `temperature`: (tokens, their
    log-probabilities at this temperature), (B, 1) each. At temperature 0 the token is the likeliest one.
    Raises InputError if the softmax is not finite, for example because a logit is nan."""
    probabilities = (logits / max(temperature, 1e-30)).softmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise InputError("the model's logits are not finite; train it at a lower --learning-rate")
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device)
    tokens = torch.searchsorted(cumulative, total * uniform, right=True)
    return tokens, probabilities.gather(-1, tokens).double().log()


@fails_together
def roll_out(policy, tokenizer, pairs, sides, args):
    """Copies of the pairs in which samples of the policy, as ids and text, replace the responses on `sides`;
    without sides, the pairs themselves. A copy's `preference` is 1, until it is labelled. A pair of two equal
    samples is kept, because dropping it would bias T2. All processes call this together."""
    if not sides:
        return pairs
    policy.eval()
    prompts = [pair.prompt_ids for pair in pairs]
    with gathered(policy), computing_in(args.dtype, policy):
        responses, finished, logps = sample(policy, tokenizer, prompts, args.max_response_length, len(sides),
                                            batch_size=args.sample_batch_size)
    sampled = []
    for pair, ids_of_sides, done, sums in zip(pairs, responses, finished, logps, strict=True):
        finished_of, logps_of = dict(zip(SIDES, pair.finished, strict=True)), dict.fromkeys(SIDES, 0.0)
        new = {"preference": 1.0, "reference_logps": None}      # the data's values belong to another response
        logps_of.update(zip(sides, sums, strict=True))
        for side, ids, ended in zip(sides, ids_of_sides, done, strict=True):
            new[f"{side}_ids"] = ids
            new[side] = response_text(tokenizer, ids, pair.prompt_ids)
            finished_of[side] = ended
        sampled.append(replace(pair, **new, finished=tuple(finished_of.values()), samples=len(sides),
                               sampling_logps=tuple(logps_of.values()),
                               sampled_tokens=sum(map(len, ids_of_sides)), unfinished=done.count(False)))
    return sampled


# --- the command line ---------------------------------------------------------------------------------------

@dataclass
class Answers(Settings):
    """The settings of generate.py, of which FLAGS and those that are taken from a run are used."""
    model: str | None = setting(None, "a directory or hub name; a run's directory stands for its model, its "
                                      "lengths and its held-out prompts")
    data: str | None = setting(None, "a .jsonl, .json, .csv or .parquet file, or a hub name, for its "
                                     "prompts; or a run, for its held-out prompts and its lengths")
    n: int = setting(1, "responses to each prompt", low=1, metavar="N")
    out: str = setting("responses.jsonl", "file for the responses, as JSON lines")
    limit: int | None = setting(None, "answer the first N prompts only", low=1, metavar="N")
    temperature: float = setting(1.0, "sampling temperature; at 0 each token is the likeliest one", low=0)
    max_response_length: int = same_as(Settings, "max_response_length", default=128)


FLAGS = ("model", "data", "n", "out", "limit", "temperature", "max_prompt_length", "max_response_length",
         "sample_batch_size", "chat_template", "dtype", "seed", "trust_remote_code")
# The settings that are taken from a run unless the command line gives them. The run's chat template is in its
# model's tokenizer.
OF_A_RUN = ("data", "eval_data", "max_prompt_length", "max_response_length", "sample_batch_size", "dtype")


def load_answerer(args):
    """Load (model, tokenizer) as `load_frozen` does, for the dtype of the settings. If the settings have no
    dtype, they get the default one."""
    args.dtype = args.dtype or default_dtype()
    return load_frozen(args.model, args.dtype, trust_remote_code=args.trust_remote_code,
                       chat_template=args.chat_template,
                       lengths=(args.max_prompt_length, args.max_response_length))


def load_held_out_prompts(run, args):
    """Load the first args.limit held-out prompts, or all, of a run with these settings, and print a report.
    Raises InputError if there are none."""
    if args.eval_data:
        held_out, account = load_held_out(args.eval_data)
        print_report(args.eval_data, held_out, account)
    else:
        train, held_out, account, _ = train_and_held_out(args.data)
        print_report(args.data, train + held_out, account)
    if not held_out:
        raise InputError(f"{run}: no prompt of {args.data} is held out; name prompts with --data")
    prompts = [pair.prompt for pair in held_out[:args.limit]]
    print(f"{run} is a run: {len(prompts)} of its {len(held_out)} held-out prompts are answered")
    return prompts


def load_prompts(args):
    """Load the first args.limit prompts, or all, of --data, and print a report."""
    pairs, account = load_pairs(args.data, args.limit)
    print_report(args.data, pairs, account)
    return [pair.prompt for pair in pairs]


def answer(model, tokenizer, prompts, temperature, args, num_responses=1):
    """Sample num_responses responses to each prompt that can be asked: ([{prompt, response, tokens,
    finished}], the Account of the prompts). Responses to the same prompt follow each other. A row's prompt is
    what the model saw, without the turns that were cut. Raises InputError if no prompt can be asked."""
    pairs = [TextPair(prompt) for prompt in prompts]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    examples, account, _ = encode(pairs, tokenizer, end_token_ids(tokenizer, model), args.max_prompt_length,
                                  args.max_response_length, vocabulary)
    prompt_ids = [example.prompt_ids for example in examples]
    with computing_in(args.dtype, model):
        responses, finished, _ = sample(model, tokenizer, prompt_ids, args.max_response_length, num_responses,
                                        temperature, args.sample_batch_size)
    rows = []
    for example, answers, ended in zip(examples, responses, finished, strict=True):
        for ids, done in zip(answers, ended, strict=True):
            text = response_text(tokenizer, ids, example.prompt_ids)
            rows.append(dict(prompt=example.prompt, response=text, tokens=len(ids), finished=done))
    return rows, account


def main():
    """The command `python generate.py --model M --data D --out FILE`."""
    parser = Parser("Sample responses to each prompt of a data set. Defaults in brackets.")
    parser.add_settings(Answers, *FLAGS)
    given = vars(parser.parse_args())
    if "model" not in given:
        parser.error("argument --model: give a directory or a hub name")
    source = given["model"]                                            # whose prompts are answered, if a run
    if is_run_directory(Path(given.get("data", source))):
        source = given.pop("data", source)
    model, _ = read_run(given["model"], Answers)
    _, of_run = read_run(source, Answers, *OF_A_RUN)
    args = Answers(**{**of_run, **given, "model": model})
    if args.data is None:
        parser.error("argument --data: give a file, a directory or a hub name")
    refuse_output_of_rows(args.out, ("prompt", "response"), args.data, args.eval_data)
    if "data" in given:
        prompts = load_prompts(args)
    else:
        prompts = load_held_out_prompts(source, args)
    model, tokenizer = load_answerer(args)
    torch.manual_seed(seeded("answers", args.seed))
    rows, account = answer(model, tokenizer, prompts, args.temperature, args, args.n)
    print(f"{len(rows) // args.n} prompts were asked\n{account}")
    write_rows(args.out, rows)
    print(f"{len(rows)} responses in {args.out}, {sum(row['finished'] for row in rows)} of them finished")


if __name__ == "__main__":
    command_line(main)
