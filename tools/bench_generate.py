"""Time and memory of writing one more token after texts of growing length: both are flat, because the state is.

    python tools/bench_generate.py spikegpt_tiny --lengths 1000 4000 16000 64000
For every length the prompt is read (in one forward, or in pieces of --prefill), then --tokens tokens are written one by
one through `generate()`. Peak memory is that of the writing alone: on a GPU what torch allocated, on a CPU how far the
process's resident size rose above where it was, in steps of 4 KiB. CPU time is what counts where others compute too.
"""

import argparse
import json
import time

import torch
from _bench import Watched

import snlp_zoo
from snlp_zoo.models.cache import SpikingCache


def read(model, ids, piece):
    cache = SpikingCache()
    for part in ids.split(piece, 1):
        cache = model(part, past_key_values=cache, logits_to_keep=1).past_key_values
    return cache


@torch.no_grad()
def measure(model, length, tokens, piece):
    """The prompt is read up to its last token, which generate() reads: what is timed are single tokens alone."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
    options = {"do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    cache = read(model, ids[:, :-1], piece)
    prefill = time.perf_counter() - start
    model.generate(ids, past_key_values=cache, max_new_tokens=4, **options)  # warm
    with Watched(model.device) as memory:
        start, busy = time.perf_counter(), time.process_time()
        model.generate(ids, past_key_values=cache, max_new_tokens=tokens, **options)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {
        "length": length,
        "ms_per_token": 1e3 * seconds / tokens,
        "cpu_ms_per_token": 1e3 * busy / tokens,
        "rise_mb": memory.rise / 1e6,
        "state_bytes": cache.nbytes,
        "prefill_s": prefill,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000, 16000, 64000])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the prompt that are read at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = snlp_zoo.build(options.entry, task="causal-lm").to(options.device)
    print(f"{options.entry} on {options.device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for length in options.lengths:
        print(json.dumps(measure(model, length, options.tokens, options.prefill)), flush=True)


if __name__ == "__main__":
    main()
