"""The trial in which the second cut takes part in training: what each layer sees, and that the pruner learns."""

from learnpruner import LearnPrunerForConditionalGeneration
from learnpruner.attention_learnpruner import HARD
from learnpruner.compare import load_processor
from learnpruner.training import PrunerCollator, PrunerTrainingArguments

import ablations
import second_cut
from scenes import scene_dataset


def test_layers_behind_the_second_cut_see_fewer_tokens(tmp_path):
    base = ablations.EASY_VQA / "tiny-llava"
    model = LearnPrunerForConditionalGeneration.from_pretrained(base, pruner_trained=True)
    arguments = PrunerTrainingArguments(
        str(tmp_path), objective="hard", budgets=[1 / 18], max_steps=1, use_cpu=True, per_device_train_batch_size=2
    )
    rows = scene_dataset("train", 2, per_scene=1)
    collator = PrunerCollator(load_processor(str(base)))
    trainer = second_cut.SecondCutTrainer(model, arguments, collator, rows)
    seen = {}

    def look(number):
        def hook(layer, args, given):
            if given.get(HARD) is not None:
                vision = collator_batch["input_ids"] == model.config.image_token_id
                seen[number] = (given[HARD] & vision).sum(1).tolist(), (given[HARD] & ~vision).sum().item()

        return hook

    collator_batch = collator(list(rows))
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(look(number), with_kwargs=True)
    model.train()
    loss = trainer.compute_loss(model, collator_batch)
    loss.backward()
    first, second = 55, 18
    layers = model.config.text_config.num_hidden_layers
    cut = model.config.pruner_layer
    text = (collator_batch["input_ids"] != model.config.image_token_id).sum().item()
    assert seen == {n: ([first if n < cut else second] * 2, text) for n in range(layers)}
    assert model.model.pruner.output.weight.grad.abs().max() > 0


def test_other_objectives_are_refused(tmp_path, capsys):
    given = ["tiny-llava", "--objective", "default", "--output_dir", str(tmp_path)]
    assert second_cut.main(given) == 2
    assert "objective is 'hard'" in capsys.readouterr().err
