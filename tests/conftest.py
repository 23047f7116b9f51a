"""Small checkpoints and data for the tests, made on the spot; nothing is downloaded."""
import logging
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import pytest
import torch

logging.disable(logging.DEBUG)                     # a checkpoint makes thousands of such lines
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))   # more wait for each other

TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
EOS, END, IDS = 1, 262, 263        # the tokenizer's own end token, the template's, how many ids a model needs


def byte_tokenizer(template=None, bos=False, gap=None):
    """A byte-level tokenizer: any text, no unknown tokens. It ends every text with EOS, as some do. Ids 0–4
    are special; so is, with a template or `gap`, the highest, 262, with which an answer in TEMPLATE ends, and
    then 261 stands for nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<bos>"]
    vocab = {word: place for place, word in enumerate(words + alphabet)}
    special = ["<|user|>", "<|assistant|>"]
    if gap or gap is None and template is not None:
        vocab["<|end|>"] = END
        special.append("<|end|>")
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if bos else "$A <eos>", special_tokens=[("<bos>", 4), ("<eos>", EOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
                                   bos_token="<bos>" if bos else None,
                                   additional_special_tokens=special)
    fast.chat_template = template
    return fast


WINDOWED = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
CHUNKED = dict(attention_chunk_size=6, layer_types=["chunked_attention", "full_attention"],
               no_rope_layers=[1, 0])
FAMILIES = {  # AutoConfig's name and own settings; cohere, gemma2 and granite scale or cap their logits
    "llama": ("llama", {}), "gpt2": ("gpt2", {}), "qwen2": ("qwen2", {}),
    "tied": ("llama", dict(tie_word_embeddings=True)),                 # as most small pretrained models
    "qwen3": ("qwen3", dict(head_dim=8)),
    "gemma2": ("gemma2", dict(head_dim=8, final_logit_softcapping=2.0, **WINDOWED)),
    "gemma3": ("gemma3_text", dict(head_dim=8, **WINDOWED)), "cohere": ("cohere", dict(logit_scale=0.25)),
    "granite": ("granite", dict(logits_scaling=3.0)), "mistral": ("mistral", dict(sliding_window=4)),
    "llama4": ("llama4_text", dict(head_dim=8, intermediate_size_mlp=48, num_local_experts=2, **CHUNKED)),
    "phi3": ("phi3", {}), "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2))}


def tiny_model(family="llama", vocab_size=IDS, seed=0, **more):
    """A random model of a few thousand parameters, in eval mode. Windows and chunks are shorter than most
    rows here."""
    from transformers import AutoConfig, AutoModelForCausalLM
    kind, own = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=0), **own, **more})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A saved chat model: a directory with a byte tokenizer, a template and random weights."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("tied").save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard():
    """A suite that nohup or a shell's & has started is told to ignore these, and so is all it starts."""
    for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session", autouse=True)
def working_directory(tmp_path_factory):
    """What a run writes below the working directory, as the toy's files, goes away with the tests."""
    os.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(autouse=True)
def signals():
    """A run in this process takes the signals over; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """An untrained toy model, saved, with pairs to train it on, and in reference/ another one to measure KL
    to: a run starts in seconds. Its directory, a string."""
    from runtime.run_directory import write_rows
    from toy import grammar_pairs, toy_model
    path = tmp_path_factory.mktemp("base")
    write_rows(path / "toy-pairs.jsonl", grammar_pairs()[:60])
    model, tokenizer = toy_model(seed=5)
    model.config.tie_word_embeddings = True   # what trains, saves and resumes meets tied weights
    model.tie_weights()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    for part in toy_model(seed=6):
        part.save_pretrained(path / "reference")
    return str(path)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    """The toy's held-out pairs, as a file."""
    from runtime.run_directory import write_rows
    from toy import grammar_pairs
    path = tmp_path_factory.mktemp("held-out") / "held-out.jsonl"
    write_rows(path, grammar_pairs(held_out=True))
    return str(path)


TOY_REWARD = f"{ROOT}/toy.py:toy_reward"


def as_settings(words):
    """(flags, settings that are no flags) of arguments in which the latter are written like flags, too."""
    from reward import RewardSettings
    from runtime.settings import converter, flag_of, kind_of
    from sail import Arguments
    hidden = {}
    for cls in (RewardSettings, Arguments):                # a reward model's settings have some set aside
        for each in fields(cls):
            if each.metadata["help"] is None and kind_of(cls, each.name) is not type(None):
                hidden[flag_of(each.name)] = cls, each
    flags, chosen, words = [], {}, iter(map(str, words))
    for word in words:
        if word in hidden:
            cls, field = hidden[word]
            chosen[field.name] = converter(cls, field)(next(words))
        else:
            flags.append(word)
    return flags, chosen


def sail_main(words):
    """sail.main of arguments in which settings that are no flags are written like flags, too."""
    import sail
    flags, chosen = as_settings(words)
    return sail.main(flags, **chosen)


def sail_args(words):
    """sail.parse_args of such arguments."""
    import sail
    flags, chosen = as_settings(words)
    return sail.parse_args(flags, **chosen)


def pairs_of(rows):
    """Rows {prompt, chosen, rejected} as formats.py's pairs."""
    from formats import TextPair
    return [TextPair(row["prompt"], row.get("chosen"), row.get("rejected")) for row in rows]


def run_of(policy, reference, baseline=0.0, **more):
    """What a step of sail.py works with, of models that are there."""
    from runtime.settings import Settings
    from sail import Run
    settings = Settings(dtype="float32", micro_batch_size=more.pop("micro_batch_size", None))
    return Run(policy, reference, None, None, [], [], settings, progress={"baseline": baseline}, **more)
