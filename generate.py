"""Policies: load one, and sample from it exactly the distribution that sail.py scores.

    python generate.py --model M --data D --out responses.jsonl     # one line per prompt: prompt, response,
                                                                      tokens, …
    python generate.py --model M --questions Q --out answers.jsonl  # of AlpacaEval, MT-Bench or Arena-Hard:
                                                                      what their own judges read

SAIL's second term is the score of the distribution that was sampled from, so `sample` draws from the full
softmax, whatever the checkpoint's generation_config says, and hands on the very ids it drew.
"""
import copy
import json
import math
import os
import subprocess
import sys
import time
import uuid
import warnings
from contextlib import contextmanager
from itertools import combinations, islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import (ADJECTIVES, ADVERBS, NOUNS, PROMPTS, BadRow, InputError, Parser, collate, command_line,
                  encode, load_pairs, number, pack, prompt_tokens, read_rows, render, truncate_prompt)

TOY_SFT = Path("runs/toy-sft")          # the toy's SFT model, trained on first use


def load_tokenizer(name, trust_remote_code=False, ends=True):
    """The tokenizer of a Hugging Face directory or hub name, or of `toy`.

    Raises InputError where there is none, or, with `ends`, where it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer
    if name == "toy":
        return toy_tokenizer()
    adapter = adapter_config(name)
    if adapter and not Path(name, "tokenizer_config.json").is_file():
        name = adapter["base_model_name_or_path"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no tokenizer to load ({first_line(error)})") from None
    if ends and tokenizer.eos_token_id is None:
        raise InputError(f"{name}: its tokenizer has no end-of-sequence token; set eos_token in "
                         "tokenizer_config.json")
    return tokenizer


def load_policy(name, device="cpu", trust_remote_code=False):
    """A causal language model with float32 weights and no dropout, and its tokenizer: (model, tokenizer).

    name: a Hugging Face directory or hub name, or the directory of a LoRA adapter, which is put on its base;
    `toy` for the toy world's SFT model, trained on first use. A local directory is loaded without the
    network. Ids that the tokenizer cannot produce (padded vocabularies) get no probability, in sampling and
    in scoring alike. Raises InputError where there is nothing to load.
    """
    from transformers import AutoModelForCausalLM
    name = toy_checkpoint() if name == "toy" else name
    if adapter_config(name):
        require_peft(name)
    tokenizer = load_tokenizer(name, trust_remote_code)
    model = load_weights(AutoModelForCausalLM, name, trust_remote_code, dtype=torch.float32)
    return prepare(model.float(), tokenizer, name).to(device), tokenizer


def load_weights(auto_class, name, trust_remote_code=False, may_lack=frozenset(), **options):
    """auto_class.from_pretrained(name), without the network for a local directory.

    Raises InputError where there is no such model, or where some of its weights, but for those that it
    `may_lack`, are missing from the checkpoint: transformers would make them up.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging
    logging.set_verbosity_error()                   # its report of missing weights is told below, in one line
    logging.disable_progress_bar()                        # of loading, and later of saving
    try:
        model, loading = auto_class.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=Path(name).is_dir(),
            output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{name}: no model for {auto_class.__name__[12:]} to load "
                         f"({first_line(error)})") from None
    lacking = loading["missing_keys"] - may_lack
    if lacking:
        raise InputError(f"{name}: as a model for {auto_class.__name__[12:]} it lacks the weights "
                         f"{', '.join(sorted(lacking)[:3])}; want a trained one")
    return model


def prepare(model, tokenizer, name="model"):
    """Switch dropout off for good, mask the ids beyond the tokenizer's, and allow packed rows where the model
    can take them; returns the model."""
    switch_dropout_off(model)
    allow_packing(model)                                 # before ids are masked: it compares logits
    known, head = max(tokenizer.get_vocab().values()) + 1, model.get_output_embeddings()
    if head.weight.shape[0] < known:
        raise InputError(f"{name}: the tokenizer has {known} ids, the model only {head.weight.shape[0]}; "
                         "wrong tokenizer?")
    if head.weight.shape[0] > known:
        def mask_unknown(_, __, logits):
            return logits.index_fill(-1, torch.arange(known, logits.shape[-1], device=logits.device),
                                     torch.finfo(logits.dtype).min)
        head.register_forward_hook(mask_unknown)
    return model


def switch_dropout_off(model):
    """Switch dropout off, also in train mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):          # for torch.nn.functional.dropout
                setattr(module, name, 0.0)


def packed_attention(module, query, key, value, attention_mask, packing=None, **options):
    """transformers' SDPA attention; of a packed row (data.pack), within each of the rows that it holds.

    query, key, value: (1, heads, N, D) -> (1, N, heads, D). All of the model but attention thus works on no
    padding, and on a prompt once.
    """
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

    This is tried on two short rows: recurrent layers, for one, mix what a row holds. Models with sliding
    windows, or with another attention than SDPA, stay as they are.
    """
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


# --- large policies: adapters, shards -----------------------------------------------------------------------

def adapter_config(name):
    """The settings of the adapter in the local directory `name`; {} where there is none."""
    file = Path(name, "adapter_config.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def require_peft(what):
    """Import peft, or raise InputError, which says that `what` needs it."""
    try:
        import peft
    except ImportError:
        raise InputError(f"{what} needs peft: pip install peft") from None
    return peft


def train_adapter(policy, rank, name="model", seed=0):
    """Make a LoRA adapter (arXiv 2106.09685) all that is trained: the one that the policy was loaded with, or
    else a fresh one of this rank, with alpha 2·rank, on every linear layer but the output layer.

    A loaded adapter is kept once more, frozen, for AdapterReference. Raises InputError without peft, where
    rank contradicts the loaded adapter, and for adapters that train more than such layers: the output layer,
    embeddings or biases would move the reference too.
    """
    peft = require_peft("--lora")
    loaded = getattr(policy, "peft_config", {}).get("default")
    policy.requires_grad_(False)
    if loaded is None:
        torch.manual_seed(seed)
        policy.add_adapter(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                                           task_type="CAUSAL_LM"))
        return
    outside = [embedding for embedding in (policy.get_input_embeddings(), policy.get_output_embeddings())
               if any("lora_" in part for part, _ in embedding.named_parameters())]
    extras = [key for key in ("modules_to_save", "trainable_token_indices") if getattr(loaded, key, None)]
    extras += ["bias"] * (getattr(loaded, "bias", "none") != "none") + ["embeddings"] * bool(outside)
    if loaded.peft_type != "LORA" or extras:
        raise InputError(f"{name}: want a LoRA adapter of inner linear layers alone, which can be switched "
                         f"off to get the reference; this one is {loaded.peft_type} and trains "
                         f"{' and '.join(extras) or 'otherwise'}; merge it into its base first")
    if rank not in (None, loaded.r):
        raise InputError(f"--lora {rank}: {name} is an adapter of rank {loaded.r}, which is trained on; "
                         "leave --lora out")
    loaded.task_type = "CAUSAL_LM"
    frozen = copy.deepcopy(loaded)
    frozen.init_lora_weights = True                                    # others may change the base (PiSSA)
    with warnings.catch_warnings(action="ignore"):                     # that a second adapter is rarely meant
        policy.add_adapter(frozen, "reference")
    parameters = dict(policy.named_parameters())
    for key in parameters:
        if ".reference." in key:
            parameters[key].data.copy_(parameters[key.replace(".reference.", ".default.")])
    switch_dropout_off(policy)
    policy.set_adapter("default")


class AdapterReference:
    """The reference of a policy that trains an adapter, to be called like a model: the policy's own weights,
    with the adapter that it was loaded with in the place of the trained one, or with none. Nothing is
    copied, and which parameters are trained is untouched, also when a call fails."""

    def __init__(self, policy):
        self.module, self.parameters = policy, policy.parameters

    def __call__(self, **inputs):
        layers = [module for module in self.module.modules() if hasattr(module, "_active_adapter")]
        # Not by peft's own switches: they also turn requires_grad off and on, and FSDP may see it off. A
        # layer without an adapter of the name that is active is its base.
        try:
            for layer in layers:
                layer._active_adapter = "reference"
            return self.module(**inputs)
        finally:
            for layer in layers:
                layer._active_adapter = "default"


def shard(model, dtype="float32"):
    """Split the model's parameters over the processes, decoder layer by decoder layer (FSDP2), in place.

    Each process holds its part in float32. Layers are gathered in `dtype` for as long as they compute;
    embeddings and output layer, which sail.py calls apart, until the backward pass is over. The decoder
    layers are those of the list of modules that holds most parameters.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bfloat16 if dtype == "bfloat16" else MixedPrecisionPolicy()
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters())):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)


@contextmanager
def in_step(model, gather=True):
    """While inside, all processes call a sharded model equally often, as its collectives demand: one that is
    done calls it with a dummy token until all are. For other models, nothing.

    gather: from the first call to the end each process keeps a whole copy in the compute dtype; otherwise
    every call gathers layer after layer, which is slow and takes little memory.
    """
    if not hasattr(model, "reshard"):                    # FSDP adds that method
        yield
        return

    def any_calls(mine):
        calls = torch.tensor(float(mine), device=model.device)
        dist.all_reduce(calls)
        return calls.item() > 0

    def announce(*_):
        any_calls(True)

    def reshard_layers_after_forward(flag):              # the rest of the model stays gathered, as in `shard`
        model.set_reshard_after_forward(flag)
        model.set_reshard_after_forward(False, recurse=False)

    announcing = model.register_forward_pre_hook(announce, prepend=True)
    reshard_layers_after_forward(not gather)
    try:
        yield
    finally:
        announcing.remove()
        with torch.no_grad():
            while any_calls(False):
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        reshard_layers_after_forward(True)
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def first_line(error):
    """The first line of an exception's text, for one-line messages."""
    return str(error).strip().split("\n")[0].rstrip(".")


def check_lengths(model, name, max_prompt_length, max_response_length):
    """Raise InputError where prompt and response together are longer than the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if max_prompt_length + max_response_length > positions:
        raise InputError(f"{name} takes {positions} tokens, --max-prompt-length {max_prompt_length} and "
                         f"--max-response-length {max_response_length} make more; lower them")


def end_token_ids(tokenizer, model=None):
    """The ids that end a response: the tokenizer's EOS, the special token with which the chat template closes
    an answer, and those that the checkpoint's generation_config adds.

    The latter count only where they are special tokens: a config that was never told its tokenizer names a
    default id, which may be any word.
    """
    special, ids = tokenizer.added_tokens_decoder, {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        try:
            _, _, closing = render("question", "answer", tokenizer)[1].rpartition("answer")
            tokens = tokenizer(closing, add_special_tokens=False)["input_ids"]
            ids.update([token for token in tokens if token in special and special[token].special][:1])
        except BadRow:
            pass                                         # a template that refuses this dialogue tells nothing
    extra = model.generation_config.eos_token_id if model is not None else None
    extra = extra if isinstance(extra, list) else [extra]
    return ids | {token for token in extra if token in special}


@torch.no_grad()
def sample(model, tokenizer, prompt_ids, max_response_length, num_responses=1, temperature=1.0,
           batch_size=64):
    """Draw `num_responses` responses to each prompt from the model's full softmax at `temperature`; at 0, the
    likeliest token each time.

    prompt_ids: a list of lists of token ids, unpadded. Returns (responses, finished), lists with a list of
    num_responses entries per prompt: the generated ids, up to and with the first end token; and whether
    there is one. A response that reaches max_response_length without it gets none. Uses torch's global
    random state. Raises InputError for a model without a key-value cache.
    """
    end_ids = torch.tensor(sorted(end_token_ids(tokenizer, model)), device=model.device)
    by_length = sorted(range(len(prompt_ids)), key=lambda place: len(prompt_ids[place]))
    responses = [None] * len(prompt_ids)
    for start in tqdm(range(0, len(prompt_ids), batch_size), "generating", leave=False,
                      disable=None if len(prompt_ids) > batch_size else True):
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

    def next_logits(tokens, positions, **options):                     # of the last token of each row, (B, V)
        return model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                     use_cache=True, **options).logits[:, -1].float()

    logits = next_logits(tokens, positions, logits_to_keep=1)
    if cache.get_seq_length() != tokens.shape[1]:
        raise InputError(f"{type(model).__name__} keeps no key-value cache of its prompt; want one that does")
    cache.batch_repeat_interleave(num_responses)
    logits, mask, positions = (each.repeat_interleave(num_responses, 0)
                               for each in (logits, mask, positions[:, -1:]))
    responses = [[] for _ in range(len(mask))]
    going = list(responses)                                            # those without an end token yet
    while True:
        cumulative = (logits / max(temperature, 1e-30)).softmax(-1).cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, cumulative[:, -1:] * torch.rand(
            len(going), 1, dtype=torch.float64, device=mask.device), right=True)                    # (B, 1)
        for response, token in zip(going, tokens[:, 0].tolist()):
            response.append(token)
        going_on = (~torch.isin(tokens[:, 0], end_ids)).nonzero()[:, 0]
        if not len(going_on) or len(going[0]) == max_response_length:
            return responses
        if len(going_on) < len(going):
            cache.batch_select_indices(going_on)
            tokens, mask, positions = tokens[going_on], mask[going_on], positions[going_on]
            going = [going[row] for row in going_on.tolist()]
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions + 1
        logits = next_logits(tokens, positions)


def roll_out(policy, tokenizer, pairs, max_response_length, num_responses=2, temperature=1.0,
             dtype="float32"):
    """Put fresh samples of the policy in the place of the responses flagged on_policy; returns the new pairs.

    A pair of two samples becomes all pairs of `num_responses` samples to its prompt, which share its weight;
    where the chosen response is the data's, one sample is drawn to be the rejected one. What is new: chosen
    and rejected, as ids and text, and `unfinished`, how many of the samples. Two equal samples stay a pair:
    without such pairs the expectation would be another one.
    """
    fresh = [pair for pair in pairs if any(pair["on_policy"])]
    if not fresh:
        return pairs
    both = all(fresh[0]["on_policy"])
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        samples = zip(*sample(policy, tokenizer, [pair["prompt_ids"] for pair in fresh], max_response_length,
                              num_responses if both else 1, temperature))
    rolled_out = []
    for pair in pairs:
        if not any(pair["on_policy"]):
            rolled_out.append(pair)
            continue
        drawn = [{"ids": ids, "text": response_text(tokenizer, ids), "unfinished": not done}
                 for ids, done in zip(*next(samples))]
        own = {"ids": pair["chosen_ids"], "text": pair["chosen"], "unfinished": False}
        choices = list(combinations(drawn if both else [own, *drawn], 2))
        rolled_out += [{**pair, "weight": pair["weight"] / len(choices),
                        "chosen_ids": one["ids"], "chosen": one["text"],
                        "rejected_ids": other["ids"], "rejected": other["text"],
                        "unfinished": one["unfinished"] + other["unfinished"]} for one, other in choices]
    return rolled_out


def response_text(tokenizer, ids):
    """A response as a reward sees it: decoded, without special tokens and outer white space."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# --- the toy world's policy ---------------------------------------------------------------------------------

def toy_tokenizer():
    """A word-level tokenizer over the toy grammar."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = [*NOUNS, *ADJECTIVES, *ADVERBS, "the", "was", "and", "."]
    words = ["<pad>", "<eos>", "<unk>"] + list(dict.fromkeys(
        words + [w for p in PROMPTS for w in p.split() if w != "{}"]))
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False)


def toy_model(seed=0):
    """The toy's policy before any training: (a two-layer Llama of about 0.3 M random
    parameters, its tokenizer)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = toy_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=112, intermediate_size=288, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    return prepare(model, tokenizer).eval(), tokenizer


def toy_checkpoint():
    """The directory of the toy's SFT model; trains it with `sail.py --variant sft` where it
    is missing, and says so."""
    if not (TOY_SFT / "model").is_dir() and int(os.environ.get("RANK", 0)) == 0:
        print(f"toy: no SFT model in {TOY_SFT}/model yet; training it, once", flush=True)
        alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        script = Path(__file__).with_name("sail.py")
        if subprocess.run([sys.executable, script, "--variant", "sft", "--out", TOY_SFT],
                          env=alone).returncode:
            raise InputError(f"the toy's SFT model could not be trained: run `python {script} --variant sft` "
                             "to see why")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return str(TOY_SFT / "model")


# --- benchmarks: their question files in, the answer files out that their own judges read -------------------

BENCHMARKS = {  # name: the columns that identify its questions; the last one holds what is asked
    "MT-Bench": "question_id category turns", "Arena-Hard": "uid category prompt",
    "AlpacaEval": "dataset instruction"}
MT_BENCH_TEMPERATURES = {  # FastChat's; 0.7 for other categories
    "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1,
    "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}


def load_questions(source, limit=None):
    """The questions of a benchmark, told by their columns: (its name in BENCHMARKS, rows, turns).

    turns: what the user says, per row a list of two texts for MT-Bench, of one for the others. Raises
    InputError where the columns fit no benchmark, and for a row that cannot be asked: a judge wants them all.
    """
    rows = list(islice(read_rows(source), limit))
    columns = set().union(*rows)
    name = next((name for name, needed in BENCHMARKS.items() if columns.issuperset(needed.split())), None)
    if name is None:
        known = "; ".join(f"{', '.join(needed.split())} ({name})" for name, needed in BENCHMARKS.items())
        raise InputError(f"{source}: columns {', '.join(sorted(columns)) or '(no rows)'} fit no benchmark's "
                         f"questions; want one of: {known}")
    *others, asked = BENCHMARKS[name].split()
    n, all_turns = (2 if name == "MT-Bench" else 1), []
    for place, row in enumerate(rows, 1):
        turns = row.get(asked) if n > 1 else [row.get(asked)]
        if not isinstance(turns, list) or len(turns) != n or not all(
                isinstance(turn, str) and turn.strip()
                and turn.encode(errors="ignore").decode() == turn for turn in turns):     # no half surrogates
            raise InputError(f"{source}: row {place}: {asked}: want {'two texts' if n > 1 else 'a text'}")
        for column in others:
            if row.get(column) is None:
                raise InputError(f"{source}: row {place}: {column} is missing")
        all_turns.append(turns)
    return name, rows, all_turns


def answer_questions(model, tokenizer, turns, temperatures, max_prompt_length, max_response_length,
                     batch_size=64):
    """The model's answers to what users ask, turn by turn: (answers, finished, truncated).

    turns: as from load_questions; a later one is asked after the earlier ones and the model's own answers.
    temperatures: one per row. answers: texts, in the shape of turns. finished: how many ended by themselves;
    truncated: how many prompts were cut. Raises InputError for a prompt that the chat template refuses.
    """
    dialogues, ended, truncated = [[] for _ in turns], 0, 0
    for texts in zip(*turns):
        prompts = []
        for place, (dialogue, text) in enumerate(zip(dialogues, texts), 1):
            dialogue.append({"role": "user", "content": text})
            try:                                     # a single turn is a string, as a prompt of training data
                head, _ = render(dialogue if len(turns[0]) > 1 else text, "answer", tokenizer)
            except BadRow as reason:
                raise InputError(f"question {place}: {reason}") from None
            ids = prompt_tokens(head, tokenizer)
            if not ids:
                raise InputError(f"question {place}: it has no tokens; wrong tokenizer?")
            truncated += len(ids) > max_prompt_length
            prompts.append(truncate_prompt(ids, max_prompt_length, tokenizer))
        for temperature in sorted(set(temperatures)):
            places = [place for place, own in enumerate(temperatures) if own == temperature]
            responses, finished = sample(model, tokenizer, [prompts[place] for place in places],
                                         max_response_length, 1, temperature, batch_size)
            for place, (ids,), (done,) in zip(places, responses, finished):
                dialogues[place].append({"role": "assistant", "content": response_text(tokenizer, ids)})
                ended += done
    return [[turn["content"] for turn in dialogue[1::2]] for dialogue in dialogues], ended, truncated


def model_name(model):
    """What the answer files call a model: its directory's name; for the `model` or `merged` of a run of
    sail.py the run's, as in toy-pr for runs/toy/pr/model."""
    _, *above, name = Path(os.path.abspath(model)).parts
    return "-".join(above[-2:]) or name if name in ("model", "merged") else name


def answer_row(benchmark, row, answers, name):
    """The row of an answer file: of AlpacaEval's model_outputs.json, of FastChat's or arena-hard-auto's
    model_answer/*.jsonl. The same answers get the same id; `tstamp`, which no judge reads, is the time."""
    *_, question = (row[column] for column in BENCHMARKS[benchmark].split())
    if benchmark == "AlpacaEval":
        return {"dataset": row["dataset"], "instruction": question, "output": answers[0], "generator": name}
    key = row["question_id"] if benchmark == "MT-Bench" else row["uid"]
    answer_id, now = str(uuid.uuid5(uuid.NAMESPACE_OID, repr((name, key, answers)))), time.time()
    if benchmark == "MT-Bench":
        return {"question_id": key, "answer_id": answer_id, "model_id": name,
                "choices": [{"index": 0, "turns": answers}], "tstamp": now}
    return {"uid": key, "ans_id": answer_id, "model": name, "tstamp": now,
            "messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": {"answer": answers[0]}}]}


# --- the command line ---------------------------------------------------------------------------------------

def model_of(args):
    """(model, tokenizer) of the command line, with everything made ready to sample."""
    model, tokenizer = load_policy(args.model, "cuda" if torch.cuda.is_available() else "cpu",
                                   args.trust_remote_code)
    check_lengths(model, args.model, args.max_prompt_length, args.max_response_length)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    return model, tokenizer


def answer_benchmark(args):
    """`python generate.py --questions Q`: the benchmark's answer file."""
    benchmark, rows, turns = load_questions(args.questions, args.limit)
    suffix = ".json" if benchmark == "AlpacaEval" else ".jsonl"
    if Path(args.out).suffix != suffix:
        raise InputError(f"--out {args.out}: {benchmark}'s judge wants a file that ends in {suffix}")
    temperatures = [1.0 if args.temperature is None else args.temperature] * len(rows)
    if benchmark == "MT-Bench" and args.temperature is None:
        temperatures = [MT_BENCH_TEMPERATURES.get(str(row["category"]), 0.7) for row in rows]
    answers, finished, truncated = answer_questions(
        *model_of(args), turns, temperatures, args.max_prompt_length, args.max_response_length,
        args.batch_size)
    rows = [answer_row(benchmark, row, texts, model_name(args.model)) for row, texts in zip(rows, answers)]
    aside = Path(f"{args.out}.writing")                    # no judge shall take half a file for a whole one
    aside.write_text(json.dumps(rows, indent=1) if suffix == ".json" else
                     "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    aside.replace(args.out)
    print(f"{len(rows)} questions of {benchmark} answered in {args.out}, {finished} of "
          f"{sum(map(len, answers))} answers finished, {truncated} prompts cut")


def respond(args):
    """`python generate.py --data D`: a response to each of its prompts."""
    pairs, _ = load_pairs(args.data, args.limit)
    model, tokenizer = model_of(args)
    # The data's own responses are not used here: no limit, so that none is dropped for being cut short.
    examples, _ = encode(pairs, tokenizer, end_token_ids(tokenizer, model), args.max_prompt_length, 10**9)
    responses, finished = sample(
        model, tokenizer, [example["prompt_ids"] for example in examples], args.max_response_length, 1,
        1.0 if args.temperature is None else args.temperature, args.batch_size)
    with open(args.out, "w", encoding="utf-8") as file:
        for example, (ids,), (done,) in zip(examples, responses, finished):
            row = {"prompt": example["prompt"], "response": response_text(tokenizer, ids),
                   "tokens": len(ids), "finished": done}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(examples)} responses in {args.out}, {sum(done for done, in finished)} of them finished")


def main():
    """`python generate.py --model M --data D --out FILE`, or `--questions Q` in the place of `--data D`."""
    parser = Parser(description="Sample a response to each prompt of a data set, or answer a benchmark's "
                    "questions.")
    parser.add_argument("--model", default="toy", help="a Hugging Face directory or name, or toy (default)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--data", default="toy:test", help="as in data.py (default: toy:test)")
    prompts.add_argument("--questions", help="a question file of AlpacaEval, MT-Bench or Arena-Hard")
    parser.add_argument("--out", default="responses.jsonl",
                        help="JSON lines: prompt, response, tokens, finished; for --questions, the "
                        "benchmark's answer file")
    parser.add_argument("--limit", type=number(int, 1), help="use the first LIMIT pairs or questions")
    parser.add_argument("--temperature", type=number(float, 0), help="0: the likeliest token each time "
                        "(default: 1; for MT-Bench, FastChat's for each category)")
    parser.add_argument("--batch-size", type=number(int, 1), default=64, help="prompts generated together")
    parser.add_argument("--max-prompt-length", type=number(int, 1), default=512)
    parser.add_argument("--max-response-length", type=number(int, 1), default=128)
    parser.add_argument("--seed", type=number(int, 0, 2**20), default=0)
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run code that comes with a hub model")
    args = parser.parse_args()
    if args.questions:
        answer_benchmark(args)
    else:
        respond(args)


if __name__ == "__main__":
    command_line(main)
