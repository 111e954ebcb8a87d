"""What TRL's trainers make of the small LLaVA: SFT of its pruner, and what GRPO scores against what it sampled.

    python benchmarks/with_trl.py sft                               # minutes
    python benchmarks/with_trl.py grpo
    python benchmarks/with_trl.py render --into training/README.md  # tables of what was recorded

Results: benchmarks/results/trl/. `sft` trains the pruner alone with `SFTTrainer`, and asks the benchmark's questions
before and after, with real cuts. `grpo` notes, of each token that `GRPOTrainer` samples, the log-probability that it
scores it with minus the one that it was sampled with.
"""

import copy
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, ProcessorMixin

import learnpruner
from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.compare import load_processor
from learnpruner.cuts_learnpruner import LearnedScore
from learnpruner.hub_cards.records import weights_digest
from learnpruner.methods import METHODS
from learnpruner.training.trl import rank_by_prompt
from learnpruner_commands.arguments import Parser, positive, ratio

import accuracy
import benches
from render_accuracy import fill
from scenes import scene_dataset  # found because accuracy.py has looked for it

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trl"
MODELS = ROOT / "examples" / "easy_vqa"
TARGETS = r".*language_model.*\.(q_proj|v_proj)"
SEEDS, BATCH, TOKENS = (0, 1), 4, 576
SETTINGS = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}


def as_messages(data: Dataset) -> list[dict]:
    """Questions of scenes in the layout that TRL's trainers take."""

    def said(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    return [
        {
            "images": [row["image"]],
            "prompt": said("user", row["question"]),
            "completion": said("assistant", row["answer"]),
        }
        for row in data
    ]


@contextmanager
def keep_rates() -> Iterator[list[tuple[float, float]]]:
    """In the block, the mean gate of each image in a training forward, and the share that it was to keep."""
    found, gate = [], LearnedScore.gate

    def noted(self, scores, shares):
        gates = gate(self, scores, shares)
        found.extend((one.mean().item(), share) for one, share in zip(gates, shares))
        return gates

    LearnedScore.gate = noted
    try:
        yield found
    finally:
        LearnedScore.gate = gate


@contextmanager
def log_ratios(trainer: "trl.GRPOTrainer") -> Iterator[list[torch.Tensor]]:
    """In the block, of each token that the trainer samples, the log-probability that it is scored with minus the one
    that it was sampled with: a tensor for each batch of completions. The trainer's `num_iterations` is above 1, so that
    it scores what it has sampled at once, and its temperature 1."""
    found, sampled = [], []
    model, score = trainer.model, trainer._generate_and_score_completions
    generate = model.generate
    trainer.generation_config.update(return_dict_in_generate=True, output_logits=True)

    def noted(*args, **kwargs):
        output = generate(*args, **kwargs)
        logits = torch.stack(output.logits, dim=1).float()
        tokens = output.sequences[:, -logits.shape[1] :].unsqueeze(2)
        sampled.append(logits.log_softmax(-1).gather(2, tokens).squeeze(2))
        return output.sequences

    def compared(inputs):
        batch = score(inputs)
        said = batch["completion_mask"].bool()
        found.append((batch["old_per_token_logps"] - sampled.pop()[:, : said.shape[1]])[said])
        return batch

    model.generate, trainer._generate_and_score_completions = noted, compared
    try:
        yield found
    finally:
        del model.generate, trainer._generate_and_score_completions


def paired(before: list[list[bool]], after: list[list[bool]]) -> dict[str, float]:
    """Mean difference of answers to the same questions, `(runs, questions)`, with its 95 % interval (normal, over the
    questions)."""
    differences = (torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)).mean(0)
    mean, half = differences.mean().item(), 1.96 * differences.std().item() / math.sqrt(len(differences))
    return {"difference": mean, "low": mean - half, "high": mean + half}


def answers_right(model: PreTrainedModel, processor: ProcessorMixin, data: Dataset, ratio: float) -> list[bool]:
    """Whether each question is answered as it should be, with real cuts."""
    method = METHODS["learnpruner"](ratio)
    said, _ = accuracy.answer_questions(model.eval(), processor, data, method, seed=0, batch_size=32)
    return [answer == true for answer, true in zip(said, data["answer"])]


def train_with_sft(steps: int, questions: int, learning_rate: float, ratio: float) -> dict:
    """New pruners of the small LLaVA, each trained alone by `SFTTrainer`, its settings the defaults but for steps,
    batch, learning rate and precision."""
    base = MODELS / "tiny-llava"
    processor = load_processor(str(base))
    asked = scene_dataset("test", math.ceil(questions / benches.PER_SCENE), level="hard", per_scene=benches.PER_SCENE)
    asked = asked.select(range(questions))
    rows = as_messages(scene_dataset("train", BATCH * steps, level="hard", per_scene=1))
    before, after, logs, seconds = [], [], [], 0.0
    with keep_rates() as rates:
        for seed in SEEDS:
            torch.manual_seed(seed)
            # Its random weights choose before the training: what is compared is what the weights have learned.
            model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=ratio, pruner_trained=True)
            model.train_pruner_only()
            before.append(answers_right(model, processor, asked, ratio))
            with tempfile.TemporaryDirectory() as folder:
                args = trl.SFTConfig(
                    folder,
                    **SETTINGS,
                    seed=seed,
                    max_steps=steps,
                    learning_rate=learning_rate,
                    per_device_train_batch_size=BATCH,
                    max_length=None,
                )
                data = Dataset.from_list(copy.deepcopy(rows))
                trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=processor)
                seconds += trainer.train().metrics["train_runtime"]
            logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
            after.append(answers_right(model, processor, asked, ratio))
    means, shares = zip(*rates)
    return {
        "seeds": list(SEEDS),
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": learning_rate,
        "seconds": round(seconds, 1),
        "questions": questions,
        "ratio": ratio,
        "accuracy": {
            name: [sum(right) / questions for right in runs]
            for name, runs in (("untrained", before), ("trained", after))
        },
        "paired": paired(before, after),
        "keep_rate": {"asked": sum(shares) / len(shares), "mean": sum(means) / len(means)},
        "furthest_keep_rate": max(abs(mean - share) for mean, share in rates),
        "pruner_trained": model.config.pruner_trained,
        "logs": logs,
        **about(model),
    }


def score_with_grpo(prompts: int, ratio: float) -> dict:
    """The trained small LLaVA under `GRPOTrainer`: four ways to score what it sampled."""
    pruner = MODELS / "learnpruner-tiny-llava"
    processor = load_processor(str(pruner))
    rows = as_messages(scene_dataset("test", prompts, per_scene=1))
    found, described = {}, about(LearnPrunerForConditionalGeneration.from_pretrained(pruner))
    for case, (share, frozen, hooked) in CASES.items():
        torch.manual_seed(0)
        model = LearnPrunerForConditionalGeneration.from_pretrained(pruner, pruner_ratio=share or ratio)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl.GRPOTrainer(
                model,
                reward_funcs=lambda completion_ids, **columns: [float(len(ids)) for ids in completion_ids],
                args=trl.GRPOConfig(
                    folder,
                    **SETTINGS,
                    max_steps=1,
                    num_iterations=2,
                    per_device_train_batch_size=4 * prompts,
                    num_generations=4,
                    max_completion_length=8,
                ),
                train_dataset=Dataset.from_list(copy.deepcopy(rows)),
                processing_class=processor,
                peft_config=LoraConfig(target_modules=TARGETS, modules_to_save=None if frozen else ["pruner"]),
            )
            if hooked:
                rank_by_prompt(trainer.model)
            with log_ratios(trainer) as ratios:
                trainer.train()
        ratios = torch.cat(ratios)
        found[case] = {
            "tokens": len(ratios),
            "mean": ratios.mean().item(),
            "mean_absolute": ratios.abs().mean().item(),
            "largest": ratios.abs().max().item(),
        }
    return {"ratio": ratio, "prompts": prompts, "cases": found, **described}


# The ratio, where it is not the run's; whether the pruner is frozen; whether answers are kept from ranking.
CASES = {
    "unpruned": (1.0, True, False),
    "frozen pruner, `rank_by_prompt`": (None, True, True),
    "frozen pruner": (None, True, False),
    "pruner in training": (None, False, False),
}


def about(model: PreTrainedModel) -> dict:
    packages = {"learnpruner": learnpruner, "torch": torch, "transformers": transformers, "trl": trl}
    return {
        "base_sha256": weights_digest(model),
        "versions": {name: package.__version__ for name, package in packages.items()},
        "threads": torch.get_num_threads(),
    }


def sft_table(record: dict) -> str:
    """Markdown of what `sft` recorded, in percent: each seed, what they gained, and the budget."""
    gained, rate, right = record["paired"], record["keep_rate"], record["accuracy"]
    heads = [f"seed {seed}" for seed in record["seeds"]]
    lines = [f"| accuracy with real cuts | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, shares in right.items():
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"The mean gain of these pruners is {100 * gained['difference']:.1f} points (95 % interval over the "
            f"same questions: {100 * gained['low']:.1f} to {100 * gained['high']:.1f}), from {record['steps']} steps "
            f"of {record['batch_size']} questions; asked were {record['questions']} questions on hard scenes, at a "
            f"mean of {TOKENS * record['ratio']:.0f} of {TOKENS} tokens. In training the gates kept "
            f"{100 * rate['mean']:.2f} % of the tokens, where the first cut keeps {100 * rate['asked']:.2f} %.",
        ]
    )


def grpo_table(record: dict) -> str:
    """Markdown of what `grpo` recorded, in nats."""
    lines = ["| | tokens | mean | mean, absolute | largest |", "|---|---|---|---|---|"]
    for case, row in record["cases"].items():
        numbers = [f"{row[name]:.2g}" for name in ("mean", "mean_absolute", "largest")]
        lines.append(f"| {' | '.join([case, str(row['tokens']), *numbers])} |")
    return "\n".join(lines)


TABLES = {"sft": sft_table, "grpo": grpo_table}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*TABLES, "render"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--into", type=Path, help="Markdown file with the marks trl_sft and trl_grpo (render)")
    parser.add_argument("--ratio", type=ratio, help="by default 1/72 with sft, 1/18 with grpo")
    parser.add_argument("--steps", type=positive, default=20, help="of sft")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="of sft")
    parser.add_argument("--questions", type=positive, default=256, help="asked after sft")
    parser.add_argument("--prompts", type=positive, default=16, help="of grpo, each answered four times")
    arguments = parser.parse_args(argv)
    try:
        if arguments.what == "render":
            for name, table in TABLES.items():
                text = table(json.loads((arguments.results / f"{name}.json").read_text()))
                if arguments.into:
                    arguments.into.write_text(fill(arguments.into.read_text(), f"trl_{name}", text))
                else:
                    print(text)
            return 0
        if arguments.what == "sft":
            share = arguments.ratio or 1 / 72
            record = train_with_sft(arguments.steps, arguments.questions, arguments.learning_rate, share)
        else:
            record = score_with_grpo(arguments.prompts, arguments.ratio or 1 / 18)
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / f"{arguments.what}.json").write_text(json.dumps(record, indent=1) + "\n")
    except (OSError, ValueError) as error:
        print(f"with_trl: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
