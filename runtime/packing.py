"""Packing: score rows without their padding, and a prompt that rows share once.

`generate.response_logits` works on padded rows, and shows how. Of a model that `allow_packing` has switched
over, it gets the same numbers from one long row: all layers work on no padding; attention alone lays the rows
out again. Measured by experiments/bench.py.
"""
import torch
from torch.nn.utils.rnn import pad_sequence


def is_packed(model):
    """Whether `allow_packing` has switched the model over."""
    return model.config.get_text_config()._attn_implementation == "packed"


def packed_logits(model, input_ids, attention_mask, response_mask):
    """The logits (N, V) that predict the response's tokens of rows as `data.collate` makes them."""
    inputs, places = pack(input_ids, attention_mask, response_mask)
    wanted = places[:, :-1][response_mask[:, 1:].bool()]
    return model(**inputs, use_cache=False, logits_to_keep=wanted).logits[0]


def pack(input_ids, attention_mask, response_mask):
    """Rows (B, T) in one row of N tokens, with a prompt that rows share once: (inputs, places).

    inputs: input_ids and position_ids (1, N), and `packing`, from which attention lays the rows out again.
    places: (B, T), where in the one row a token stands (padding: anywhere)."""
    real = attention_mask.bool()                                                              # (B, T)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    prompt = real & (response_mask.cumsum(-1) == 0)
    first = first_with_prompt(input_ids, prompt)
    repeated = prompt & (first != torch.arange(len(first), device=real.device))[:, None]
    own = real & ~repeated                                             # the tokens that a row brings itself
    place_of_own = own.flatten().cumsum(0).view_as(positions) - 1
    starts = own.sum(1).cumsum(0) - own.sum(1)                         # where each row's own tokens begin
    places = torch.where(own, place_of_own, starts[first, None] + positions)
    inputs = dict(input_ids=input_ids[own][None], position_ids=positions[own][None],
                  attention_mask=real.new_ones(1, 1, 1, 1),            # 4-D: transformers then makes none
                  packing=grids_of(places, real, int(own.sum())))
    return inputs, places


def first_with_prompt(input_ids, prompt):
    """For each row, the first row with the same prompt: (B,)."""
    rows, first = {}, []
    for row, (ids, in_prompt) in enumerate(zip(input_ids, prompt)):
        key = tuple(ids[in_prompt].tolist())
        rows.setdefault(key, row)
        first.append(rows[key])
    return torch.tensor(first, device=input_ids.device)


def grids_of(places, real, n):
    """How attention lays out one row of n tokens again as rows, like lengths together in grids: (the token of
    each place in the grids, the grids' shapes, for each token a place in the grids)."""
    rows = [place[is_token] for place, is_token in zip(places, real)]
    rows.sort(key=len, reverse=True)
    grids = []
    for row in rows:
        if not grids or len(row) < 0.8 * len(grids[-1][0]):
            grids.append([])
        grids[-1].append(row)
    padded = [pad_sequence(grid, batch_first=True, padding_value=n) for grid in grids]     # n: no token
    tokens = torch.cat([grid.flatten() for grid in padded])
    back = tokens.new_full((n + 1,), len(tokens))
    back = back.scatter_reduce(0, tokens, torch.arange(len(tokens), device=tokens.device), "amin")[:n]
    return tokens.clamp(max=n - 1), [grid.shape for grid in padded], back


def packed_attention(module, query, key, value, attention_mask, packing=None, **options):
    """transformers' SDPA attention; of a packed row, within each of the rows that it holds. query, key,
    value: (1, heads, N, D) -> (1, N, heads, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    tokens, shapes, back = packing
    options["is_causal"] = True                          # no row looks at its padding, on the right
    outputs, start = [], 0
    for rows, length in shapes:
        grid = tokens[start:start + rows * length].view(rows, length)
        start += rows * length
        laid_out = [each[0][:, grid].transpose(0, 1) for each in (query, key, value)]  # (rows, heads, …, D)
        output, _ = sdpa_attention_forward(module, *laid_out, None, **options)         # (rows, …, heads, D)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)[None], None


def can_be_packed(config):
    """Whether a model's attention is SDPA over the whole of a row, in each layer."""
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = {*(getattr(config, "layer_types", None) or ["full_attention"])}
    return config._attn_implementation == "sdpa" and not windowed and kinds == {"full_attention"}


@torch.no_grad()
def allow_packing(model):
    """Switch the model over if it then gives its own logits on a packed row; returns it. This is tried on two
    short rows, as recurrent layers, for one, mix what a row holds."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    if not can_be_packed(model.config.get_text_config()):
        return model
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)
    input_ids = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 1, 0]], device=model.device)
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], device=model.device)
    response_mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]], device=model.device)
    plain = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    inputs, places = pack(input_ids, attention_mask, response_mask)
    model.set_attn_implementation("packed")
    try:
        packed = model(**inputs, use_cache=False).logits[0, places]
        same = (packed - plain)[attention_mask.bool()].abs().max() <= 1e-4 * plain.abs().max()
    except (TypeError, RuntimeError):                    # it takes no `packing`, or needs rows of one shape
        same = False
    if not same:
        model.set_attn_implementation("sdpa")
    return model
