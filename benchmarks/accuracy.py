"""Accuracy of a pruning method on scenes of easy-vqa images whose boxes are known (examples/easy_vqa/scenes.py).

    python benchmarks/accuracy.py --model examples/easy_vqa/tiny-llava --method random --ratio 1/18 --output FILE.json

With `--photo FOLDER` on the scenes of examples/photo_vqa whose features lie there.

Writes exact-match accuracy, overall and for each kind of question, the answer to each question, the tokens kept at each
cut and all that is needed to run it again. The questions are the same for every method, ratio and seed; `--seed` draws
what a method leaves to chance. `--unpruned FILE.json`, a run of `--method none` on the same questions, adds RelAcc: the
mean over the kinds of question of accuracy / unpruned accuracy (a mean of ratios, as the paper takes it over
benchmarks). benchmarks/paired.py compares two runs question by question.
benchmarks/render_accuracy.py makes the table and the plot.
"""

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

import learnpruner
from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.accounting import mean_tokens
from learnpruner.compare import build_prompt
from learnpruner.compat_learnpruner import CACHE
from learnpruner.hub_cards.records import (
    LEARNED,
    check_comparable,
    code_digest,
    read_result,
    relative_accuracy,
    weights_digest,
)
from learnpruner.keys_learnpruner import PrunedCache
from learnpruner.methods import METHODS, Method, OracleBoxes, Random
from learnpruner.methods.baselines import box_patches
from learnpruner.training.metrics import ExactMatch
from learnpruner_commands.arguments import Parser, positive, ratio

from benches import easy_vqa, photo_vqa  # which finds the scenes
from scenes import OBJECTS

PRUNER_FIELDS = ("pruner_layer", "pruner_stage_ratio", "pruner_diversity", "pruner_query")
# What --set takes. The last tells a new pruner that it is trained: its random weights choose, as a control.
SETTABLE = (*PRUNER_FIELDS, "pruner_trained")


def patch_middles(tokens: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of each patch's middle, row by row, in pixels: each `(tokens,)`.

    Args:
        tokens (`int`): Patches of the image.
        size (`tuple[int, int]`): Width and height of the image, in pixels.

    Raises:
        `ValueError`: where no grid of so many squares has the image's shape: the model saw another.
    """
    width, height = size
    columns = math.isqrt(tokens * width // height)
    side = width / columns
    if columns * round(height / side) != tokens:
        raise ValueError(f"{tokens} tokens do not lie on {width} x {height} pixels: this model takes other images.")
    return side * (torch.arange(tokens) % columns + 0.5), side * (torch.arange(tokens) // columns + 0.5)


@contextmanager
def each_image_encoded_once(tower: nn.Module) -> Iterator[None]:
    """The questions of a scene stand side by side in a batch: their image goes through the tower once for all. Every
    tensor that the tower takes or returns has the images, which are of one size, in turn."""
    places: list[torch.Tensor] = []

    def reduce(module, arguments, keywords):
        given = {**dict(enumerate(arguments)), **keywords}
        given = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        # Patches and crops are more than images, what lays images out has a row for each.
        count = min(map(len, given.values()))
        images = {name: value.unflatten(0, (count, -1)) for name, value in given.items()}
        pixels = max(images.values(), key=torch.numel).flatten(1)
        _, place, repeats = pixels.unique_consecutive(dim=0, return_inverse=True, return_counts=True)
        places.append(place)
        first = {name: image[repeats.cumsum(0) - repeats].flatten(0, 1) for name, image in images.items()}
        arguments = tuple(first.get(number, value) for number, value in enumerate(arguments))
        return arguments, {name: first.get(name, value) for name, value in keywords.items()}

    def repeat(module, arguments, keywords, outputs):
        place = places.pop()
        count = int(place[-1]) + 1

        def for_all(value):
            if isinstance(value, tuple):
                return tuple(map(for_all, value))
            return None if value is None else value.unflatten(0, (count, -1))[place].flatten(0, 1)

        return type(outputs)(**{name: for_all(value) for name, value in outputs.items()})

    with (
        tower.register_forward_pre_hook(reduce, with_kwargs=True),
        tower.register_forward_hook(repeat, with_kwargs=True, prepend=True),
    ):
        yield


def for_batch(method: Method, seed: int, rows: list[dict], numbers: list[int]) -> Method:
    """The method, told what it must know of the images of a batch: chance of the seed and the number of the question
    alone, so that batches make no difference; boxes."""
    if isinstance(method, Random):
        return replace(method, seed=[f"{seed} {number}" for number in numbers])
    if isinstance(method, OracleBoxes):
        return replace(method, boxes=[row["boxes"] for row in rows], picture=rows[0]["image"].size)
    return method


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    data: Dataset,
    method: Method | None,
    seed: int,
    batch_size: int,
) -> tuple[list[str], dict]:
    """Asks every question of the data greedily, unpruned without a method. Returns the answers, and what was kept:
    tokens (the same for each image), and after each cut the mean share of the boxes' patches and the share of objects
    with one or more left."""
    config, answers, kept, recalls = model.config, [], None, []
    for start in tqdm(range(0, len(data), batch_size), desc=f"{method or 'unpruned'}", unit="batch"):
        numbers = list(range(start, min(start + batch_size, len(data))))
        rows = [data[number] for number in numbers]
        inputs = processor(
            images=[row["image"] for row in rows],
            text=[build_prompt(processor, row["question"]) for row in rows],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        with each_image_encoded_once(model.get_encoder("image")):
            schedule = () if method is None else for_batch(method, seed, rows, numbers)
            output = model.generate(
                **inputs, schedule=schedule, do_sample=False, max_new_tokens=8, return_dict_in_generate=True
            )
        replies = output.sequences[:, inputs["input_ids"].shape[1] :]
        answers += [reply.strip() for reply in processor.batch_decode(replies, skip_special_tokens=True)]
        vision = inputs["input_ids"] == config.image_token_id
        # Where nothing was cut the cache is the stock model's, which keeps no record.
        cache = output[CACHE]
        masks = cache.kept_mask if isinstance(cache, PrunedCache) else ()
        counts = set(zip(*((mask & vision).sum(1).tolist() for mask in (vision, *masks))))
        if len(counts | ({kept} if kept else set())) != 1:
            raise RuntimeError(f"Images of one size kept different numbers of tokens: {counts}, {kept}")
        (kept,) = counts
        for number, row in enumerate(rows):
            boxes = box_patches(*patch_middles(kept[0], row["image"].size), row["boxes"])
            foreground = boxes.any(0)
            left = [mask[number][vision[number]].cpu() for mask in masks]
            recalls.append(
                [((mask & foreground).sum() / foreground.sum(), (mask & boxes).any(1).float().mean()) for mask in left]
            )
    layers = tuple(cut.layer for cut in method.cuts(model.model)) if method and masks else ()
    mean = mean_tokens(kept[1:], layers, kept[0], config.text_config.num_hidden_layers)
    recall, objects = (
        torch.tensor(recalls, dtype=torch.float64).mean(0).reshape(-1, 2).T.tolist() if layers else ([], [])
    )
    return answers, {
        "image": kept[0],
        "after_cuts": list(kept[1:]),
        "cut_layers": list(layers),
        "mean": mean,
        "foreground_recall": recall,
        "objects_seen": objects,
    }


def commit_of(model: str) -> str | None:
    """The commit that a Hub id stands for; `None` for a folder, which `base_sha256` identifies."""
    return None if Path(model).is_dir() else extract_commit_hash(cached_file(model, CONFIG_NAME), None)


def scored(data: Dataset, answers: list[str]) -> dict:
    """Exact match, overall and for each kind of question."""

    def accuracy(pairs: list[tuple[str, str]]) -> dict:
        given, true = zip(*pairs)
        return {"accuracy": ExactMatch().compute(predictions=given, references=true)["exact_match"], "n": len(pairs)}

    by_kind = defaultdict(list)
    for kind, true, answer in zip(data["kind"], data["answer"], answers):
        by_kind[kind].append((answer, true))
    everything = [pair for pairs in by_kind.values() for pair in pairs]
    return {**accuracy(everything), "by_kind": {kind: accuracy(by_kind[kind]) for kind in sorted(by_kind)}}


def each_answer(data: Dataset, answers: list[str]) -> dict[str, list]:
    """Of each question, in turn, the number of its scene, and what was expected and given."""
    return {"scene": list(data["scene"]), "expected": list(data["answer"]), "given": list(answers)}


def dump(result: dict) -> str:
    """JSON, each of the answers' lists on a line."""
    lists = {name: json.dumps(values, separators=(",", ":")) for name, values in result["answers"].items()}
    lines = ",\n".join(f'  "{name}": {values}' for name, values in lists.items())
    text = json.dumps({**result, "answers": {}}, indent=1)
    return text.replace('"answers": {}', f'"answers": {{\n{lines}\n }}') + "\n"


def read_settings(pairs: list[str], method: str) -> tuple[dict, dict]:
    """`["pruner_layer=2"]` -> `{"pruner_layer": 2}`, and the same of the method's own settings. Raises `ValueError`
    where a pair is none, or its name unknown."""
    own = [field.name for field in fields(METHODS[method])] if method in METHODS else []
    own = [name for name in own if name not in ("ratio", "accounting")]
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in (*SETTABLE, *own):
            known = ", ".join([*SETTABLE, *own])
            raise ValueError(f"--set takes one of {known} and its value, such as pruner_layer=2.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    of_method = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return (
        {name: value for name, value in found.items() if name in SETTABLE},
        {name: value for name, value in of_method.items() if name not in SETTABLE},
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id or folder of a stock or a pruned checkpoint")
    parser.add_argument("--method", choices=["none", *METHODS], required=True)
    parser.add_argument("--ratio", type=ratio, help="share of tokens kept, such as 1/18; none takes no ratio")
    parser.add_argument(
        "--accounting", choices=["mean", "cap"], default="mean", help="of the decoder's layers, or behind the last cut"
    )
    parser.add_argument("--limit", type=positive, default=2000, help="questions")
    parser.add_argument("--seed", type=int, default=0, help="of what the method leaves to chance")
    parser.add_argument("--level", choices=OBJECTS, default="standard")
    parser.add_argument("--scene-seed", type=int, default=0, help="of the level's scenes: another one, other scenes")
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="validation: cluttered scenes that choices are made on",
    )
    parser.add_argument("--photo", type=Path, metavar="FOLDER", help="of photo_vqa/features.py, in place of --level")
    parser.add_argument(
        "--other-picture", action="store_true", help="ask about each scene with the next one's, a control"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base, by default the checkpoint's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the checkpoint's pruner_ fields, or the method's",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="of the checkpoint's processor")
    parser.add_argument("--name", help="what the method is called in tables, by default its name")
    parser.add_argument("--unpruned", type=Path, help="the result of --method none on the same questions, for RelAcc")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    arguments = parser.parse_args(argv)
    try:
        fields_of_model, settings = read_settings(arguments.set, arguments.method)
    except ValueError as error:
        parser.error(str(error))
    if (arguments.ratio is None) != (arguments.method == "none"):
        parser.error("--method none takes no --ratio, and every other method needs one")
    if arguments.photo and (arguments.scene_seed or arguments.split != "test"):
        parser.error("--photo takes no --scene-seed and no --split: what was asked is stored in its folder")
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.output.is_dir():
            raise ValueError(f"--output {arguments.output} is a folder: name a file.")
        unpruned = read_result(arguments.unpruned) if arguments.unpruned else None
        if unpruned and unpruned["method"] != "none":
            raise ValueError(f"--unpruned {arguments.unpruned} holds a run of {unpruned['method']!r}, not of 'none'.")
        method = None
        if arguments.ratio is not None:
            method = METHODS[arguments.method](arguments.ratio, accounting=arguments.accounting, **settings)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        if arguments.photo:
            bench = photo_vqa(arguments.model, arguments.photo, arguments.limit, arguments.other_picture)
        else:
            bench = easy_vqa(
                arguments.model,
                arguments.split,
                arguments.level,
                arguments.scene_seed,
                arguments.limit,
                arguments.trust_remote_code,
            )
        data = bench.data
        torch.manual_seed(arguments.seed)  # a stock base gets a fresh pruner
        options = {"dtype": arguments.dtype} if arguments.dtype else {}
        model = LearnPrunerForConditionalGeneration.from_pretrained(arguments.model, **options, **fields_of_model)
        # torch copies the weights of a frozen head for each row of a batch (CPU, bfloat16), which is slow.
        model.eval().requires_grad_(True)
        if method is not None:
            method.cuts(model.model)  # says what the model lacks, before any work
        about = {
            "method": arguments.method,
            "name": arguments.name or arguments.method,
            "fields": {name: getattr(model.config, name) for name in dict.fromkeys((*PRUNER_FIELDS, *fields_of_model))},
            "ratio": arguments.ratio or 1.0,
            "accounting": arguments.accounting,
            "settings": settings,
            **({} if method is None else {"method_revision": method.revision}),
            "seed": arguments.seed,
            "level": bench.level,
            "scene_seed": arguments.scene_seed,
            # A folder's path says something of this machine only; the digest says which weights it held.
            "model": Path(arguments.model).resolve().name if Path(arguments.model).is_dir() else arguments.model,
            "model_revision": commit_of(arguments.model),
            "base_sha256": weights_digest(model),
            "pruner_sha256": weights_digest(model, pruner=True) if arguments.method in LEARNED else None,
            "pruner_trained": model.config.pruner_trained,
            "data": hashlib.sha256("\n".join([*data["question"], *data["answer"]]).encode()).hexdigest(),
            "pixels_sha256": bench.pixels,
            "code_sha256": code_digest(bench.code),
            "batch_size": arguments.batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "versions": {
                "learnpruner": learnpruner.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        if unpruned:
            check_comparable(about, unpruned)
        bench.prepare(model)
        start = time.perf_counter()
        answers, tokens = answer_questions(model, bench.processor, data, method, arguments.seed, arguments.batch_size)
        seconds = round(time.perf_counter() - start, 1)
        result = {**about, **scored(data, answers), "tokens": tokens, "seconds": seconds}
        result["answers"] = each_answer(data, answers)
        arguments.output.write_text(dump(result))
        if unpruned:
            result["relative_accuracy"] = relative_accuracy(result, unpruned)
            arguments.output.write_text(dump(result))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"accuracy: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps({name: result[name] for name in ("method", "level", "accuracy", "n", "tokens")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
