"""Sampling matches scoring: the distribution, the ids, the end tokens."""
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import END, EOS, IDS, TEMPLATE, byte_tokenizer, pairs_of, sail_main, tiny_model
from test_errors import fails
from transformers import GenerationConfig

import evaluate
import generate
import sail
from data import Pair, collate, encode, response_text
from runtime.command_line import InputError
from runtime.run_directory import write_rows
from data import end_token_ids
from formats import read_rows, split_held_out
from generate import prepare, roll_out, sample
from reward import swap_responses
from data import SIDES
from sail import pair_logps, sequence_logps


def three_token_model():
    """(model over <pad>, <eos>, a, its tokenizer): every next token has the same logits, whatever came
    before."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    return tiny_model(vocab_size=3, seed=3), tokenizer


def test_sample_frequencies_fit_the_softmax_whatever_the_generation_config_says():
    model, tokenizer = three_token_model()
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, temperature=0.1, top_p=0.3,
                                               repetition_penalty=5.0, min_p=0.4, eos_token_id=1,
                                               pad_token_id=0, suppress_tokens=[0])
    own = model.generation_config
    torch.manual_seed(0)
    n = 20_000
    responses, *_ = sample(model, tokenizer, [[2, 2]], 2, num_responses=n)
    # all there are in two tokens
    outcomes = [(1,)] + [(first, second) for first in (0, 2) for second in (0, 1, 2)]
    counts = torch.tensor([sum(tuple(ids) == outcome for ids in responses[0])
                           for outcome in outcomes]).double()
    with torch.no_grad():
        logps = sequence_logps(
            model, *collate([[2, 2]] * 7, [list(outcome) for outcome in outcomes])).double()
    expected = n * logps.exp()
    assert counts.sum() == n and expected.sum().item() == pytest.approx(n, rel=1e-5)
    assert ((counts - expected) ** 2 / expected).sum() < 22.46                      # χ², 6 degrees, p = 0.001
    assert model.generation_config is own


def test_another_temperature_is_another_distribution():
    model, tokenizer = three_token_model()
    torch.manual_seed(0)
    responses, *_ = sample(model, tokenizer, [[2]], 1, num_responses=5000, temperature=0.25)
    logits = model(torch.tensor([[2]])).logits[0, -1]
    shares = torch.tensor([sum(ids == [token] for ids in responses[0]) for token in range(3)]) / 5000
    torch.testing.assert_close(shares, (logits / 0.25).softmax(-1).detach(), rtol=0, atol=0.03)


def test_at_temperature_0_each_token_is_the_likeliest_also_with_masked_ids_and_great_logits():
    model = prepare(tiny_model(vocab_size=300), byte_tokenizer())
    with torch.no_grad():
        model.lm_head.weight *= 1e4
        for seed in range(2):
            torch.manual_seed(seed)
            (response,), _ = generate.draw(model, [[5, 6, 7]], torch.tensor([1]), 10, 1, 0.0)
            logits = model(torch.tensor([[5, 6, 7] + response])).logits[0, 2:-1]
            assert response == logits.argmax(-1).tolist() and logits.abs().max() > 1e4


@pytest.mark.parametrize("ends", [{EOS}, {EOS, END}])
def test_a_response_ends_with_its_first_end_token_or_is_counted_unfinished(ends):
    """With the template's end token too, if there is one."""
    model, tokenizer = three_token_model() if ends == {EOS} else (tiny_model(), byte_tokenizer(TEMPLATE))
    torch.manual_seed(1)
    responses, finished, _ = sample(model, tokenizer, [[2], [2, 2, 2]], 4, num_responses=50 * len(ends) ** 2)
    rows = [row for group in responses for row in group]
    done = [flag for group in finished for flag in group]
    assert 0 < sum(done) < len(done) and {row[-1] for row in rows} >= ends
    for row, flag in zip(rows, done, strict=True):
        assert sum(token in ends for token in row) == int(flag)
        assert row[-1] in ends if flag else len(row) == 4


def test_trained_ids_are_generated_ids_also_where_text_does_not_round_trip(monkeypatch):
    model, tokenizer = prepare(tiny_model(), byte_tokenizer()), byte_tokenizer()
    drawn, prompts, original = [], [], generate.draw

    def watch(model, prompt_ids, *more):
        prompts.extend(prompt_ids)
        responses, logps = original(model, prompt_ids, *more)
        drawn.extend(responses)
        return responses, logps

    monkeypatch.setattr(generate, "draw", watch)
    pairs = [Pair("", "", "", [12], [1], [1]), Pair("", "", "", [10], [1], [1])]
    pairs[0].prompt_ids = [12] * 3
    torch.manual_seed(0)
    rolled = roll_out(model, tokenizer, pairs, SIDES, options(12))
    assert prompts == [[10], [12, 12, 12]]                             # by length; each keeps its own samples
    trained = [rolled[1].chosen_ids, rolled[1].rejected_ids, rolled[0].chosen_ids, rolled[0].rejected_ids]
    assert trained == drawn and all(trained)
    # bytes that are not UTF-8
    assert any(tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] != ids
               for ids in trained)
    assert [pair.chosen_ids for pair in pairs] == [[1], [1]]                           # those are copies
    lengths = [len(trained[2] + trained[3]), len(trained[0] + trained[1])]
    assert [pair.sampled_tokens for pair in rolled] == lengths
    assert [pair.samples for pair in rolled] == [2, 2]


@pytest.mark.parametrize("family, config", [
    ("llama", {}), ("gpt2", {}), ("gemma2", {}),
    ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=0))])
def test_a_rollout_sees_the_logits_of_the_plain_forward(family, config):
    """With its cache, shared prompts and shrinking batch."""
    model, seen = tiny_model(family, **config), []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(output.logits[:, -1]))
    torch.manual_seed(0)
    prompts = [[5, 6, 7], [9], [11] * 20]
    responses, _ = generate.draw(model, prompts, torch.arange(0, IDS, 7), 10, 3, 1.0)      # many end tokens
    hook.remove()
    assert len({len(response) for response in responses}) > 3 and max(map(len, responses)) <= 10
    seen[0] = seen[0].repeat_interleave(3, 0)
    for row, response in enumerate(responses):
        with torch.no_grad():
            expected = model(torch.tensor([prompts[row // 3] + response])).logits[0, -len(response) - 1:-1]
        for step in range(len(response)):
            place = sum(len(other) > step for other in responses[:row])
            torch.testing.assert_close(seen[step][place], expected[step], rtol=1e-4, atol=1e-4)


def test_prompts_are_read_once_and_finished_responses_leave_the_batch():
    model, rows = tiny_model(), []
    model.register_forward_pre_hook(lambda _, __, inputs: rows.append(tuple(inputs["input_ids"].shape)),
                                    with_kwargs=True)
    torch.manual_seed(0)
    responses, _ = generate.draw(model, [[5, 6, 7], [8]], torch.arange(0, IDS, 7), 12, 4, 1.0)
    assert rows[0] == (2, 3)
    assert rows[1:] == [(sum(len(response) > step for response in responses), 1)
                        for step in range(1, max(map(len, responses)))]
    assert rows[-1][0] < 8


def test_a_model_without_a_key_value_cache_is_refused():
    class Forgetful(type(tiny_model())):
        def forward(self, cache=None, **inputs):
            return super().forward(**inputs)

    model = tiny_model()
    model.__class__ = Forgetful
    with pytest.raises(InputError, match=r"Forgetful lacks .* the usual cache.*\(it keeps no cache of its"):
        prepare(model, byte_tokenizer())


def options(max_response_length, dtype="float32"):
    """The arguments that a rollout looks at."""
    return SimpleNamespace(max_response_length=max_response_length, temperature=1.0, dtype=dtype,
                           sample_batch_size=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rollout_computes_in_the_dtype_in_which_its_responses_are_scored(dtype):
    model, seen, heads = prepare(tiny_model(), byte_tokenizer()), [], []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, hidden: seen.append(hidden.dtype))
    model.lm_head.register_forward_hook(lambda _, __, logits: heads.append(logits.dtype))
    pair = Pair("", "", "", [10, 11])
    (rolled,) = roll_out(model, byte_tokenizer(), [pair], SIDES, options(4, dtype))
    drawing = {*seen}
    seen.clear()
    pair_logps(model, [rolled], dtype)
    assert drawing == {*seen} == {getattr(torch, dtype)} and {*heads} == {torch.float32}


def test_a_half_sampled_pair_keeps_the_datas_chosen_response():
    model, tokenizer = tiny_model(), byte_tokenizer()
    pair = Pair("", "data", "", [10, 11], [7, 1], [1])
    torch.manual_seed(0)
    pair.preference = 0.3                                  # of a response that is replaced
    (rolled,) = roll_out(model, tokenizer, [pair], ("rejected",), options(6))
    assert rolled.preference == 1.0
    assert rolled.chosen_ids == [7, 1] and rolled.chosen == "data" and rolled.samples == 1
    assert rolled.rejected_ids != [1] and rolled.unfinished in (0, 1)


def test_each_prompt_gets_its_own_samples_whatever_the_batching():
    """A model that repeats the last prompt token shows whose sample is whose."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.randn(IDS, 32).sign() * 3)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    prompts = [[50 + i] * (1 + i % 3) for i in range(7)]
    responses, *_ = sample(model, tokenizer, prompts, 3, num_responses=2, batch_size=3)
    assert [group for group in responses] == [[[50 + i] * 3] * 2 for i in range(7)]


def test_ids_beyond_the_tokenizers_are_never_sampled():
    model, tokenizer = tiny_model(vocab_size=2000), byte_tokenizer(gap=True)
    prepare(model, tokenizer)
    torch.manual_seed(0)
    responses, *_ = sample(model, tokenizer, [[5]], 8, num_responses=400)
    assert max(max(row) for row in responses[0]) == IDS - 1


def test_a_response_may_begin_with_an_id_that_the_vocabulary_skips():
    tokenizer = byte_tokenizer(gap=True)
    assert tokenizer.convert_ids_to_tokens(END - 1) is None
    assert response_text(tokenizer, [END - 1, 70], [5]) == response_text(tokenizer, [70], [5])


def test_end_tokens_are_the_tokenizers_and_the_checkpoints_special_ones():
    model, tokenizer = tiny_model(), byte_tokenizer()
    model.generation_config.eos_token_id = [1, 2, 77]          # <eos>, a special token, a letter
    assert end_token_ids(tokenizer, model) == {1, 2}
    assert end_token_ids(tokenizer) == {1}
    for nonsense in ([[1]], {"a": 1}, "2"):
        model.generation_config.eos_token_id = nonsense
        assert end_token_ids(tokenizer, model) == {1}


def test_the_token_that_closes_an_answer_in_the_template_ends_it():
    """As with Qwen's base models: the template closes with a special token that is not the tokenizer's
    EOS."""
    tokenizer = byte_tokenizer(TEMPLATE.replace("<|end|>", "<|end|>\\n"))
    end_ids = end_token_ids(tokenizer)
    examples, *_ = encode([Pair("Q", "good", "bad")], tokenizer, end_ids, 50, 50)
    assert end_ids == {EOS, END} and tokenizer.decode(examples[0].chosen_ids) == "good<|end|>"
    assert response_text(tokenizer, examples[0].chosen_ids) == "good"


def test_a_model_smaller_than_its_tokenizer_is_refused_only_where_an_id_that_occurs_has_no_row():
    model, tokenizer = prepare(tiny_model(vocab_size=50), byte_tokenizer(gap=True)), byte_tokenizer(gap=True)
    known = Pair("!!", "!", "#")
    assert encode([known], tokenizer, {1}, 9, 9, rows=50)[0]
    assert model.get_output_embeddings().weight.shape[0] == 50
    for side in ("prompt", *SIDES):
        with pytest.raises(InputError, match="the data hold 'z', id .*the model has only 50 ids"):
            encode([known, replace(known, **{side: "z"})], tokenizer, {1}, 9, 9, rows=50)
    highest = max(byte_tokenizer(gap=True)("#")["input_ids"])
    encode([known], tokenizer, {1}, 9, 9, rows=highest + 1)
    with pytest.raises(InputError, match=f"the data hold '#', id {highest}"):
        encode([known], tokenizer, {1}, 9, 9, rows=highest)
    tokenizer.eos_token = "z"
    with pytest.raises(InputError, match="263 ids, the model only 50, and an end token is among"):
        prepare(model, tokenizer)


def test_the_command_line_writes_one_row_per_prompt(checkpoint, held_out, tmp_path, monkeypatch, capsys):
    out = tmp_path / "responses.jsonl"
    monkeypatch.setattr("sys.argv", [
        "generate.py", "--model", str(checkpoint), "--data", held_out, "--limit", "5",
        "--max-prompt-length", "64", "--max-response-length", "6", "--out", str(out)])
    generate.main()
    rows = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert len(rows) == 5 and all(set(row) == {"prompt", "response", "tokens", "finished"} for row in rows)
    assert all(1 <= row["tokens"] <= 6 for row in rows) and "5 responses" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3"])
def test_a_loaded_model_answers_a_prompt_as_it_does_alone_whatever_pads_it(family):
    """Also one that scores packed rows: it samples from padded ones."""
    model, tokenizer = prepare(tiny_model(family), byte_tokenizer()), byte_tokenizer()
    assert (model.config._attn_implementation == "packed") == (family != "gemma3")
    prompts = [[5, 6, 7], [*range(40, 60)], [9], [30, 31]]
    together, *_ = sample(model, tokenizer, prompts, 8, temperature=0.0)
    alone = [sample(model, tokenizer, [prompt], 8, temperature=0.0)[0][0] for prompt in prompts]
    assert together == alone


def test_an_id_that_the_model_lacks_is_named_by_every_command(tmp_path, monkeypatch, capsys):
    for part in (tiny_model(vocab_size=50), byte_tokenizer(gap=True)):
        part.save_pretrained(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    write_rows("x.jsonl", [{"prompt": "z", "chosen": f"!{'!' * nth}", "rejected": "#"} for nth in range(4)])
    lengths = ["--max-prompt-length", "8", "--max-response-length", "8"]
    for main, argv in ((sail.main, ["--variant", "dpo", "--model", "small", "--data", "x.jsonl"]),
                       (generate.main, ["--model", "small", "--data", "x.jsonl"]),
                       (evaluate.main, ["small", "--eval-data", "x.jsonl"])):
        capsys.readouterr()
        assert "the data hold 'z'" in fails(main, ["x.py", *argv, *lengths], monkeypatch, capsys)


def test_an_end_token_that_only_the_model_names_ends_the_datas_responses(tmp_path, monkeypatch, capsys):
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 2]
    for part in (model, byte_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    write_rows("x.jsonl", [{"prompt": "Q", "chosen": f"{nth}<|user|>", "rejected": "no"} for nth in range(4)])
    flags = ["--eval-data", "x.jsonl", "--max-prompt-length", "8", "--max-response-length", "8"]
    sail_main(["--variant", "dpo", "--model", "model", "--data", "x.jsonl", "--steps", "1", "--batch-size",
               "2", *flags, "--out", "run"])
    cut = "cut: 4 responses with an end token in their text\n"
    assert capsys.readouterr().out.count(cut) == 2                     # of both files
    monkeypatch.setattr("sys.argv", ["evaluate.py", "model", *flags])
    evaluate.main()
    assert cut in capsys.readouterr().out


def test_a_sample_ends_at_a_token_that_only_the_model_names():
    model, tokenizer = prepare(tiny_model(), byte_tokenizer()), byte_tokenizer()
    model.generation_config.eos_token_id = [1, 2]
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([2]), 1e4))
    assert sample(model, tokenizer, [[5]], 4)[:2] == ([[[2]]], [[True]])


def test_tokens_of_however_small_a_probability_may_be_drawn(monkeypatch):
    """A thousand of 1e-10 each, behind one that is nearly certain."""
    logits = torch.tensor([[0.0, *[math.log(1e-10)] * 1000]])
    for missing in (200, 400, 500, 600, 800):
        uniform = torch.tensor([[1 - missing * 1e-10]], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, uniform=uniform, **__: uniform)
        assert generate.draw_tokens(logits, 1.0)[0].item() == pytest.approx(1000 - missing, abs=20)


def run_generate(monkeypatch, *argv):
    """The rows that generate.py writes for these arguments."""
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, argv), "--out", "answers.jsonl"])
    generate.main()
    return read_rows("answers.jsonl")


def test_what_is_cut_dropped_altered_or_unread_is_said_and_a_row_has_what_the_policy_saw(
        checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}]
    write_rows("x.jsonl", [{"prompt": turns, "lang": "en"}, {"prompt": "d" * 80}, {"prompt": "e"}])
    rows = run_generate(monkeypatch, "--model", checkpoint, "--data", "x.jsonl", "--max-prompt-length", 40,
                        "--max-response-length", 2)
    assert [row["prompt"] for row in rows] == [turns[2:], "e"]
    said = capsys.readouterr().out
    assert "x.jsonl: prompts; 3 rows, 3 kept\n   unread: lang (1 rows)\n" in said
    assert ("2 prompts were asked\n  dropped: 1 (1 prompt longer than --max-prompt-length)\n"
            "      cut: 1 prompts longer than --max-prompt-length\n" in said)


def test_n_responses_to_each_prompt_stand_one_after_another(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("x.jsonl", [{"prompt": "long " * 5}, {"prompt": "a"}])
    rows = run_generate(monkeypatch, "--model", checkpoint, "--data", "x.jsonl", "--max-prompt-length", 64,
                        "--max-response-length", 8, "--n", 3)
    assert [row["prompt"] for row in rows] == ["long " * 5] * 3 + ["a"] * 3
    assert len({row["response"] for row in rows}) > 4


def test_of_a_run_its_held_out_prompts_are_answered_with_its_lengths_and_template(
        checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"question {nth}", "chosen": "yes", "rejected": "no"} for nth in range(60)]
    write_rows("pairs.jsonl", pairs)
    write_rows("others.jsonl", pairs[:4])
    Path("mine.jinja").write_text("A talk." + TEMPLATE)
    lengths = ["--max-prompt-length", "50", "--max-response-length", "5"]
    for name, more in (("run", []), ("other", ["--eval-data", "others.jsonl"])):
        sail_main(["--variant", "dpo", "--model", str(checkpoint), "--data", "pairs.jsonl", "--steps", "1",
                   "--batch-size", "2", "--eval-limit", "2", "--chat-template", "mine.jinja", "--out", name,
                   *lengths, *more])
    Path("mine.jinja").unlink()                                        # the run has it in its model
    capsys.readouterr()
    seen, encode = [], generate.encode
    monkeypatch.setattr(generate, "encode", lambda pairs, tokenizer, ends, *limits: (
        seen.append((tokenizer.chat_template, *limits[:2])), encode(pairs, tokenizer, ends, *limits))[1])
    _, held_out = split_held_out(pairs_of(pairs))
    prompts = [pair.prompt for pair in held_out]
    assert [row["prompt"] for row in run_generate(monkeypatch, "--model", "run")] == prompts
    assert f"run is a run: {len(prompts)} of its {len(prompts)} held-out prompts" in capsys.readouterr().out
    rows = run_generate(monkeypatch, "--model", "other", "--limit", 3)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in pairs[:3]]
    rows = run_generate(monkeypatch, "--model", "run", "--data", "others.jsonl", "--max-response-length", 3)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in pairs[:4]]
    template = "A talk." + TEMPLATE
    assert seen == [(template, 50, 5), (template, 50, 5), (template, 50, 3)]


def test_of_a_long_file_it_is_shown_how_far_it_is(monkeypatch, capsys):
    """Off a terminal by a line every half minute; here each look at the clock finds it 20 s later."""
    model, tokenizer = three_token_model()
    clock = itertools.count(0, 20)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    sample(model, tokenizer, [[2]] * 6, 1, batch_size=2)
    shown = capsys.readouterr().out
    assert "batches of responses to 6 prompts: 2 of 3 after 40 s" in shown


def test_a_response_is_called_finished_if_it_is(monkeypatch):
    monkeypatch.setattr(generate, "sample", lambda *_: ([[[70, 71]], [[70, 1]]], [[False], [True]], None))
    rows, _ = generate.answer(tiny_model(), byte_tokenizer(gap=True), ["a", "b"], 1.0, SimpleNamespace(
        max_prompt_length=8, max_response_length=2, sample_batch_size=2, dtype="float32"))
    assert [row["finished"] for row in rows] == [False, True]


def test_at_temperature_0_the_likeliest_token_is_drawn_however_near_the_next():
    logits = torch.tensor([[20.0, 20.001, 19.0]]).repeat(200, 1)
    assert generate.draw_tokens(logits, 0.0)[0].unique().tolist() == [1]


def test_the_chat_template_of_the_command_line_is_the_one_that_answers(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("x.jsonl", [{"prompt": "Q"}])
    Path("mine.jinja").write_text("A talk." + TEMPLATE)
    seen, load = [], generate.load_policy

    def watched(*names, **options):
        model, tokenizer = load(*names, **options)
        seen.append(tokenizer.chat_template)
        return model, tokenizer

    monkeypatch.setattr(generate, "load_policy", watched)
    for more in ([], ["--chat-template", "mine.jinja"]):
        run_generate(monkeypatch, "--model", checkpoint, "--data", "x.jsonl", "--max-prompt-length", 60,
                     "--max-response-length", 2, *more)
    assert seen == [TEMPLATE, "A talk." + TEMPLATE]


# --- the sampler's gap

@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "gemma3"])
@pytest.mark.parametrize("sides", [SIDES, ("rejected",)])
def test_a_response_keeps_the_log_probability_with_which_it_was_sampled(family, sides):
    model, tokenizer = prepare(tiny_model(family), byte_tokenizer()), byte_tokenizer()
    torch.manual_seed(0)
    pairs = roll_out(model, tokenizer, [Pair("", "a", "b", [10 + i] * (i + 1), [7, 1], [8, 1])
                                        for i in range(6)], sides, options(12))
    scored = pair_logps(model, pairs)
    sampled = torch.tensor([pair.sampling_logps for pair in pairs]).T
    if sides != SIDES:
        assert (sampled[0] == 0).all()
    torch.testing.assert_close(sampled[-len(sides):], scored[-len(sides):], rtol=0, atol=1e-4)
    swap_responses(pairs[0])
    assert pairs[0].sampling_logps == pytest.approx(sampled[:, 0].flip(0).tolist(), abs=1e-5)


def test_the_output_layer_in_float32_halves_the_gap_of_bfloat16():
    """The root mean square of the difference between sampling and scoring."""
    gaps = []
    for layer_in_float32 in (False, True):
        model, tokenizer = tiny_model("llama", hidden_size=64), byte_tokenizer()
        with torch.no_grad():
            model.lm_head.weight.mul_(20)                              # sharper than a random model
        if layer_in_float32:
            prepare(model, tokenizer)
        torch.manual_seed(0)
        pairs = [Pair("", "", "", [10 + i] * 6) for i in range(24)]
        pairs = roll_out(model, tokenizer, pairs, SIDES, options(24, "bfloat16"))
        sampled = torch.tensor([pair.sampling_logps for pair in pairs]).T
        gaps.append((pair_logps(model, pairs, "bfloat16") - sampled).square().mean().sqrt().item())
    assert gaps[1] < 0.7 * gaps[0]


def test_the_gap_of_a_step_is_the_root_mean_square_over_its_samples():
    from sail import Method, preference_losses, record_of
    model = prepare(tiny_model(), byte_tokenizer())
    pairs = [Pair("", "a", "b", [10], [11, 1], [12, 1], on_policy=True, samples=2) for _ in range(2)]
    pairs += [Pair("", "a", "b", [10], [11, 1], [12, 1])]              # of the data: it has no gap
    (chosen, *_), (rejected, *_) = pair_logps(model, pairs).tolist()
    pairs[0].sampling_logps = (chosen + 0.3, rejected)
    pairs[1].sampling_logps = (chosen, rejected - 0.1)
    method = Method(variant="pr", mix=0.3, response_coef=1.0, label_coef=0.0)
    _, metrics = preference_losses(model, model, pairs, method)
    totals = {name: value.item() * 3 for name, value in metrics.items()}
    totals.update(pairs=3, samples=4, tokens=0, scored=0, chosen_tokens=6, unfinished=0, sampled_tokens=8)
    record = record_of(1, totals, Method(variant="pr"), {})
    assert record["sampler_gap"] == pytest.approx(((0.3 ** 2 + 0.1 ** 2) / 4) ** 0.5, abs=1e-5)
