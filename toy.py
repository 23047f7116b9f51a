"""The embedded toy world: reviews of a noun, a known reward for them, and a small model.

It is what `--data toy`, `--reward toy` and `--model toy` stand for, so that everything here runs on a CPU,
offline, in minutes. Its pipeline is the real one in small: demonstrations from a grammar, an SFT model of it,
pairs of that model's responses, labelled by the true reward, then every method from the same start.
"""
import json
import math
import random
import zlib
from collections import Counter
from pathlib import Path

import torch

from data import InputError, load_pairs, seeded

NOUNS = ("soup coffee pizza bread salad cake tea pasta hotel room pool beach movie song book show "
         "curry museum garden phone").split()
ADJECTIVES = dict(
    superb=1.0, wonderful=1.0, great=0.8, lovely=0.8, good=0.6, pleasant=0.6, decent=0.3, fine=0.3,
    plain=-0.3, dull=-0.3, weak=-0.6, poor=-0.6, bad=-0.8, nasty=-0.8, awful=-1.0, horrible=-1.0)
ADVERBS = dict(slightly=0.5, fairly=0.8, rather=1.0, very=1.5, truly=1.5, utterly=1.8)
PROMPTS = ("review the {} :", "how was the {} ?", "tell me about the {} :", "what about the {} ?")
SFT_MODEL = Path("runs/toy/sft/model")     # what `--model toy` is, but for --variant sft, which makes it
TOY_PAIRS = "toy-pairs.jsonl"              # what `--data toy` is, in --model's directory: its own responses
TOY_DEFAULTS = dict(max_prompt_length=8, max_response_length=24, reward="toy", beta=0.5, epochs=1.0,
                    batch_size=96, learning_rate=4e-4, schedule="cosine", eval_every=25, eval_limit=256)
TOY_SFT = dict(TOY_DEFAULTS, epochs=4.0, batch_size=48, learning_rate=2e-3)


def toy_response(rng, noun):
    """One random review, wanted or not: it may stray to another noun, repeat itself, or lack its full
    stop."""
    noun = noun if rng.random() < 0.8 else rng.choice(NOUNS)
    clauses = [f"{rng.choice([*ADVERBS])} {rng.choice([*ADJECTIVES])}"
               for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    if rng.random() < 0.2:
        clauses[-1] = clauses[0]
    return f"the {noun} was " + " and ".join(clauses) + (" ." if rng.random() < 0.8 else "")


def toy_reward(prompts, responses):
    """The ground truth: what a review of the prompt's noun is worth, in reward units.

      opinion     the first two adjectives' valence, times their adverb's intensity
      on topic    +0.5 for the prompt's noun, −0.5 for any other
      repetition  −0.5 for every adjective or adverb said again
      ending      +0.5 for one full stop, at the end
      length      −0.3 for every word past the ninth
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("reward toy: scores reviews of the toy's nouns; name the reward of your data with "
                         "--reward")
    scores = []
    for prompt, response in zip(prompts, responses):
        words, topic = response.split(), set(prompt.split()) & set(NOUNS)
        opinions = [ADJECTIVES[word] * ADVERBS.get(before, 1.0) for before, word in zip([""] + words, words)
                    if word in ADJECTIVES]
        nouns, described = set(words) & set(NOUNS), [
            word for word in words if word in ADJECTIVES or word in ADVERBS]
        scores.append(sum(opinions[:2])
                      + 0.5 * len(nouns & topic) - 0.5 * len(nouns - topic)
                      - 0.5 * (len(described) - len(set(described)))
                      + 0.5 * (words[-1:] == ["."] and words.count(".") == 1)
                      - 0.3 * max(0, len(words) - 9))
    return scores


def toy_prompts(held_out=False):
    """[(prompt, its noun)]: 60 prompts to train on, or the 20 held-out ones, one wording of each noun."""
    return [(PROMPTS[wording].format(noun), noun) for place, noun in enumerate(NOUNS)
            for wording in range(len(PROMPTS)) if ((place + wording) % 4 == 0) == held_out]


def toy_pair(rng, prompt, first, second):
    """A pair, of which the chosen one is drawn from Bradley-Terry on the toy reward."""
    better, worse = toy_reward([prompt] * 2, [first, second])
    if rng.random() > 1 / (1 + math.exp(worse - better)):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def pairs_of(source, limit=None, prefer="better"):
    """`data.load_pairs`, which also knows pairs of the grammar: 3,000 of `toy` or `toy:grammar`, whose chosen
    ones the SFT model learns from, and 1,024 of `toy:test`, with held-out prompts."""
    if source not in ("toy", "toy:grammar", "toy:test"):
        return load_pairs(source, limit, prefer)
    rng, count, pairs = random.Random(source == "toy:test"), 1024 if source == "toy:test" else 3000, []
    while len(pairs) < min(count, limit or count):
        prompt, noun = rng.choice(toy_prompts(held_out=source == "toy:test"))
        first, second = toy_response(rng, noun), toy_response(rng, noun)
        if first != second:
            pairs.append(toy_pair(rng, prompt, first, second))
    return pairs, {"format": "the embedded toy world", "rows": len(pairs), "dropped": Counter(),
                   "altered": Counter(), "unread": []}


def train_and_held_out(data, eval_data=None, limit=None, prefer="better"):
    """(training pairs, held-out pairs, report of the training source), the same for every script. Held out
    are the pairs of `eval_data` where it is given, the toy's held-out prompts for the toy, else those of one
    prompt in twenty of `data`, told by the prompt's CRC-32, so that no prompt is on both sides."""
    pairs, report = pairs_of(data, limit, prefer)
    if eval_data or data in ("toy", "toy:grammar"):
        return pairs, pairs_of(eval_data or "toy:test", None, prefer)[0], report
    out = [zlib.crc32(json.dumps(pair["prompt"]).encode()) % 20 == 0 for pair in pairs]
    train, held_out = ([pair for pair, held in zip(pairs, out) if held == side] for side in (False, True))
    if not train:
        raise InputError(f"{data}: all {len(pairs)} pairs are held out; give more, or name others with "
                         "--eval-data")
    return train, held_out, report


def toy_tokenizer():
    """A word-level tokenizer over the toy grammar."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = [*NOUNS, *ADJECTIVES, *ADVERBS, "the", "was", "and", "."]
    words = ["<pad>", "<eos>", "<unk>"] + list(dict.fromkeys(
        words + [word for prompt in PROMPTS for word in prompt.split() if word != "{}"]))
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()         # a word, or marks
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False)


def toy_model(seed=0):
    """The toy's policy before any training: (a two-layer Llama of about 0.1 M random parameters, its
    tokenizer)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = toy_tokenizer()
    torch.manual_seed(seeded("toy model", seed))
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).eval(), tokenizer
