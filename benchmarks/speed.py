"""Speed of pruning against the stock class: same process, same weights, same attention backend, in turn.

    python benchmarks/speed.py --preset cpu-small --batch 4 --ratio 0.0556 --new-tokens 8 --output FILE.json
    python benchmarks/speed.py --preset llava-1.5-7b --batch 1,4,16,32 --new-tokens 1,32 --output FOLDER

Lists make a sweep, one JSON file for each point, in a folder; a sweep that was killed goes on, and a point that fails
leaves the others. A file of another measurement, or of other code, is refused. Weights are random, on the shapes of the
published models: speed does not depend on values. Every time is wall clock, in seconds, of a device that has finished;
every figure is the median of the rounds, with an interval of order statistics (speed_measure.summarise). A ratio of
times is taken in each round, before the median.

    prefill             forward of the prompt, pixels included, to the logits of its last row
    decoder_prefill     the same without vision tower and projector: the prefill less their time in the same round
    time_to_first_token, decode_token, end_to_end       of `generate`, greedy
    prefill_speedup, end_to_end_speedup                 stock / pruned
    decode_speedup                                      stock / pruned, of decode_token, where there is one
    overhead_at_ratio_one                               `generate` at pruner_ratio=1.0 / of the stock class; the same of
                                                        its first token (prefill_...) and of later ones (decode_...)
    prefill_ceiling     Amdahl's: stock prefill / an ideal one in the same round, the stock model's own parts under one
                        clock: vision tower, projector and embedding of all tokens, the stock decoder layers, each on as
                        many rows as pruning leaves it, norm and head. Scoring, selecting, dropping, masks and positions
                        cost nothing there.
    end_to_end_ceiling  stock `generate` / the same, less what the stock layers save on fewer rows and keys: stock
                        prefill less the ideal one, and for each later token what one token saves in all layers
    parts               those of the ideal prefill, each under a clock of its own: for information, and for one token
    scoring, selection  of both cuts, in place, in a run of its own with a clock around them
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from learnpruner_commands.arguments import Parser, positive, ratio

from speed_presets import PRESETS
from speed_sweep import DTYPES, measure_all

BACKENDS = ("sdpa", "eager", "flash_attention_2", "flex_attention")
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def several(kind: Callable) -> Callable[[str], list]:
    """Comma-separated values of an argument."""

    def read(text: str) -> list:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))

    return read


def backend(text: str) -> str:
    if text not in BACKENDS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(BACKENDS)}")
    return text


def device(text: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: give cpu, cuda or cuda:N")
    return torch.device(text)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--batch", type=several(positive), default=[1], help="samples, of one image each")
    parser.add_argument("--text", type=several(positive), default=[64], help="text tokens of the prompt")
    parser.add_argument("--new-tokens", type=several(positive), default=[8], help="tokens of the answer")
    parser.add_argument("--ratio", type=several(ratio), default=[1 / 9], help="mean share of tokens kept")
    parser.add_argument("--backend", type=several(backend), default=["sdpa"], help=", ".join(BACKENDS))
    parser.add_argument("--device", type=device, default=DEFAULT_DEVICE, help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="by default bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--rounds", type=positive, default=9, help="that count; 6 make an interval of 95 %%")
    parser.add_argument("--warmup", type=positive, default=1, help="rounds before")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--output", type=Path, required=True, help="a .json file, or a folder for a sweep")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        failed = measure_all(arguments)
    except KeyboardInterrupt:
        print("speed: stopped. Finished points are kept, and the same command goes on.", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"speed: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for line in failed:
        print(f"speed: not measured: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
