"""The embedded toy world: reviews of a noun, a known reward for them, and a small model.

`sail.py --data toy` uses this world, so that everything runs on a CPU, offline, in minutes. It has the steps
of a real project: a grammar writes demonstrations, a model is trained on them by SFT, the true reward labels
pairs of that model's responses, and every method starts from that model. `toy_settings` gives the toy the
form that any user's project has: files of pairs, the directory of a model, and a reward FILE.py:FUNCTION.
"""
import math
import os
import random
from pathlib import Path

from runtime.command_line import InputError, seeded
from runtime.run_directory import read_json, write_directory, write_rows
from runtime.saved_model import base_of

import torch

from data import response_text
from generate import load_policy, sample

NOUNS = ("soup coffee pizza bread salad cake tea pasta hotel room pool beach movie song book show "
         "curry museum garden phone").split()
ADJECTIVES = dict(
    superb=1.0, wonderful=1.0, great=0.8, lovely=0.8, good=0.6, pleasant=0.6, decent=0.3, fine=0.3,
    plain=-0.3, dull=-0.3, weak=-0.6, poor=-0.6, bad=-0.8, nasty=-0.8, awful=-1.0, horrible=-1.0)
ADVERBS = dict(slightly=0.5, fairly=0.8, rather=1.0, very=1.5, truly=1.5, utterly=1.8)
PROMPTS = ("review the {} :", "how was the {} ?", "tell me about the {} :", "what about the {} ?")
WORLD = Path("runs/toy/world")             # the grammar's pairs, and untrained models
SFT_MODEL = Path("runs/toy/sft/model")     # the model that all variants but sft start from
DEFAULTS = dict(max_prompt_length=8, max_response_length=24, beta=0.5, epochs=1.0, batch_size=96,
                learning_rate=4e-4, schedule="cosine", eval_every=25, eval_limit=256)
SFT_DEFAULTS = dict(DEFAULTS, epochs=4.0, batch_size=48, learning_rate=2e-3)


def toy_response(rng, noun):
    """Write one random review, good or bad. It may be about another noun, repeat itself, or lack its full
    stop."""
    noun = noun if rng.random() < 0.8 else rng.choice(NOUNS)
    clauses = [f"{rng.choice([*ADVERBS])} {rng.choice([*ADJECTIVES])}"
               for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    if rng.random() < 0.2:
        clauses[-1] = clauses[0]
    return f"the {noun} was " + " and ".join(clauses) + (" ." if rng.random() < 0.8 else "")


def toy_reward(prompts, responses):
    """The ground truth: what each response is worth as a review of its prompt's noun, a list of floats, each
    the sum of five parts. Words are separated by spaces, and the full stop is a word. Raises InputError for a
    prompt that is no string.

      opinion     the valence of each of the first two adjectives, times the intensity of the adverb before it
      on topic    +0.5 if the prompt's noun occurs, −0.5 for every other noun of the toy that occurs
      repetition  −0.5 for every adjective or adverb that is said again
      ending      +0.5 if there is one full stop, and it is the last word
      length      −0.3 for every word past the ninth
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("the toy's reward can score only reviews of the toy's nouns; name a reward for your "
                         "data with --reward")
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        words = response.split()
        topic = set(prompt.split()) & set(NOUNS)
        nouns = set(words) & set(NOUNS)
        described = [word for word in words if word in ADJECTIVES or word in ADVERBS]
        opinions = []
        for before, word in zip([""] + words, words, strict=False):
            if word in ADJECTIVES:
                opinions.append(ADJECTIVES[word] * ADVERBS.get(before, 1.0))
        score = sum(opinions[:2])
        score += 0.5 * len(nouns & topic) - 0.5 * len(nouns - topic)
        score -= 0.5 * (len(described) - len(set(described)))
        if words[-1:] == ["."] and words.count(".") == 1:
            score += 0.5
        scores.append(score - 0.3 * max(0, len(words) - 9))
    return scores


def toy_prompts(held_out=False):
    """The prompts and their nouns, [(prompt, noun)]: 60 prompts to train on, or the 20 held-out prompts,
    which are one wording for each noun."""
    prompts = []
    for place, noun in enumerate(NOUNS):
        for wording, text in enumerate(PROMPTS):
            if ((place + wording) % 4 == 0) == held_out:
                prompts.append((text.format(noun), noun))
    return prompts


def toy_pair(rng, prompt, first, second, finished=(True, True)):
    """Make a row of a pair. The chosen response is drawn from the Bradley-Terry model of the toy reward.
    finished: whether the first and whether the second response ended by itself."""
    better, worse = toy_reward([prompt] * 2, [first, second])
    if rng.random() > 1 / (1 + math.exp(worse - better)):
        first, second, finished = second, first, finished[::-1]
    row = {"prompt": prompt, "chosen": first, "rejected": second}
    if False in finished:
        row["chosen_finished"], row["rejected_finished"] = finished
    return row


def grammar_pairs(held_out=False):
    """Rows of pairs from the grammar: 3,000 pairs, on whose chosen responses the SFT model is trained, or
    1,024 pairs with held-out prompts."""
    rng = random.Random(int(held_out))
    count = 1024 if held_out else 3000
    prompts, rows = toy_prompts(held_out), []
    while len(rows) < count:
        prompt, noun = rng.choice(prompts)
        first, second = toy_response(rng, noun), toy_response(rng, noun)
        if first != second:
            rows.append(toy_pair(rng, prompt, first, second))
    return rows


def draw_toy_pairs(model, path, count=18000, seed=0):
    """Sample pairs from a model of the toy, label them by the true reward, and write them to `path`."""
    policy, tokenizer = load_policy(model)
    rng = random.Random(seed)
    asked = rng.choices(toy_prompts(), k=count)
    prompts = [prompt for prompt, _ in asked]
    torch.manual_seed(seeded("toy pairs", seed))
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    responses, finished, _ = sample(policy, tokenizer, prompt_ids, DEFAULTS["max_response_length"], 2,
                                    batch_size=512)
    rows = []
    for prompt, ids, done in zip(prompts, responses, finished, strict=True):
        first, second = (response_text(tokenizer, each) for each in ids)
        rows.append(toy_pair(rng, prompt, first, second, tuple(done)))
    write_rows(path, rows)


def toy_vocabulary():
    """{word: id} of the toy grammar."""
    words = [*NOUNS, *ADJECTIVES, *ADVERBS, "the", "was", "and", "."]
    for prompt in PROMPTS:
        words += [word for word in prompt.split() if word != "{}"]
    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(words)]
    return {word: place for place, word in enumerate(words)}


def is_toy_model(model):
    """Whether a directory holds a model of the toy, which is recognised by its vocabulary, or a checkpoint
    whose base is one. If the directory does not exist: whether its name begins as those of the models that
    the toy writes."""
    run = base_of(model)
    if run is not None:
        return is_toy_model(run.model)
    file = Path(model, "tokenizer.json")
    if not Path(model).is_dir():
        return str(model).startswith(str(WORLD.parent))
    tokens = read_json(file).get("model") if file.is_file() else None
    return isinstance(tokens, dict) and tokens.get("vocab") == toy_vocabulary()


def toy_tokenizer():
    """A word-level tokenizer over the toy grammar."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel(toy_vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()         # splits words from punctuation
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

# --- the toy as a user's project ----------------------------------------------------------------------------

def toy_settings(variant, model=None, seed=0):
    """The settings that `--data toy` stands for, {name: default}: files of pairs, the directory of a model,
    and a reward in a file of Python. The pairs of a model's own responses lie in the directory of this
    model."""
    reward = f"{os.path.relpath(__file__)}:toy_reward"
    eval_data = str(WORLD / "held-out.jsonl")
    if variant == "sft":
        model = model or str(WORLD / f"untrained-{seed}")
        return dict(SFT_DEFAULTS, data=str(WORLD / "grammar.jsonl"), eval_data=eval_data, model=model,
                    reward=reward)
    model = model or str(SFT_MODEL)
    settings = dict(DEFAULTS, data=f"{model}/toy-pairs.jsonl", eval_data=eval_data, model=model,
                    reward=reward)
    if variant == "pp":
        settings["revkl_coef"] = 0.3                       # PP diverges without this anchor
    return settings


def write_world(seed=0):
    """Write the grammar's pairs and the model before any training to WORLD, unless they exist."""
    if not (WORLD / "grammar.jsonl").is_file():
        write_rows(WORLD / "grammar.jsonl", grammar_pairs())
    if not (WORLD / "held-out.jsonl").is_file():
        write_rows(WORLD / "held-out.jsonl", grammar_pairs(held_out=True))
    if not (WORLD / f"untrained-{seed}").is_dir():
        def write(aside):
            for part in toy_model(seed):
                part.save_pretrained(aside)

        write_directory(WORLD / f"untrained-{seed}", write)
