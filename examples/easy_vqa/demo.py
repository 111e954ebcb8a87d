"""The main job on real input: real images, real questions, pruned and unpruned side by side.

    python examples/easy_vqa/demo.py [--limit 6] [--ratio 1/18] [--model FOLDER] [--output demo_output]

Asks the small trained model of this folder about test scenes: images that no training has seen.
"""

import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import compare, load_processor, save_picture, token_side
from learnpruner_commands.arguments import Parser, positive, ratio

from scenes import OBJECTS, scene_dataset

TRAINED = Path(__file__).parent / "learnpruner-tiny-llava"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TRAINED), help="default: the trained model of this folder")
    parser.add_argument("--ratio", type=ratio, help="default: the checkpoint's")
    parser.add_argument("--level", choices=OBJECTS, default="standard")
    parser.add_argument("--limit", type=positive, default=6, help="questions to ask")
    parser.add_argument("--seed", type=int, default=0, help="other scenes")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args(argv)

    try:
        questions = scene_dataset("test", arguments.limit, level=arguments.level, seed=arguments.seed, per_scene=1)
        torch.manual_seed(arguments.seed)  # a stock base gets a fresh pruner
        processor = load_processor(arguments.model)
        fields = {} if arguments.ratio is None else {"pruner_ratio": arguments.ratio}
        model = LearnPrunerForConditionalGeneration.from_pretrained(arguments.model, **fields).eval()
        arguments.output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    results = []
    for number, row in enumerate(tqdm(questions, desc="asking", unit="question")):
        result = compare(model, processor, row["image"], row["question"], max_new_tokens=8)
        picture = arguments.output / f"question-{number}.png"
        save_picture(result, token_side(processor), picture)
        tqdm.write(f"\n{result}\ntrue answer      {row['answer']!r}\npicture          {picture}")
        results.append(result)

    tokens, mean = " -> ".join(map(str, results[0].tokens)), results[0].mean_tokens
    right = sum(result.answer == answer for result, answer in zip(results, questions["answer"]))
    stock_right = sum(result.stock_answer == answer for result, answer in zip(results, questions["answer"]))
    faster = statistics.median(result.stock_seconds / result.seconds for result in results)
    smaller = statistics.median(result.stock_cache_bytes / result.cache_bytes for result in results)
    print(
        f"\n{tokens} vision tokens, {mean:.1f} on average over the decoder's layers: {right} of "
        f"{len(results)} answers right (unpruned: {stock_right}); unpruned time / pruned time {faster:.2f}, unpruned "
        f"cache / pruned cache {smaller:.2f} (this machine, this model, batch 1)."
    )
    if not model.config.pruner_trained:
        print("The pruner is NOT TRAINED yet: the first cut is training-free, by the vision encoder's features alone.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
