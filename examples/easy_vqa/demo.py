"""The main job on real input: real images, real questions, pruned and unpruned side by side.

    python examples/easy_vqa/demo.py [--limit 5] [--ratio 0.0556] [--model FOLDER] [--output demo_output]

Loads `tiny-llava/` beside this file if it is there, else builds an untrained model of LLaVA's anatomy (576 vision
tokens, 8 decoder layers), and says so. Images and questions come from the public easy-vqa package.
"""

import random
import statistics
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.trainers import WordLevelTrainer
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.budget_learnpruner import mean_tokens
from learnpruner.cli import Parser, positive, ratio
from learnpruner.compare import compare, load_image, save_picture

TRAINED = Path(__file__).parent / "tiny-llava"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def load_questions(limit: int, seed: int) -> list[tuple[str, str, Path]]:
    """Draws test questions: (question, answer, image file).

    Raises:
        `ImportError`: where the easy-vqa package or one of its images is missing.
    """
    try:
        from easy_vqa import get_test_image_paths, get_test_questions

        questions, answers, image_ids = get_test_questions()
        paths = get_test_image_paths()
        chosen = random.Random(seed).sample(range(len(questions)), min(limit, len(questions)))
        drawn = [(questions[i], answers[i], Path(paths[image_ids[i]])) for i in chosen]
        for _, _, path in drawn:
            load_image(path)
    except (ImportError, OSError, ValueError, LookupError) as error:
        raise ImportError(
            f"The easy-vqa package is missing or damaged ({error}): pip install --force-reinstall easy-vqa==1.0"
        ) from error
    return drawn


def build_untrained(folder: Path, seed: int) -> None:
    """Saves a random LLaVA with transformers' own classes, and a processor whose words are those of the questions."""
    from easy_vqa import get_test_questions

    torch.manual_seed(seed)
    backend = Tokenizer(WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = Sequence([WhitespaceSplit(), Split("?", "isolated")])
    backend.train_from_iterator(
        get_test_questions()[0], WordLevelTrainer(special_tokens=[*SPECIAL.values(), "<image>"])
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", additional_special_tokens=["<image>"], **SPECIAL
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 192, "width": 192}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "initializer_range": 0.08}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=192, patch_size=8, num_hidden_layers=4, **shape),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **shape,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: tiny-llava beside this file, else an untrained model")
    parser.add_argument("--ratio", type=ratio, default=32 / 576, help="default: 32 of 576 tokens")
    parser.add_argument("--limit", type=positive, default=5, help="questions to ask")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args(argv)

    try:
        questions = load_questions(arguments.limit, arguments.seed)
        folder = arguments.model or (TRAINED if TRAINED.is_dir() else None)
        untrained = folder is None
        arguments.output.mkdir(parents=True, exist_ok=True)
        if untrained:
            folder = arguments.output / "untrained-llava"
            build_untrained(folder, arguments.seed)
        torch.manual_seed(arguments.seed)  # a stock base gets a fresh pruner
        model = LearnPrunerForConditionalGeneration.from_pretrained(folder, pruner_ratio=arguments.ratio).eval()
        processor = AutoProcessor.from_pretrained(folder)
    except (ImportError, OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2

    results = []
    for number, (question, answer, path) in enumerate(tqdm(questions, desc="asking", unit="question")):
        result = compare(model, processor, load_image(path), question, max_new_tokens=4)
        picture = arguments.output / f"question-{number}.png"
        save_picture(result, model.config.vision_config.patch_size, picture)
        tqdm.write(f"\n{result}\ntrue answer      {answer!r}\npicture          {picture}")
        results.append(result)

    tokens, config = results[0].tokens, model.config
    layers = (0, config.pruner_layer)[: len(tokens) - 1]
    mean = mean_tokens(tokens[1:], layers, tokens[0], config.text_config.num_hidden_layers)
    faster = statistics.median(result.stock_seconds / result.seconds for result in results)
    smaller = statistics.median(result.stock_cache_bytes / result.cache_bytes for result in results)
    print(
        f"\n{len(results)} questions: {' -> '.join(map(str, tokens))} vision tokens, {mean:.1f} on average over the "
        f"decoder's layers; unpruned time / pruned time {faster:.2f}, unpruned cache / pruned cache {smaller:.2f} "
        f"(this machine, this model, batch 1)."
    )
    if untrained:
        print("The model is UNTRAINED: its answers mean nothing, only the tokens, the time and the bytes do.")
    if not config.pruner_trained:
        print("The pruner is UNTRAINED: the patches of the first cut are arbitrary.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
