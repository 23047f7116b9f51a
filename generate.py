"""Policies: load one, and sample from it exactly the distribution that sail.py scores.

    python generate.py --model M --data D --out responses.jsonl     # one line per prompt: prompt, response,
                                                                      tokens, …

SAIL's second term is the score of the distribution that was sampled from, so `sample` draws from the full
softmax, whatever the checkpoint's generation_config says, and hands on the very ids it drew.
"""
import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import (ADJECTIVES, ADVERBS, NOUNS, PROMPTS, BadRow, InputError, Parser, command_line, encode,
                  load_pairs, number, render)

TOY_SFT = Path("runs/toy-sft")          # the toy's SFT model, trained on first use


def load_tokenizer(name, trust_remote_code=False, ends=True):
    """The tokenizer of a Hugging Face directory or hub name, or of `toy`.

    Raises InputError where there is none, or, with `ends`, where it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer
    if name == "toy":
        return toy_tokenizer()
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

    name: a Hugging Face directory or hub name; `toy` for the toy world's SFT model, trained on first use.
    A local directory is loaded without the network. Ids that the tokenizer cannot produce (padded
    vocabularies) get no probability, in sampling and in scoring alike. Raises InputError where there is
    nothing to load.
    """
    from transformers import AutoModelForCausalLM
    name = toy_checkpoint() if name == "toy" else name
    tokenizer = load_tokenizer(name, trust_remote_code)
    model = load_weights(AutoModelForCausalLM, name, trust_remote_code, dtype=torch.float32)
    return prepare(model, tokenizer, name).to(device), tokenizer


def load_weights(auto_class, name, trust_remote_code=False, **options):
    """auto_class.from_pretrained(name), without the network for a local directory.

    Raises InputError where there is no such model, or where some of its weights are missing from the
    checkpoint: transformers would make them up.
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
    if loading["missing_keys"]:
        raise InputError(f"{name}: as a model for {auto_class.__name__[12:]} it lacks the weights "
                         f"{', '.join(sorted(loading['missing_keys'])[:3])}; want a trained one")
    return model


def prepare(model, tokenizer, name="model"):
    """Switch dropout off for good and mask the ids beyond the tokenizer's; returns the model."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name_of, value in vars(module).items():
            if "drop" in name_of and isinstance(value, float):       # for torch.nn.functional.dropout
                setattr(module, name_of, 0.0)
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
    """Draw `num_responses` responses to each prompt from the model's full softmax at `temperature`.

    prompt_ids: a list of lists of token ids, unpadded. Returns (responses, finished), lists with a list of
    num_responses entries per prompt: the generated ids, up to and with the first end token; and whether
    there is one. A response that reaches max_response_length without it gets none. Uses torch's global
    random state.
    """
    from transformers import GenerationConfig
    end_ids = end_token_ids(tokenizer, model)
    own_config = model.generation_config
    sampling = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, num_return_sequences=num_responses,
        max_new_tokens=max_response_length, eos_token_id=sorted(end_ids), pad_token_id=tokenizer.eos_token_id)
    rows = []
    try:
        model.generation_config = GenerationConfig()  # or its top_k, penalties, … would fill in what is unset
        for start in tqdm(range(0, len(prompt_ids), batch_size), "generating", leave=False,
                          disable=None if len(prompt_ids) > batch_size else True):
            prompts = [torch.tensor(ids) for ids in prompt_ids[start:start + batch_size]]
            tokens = pad_sequence(prompts, batch_first=True, padding_side="left").to(model.device)    # (B, P)
            mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True,
                                padding_side="left")
            output = model.generate(input_ids=tokens, attention_mask=mask.to(model.device),
                                    generation_config=sampling)
            assert torch.equal(output[::num_responses, :tokens.shape[1]],
                               tokens), "a response lost its prompt"
            rows += output[:, tokens.shape[1]:].tolist()                                            # (B·n, R)
    finally:
        model.generation_config = own_config
    ends = [next((place + 1 for place, token in enumerate(row) if token in end_ids), None) for row in rows]
    rows = [row[:end] for row, end in zip(rows, ends)]
    groups = [slice(start, start + num_responses) for start in range(0, len(rows), num_responses)]
    return [rows[group] for group in groups], [[end is not None for end in ends[group]] for group in groups]


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


def main():
    """`python generate.py --model M --data D --out FILE`."""
    parser = Parser(description="Sample a response to each prompt of a data set.")
    parser.add_argument("--model", default="toy", help="a Hugging Face directory or name, or toy (default)")
    parser.add_argument("--data", default="toy:test", help="as in data.py (default: toy:test)")
    parser.add_argument("--out", default="responses.jsonl",
                        help="JSON lines: prompt, response, tokens, finished")
    parser.add_argument("--limit", type=number(int, 1), help="use the first LIMIT pairs")
    parser.add_argument("--temperature", type=number(float, 1e-3), default=1.0)
    parser.add_argument("--batch-size", type=number(int, 1), default=64, help="prompts generated together")
    parser.add_argument("--max-prompt-length", type=number(int, 1), default=512)
    parser.add_argument("--max-response-length", type=number(int, 1), default=128)
    parser.add_argument("--seed", type=number(int, 0, 2**20), default=0)
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run code that comes with a hub model")
    args = parser.parse_args()
    pairs, _ = load_pairs(args.data, args.limit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_policy(args.model, device, args.trust_remote_code)
    check_lengths(model, args.model, args.max_prompt_length, args.max_response_length)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    # The data's own responses are not used here: no limit, so that none is dropped for being cut short.
    examples, _ = encode(pairs, tokenizer, end_token_ids(tokenizer, model), args.max_prompt_length, 10**9)
    torch.manual_seed(args.seed)
    responses, finished = sample(model, tokenizer, [example["prompt_ids"] for example in examples],
                                 args.max_response_length, 1, args.temperature, args.batch_size)
    with open(args.out, "w", encoding="utf-8") as file:
        for example, (ids,), (done,) in zip(examples, responses, finished):
            row = {"prompt": example["prompt"], "response": response_text(tokenizer, ids),
                   "tokens": len(ids), "finished": done}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(examples)} responses in {args.out}, {sum(done for done, in finished)} of them finished")


if __name__ == "__main__":
    command_line(main)
