"""Small checkpoints and data for the tests, made on the spot; nothing is downloaded."""
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def byte_tokenizer(template=None, bos=False):
    """A byte-level tokenizer: any text, no unknown tokens. Ids 0–3 are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<bos>"]
    vocab = {word: place for place, word in enumerate(words + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A",
                                                                 special_tokens=[("<bos>", 4)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>",
                                   bos_token="<bos>" if bos else None,
                                   additional_special_tokens=["<|user|>", "<|assistant|>"])
    fast.chat_template = template
    return fast


def tiny_model(family="llama", vocab_size=261, seed=0, **more):
    """A random model of a few thousand parameters, in eval mode."""
    from transformers import (CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config,
                              GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM, LlamaConfig,
                              LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM)
    torch.manual_seed(seed)
    size = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    if family == "gpt2":
        config = GPT2Config(vocab_size=vocab_size, n_positions=256, n_embd=32, n_layer=2, n_head=4,
                            initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0, **more)
        return GPT2LMHeadModel(config).eval()
    config, model, own = {
        "llama": (LlamaConfig, LlamaForCausalLM, {}), "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM, dict(head_dim=8, final_logit_softcapping=2.0)),
        "granite": (GraniteConfig, GraniteForCausalLM, dict(logits_scaling=3.0)),
        "cohere": (CohereConfig, CohereForCausalLM, dict(logit_scale=0.25))}[family]
    return model(config(**{**size, **own, **more})).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A saved chat model: a directory with a byte tokenizer, a template and random weights."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """An untrained toy model, saved: training starts from it in seconds. Its directory, a string."""
    from generate import toy_model
    path = tmp_path_factory.mktemp("base")
    for part in toy_model(seed=5):
        part.save_pretrained(path)
    return str(path)
