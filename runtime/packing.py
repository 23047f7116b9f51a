"""Packing: rows are scored without their padding, and a prompt that several rows share is computed once.

`generate.response_logits` shows the computation on padded rows. For a model that `allow_packing` has switched
over, it gets the same numbers from one long row. Then no layer works on padding but attention, which
puts the tokens back into separate rows. experiments/bench.py measures the gain.
"""
import torch
from torch.nn.utils.rnn import pad_sequence

from runtime.processes import sent


def is_packed(model):
    """Whether `allow_packing` has switched the model over to packed rows."""
    return model.config.get_text_config()._attn_implementation == "packed"


def packed_logits(model, input_ids, attention_mask, response_mask):
    """The logits (N, V) that predict the response's tokens of rows, which `data.collate` has made."""
    device = next(model.parameters()).device
    inputs, places = pack(input_ids, attention_mask, response_mask, device)
    scored = response_mask[:, 1:].bool()
    wanted = places[:, :-1][scored]
    output = model(**inputs, use_cache=False, logits_to_keep=sent(wanted, device))
    return output.logits[0]


def pack(input_ids, attention_mask, response_mask, device):
    """Pack rows (B, T) into one row of N tokens, in which a prompt that several rows share occurs once:
    (inputs, places).

    If the rows are on the CPU, the CPU never has to wait for a GPU. inputs, on `device`: input_ids and
    position_ids, (1, N), and `packing`, from which attention restores the separate rows. places: (B, T), the
    place of each token in the packed row; the places of padding have no meaning."""
    real = attention_mask.bool()                                       # (B, T)
    positions = attention_mask.cumsum(-1) - 1
    positions = positions.clamp(min=0)
    before_response = response_mask.cumsum(-1) == 0
    prompt = real & before_response
    first = first_with_prompt(input_ids, prompt)
    rows = torch.arange(len(first), device=real.device)
    is_repeated = (first != rows)[:, None]                             # (B, 1)
    own = real & ~(prompt & is_repeated)                               # the tokens that a row adds itself
    place_of_own = own.flatten().cumsum(0) - 1
    place_of_own = place_of_own.view_as(positions)
    lengths = own.sum(1)
    starts = lengths.cumsum(0) - lengths                               # where each row's own tokens begin
    place_of_repeated = starts[first, None] + positions
    places = torch.where(own, place_of_own, place_of_repeated)
    tokens, shapes, back = grids_of(places, real, int(lengths.sum()))
    inputs = dict(
        input_ids=sent(input_ids[own][None], device),
        position_ids=sent(positions[own][None], device),
        attention_mask=sent(real.new_ones(1, 1, 1, 1), device),        # 4-D: transformers then makes no mask
        packing=(sent(tokens, device), shapes, sent(back, device)))
    return inputs, places


def first_with_prompt(input_ids, prompt):
    """For each row, the first row with the same prompt: (B,)."""
    rows, first = {}, []
    for row, (ids, in_prompt) in enumerate(zip(input_ids, prompt, strict=True)):
        key = tuple(ids[in_prompt].tolist())
        rows.setdefault(key, row)
        first.append(rows[key])
    return torch.tensor(first, device=input_ids.device)


def grids_of(places, real, n):
    """How attention restores separate rows from a packed row of n tokens. Rows of similar lengths form a
    grid, which is padded on the right: (the token at each place of the grids, the grids' shapes, a place in
    the grids for each token)."""
    rows = []
    for place, is_token in zip(places, real, strict=True):
        rows.append(place[is_token])
    rows.sort(key=len, reverse=True)
    grids = []
    for row in rows:
        if not grids or len(row) < 0.8 * len(grids[-1][0]):
            grids.append([])
        grids[-1].append(row)
    tokens, shapes = [], []
    for grid in grids:
        padded = pad_sequence(grid, batch_first=True, padding_value=n)             # n stands for no token
        tokens.append(padded.flatten())
        shapes.append(padded.shape)
    tokens = torch.cat(tokens)
    places_in_grids = torch.arange(len(tokens), device=tokens.device)
    back = tokens.new_full((n + 1,), len(tokens))
    back = back.scatter_reduce(0, tokens, places_in_grids, "amin")
    return tokens.clamp(max=n - 1), shapes, back[:n]


def packed_attention(module, query, key, value, attention_mask, packing=None, **options):
    """SDPA attention as in transformers. For a packed row, it works within each of the rows that were packed.
    query, key, value: (1, heads, N, D) -> (1, N, heads, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    tokens, shapes, back = packing
    options["is_causal"] = True                          # the padding is on the right, so no token sees it
    outputs, start = [], 0
    for rows, length in shapes:
        end = start + rows * length
        grid = tokens[start:end].view(rows, length)
        start = end
        laid_out = []
        for each in (query, key, value):
            laid_out.append(each[0][:, grid].transpose(0, 1))          # (rows, heads, length, D)
        output, _ = sdpa_attention_forward(module, *laid_out, None, **options)
        outputs.append(output.flatten(0, 1))                           # (rows · length, heads, D)
    outputs = torch.cat(outputs)
    return outputs.index_select(0, back)[None], None


def can_be_packed(config):
    """Whether a model's config says that each layer has SDPA attention over the whole row, not over a sliding
    window. `allow_packing` then tries out whether packed rows give the same logits."""
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        return False
    for kind in getattr(config, "layer_types", None) or []:
        if kind != "full_attention":
            return False
    return config._attn_implementation == "sdpa"


def register_packing():
    """Register `packed_attention` with transformers, under the name "packed"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)


@torch.no_grad()
def allow_packing(model):
    """Switch a model over to packed rows if it gives the same logits for them; returns the model. This is
    tried on two short rows, because recurrent layers, for example, mix the rows that are packed together."""
    if not can_be_packed(model.config.get_text_config()):
        return model
    register_packing()
    rows = torch.tensor([
        [[0, 1, 1, 1, 0], [0, 1, 0, 1, 0]],                # input_ids
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],                # attention_mask
        [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]])               # response_mask
    input_ids, attention_mask, response_mask = rows.to(model.device)
    plain = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    inputs, places = pack(input_ids, attention_mask, response_mask, model.device)
    model.set_attn_implementation("packed")
    try:
        packed = model(**inputs, use_cache=False).logits[0, places]
        difference = (packed - plain)[attention_mask.bool()]
        same = difference.abs().max() <= 1e-4 * plain.abs().max()
    except (TypeError, RuntimeError):               # the model takes no `packing`, or needs rows of one shape
        same = False
    if not same:
        model.set_attn_implementation("sdpa")
    return model
