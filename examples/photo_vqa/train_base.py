# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Trains the photo model: DINOv2-S and SmolLM2 stay frozen, the projector and low-rank additions are learned.

    python examples/photo_vqa/train_base.py --packages FOLDER --features FOLDER --output FOLDER --sequences 2400

--features holds the folders `train` and `validation` of features.py. A sequence is one image with all its questions.
In half of the sequences each question sees the image and itself; in the others they are one conversation. All 576
tokens are always there.

A checkpoint is written every five minutes, after --max-minutes and on SIGTERM; the same command goes on from it, and
does nothing once all sequences are done. Shards that were added to `train` take part from the next pass on.
"""

import json
import math
import os
import pickle
import platform
import random
import signal
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from learnpruner_commands.arguments import Parser, positive

import projector as lookup
from features import LAYER, Features
from packages import digest, find
from photo_llava import ATTENTION, RANK, adapt, answer_loss, build_config, run
from prompts import IMAGE, Packed, Packer
from questions import random_of, test_questions, training_questions
from text_model import load_text_model
from tower import load_tower

BATCH = 4
LEARNING_RATE, LAST_RATE, PROJECTOR_SHARE = 5e-4, 5e-5, 0.4
WARM_UP = 120  # sequences
LOG_EVERY = 100  # sequences
SAVE_SECONDS, VALIDATE_SECONDS = 300, 900
VALIDATION_SCENES = 100
LOOKUP_SCENES, LOOKUP_EPOCHS = 1500, 8
# Without them, glibc gives large tensors' memory back after each use; on two cores that took half of the time. The
# last asks for huge pages: with small ones, a long run slows down.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "2",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def rate_at(sequence: int, total: int) -> float:
    """The learning rate: a warm-up, then half a cosine over all sequences."""
    falling = LAST_RATE + (LEARNING_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * sequence / total))
    return min(1.0, (sequence + BATCH) / WARM_UP) * falling


def shares(right: dict[str, list[bool]]) -> dict[str, float]:
    """Accuracy by kind, and of all questions."""
    found = {kind: sum(values) / len(values) for kind, values in sorted(right.items())}
    every = [value for values in right.values() for value in values]
    return {kind: round(value, 4) for kind, value in {**found, "all": sum(every) / len(every)}.items()}


class Run:
    """A training that can be cut off between two steps and go on.

    Args:
        folder (`Path`): Where its files are.
        text (`LlamaForCausalLM`): Loaded anew: low-rank layers are put in.
        tokenizer (`PreTrainedTokenizerBase`): With the image's placeholder.
        tower (`Dinov2Model`): Its layer behind the stored hidden state is run.
        features (`Path`): Holds the folders `train` and `validation`.
        sequences (`int`): The whole length: the learning rate follows it.
        seed (`int`): Everything random comes from it.
        scenes (`int`): Of validation.
        threads (`int`): Sequences at a time, each on one thread. A sequence's many small operations keep one core busy
            and leave a second one idle.

    Raises:
        `ValueError`: where the folder holds another run, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        text: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        tower: nn.Module,
        features: Path,
        sequences: int,
        seed: int = 0,
        scenes: int = VALIDATION_SCENES,
        threads: int = 1,
    ):
        self.pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))
        self.folder, self.features, self.sequences, self.seed = folder, features, sequences, seed
        self.text, self.layer = text, tower.encoder.layer[LAYER]
        image = tower.config.image_size // tower.config.patch_size
        self.packer = Packer(tokenizer, tokens=image**2)
        self.config = build_config(tower.config, text.config, tokenizer.convert_tokens_to_ids(IMAGE))
        torch.manual_seed(seed)
        self.low_rank = adapt(text)
        text.set_attn_implementation(ATTENTION)
        self.validation = Features(features / "validation")
        self.validation_scenes = min(scenes, len(self.validation))
        self.sequence, self.passes, self.log = 0, [], []
        self.seconds = 0.0
        self.about = {}
        self.stopped = False
        state = self._load()
        self.projector = lookup.LlavaMultiModalProjector(self.config).float()
        if state is None:
            self._start()
        self.parameters = [*self.low_rank.values(), *self.projector.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.low_rank.values(), "share": 1.0},
                {"params": self.projector.parameters(), "share": PROJECTOR_SHARE},
            ],
            weight_decay=0.01,
            betas=(0.9, 0.98),
        )
        if state is not None:
            self._resume(state)

    def _settings(self) -> dict:
        return {"seed": self.seed, "sequences": self.sequences, "rank": RANK, "batch": BATCH}

    def _start(self) -> None:
        """Fits the projector, which is the first thing that a run does."""
        begun = time.perf_counter()
        patches = lookup.gather(self.layer, Features(self.features / "train"), LOOKUP_SCENES, self.seed)
        words = lookup.Lookup(self.text, self.packer)
        self.projector, right = lookup.fit(self.config, words, *patches, LOOKUP_EPOCHS, self.seed)
        seconds = round(time.perf_counter() - begun)
        self.log.append({"sequence": 0, "lookup": {"patches": len(patches[0]), "right": right, "seconds": seconds}})

    def trained(self) -> dict[str, torch.Tensor]:
        """What is learned, by name."""
        weights = {f"projector.{name}": weight for name, weight in self.projector.state_dict().items()}
        return weights | {f"text.{name}": weight.detach() for name, weight in self.low_rank.items()}

    def _load(self) -> dict | None:
        path = self.folder / "run.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True)
            settings = state["settings"]
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is damaged: choose another --output.") from error
        if settings != self._settings():
            raise ValueError(f"{path} is of a run with {settings}, not {self._settings()}: choose another --output.")
        return state

    def _resume(self, state: dict) -> None:
        with torch.no_grad():
            for name, weight in self.trained().items():
                weight.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sequence, self.passes, self.log, self.seconds = (
            state[name] for name in ("sequence", "passes", "log", "seconds")
        )

    def save(self) -> None:
        """The checkpoint, what is learned in half precision, and the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name) for name in ("sequence", "passes", "log", "seconds")}
        state |= {"settings": self._settings(), "trained": self.trained(), "optimizer": self.optimizer.state_dict()}
        about = {**self._settings(), "done": self.sequence, "minutes": round(self.seconds / 60, 1), **self.about}
        text = json.dumps({**about, "passes": self.passes, "log": self.log}, indent=1) + "\n"
        for name, write in (
            ("run.pt", lambda path: torch.save(state, path)),
            ("photo-llava.safetensors", lambda path: save_file({k: v.half() for k, v in self.trained().items()}, path)),
            ("photo-llava.json", lambda path: path.write_text(text)),
        ):
            write(self.folder / f"{name}.tmp")
            # Renamed when whole: a run that is killed while it writes keeps its last checkpoint.
            (self.folder / f"{name}.tmp").replace(self.folder / name)

    def _run(self, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
        with torch.no_grad():
            patches = self.layer(hidden.float()[None])[0, 1:]
        return run(self.text, self.projector, self.packer.start, patches, packed)

    def _learn(self, hidden: torch.Tensor, packed: Packed) -> tuple[float, list[bool], tuple[torch.Tensor, ...]]:
        """Loss, which words were right, and gradients."""
        logits = self._run(hidden, packed)
        loss = answer_loss(logits, packed)
        return loss.item(), (logits.argmax(-1) == packed.targets).tolist(), torch.autograd.grad(loss, self.parameters)

    def _begin_pass(self) -> None:
        """Another pass over all scenes that are there by now."""
        self.passes.append([self.sequence, len(Features(self.features / "train"))])

    def _open_pass(self) -> None:
        first, count = self.passes[-1]
        self.first, self.train = first, Features(self.features / "train", count)
        self.order = list(range(count))
        random.Random(f"{self.seed} order {first}").shuffle(self.order)

    def step(self) -> list[tuple[float, bool, dict[str, list[bool]]]]:
        """One update. Returns for each sequence the loss, whether questions stood apart, and which were right."""
        rate = rate_at(self.sequence, self.sequences)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        batch = min(BATCH, self.sequences - self.sequence)
        about, jobs = [], []
        for _ in range(batch):
            if not self.passes or self.sequence - self.passes[-1][0] == self.passes[-1][1]:
                self._begin_pass()
                self._open_pass()
            number = self.order[self.sequence - self.first]
            rng = random.Random(f"{self.seed} sequence {self.sequence}")
            apart = rng.random() < 0.5
            asked = training_questions(self.train.scene(number), rng)
            about.append((apart, asked))
            jobs.append(
                (self.train.layer(number), self.packer.pack([(one.question, one.answer) for one in asked], apart))
            )
            self.sequence += 1
        results = []
        self.optimizer.zero_grad()
        # In the order of the sequences, so that sums do not depend on which thread was first.
        for (apart, asked), (loss, hits, gradients) in zip(about, self.pool.map(self._learn, *zip(*jobs))):
            for parameter, gradient in zip(self.parameters, gradients):
                parameter.grad = gradient / batch if parameter.grad is None else parameter.grad + gradient / batch
            right = defaultdict(list)
            for one, hit in zip(asked, hits):
                right[one.kind].append(hit)
            results.append((loss, apart, right))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return results

    def _answer(self, number: int) -> list[tuple[str, bool, bool]]:
        """Kind of each test question of a scene, and whether it is right in the two ways of [`validate`]."""
        scene = self.validation.scene(number)
        asked = test_questions(scene, random_of(scene), "fine")
        packed = self.packer.pack([(one.question, one.answer) for one in asked], apart=True)
        with torch.no_grad():
            logits = self._run(self.validation.layer(number), packed)
        found = []
        for one, row, true in zip(asked, logits, packed.targets.tolist()):
            choices = [self.packer.word(f" {choice}") for choice in one.choices]
            found.append((one.kind, row.argmax().item() == true, choices[row[choices].argmax()] == true))
        return found

    def validate(self) -> dict[str, dict[str, float]]:
        """Accuracy on test questions of the set "validation", by kind: of the likeliest word of all, which is what
        `generate` says, and of the likeliest of a question's choices."""
        said, chosen = defaultdict(list), defaultdict(list)
        for answers in self.pool.map(self._answer, range(self.validation_scenes)):
            for kind, likeliest, among in answers:
                said[kind].append(likeliest)
                chosen[kind].append(among)
        return {"said": shares(said), "among_choices": shares(chosen)}

    def _validate(self) -> None:
        self.log.append({"sequence": self.sequence, "minutes": round(self.seconds / 60, 1), **self.validate()})

    def train_on(self, max_minutes: float = math.inf) -> None:
        """Trains until all sequences are done, `max_minutes` have passed or [`stop`] was called."""
        if self.sequence >= self.sequences:
            return
        if self.passes:
            self._open_pass()
        begun = saved = last = time.perf_counter()
        if self.sequence == 0:
            self._validate()
            self.save()
            last = time.perf_counter()
        # In training's own minutes: a run that is often stopped is validated as often.
        validated = 60 * max(entry["minutes"] for entry in self.log if "said" in entry)
        recent = []
        with tqdm(total=self.sequences, initial=self.sequence, mininterval=10, unit=" sequences") as bar:
            while self.sequence < self.sequences and not self.stopped:
                results = self.step()
                recent += results
                now = time.perf_counter()
                self.seconds, last = self.seconds + now - last, now
                bar.update(len(results))
                if len(recent) >= LOG_EVERY:
                    self._record(recent, bar)
                    recent = []
                if self.sequence == self.sequences or self.seconds - validated > VALIDATE_SECONDS:
                    self._validate()
                    validated, last = self.seconds, time.perf_counter()
                if now - begun > 60 * max_minutes:
                    self.stop()
                if now - saved > SAVE_SECONDS:
                    self.save()
                    saved = now
            if recent:
                self._record(recent, bar)
        self.save()

    def _record(self, results: list, bar: tqdm) -> None:
        """Adds the last sequences to the log. Answers in a conversation are told apart: earlier turns help."""
        right = {True: defaultdict(list), False: defaultdict(list)}
        for _, apart, kinds in results:
            for kind, hits in kinds.items():
                right[apart][kind] += hits
        entry = {"sequence": self.sequence, "minutes": round(self.seconds / 60, 1)}
        entry["loss"] = round(sum(loss for loss, *_ in results) / len(results), 4)
        entry |= {name: shares(right[apart]) for name, apart in (("apart", True), ("turns", False)) if right[apart]}
        self.log.append(entry)
        bar.set_postfix(loss=entry["loss"], **entry.get("apart", {}))

    def stop(self, *_) -> None:
        """Ends [`train_on`] after the present step, with a checkpoint."""
        self.stopped = True


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--packages", type=Path, help="folder of packages.py; otherwise PHOTO_VQA_PACKAGES or the system"
    )
    parser.add_argument("--features", type=Path, required=True, help="folder with `train` and `validation`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sequences", type=positive, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=2, help="sequences at a time")
    parser.add_argument("--max-minutes", type=positive, help="stop after so long; the same command goes on")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        packages = find(arguments.packages)
        text, tokenizer = load_text_model(packages.text, arguments.output / "text-model")
        training = Run(
            arguments.output,
            text,
            tokenizer,
            load_tower(packages.tower),
            arguments.features,
            arguments.sequences,
            arguments.seed,
            threads=arguments.threads,
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"train_base: {error}", file=sys.stderr)
        return 2
    training.about = {
        "threads": arguments.threads,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "made_of": {
            "fold": training.validation.made_of["fold"],
            "tower": digest(packages.tower),
            "text": digest(packages.text),
        },
    }
    signal.signal(signal.SIGTERM, training.stop)
    training.train_on(arguments.max_minutes or math.inf)
    return 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        # The allocator reads them when the process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    sys.exit(main())
