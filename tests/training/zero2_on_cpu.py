"""Two steps of the plain Trainer on one process, with DeepSpeed's ZeRO-2 or without: prints what the pruner became.

zero2_on_cpu.py BASE FOLDER FAMILY [zero2]
"""

import sys

import torch
from transformers import Trainer, TrainingArguments

from learnpruner import LearnPrunerForConditionalGeneration

from tiny_models import labelled

base, folder, family, *zero2 = sys.argv[1:]
settings = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
# Without it DeepSpeed would build an optimizer of its own for the CPU.
settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
arguments = TrainingArguments(
    folder,
    deepspeed=settings if zero2 else None,
    max_steps=2,
    per_device_train_batch_size=1,
    learning_rate=1e-2,
    optim="adamw_torch",
    report_to=[],
    save_strategy="no",
)
torch.manual_seed(0)  # a stock checkpoint gets a new pruner
model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_ratio=0.3).train_pruner_only()
samples = [labelled(family, [[2, (32, 32), 8]], seed) for seed in range(4)]
trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=lambda rows: dict(rows[0]))
assert trainer.is_deepspeed_enabled == bool(zero2)
trainer.train()
trainer.save_model(folder)
assert model.config.pruner_trained
torch.save(model.model.pruner.state_dict(), f"{folder}/pruner.pt")
