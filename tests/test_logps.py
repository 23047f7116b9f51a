"""sequence_logps against a slow float64 computation, and what must not change it."""
import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import END, FAMILIES, IDS, byte_tokenizer, tiny_model

from data import Pair, collate
from generate import prepare, sequence_logps, sequence_logps_and_revkl
from runtime import training
from runtime.command_line import InputError
from runtime.packing import allow_packing, can_be_packed
from runtime.training import micro_batches
from sail import response_tokens

PARTIAL = ("gemma2", "gemma3", "mistral", "llama4")                  # attention is to a window, or to a chunk
PACKED = [family for family in FAMILIES if family not in PARTIAL]
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17]]
RESPONSES = [[20, 21, 1], [30, 31, 32, 33, 34, 1], [0, 41]]  # the last holds the padding id 0 as a real token


def slow_logps(model, prompts, responses):
    """One row at a time, one token at a time, in float64, through the plain forward."""
    model = copy.deepcopy(model).double()
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        total = 0.0
        for place, token in enumerate(response):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response[:place]])).logits[0, -1]
            total += (logits[token] - logits.exp().sum().log()).item()
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float32)


def padded(prompts, responses, left, extra=0):
    """input_ids, attention_mask, response_mask with `extra` columns of noise as padding on one side."""
    width = extra + max(len(prompt + response) for prompt, response in zip(prompts, responses, strict=True))
    columns = [], [], []
    for prompt, response in zip(prompts, responses, strict=True):
        gap = width - len(prompt + response)
        rows = prompt + response, [1] * len(prompt + response), [0] * len(prompt) + [1] * len(response)
        for column, row, filler in zip(columns, rows, (7, 0, 0), strict=True):
            column.append([filler] * gap + row if left else row + [filler] * gap)
    return [torch.tensor(column) for column in columns]


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_it_equals_a_float64_computation_token_by_token(family, left, packed):
    model = (allow_packing if packed else copy.copy)(tiny_model(family))
    exact = slow_logps(model, PROMPTS, RESPONSES)
    with torch.no_grad():
        ours = sequence_logps(model, *padded(PROMPTS, RESPONSES, left))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batch_mates_change_nothing(family, packed):
    model = (allow_packing if packed else copy.copy)(tiny_model(family))
    with torch.no_grad():
        alone = torch.cat([sequence_logps(model, *padded([prompt], [response], False))
                           for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
        for left in (False, True):
            for extra in (0, 1, 60):
                together = sequence_logps(model, *padded(PROMPTS, RESPONSES, left, extra))
                torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_extreme_padding_gives_finite_values_and_gradients():
    model = tiny_model()
    logps = sequence_logps(model, *padded([[5]], [[1]], True, 200))
    logps.sum().backward()
    assert logps.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters()
                                          if p.grad is not None)


def test_a_row_without_response_has_log_probability_zero():
    model = tiny_model()
    ids, attention, response = padded(PROMPTS, RESPONSES, False)
    response[1] = 0
    logps = sequence_logps(model, ids, attention, response)
    assert logps[1] == 0 and (logps[[0, 2]] < 0).all()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_only_positions_that_predict_a_response_are_projected(packed):
    """Packed, the responses' own; padded, the columns that any row needs."""
    model, seen = (allow_packing if packed else copy.copy)(tiny_model()), []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(tuple(logits.shape)))
    prompts, responses = [[5, 6, 7], [9, 10, 11, 12, 13]], [[20, 21, 1], [30, 1]]
    sequence_logps(model, *collate(prompts, responses))
    assert seen == [(1, 5, IDS) if packed else (2, 4, IDS)]           # columns 2 to 5


def test_micro_batches_keep_the_pairs_in_order_within_the_budget_of_logits(monkeypatch):
    monkeypatch.setattr(training, "logits_at_once", lambda: 20 * IDS)
    lengths = [4, 6, 3, 7, 5, 30, 1, 1]                                # of chosen and rejected together
    pairs = [Pair("", "", "", [], [1], [1] * (length - 1)) for length in lengths]
    micros = micro_batches(pairs, response_tokens, tiny_model())
    assert [[len(pair.rejected_ids) + 1 for pair in micro] for micro in micros] == [
        [4, 6, 3, 7], [5], [30], [1, 1]]
    assert [pair for micro in micros for pair in micro] == pairs


def test_a_micro_batch_has_at_most_the_given_number_of_pairs():
    pairs = [Pair("", "", "", [], [1], [2])] * 7
    assert [len(micro) for micro in micro_batches(pairs, response_tokens, tiny_model(), 3)] == [3, 3, 1]


def test_the_logits_of_a_model_that_also_sees_are_those_of_its_text(monkeypatch):
    monkeypatch.setattr(training, "logits_at_once", lambda: 20)
    text = SimpleNamespace(vocab_size=5)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert micro_batches([2] * 5, int, model) == [[2, 2], [2, 2], [2]]


# Three share a prompt, and the last prompt is another one of the same length.
SHARED = [[5, 6, 7], [9], [5, 6, 7], [11, 12, 13, 14, 15, 16, 17] * 9, [5, 6, 7], [5, 8, 7]]
ANSWERS = [[20, 21, 1], [30, 1], [22] * 40 + [1], [31, 32, 33], [20, 21, 1], [20, 21, 1]]


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones(family, left):
    padded_model = tiny_model(family)
    packed_model, sizes = allow_packing(copy.deepcopy(padded_model)), []
    assert packed_model.config._attn_implementation == "packed" != padded_model.config._attn_implementation
    packed_model.register_forward_pre_hook(lambda _, __, inputs: sizes.append(inputs["input_ids"].shape),
                                           with_kwargs=True)
    weights, gradients = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25, 2.0]), []
    logps = [sequence_logps(model, *padded(SHARED, ANSWERS, left)) for model in (padded_model, packed_model)]
    for model, sums in zip((padded_model, packed_model), logps, strict=True):
        gradients.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(
            (weights * sums).sum(), list(model.parameters()))]))
    assert sizes == [(1, sum(map(len, ANSWERS)) + 3 + 1 + 63 + 3)]     # no padding, and each prompt once
    torch.testing.assert_close(logps[1], logps[0], rtol=1e-5, atol=1e-5)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_a_mask_with_gaps_is_packed_too():
    """Several turns: what stands between two responses is neither scored nor taken for a shared prompt."""
    ids, attention, response = padded([[5, 6], [5, 6], [5, 6]], [[7, 8, 9, 10], [12, 8, 9, 10], [1]], False)
    response[:2, 3] = 0
    plain, packed = tiny_model(), allow_packing(tiny_model())
    torch.testing.assert_close(sequence_logps(packed, ids, attention, response),
                               sequence_logps(plain, ids, attention, response), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("why, family, config", [
    ("a sliding window", "qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)),
    ("not SDPA", "llama", dict(attn_implementation="eager")), ("windows in each layer", "mistral", {}),
    ("windows in some layers", "gemma3", {}), ("chunks in some layers", "llama4", {})])
def test_models_that_cannot_be_packed_are_padded(why, family, config):
    model = tiny_model(family, **config)
    before = model.config._attn_implementation
    assert allow_packing(model).config._attn_implementation == before != "packed"


def test_a_model_that_mixes_the_tokens_of_a_row_otherwise_is_padded():
    """Found by trying: here a convolution over the row, as in recurrent and hybrid models."""
    model = tiny_model(vocab_size=300)
    model.model.layers[0].register_forward_pre_hook(
        lambda _, inputs: (inputs[0] + inputs[0].roll(1, dims=1), *inputs[1:]))
    assert allow_packing(model).config._attn_implementation == "sdpa"


def test_the_gradient_is_that_of_the_plain_forward():
    model = tiny_model()
    ids, attention, response = collate(PROMPTS, RESPONSES)
    logps = model(input_ids=ids, attention_mask=attention).logits.log_softmax(-1)[:, :-1]
    plain = (logps.gather(-1, ids[:, 1:, None]).squeeze(-1) * response[:, 1:]).sum()
    expected = torch.autograd.grad(plain, list(model.parameters()))
    ours = torch.autograd.grad(sequence_logps(model, ids, attention, response).sum(),
                               list(model.parameters()))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_half_precision_models_are_summed_in_float32():
    model = tiny_model().bfloat16()
    batch = collate(PROMPTS, RESPONSES)
    with torch.no_grad():
        ours = sequence_logps(model, *batch)
        # the same bf16 logits
        logits = model(input_ids=batch[0], attention_mask=batch[1]).logits[:, :-1].double()
    exact = (logits.log_softmax(-1).gather(-1, batch[0][:, 1:, None]).squeeze(-1) * batch[2][:, 1:]).sum(-1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family, dropouts", [
    ("gpt2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)), ("llama", dict(attention_dropout=0.5))])
def test_two_forwards_in_train_mode_are_identical(family, dropouts):
    model = prepare(tiny_model(family, **dropouts), byte_tokenizer()).train()
    batch = collate(PROMPTS, RESPONSES)
    assert torch.equal(sequence_logps(model, *batch), sequence_logps(model, *batch))


def test_ids_beyond_the_tokenizers_have_no_probability():
    model, plain = prepare(tiny_model(vocab_size=300), byte_tokenizer(gap=True)), tiny_model(vocab_size=300)
    with torch.no_grad():
        masked, logits = (each(torch.tensor([[5, 6]])).logits for each in (model, plain))
        ours = sequence_logps(model, *collate([[5]] * 2, [[6], [END]]))
    assert masked.softmax(-1)[..., IDS:].sum() == 0
    assert ours.tolist() == pytest.approx(logits[0, 0, :IDS].log_softmax(-1)[[6, END]].tolist(), abs=1e-5)


def test_a_model_that_makes_all_logits_is_refused():
    class Whole(type(tiny_model())):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids, attention_mask)

    model = tiny_model()
    model.__class__ = Whole
    with pytest.raises(InputError, match="Whole lacks logits_to_keep, position_ids, or the usual"):
        prepare(model, byte_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_the_sums_are_those_of_float32_but_for_rounding(family):
    model, batch = tiny_model(family), collate(PROMPTS, RESPONSES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sequence_logps(model, *batch)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, sequence_logps(model, *batch), rtol=0.05, atol=0.5)


def test_diverged_weights_give_nan_and_no_error():
    model = tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    assert sequence_logps(model, *collate(PROMPTS, RESPONSES)).isnan().all()    # the loop skips and counts it


def exact_revkl(policy, reference, prompts, responses):
    """Σ_tokens KL(π_ref ‖ π) over the vocabulary, from whole forwards of one row each; (B,), with grad."""
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        rows = torch.tensor([prompt + response])
        ours, theirs = (model(rows).logits[0, len(prompt) - 1:-1].log_softmax(-1)
                        for model in (policy, reference))
        sums.append(torch.nn.functional.kl_div(ours, theirs.detach(), reduction="sum", log_target=True))
    return torch.stack(sums)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_revkl_and_both_log_probs_come_from_one_forward_of_each_model(family, monkeypatch):
    softmax = torch.nn.functional.softmax               # gemma2's attention would have float32
    monkeypatch.setattr("torch.nn.functional.softmax", lambda x, dim=-1, dtype=None: softmax(x, dim))
    policy, reference = (tiny_model(family, seed=seed).double() for seed in (1, 2))
    calls = []
    for model in (policy, reference):
        model.register_forward_hook(lambda module, *_: calls.append(module))
    batch = collate(PROMPTS, RESPONSES)
    ours, theirs, revkl = sequence_logps_and_revkl(policy, reference, *batch)
    assert calls == [policy, reference]
    torch.testing.assert_close(ours, sequence_logps(policy, *batch))
    torch.testing.assert_close(theirs, sequence_logps(reference, *batch))
    expected = exact_revkl(policy, reference, PROMPTS, RESPONSES)
    torch.testing.assert_close(revkl, expected, rtol=1e-9, atol=1e-9)
    assert (revkl > 0).all()
    held = torch.autograd.grad((ours + theirs + revkl).sum(), list(reference.parameters()), allow_unused=True,
                               retain_graph=True)
    assert held == (None,) * len(held)
    weights, parameters = torch.tensor([1.0, -2.0, 0.5]), list(policy.parameters())
    gradients = torch.autograd.grad((weights * revkl).sum(), parameters)
    for one, other in zip(gradients, torch.autograd.grad((weights * expected).sum(), parameters),
                          strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_revkl_is_zero_at_the_reference():
    model = tiny_model().double()
    _, _, revkl = sequence_logps_and_revkl(model, copy.deepcopy(model), *collate(PROMPTS, RESPONSES))
    assert revkl.abs().max() < 1e-12


@pytest.mark.parametrize("config, packed", [
    (dict(), True), (dict(sliding_window=None), True), (dict(sliding_window=16), False),
    (dict(sliding_window=16, use_sliding_window=True), False),
    (dict(sliding_window=16, use_sliding_window=False), True),
    (dict(layer_types=["full_attention", "sliding_attention"]), False),
    (dict(layer_types=["full_attention"] * 2), True)])
def test_a_window_forbids_packing_unless_the_model_says_that_it_uses_none(config, packed):
    assert can_be_packed(SimpleNamespace(_attn_implementation="sdpa", **config)) == packed
