"""The real trainers of TRL on every family: SFT trains the pruner, DPO and GRPO cut as generation does."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.budget_learnpruner import keep_counts
from learnpruner.training.trl import rank_by_prompt

pytest.importorskip("trl", reason="TRL is an extra, which the lowest supported versions leave out")
import trl
from trl.data_utils import prepare_multimodal_messages

from processing_tiny_qwen2_vl import TinyQwen2VLProcessor
from tiny_models import (
    FAMILIES,
    IMAGE,
    LAYERS,
    LLAVA,
    PAD,
    PATCH,
    SIDE,
    VIDEO,
    VOCAB,
    tiny_pair,
    tiny_processor,
    with_answer,
)
from with_trl import keep_rates, log_ratios

# TRL's own use of a name that transformers 5.24 renamed.
pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")]
# No part of an answer that is to be given back as words.
SPECIAL = [PAD, 1, 2, 3, IMAGE, VIDEO, 122, 123]
TARGETS = r".*language_model.*q_proj"
RATIO = 0.2
TEMPLATE = (
    "{{% for m in messages %}}{{% for p in m['content'] %}}{{% if p['type'] == 'image' %}}{image} "
    "{{% else %}}{{{{ p['text'] }}}} {{% endif %}}{{% endfor %}}{{% endfor %}}"
)


class QwenProcessor(TinyQwen2VLProcessor):
    """Takes what TRL passes to the stock one."""

    def __call__(self, images=None, text=None, add_special_tokens=True, videos=None, audio=None, **kwargs):
        return super().__call__(images, text, **kwargs)


def processor_of(family):
    if family in LLAVA:
        processor, image = tiny_processor(family), "<image>"
    else:
        special = {"<pad>": PAD, "<eos>": 2, "<unk>": 3, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
        special |= {"<|vision_start|>": 122, "<|vision_end|>": 123}
        words = special | {f"w{i}": i for i in range(VOCAB) if i not in special.values()}
        backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            eos_token="<eos>",
            unk_token="<unk>",
            additional_special_tokens=[name for name in special if "|" in name],
        )
        size = {"shortest_edge": 4 * PATCH**2, "longest_edge": 256 * PATCH**2}
        images = Qwen2VLImageProcessorPil(patch_size=PATCH // 2, merge_size=2, temporal_patch_size=2, size=size)
        processor, image = QwenProcessor(images, tokenizer), "<|vision_start|> <|image_pad|> <|vision_end|>"
    processor.chat_template = TEMPLATE.format(image=image)
    return processor


def noise(seed):
    values = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


def said(role, words):
    return [{"role": role, "content": words}]


def rows_of(count=4, **answers):
    """Each with a picture of its own; answers by column, such as `completion="w7 w8"`."""
    answers = {name: said("assistant", words) for name, words in answers.items()}
    return [{"images": [noise(seed)], "prompt": said("user", "w5 w6"), **answers} for seed in range(count)]


def pruned(family, frozen=False, **fields):
    model = tiny_pair(family, **{"pruner_ratio": RATIO, "pruner_trained": False, **fields})[1]
    model.model.pruner.requires_grad_(not frozen)
    return model


def trainer_of(kind, model, rows, folder, family, **settings):
    others = {name: settings.pop(name) for name in ("peft_config", "ref_model", "reward_funcs") if name in settings}
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **settings,
    }
    if kind != "GRPO":
        settings["max_length"] = None
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor_of(family),
        **others,
    )


# What a trainer does with a model is asked of one family in all forms, what the others do differently in one of each.
OTHERS = [family for family in FAMILIES if family != "llava"]


# With `None` checkpoints are not reentrant.
@pytest.mark.parametrize(
    ("family", "lora", "reentrant"),
    [
        *(("llava", lora, reentrant) for lora in (False, True) for reentrant in (None, True)),
        *((family, lora, reentrant) for family in OTHERS for lora, reentrant in ((False, None), (True, True))),
    ],
)
def test_sft_trains_the_pruner(family, lora, reentrant, tmp_path):
    """By the trainer's defaults, gradient checkpointing among them, and to its budget."""
    model = pruned(family) if lora else pruned(family).train_pruner_only()
    settings = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if lora:
        settings["peft_config"] = LoraConfig(target_modules=TARGETS, modules_to_save=["pruner"])
    trainer = trainer_of("SFT", model, rows_of(completion="w7 w8"), tmp_path, family, **settings)
    assert trainer.args.gradient_checkpointing
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    with keep_rates() as rates:
        trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("pruner" in name for name in changed)
    assert any("lora_" in name for name in changed) == lora
    assert all("pruner" in name or "lora_" in name for name in changed)
    assert model.config.pruner_trained
    assert len(rates) == 4  # two images in each of the two steps
    tokens = int((prompts_of(family, 1)["input_ids"] == IMAGE).sum())
    first = keep_counts(tokens, RATIO, num_layers=LAYERS, pruner_layer=2, stage_ratio=3.0)[0]
    for mean, share in rates:
        assert mean == pytest.approx(share, abs=1e-3)
        if family != "llava_next":  # whose rows that are structure take no part
            assert share == pytest.approx(first / tokens)


def prompts_of(family, count):
    """Prompts of [`rows_of`], as the processor makes them."""
    processor = processor_of(family)
    rows = [prepare_multimodal_messages(row["prompt"], row["images"]) for row in rows_of(count)]
    text = [processor.apply_chat_template(row, tokenize=False) for row in rows]
    images = [[noise(seed)] for seed in range(count)]
    return processor(images=images, text=text, padding=True, return_tensors="pt")


def accuracy_of(model, prompts, answers):
    """Share of answer tokens that are the likeliest, with real cuts."""
    new = answers.shape[1]
    inputs = with_answer(prompts, torch.cat([prompts["input_ids"], answers], dim=1))
    labels = inputs["input_ids"].clone()
    labels[:, :-new] = -100
    with torch.no_grad():
        outputs = model.eval()(**inputs, labels=labels)
    assert len(outputs.kept_mask) == 2
    return (outputs.logits[:, -new - 1 : -1].argmax(-1) == answers).float().mean().item()


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_sft_trains_the_pruner_to_some_use(family, tmp_path):
    """To find the tokens that the unpruned model's own answers come from."""
    model = pruned(family, pruner_trained=True)
    model.config.pruner_ratio = 0.4
    with torch.no_grad():
        for layer in (model.model.pruner.hidden, model.model.pruner.output):
            layer.weight.mul_(0.02 / 0.3)  # a new pruner's weights are as wide as its base's, which are wide here
    prompts = prompts_of(family, 16)
    wrote = model.generate(**prompts, pruner_ratio=1.0, max_new_tokens=4, do_sample=False, suppress_tokens=SPECIAL)
    answers = wrote[:, prompts["input_ids"].shape[1] :]
    rows = rows_of(16)
    for row, answer in zip(rows, answers.tolist()):
        row["completion"] = said("assistant", " ".join(f"w{token}" for token in answer))
    untrained = accuracy_of(model, prompts, answers)
    settings = {"max_steps": 60, "learning_rate": 0.03, "per_device_train_batch_size": 16, "logging_strategy": "no"}
    trainer_of("SFT", model.train_pruner_only(), rows, tmp_path, family, **settings).train()
    assert accuracy_of(model, prompts, answers) > untrained + 0.1


PAIRS = {"chosen": "w7 w8", "rejected": "w9 w10 w11"}


@pytest.mark.parametrize(
    ("family", "reference"),
    [
        *(("llava", reference) for reference in ("lora", "lora and pruner", "ref_model")),
        *((family, "lora and pruner") for family in OTHERS),
    ],
)
def test_dpo_begins_at_a_log_ratio_of_0(family, reference, tmp_path):
    """With a frozen pruner policy and reference cut alike; one that trains with the adapters gates in both."""
    model = pruned(family, frozen=True, pruner_trained=True)
    saved = ["pruner"] if reference == "lora and pruner" else None
    settings = {"peft_config": LoraConfig(target_modules=TARGETS, modules_to_save=saved)}
    if reference == "ref_model":
        settings = {"ref_model": pruned(family, pruner_trained=True)}  # in eval mode a trainable pruner cuts, too
    trainer = trainer_of("DPO", model, rows_of(**PAIRS), tmp_path, family, **settings)
    trainer.train()
    first, last = (entry for entry in trainer.state.log_history if "rewards/chosen" in entry)
    for side in ("chosen", "rejected"):
        assert abs(first[f"rewards/{side}"]) < 1e-5
        assert abs(last[f"rewards/{side}"]) > 1e-4  # it learns


@pytest.mark.parametrize("case", ["no reference", "gated policy, cut reference"])
def test_dpo_that_begins_elsewhere(case, tmp_path):
    """What the guide tells to avoid: the unpruned base as reference, and a pruner that trains beside a `ref_model`."""
    stock = tiny_pair("llava")[0]
    stock.save_pretrained(tmp_path / "base")
    settings = {}
    if case == "no reference":
        model = LearnPrunerForConditionalGeneration.from_pretrained(
            tmp_path / "base", pruner_ratio=RATIO, pruner_trained=True
        )
        model.model.pruner.requires_grad_(False)
    else:
        model, settings["ref_model"] = pruned("llava"), pruned("llava")
    trainer = trainer_of("DPO", model, rows_of(**PAIRS), tmp_path / "run", "llava", max_steps=1, **settings)
    assert (type(trainer.ref_model) is type(stock)) == (case == "no reference")
    trainer.train()
    (first,) = (entry for entry in trainer.state.log_history if "rewards/chosen" in entry)
    assert abs(first["rewards/chosen"]) > 1e-3


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_ranks_by_the_prompt_where_it_is_asked_to(family, hooked, tmp_path, caplog):
    """As with labels inside the forward."""
    logging.Logger.warning_once.cache_clear()
    caplog.set_level("WARNING")
    model, reference = pruned(family, frozen=True, pruner_trained=True), pruned(family, pruner_trained=True)
    trainer = trainer_of("DPO", model, rows_of(**PAIRS), tmp_path, family, ref_model=reference)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        expected = model(**inputs, labels=labels).kept_mask
        handles = [rank_by_prompt(one) for one in (model, reference) if hooked]
        found = []
        model.model.register_forward_hook(lambda module, args, outputs: found.append(outputs.kept_mask))
        scores = model(**inputs, labels=labels, fused_lm_head=True).log_probs
        assert torch.equal(found[0][1], expected[1]) == hooked
        assert ("choose its own evidence" in caplog.text) == (not hooked)
        for handle in handles:
            handle.remove()
        again = model(**inputs, labels=labels, fused_lm_head=True).log_probs
        assert torch.equal(again, scores) == (not hooked)
        assert caplog.text.count("choose its own evidence") == 1


# Largest |scored - sampled| log-probability of a token.
BY_THE_PROMPT = (True, True, 0, 1e-4)


@pytest.mark.parametrize(
    ("family", "frozen", "hooked", "least", "most"),
    [
        pytest.param("llava", True, False, 1e-2, 20, id="by all text"),
        pytest.param("llava", False, True, 1e-2, 20, id="in training"),
        *(pytest.param(family, *BY_THE_PROMPT, id=f"by the prompt, {family}") for family in FAMILIES),
    ],
)
def test_grpo_scores_what_it_sampled(family, frozen, hooked, least, most, tmp_path):
    trainer = trainer_of(
        "GRPO",
        pruned(family, pruner_trained=True),
        rows_of(2),
        tmp_path,
        family,
        max_steps=1,
        num_iterations=2,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=6,
        generation_kwargs={"suppress_tokens": [IMAGE, VIDEO, 122, 123]},
        reward_funcs=lambda completion_ids, **columns: [float(sum(ids)) for ids in completion_ids],
        peft_config=LoraConfig(target_modules=TARGETS, modules_to_save=None if frozen else ["pruner"]),
    )
    if hooked:
        rank_by_prompt(trainer.model)
    with log_ratios(trainer) as ratios:
        trainer.train()
    assert sum(map(len, ratios)) >= 20
    assert least <= torch.cat(ratios).abs().max() <= most
