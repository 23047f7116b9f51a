"""A policy: load it, adapt it, score with it, and sample from it exactly the distribution that is scored.

    python generate.py --model M --data D --out responses.jsonl     # prompt, response, tokens, finished

SAIL's second term is the score of the distribution that was sampled from. So `sample` draws from the full
softmax, whatever the checkpoint's generation_config says, and hands on the very ids it drew; `sequence_logps`
scores these ids under the same softmax.

Shapes: B rows, T tokens of prompt and response with padding, P of the prompt, V vocabulary, N scored tokens.
"""
import copy
import inspect
import math
from collections import Counter
from pathlib import Path

from data import (
    BadRow, InputError, Parser, collate, command_line, counted, end_token_ids, first_line,
    fitting_prompt, load_tokenizer, number, response_text, seeded, write_rows)

import torch
from torch.nn.utils.rnn import pad_sequence

from distributed import gathered, progress, shard
from toy import SFT_MODEL, pairs_of, toy_model

# --- load and adapt -----------------------------------------------------------------------------------------


def load_policy(name, device="cpu", trust_remote_code=False, lengths=(0, 0), date=None):
    """(model, tokenizer): a causal language model in float32 without dropout, of a directory (without the
    network) or hub name; `toy` is the toy's SFT model. Ids that the tokenizer cannot produce get no
    probability, in sampling and scoring alike. date: as in `load_tokenizer`. Raises InputError where there is
    nothing to load, or too few positions for `lengths`."""
    from transformers import AutoModelForCausalLM
    name = str(SFT_MODEL) if name == "toy" else name
    if name == str(SFT_MODEL) and not SFT_MODEL.is_dir():
        raise InputError(f"toy: no SFT model in {name} yet; `python sail.py --variant sft` trains it")
    tokenizer = load_tokenizer(name, trust_remote_code, date=date)
    model = load_weights(AutoModelForCausalLM, name, trust_remote_code, dtype=torch.float32).float()
    prepare(model, tokenizer, name)
    positions = positions_of(model)
    if sum(lengths) > positions:
        raise InputError(f"{name} takes {positions} tokens, --max-prompt-length {lengths[0]} and "
                         f"--max-response-length {lengths[1]} make more; lower them")
    return model.to(device), tokenizer


def positions_of(model):
    """How many tokens a model can sample and score alike. From a certain length on, rotary encodings of the
    kinds longrope and dynamic turn all positions of a sequence by other angles; keys that are in the cache by
    then keep the old ones, so that such a length is as good as none."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in rope.values() if isinstance(each, dict)] or [rope]      # for each kind of layer
    for kind in kinds:
        rope_type = kind.get("rope_type") or "default"
        if rope_type == "longrope" or "dynamic" in rope_type:
            positions = min(positions, kind.get("original_max_position_embeddings") or positions)
    return positions


def load_weights(auto_class, name, trust_remote_code=False, may_lack=frozenset(), **options):
    """auto_class.from_pretrained(name), offline for a directory. Raises InputError where there is no such
    model, or where weights are missing, but for those that it `may_lack`: transformers would make them up."""
    from safetensors import SafetensorError
    from transformers.utils import logging
    logging.set_verbosity_error()                   # its report of missing weights is told below, in one line
    logging.disable_progress_bar()
    kind = auto_class.__name__.removeprefix("AutoModelFor")
    try:
        model, loading = auto_class.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=Path(name).is_dir(),
            output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{name}: no model for {kind} to load ({first_line(error)})") from None
    lacking = loading["missing_keys"] - may_lack
    if lacking:
        raise InputError(f"{name}: as a model for {kind} it lacks weights, {', '.join(sorted(lacking)[:3])}; "
                         "want a trained one")
    return model


def prepare(model, tokenizer, name="model"):
    """Switch dropout off for good, mask the ids beyond the tokenizer's, allow packed rows where the model can
    take them; returns the model. Raises InputError where it cannot be sampled from and scored alike."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "drop" in attribute and isinstance(value, float):     # for torch.nn.functional.dropout
                setattr(module, attribute, 0.0)
    known, head = max(tokenizer.get_vocab().values()) + 1, model.get_output_embeddings()
    rows = head.weight.shape[0]
    if max(end_token_ids(tokenizer, model)) >= rows:     # other ids without a row may well occur in no text
        raise InputError(f"{name}: the tokenizer has {known} ids, the model only {rows}, and an end token is "
                         "among the others; wrong tokenizer?")
    try:
        allow_packing(model)                             # before ids are masked: it compares logits
        if rows > known:
            head.register_forward_hook(lambda _, __, logits: logits.index_fill(
                -1, torch.arange(known, rows, device=logits.device), torch.finfo(logits.dtype).min))
        off = distance(model)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise InputError(f"{name}: {type(model).__name__} lacks logits_to_keep, position_ids, or the usual "
                         f"cache, which scoring and sampling need ({first_line(error)})") from None
    if not off < 1e-3:
        raise InputError(f"{name}: {type(model).__name__} samples from another distribution than it scores: "
                         f"logits differ by {off:.1g} of the largest")
    return model


@torch.no_grad()
def distance(model):
    """How far, as a share of the largest logit, a token that `draw` takes for the likeliest is from being it
    where responses are scored: 0, or rounding."""
    prompts, none = [[0, 1, 1], [1]], torch.tensor([], dtype=torch.long, device=model.device)
    responses = draw(model, prompts, none, 3, 1, 0.0)
    logits = response_logits(model, *collate(prompts, responses, model.device))                     # (N, V)
    drawn = logits[torch.arange(len(logits)), sum(responses, [])]
    return ((logits.amax(-1) - drawn).max() / drawn.abs().max()).item()


def load_models(args, device):
    """(policy, reference, tokenizer) as the flags of sail.py want them: adapted, sharded, on the device. The
    reference is None for sft, and the policy without its adapter where it has one."""
    place = "cpu" if args.shard else device                            # FSDP moves what it keeps
    options = args.trust_remote_code, (args.max_prompt_length, args.max_response_length), args.date
    if args.model == "toy":                                            # sft, which starts from nothing
        policy, tokenizer = toy_model(args.seed)
        prepare(policy, tokenizer).to(place)
    else:
        policy, tokenizer = load_policy(args.model, place, *options)
    reference = None
    if args.reference not in (None, args.model):
        reference, other = load_policy(args.reference, place, *options)
        if other.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"--reference {args.reference} has another vocabulary than --model {args.model}")
    elif args.reference:
        reference = AdapterReference(policy) if args.lora else copy.deepcopy(policy)
    models = [policy] + [reference] * isinstance(reference, torch.nn.Module)
    for model in models[1:]:
        model.requires_grad_(False)
    if args.lora:
        add_adapter(policy, args.lora, args.seed)
    for model in models if args.shard else ():
        shard(model, args.dtype)
    if args.gradient_checkpointing:
        older = policy.gradient_checkpointing_enable                   # the name until transformers 5.2x
        getattr(policy, "activation_checkpointing_enable", older)({"use_reentrant": False})
    return policy, reference, tokenizer


def add_adapter(policy, rank, seed=0):
    """Make a fresh LoRA adapter (arXiv 2106.09685) all that is trained: of this rank, with alpha 2·rank, on
    every linear layer but the output layer."""
    import peft
    device = policy.device
    policy.requires_grad_(False)
    torch.manual_seed(seeded("adapter", seed))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM",
                             base_model_name_or_path=policy.name_or_path)
    peft.inject_adapter_in_model(config, policy)
    policy.to(device)


class AdapterReference:
    """The reference of a policy that trains an adapter, to be called like a model: the policy with its
    adapter scaled by 0. Nothing is copied, and which parameters are trained is untouched, also when a call
    fails."""

    def __init__(self, policy):
        self.module, self.parameters = policy, policy.parameters

    def __call__(self, **inputs):
        layers = [module for module in self.module.modules() if hasattr(module, "set_scale")]
        try:
            for layer in layers:
                layer.set_scale("default", 0)
            return self.module(**inputs)
        finally:
            for layer in layers:
                layer.set_scale("default", 1)


# --- score --------------------------------------------------------------------------------------------------

def sequence_logps(model, input_ids, attention_mask, response_mask, reference=None):
    """log π(y|x): the log-probabilities of a row's response tokens, summed; (B,), float32 at least.

    input_ids, attention_mask, response_mask: (B, T), padded on either side; response_mask is 1 on the
    response's tokens, its end token included. With `reference`, a model that is held fixed: (3, B), log π,
    log π_ref and RevKL, Σ_tokens KL(π_ref(·|context) ‖ π(·|context)), exact over the vocabulary (arXiv
    2606.31524)."""
    scored = response_mask[:, 1:].bool()                               # (B, T−1): place t predicts token t+1
    tokens, rows = input_ids[:, 1:][scored], scored.nonzero()[:, 0]    # (N,)
    batch = input_ids, attention_mask, response_mask
    ours = response_logits(model, *batch).log_softmax(-1)              # (N, V)
    terms = [ours.gather(-1, tokens[:, None])]                         # of (N, 1)
    if reference is not None:
        with torch.no_grad():
            theirs = response_logits(reference, *batch).log_softmax(-1)
        terms += [theirs.gather(-1, tokens[:, None]), (theirs.exp() * (theirs - ours)).sum(-1, keepdim=True)]
    terms = torch.cat(terms, -1)
    sums = terms.new_zeros(len(input_ids), terms.shape[1]).index_add(0, rows, terms).T     # (1 or 3, B)
    return sums[0] if reference is None else sums


def response_logits(model, input_ids, attention_mask, response_mask):
    """The logits that predict the response's tokens, (N, V), float32 at least; no others are made. A model
    that allows it (`allow_packing`) gets the rows packed: no padding, and a prompt that rows share once."""
    scored = response_mask[:, 1:].bool()
    if getattr(model, "module", model).config.get_text_config()._attn_implementation == "packed":
        inputs, places = pack(input_ids, attention_mask, response_mask)
        logits = model(**inputs, use_cache=False, logits_to_keep=places[:, :-1][scored]).logits[0]
    else:
        columns = scored.any(0).nonzero()[:, 0]                        # those that any row needs
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)    # (B, T): padding does not move a token
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                       use_cache=False, logits_to_keep=columns).logits[scored[:, columns]]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def pair_logps(model, pairs, dtype="float32", reference=None):
    """`sequence_logps` of the chosen and the rejected responses, (2, B), from one forward in which every
    response occurs once. With `reference`: (3, 2, B), log π, log π_ref and RevKL."""
    device, rows = next(model.parameters()).device, {}                 # rows: response -> its row
    places = [[rows.setdefault((tuple(pair["prompt_ids"]), tuple(pair[side])), len(rows)) for pair in pairs]
              for side in ("chosen_ids", "rejected_ids")]              # (2, B)
    prompts, responses = zip(*((list(prompt), list(response)) for prompt, response in rows))
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        sums = sequence_logps(model, *collate(prompts, responses, device), reference)
    return sums[..., torch.tensor(places, device=device)]


LOGITS = 3 * 2**24                        # of a forward, positions × vocabulary: 192 MB, several times


def micro_batches(pairs, model, size=None):
    """The pairs, in their order, in lists of at most `size` whose responses make about LOGITS logits."""
    vocabulary, micros, room = model.config.get_text_config().vocab_size, [], 0
    for pair in pairs:
        logits = (len(pair["chosen_ids"]) + len(pair["rejected_ids"])) * vocabulary
        if not micros or logits > room or len(micros[-1]) == size:
            micros.append([])
            room = LOGITS
        micros[-1].append(pair)
        room = max(0, room - logits)
    return micros


# Packing: how `response_logits` saves the work of padding and of shared prompts.

def pack(input_ids, attention_mask, response_mask):
    """`data.collate`'s rows, without padding, in one row of N tokens, where a prompt that rows share stands
    once: (inputs, places).

    inputs: input_ids and position_ids (1, N), and `packing`, for attention to lay the rows out again in
    grids, like lengths together: the token of each place in the grids, the grids' shapes, the place of each
    token. places: (B, T), where in the one row a token stands (padding: anywhere)."""
    real, positions = attention_mask.bool(), (attention_mask.cumsum(-1) - 1).clamp(min=0)          # (B, T)
    prompt = real & (response_mask.cumsum(-1) == 0)
    seen = {}                                                          # prompt -> the first row that has it
    first = [seen.setdefault(tuple(ids[of].tolist()), row)
             for row, (ids, of) in enumerate(zip(input_ids, prompt))]
    first = torch.tensor(first, device=real.device)
    own = real & ~(prompt & (first != torch.arange(len(first), device=real.device))[:, None])
    starts = own.sum(1).cumsum(0) - own.sum(1)
    places = torch.where(own, own.flatten().cumsum(0).view_as(positions) - 1, starts[first, None] + positions)

    grids, n = [], int(own.sum())
    for row in sorted((place[of] for place, of in zip(places, real)), key=len, reverse=True):
        if not grids or len(row) < 0.8 * len(grids[-1][0]):
            grids.append([])
        grids[-1].append(row)
    grids = [pad_sequence(grid, batch_first=True, padding_value=n) for grid in grids]
    tokens = torch.cat([grid.flatten() for grid in grids])             # n stands for padding
    back = tokens.new_full((n + 1,), len(tokens)).scatter_reduce(
        0, tokens, torch.arange(len(tokens), device=tokens.device), "amin")[:n]
    return dict(input_ids=input_ids[own][None], position_ids=positions[own][None],
                attention_mask=real.new_ones(1, 1, 1, 1),              # 4-D: transformers then makes none
                packing=(tokens.clamp(max=n - 1), [grid.shape for grid in grids], back)), places


def packed_attention(module, query, key, value, attention_mask, packing=None, **options):
    """transformers' SDPA attention; of a packed row, within each of the rows that it holds, so that all else
    works on no padding, and on a prompt once. query, key, value: (1, heads, N, D) -> (1, N, heads, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    tokens, shapes, back = packing
    sizes = [rows * length for rows, length in shapes]
    laid_out = [each[0].transpose(0, 1).index_select(0, tokens).split(sizes) for each in (query, key, value)]
    options["is_causal"] = True                          # no row looks at its padding, on the right
    outputs = []
    for shape, *grid in zip(shapes, *laid_out):
        grid = [each.unflatten(0, shape).transpose(1, 2) for each in grid]         # (rows, heads, length, D)
        outputs.append(sdpa_attention_forward(module, *grid, None, **options)[0].flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)[None], None


@torch.no_grad()
def allow_packing(model):
    """Switch the model to `packed_attention` if it then gives its own logits on a packed row; returns it.
    This is tried on two short rows, as recurrent layers, for one, mix what a row holds. Models with sliding
    windows, or with another attention than SDPA, stay as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = {*(getattr(config, "layer_types", None) or ["full_attention"])}
    if config._attn_implementation != "sdpa" or windowed or kinds != {"full_attention"}:
        return model
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)
    rows = collate([[0, 1], [0, 1]], [[1, 1, 0], [0, 1]], model.device)   # one grid, with padding
    inputs, places = pack(*rows)
    plain = model(input_ids=rows[0], attention_mask=rows[1], use_cache=False).logits              # (2, T, V)
    model.set_attn_implementation("packed")
    try:
        packed = model(**inputs, use_cache=False).logits[0, places]
        same = (packed - plain)[rows[1].bool()].abs().max() <= 1e-4 * plain.abs().max()
    except (TypeError, RuntimeError):                    # it takes no `packing`, or needs rows of one shape
        same = False
    if not same:
        model.set_attn_implementation("sdpa")
    return model


# --- sample -------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, tokenizer, prompt_ids, max_response_length, num_responses=1, temperature=1.0,
           batch_size=64):
    """Draw `num_responses` responses to each prompt (lists of ids) from the full softmax at `temperature`; at
    0, the likeliest token each time. Uses torch's global random state.

    Returns (responses, finished), with a list of num_responses entries per prompt: the generated ids, up to
    and with the first end token; whether there is one, as a response that reaches max_response_length gets
    none. Raises InputError for a model without a key-value cache."""
    end_ids = torch.tensor(sorted(end_token_ids(tokenizer, model)), device=model.device)
    by_length = sorted(range(len(prompt_ids)), key=lambda place: len(prompt_ids[place]))
    responses = [None] * len(prompt_ids)
    for start in range(0, len(prompt_ids), batch_size):
        batch = by_length[start:start + batch_size]
        rows = draw(model, [prompt_ids[place] for place in batch], end_ids, max_response_length,
                    num_responses, temperature)
        for nth, place in enumerate(batch):
            responses[place] = rows[nth * num_responses:(nth + 1) * num_responses]
    ends = set(end_ids.tolist())
    return responses, [[ids[-1] in ends for ids in group] for group in responses]


def draw(model, prompt_ids, end_ids, max_response_length, num_responses, temperature):
    """`sample` for one batch: num_responses consecutive lists of ids per prompt. A prompt is read once, for
    all its responses; a finished response leaves the batch."""
    from transformers import DynamicCache
    prompts = [torch.tensor(ids, device=model.device) for ids in prompt_ids]
    tokens = pad_sequence(prompts, batch_first=True, padding_side="left")                           # (B, P)
    mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
    positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), DynamicCache(config=model.config)
    older = "cache" not in inspect.signature(model.forward).parameters            # until transformers 5.2x
    cached = {"past_key_values" if older else "cache": cache, "use_cache": True}

    def next_logits(tokens, positions):                                # of the last token of each row, (B, V)
        return model(input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1,
                     **cached).logits[:, -1].float()

    logits = next_logits(tokens, positions)
    if cache.get_seq_length() != tokens.shape[1]:
        raise ValueError("it keeps no cache of its prompt")            # `prepare` has tried each model once
    cache.batch_repeat_interleave(num_responses)
    logits, mask, positions = (each.repeat_interleave(num_responses, 0)
                               for each in (logits, mask, positions[:, -1:]))
    responses = [[] for _ in range(len(mask))]
    going = list(responses)                                            # those without an end token yet
    what = f"responses to {len(prompt_ids)} prompts, tokens"
    for length in progress(range(1, max_response_length + 1), what):
        cumulative = (logits / max(temperature, 1e-30)).softmax(-1).cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, cumulative[:, -1:] * torch.rand(
            len(going), 1, dtype=torch.float64, device=mask.device), right=True)                    # (B, 1)
        if not cumulative[:, -1].isfinite().all():
            raise InputError("the policy's logits are not finite; try a lower --learning-rate")
        for response, token in zip(going, tokens[:, 0].tolist()):
            response.append(token)
        going_on = (~torch.isin(tokens[:, 0], end_ids)).nonzero()[:, 0]
        if not len(going_on) or length == max_response_length:
            break
        if len(going_on) < len(going):
            cache.batch_select_indices(going_on)
            tokens, mask, positions = tokens[going_on], mask[going_on], positions[going_on]
            going = [going[row] for row in going_on.tolist()]
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions + 1
        logits = next_logits(tokens, positions)
    return responses


def roll_out(policy, tokenizer, pairs, args):
    """The pairs, with fresh samples of the policy in the place of the responses that they call `sampled`, as
    ids and text; `unfinished` counts the cut ones. Two equal samples stay a pair: without such pairs the
    expectation would be another one."""
    fresh = [pair for pair in pairs if pair["sampled"]]
    sides = fresh[0]["sampled"] if fresh else ()
    bfloat16 = args.dtype == "bfloat16"
    with gathered(policy), torch.autocast(policy.device.type, torch.bfloat16, enabled=bfloat16):
        samples = zip(*sample(policy, tokenizer, [pair["prompt_ids"] for pair in fresh],
                              args.max_response_length, len(sides)))
    rolled_out = []
    for pair in pairs:
        if pair["sampled"]:
            responses, finished = next(samples)
            pair = {**pair, "unfinished": len(sides) - sum(finished)}
            for side, ids in zip(sides, responses):
                text = response_text(tokenizer, ids, pair["prompt_ids"])
                pair.update({f"{side}_ids": ids, side: text})
        rolled_out.append(pair)
    return rolled_out


# --- the command line ---------------------------------------------------------------------------------------

def askable(prompts, tokenizer, limit):
    """(the prompts that a chat template takes and that fit into `limit` tokens, counts of others by reason).
    Raises InputError where none is left."""
    kept, dropped = [], Counter()
    for prompt in prompts:
        try:
            fitting_prompt(prompt, tokenizer, limit)
            kept.append(prompt)
        except BadRow as reason:
            dropped[str(reason)] += 1
    if not kept:
        raise InputError(f"none of {len(prompts)} prompts can be asked: {counted(dropped)}")
    return kept, dropped


def answer(model, tokenizer, prompts, temperature, args):
    """A response to each prompt: [(text, length in tokens, whether it finished)]. Raises InputError for a
    prompt that cannot be asked."""
    prompt_ids = []
    for nth, prompt in enumerate(prompts, 1):
        try:
            prompt_ids.append(fitting_prompt(prompt, tokenizer, args.max_prompt_length)[2])
        except BadRow as reason:
            raise InputError(f"prompt {nth}: {reason}") from None
    responses, finished = sample(model, tokenizer, prompt_ids, args.max_response_length, 1, temperature,
                                 args.batch_size)
    return [(response_text(tokenizer, ids, prompt), len(ids), done)
            for prompt, (ids,), (done,) in zip(prompt_ids, responses, finished)]


def main():
    """`python generate.py --model M --data D --out FILE`."""
    parser = Parser("Sample a response to each prompt of a data set.")
    add = parser.add_argument
    add("--model", default="toy", help="a directory or hub name, or toy (toy)")
    add("--out", default="responses.jsonl", help="JSON lines (responses.jsonl)")
    add("--temperature", type=number(float, 0), default=1.0, help="0: the likeliest token each time (1)")
    add("--batch-size", type=number(int, 1), default=64, help="prompts generated together (64)")
    parser.shared("--data", "--limit", "--max-prompt-length", "--max-response-length", "--date", "--seed",
                  "--trust-remote-code")
    parser.set_defaults(data="toy:test", max_prompt_length=512, max_response_length=128)
    args = parser.parse_args()
    pairs, report = pairs_of(args.data, args.limit)
    model, tokenizer = load_policy(args.model, "cuda" if torch.cuda.is_available() else "cpu",
                                   args.trust_remote_code, (args.max_prompt_length, args.max_response_length),
                                   args.date)
    prompts, unasked = askable([pair["prompt"] for pair in pairs], tokenizer, args.max_prompt_length)
    if unasked or report["dropped"]:
        print(f"dropped: {counted(unasked + report['dropped'])}")
    torch.manual_seed(seeded("answers", args.seed))
    answers = answer(model, tokenizer, prompts, args.temperature, args)
    write_rows(args.out, [dict(prompt=prompt, response=text, tokens=tokens, finished=done)
                          for prompt, (text, tokens, done) in zip(prompts, answers)])
    print(f"{len(prompts)} responses in {args.out}, {sum(done for *_, done in answers)} of them finished")


if __name__ == "__main__":
    command_line(main)
