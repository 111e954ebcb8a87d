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
from learnpruner.cuts_learnpruner import LearnedScore
from learnpruner.training.trl import rank_by_prompt

from processing_tiny_qwen2_vl import TinyQwen2VLProcessor
from tiny_models import FAMILIES, IMAGE, LAYERS, LLAVA, PAD, PATCH, PATCHES, SIDE, VIDEO, VOCAB, tiny_pair, tiny_processor

trl = pytest.importorskip("trl", reason="TRL is an extra, which the lowest supported versions leave out")
# TRL's own use of a name that transformers 5.24 renamed.
pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")]
TARGETS = r".*language_model.*q_proj"
RATIO = 0.2
TEMPLATE = (
    "{{% for m in messages %}}{{% for p in m['content'] %}}{{% if p['type'] == 'image' %}}{image} "
    "{{% else %}}{{{{ p['text'] }}}} {{% endif %}}{{% endfor %}}{{% endfor %}}"
)


class QwenProcessor(TinyQwen2VLProcessor):
    """Takes what TRL passes to the stock one."""

    def __call__(self, images=None, text=None, add_special_tokens=True, **kwargs):
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
    model = tiny_pair(family, pruner_ratio=RATIO, **fields)[1]
    # Outside of PEFT, which freezes the base itself.
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


@pytest.fixture
def kept(monkeypatch):
    """Mean gates of all images, and the shares that they were to keep."""
    record, gate = [], LearnedScore.gate

    def recorded(self, scores, shares):
        gates = gate(self, scores, shares)
        record.extend((one.mean().item(), share) for one, share in zip(gates, shares))
        return gates

    monkeypatch.setattr(LearnedScore, "gate", recorded)
    return record


def moved(trainer, before):
    return {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_trains_the_pruner(family, lora, reentrant, kept, tmp_path):
    """By the trainer's defaults, gradient checkpointing among them."""
    model = pruned(family) if lora else pruned(family).train_pruner_only()
    settings = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if lora:
        settings["peft_config"] = LoraConfig(target_modules=TARGETS, modules_to_save=["pruner"])
    trainer = trainer_of("SFT", model, rows_of(completion="w7 w8"), tmp_path, family, **settings)
    assert trainer.args.gradient_checkpointing
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = moved(trainer, before)
    assert any("pruner" in name for name in changed)
    assert any("lora_" in name for name in changed) == lora
    assert all("pruner" in name or "lora_" in name for name in changed)
    assert model.config.pruner_trained
    tokens = PATCHES if family != "llava_next" else 60
    assert len(kept) >= 4
    for mean, share in kept:
        assert mean == pytest.approx(share, abs=1e-3)


def first_log(trainer, kind):
    trainer.train()
    return next(entry for entry in trainer.state.log_history if f"rewards/{kind}" in entry)


PAIRS = {"chosen": "w7 w8", "rejected": "w9 w10 w11"}


@pytest.mark.parametrize("reference", ["lora", "ref_model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_begins_at_a_log_ratio_of_0(family, reference, tmp_path):
    """With a frozen pruner policy and reference cut alike."""
    model = pruned(family, frozen=True, pruner_trained=True)
    settings = {"peft_config": LoraConfig(target_modules=TARGETS)}
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
