"""How far the distribution that is sampled from is from the one that is scored, in float32 and in bfloat16.

    python experiments/sampler_gap.py --model DIR --data FILE

Samples two responses to each of the first prompts, scores them, and prints the root mean square of the
difference in log π(y|x), in nats per response: `sampler_gap` of metrics.jsonl. The third row lets the output
layer compute in bfloat16, as autocast would. The differences go to experiments/sampler_gap.jsonl.
"""
import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import generate
from data import SIDES, encode, end_token_ids
from formats import load_pairs
from generate import load_frozen, pair_logps, roll_out
from runtime.run_directory import write_rows
from runtime.settings import Settings

ROWS = ROOT / "experiments/sampler_gap.jsonl"


def gaps_of(model, tokenizer, prompts, settings):
    """log π as scored minus log π as sampled, (2, B)."""
    torch.manual_seed(0)
    pairs = roll_out(model, tokenizer, prompts, SIDES, settings)
    sampled = torch.tensor([pair.sampling_logps for pair in pairs]).T
    scored = []
    with torch.no_grad():
        for first in range(0, len(pairs), 8):
            scored.append(pair_logps(model, pairs[first:first + 8], settings.dtype).cpu())
    return torch.cat(scored, 1) - sampled


def table(rows):
    """Markdown: a line for each row, with the root mean square and the largest of its gaps."""
    lines = ["| computes in | output layer in | root mean square | largest |", "|---|---|---|---|"]
    for row in rows:
        root_mean_square = math.sqrt(sum(gap**2 for gap in row["gaps"]) / len(row["gaps"]))
        largest = max(map(abs, row["gaps"]))
        lines.append(f"| {row['dtype']} | {row['output_layer']} | {root_mean_square:.2g} | {largest:.2g} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32, help="of a response at most (32)")
    args = parser.parse_args()
    pairs, _ = load_pairs(args.data, args.prompts)
    in_float32, rows = generate.compute_in_float32, []
    for dtype, head in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        generate.compute_in_float32 = in_float32 if head == "float32" else lambda layer: None
        model, tokenizer = load_frozen(args.model, dtype)
        settings = Settings(max_response_length=args.tokens, dtype=dtype)
        examples, _, _ = encode(pairs, tokenizer, end_token_ids(tokenizer, model), 128, args.tokens)
        gaps = gaps_of(model, tokenizer, examples, settings)
        rows.append({"dtype": dtype, "output_layer": head, "gaps": gaps.flatten().tolist()})
    write_rows(ROWS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
