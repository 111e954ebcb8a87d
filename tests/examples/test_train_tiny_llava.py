"""The recipe of the small model: its packing, its stages, and that a killed run goes on as if it had not been."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tiny_llava
import train_tiny_llava as recipe
from scenes import COLORS, SHAPES, make_scene, scene_at, sources

QUESTIONS = [
    [("what color is the circle?", "teal"), ("how many shapes are there?", "3"), ("is there a red shape?", "no")],
]


@pytest.fixture(scope="module")
def model_and_processor():
    torch.manual_seed(0)
    processor = tiny_llava.build_processor()
    return tiny_llava.build_model(processor).eval(), processor


@pytest.fixture(scope="module")
def scene():
    return scene_at("train", "standard", 0, 0, 1)[0]


def test_anatomy(model_and_processor):
    model, processor = model_and_processor
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert 1e6 < sum(parameter.numel() for parameter in model.model.vision_tower.parameters()) < 2e6
    assert model.config.text_config.num_hidden_layers >= 8
    words = set()
    for number in range(400):
        for _, question, answer in scene_at("train", ("standard", "hard")[number % 2], 0, number, 4)[1]:
            words |= {question, answer}
    ids = processor.tokenizer(sorted(words), add_special_tokens=False).input_ids
    assert processor.tokenizer.unk_token_id not in {number for row in ids for number in row}


def test_pixels_are_the_processors(model_and_processor, scene):
    _, processor = model_and_processor
    inputs = processor(images=scene.image, text="<s><image>", return_tensors="pt")
    assert torch.allclose(tiny_llava.pixels_of([scene], processor), inputs["pixel_values"], atol=1e-5)
    assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 576


@torch.no_grad()
def test_packed_questions_are_answered_as_if_alone(model_and_processor, scene):
    model, processor = model_and_processor
    batch = tiny_llava.pack_questions(QUESTIONS, processor, 576)
    labels = batch.pop("labels")[0]
    packed = model(pixel_values=tiny_llava.pixels_of([scene], processor), **batch).logits[0, :-1][labels[1:] != -100]
    alone = []
    for question, answer in QUESTIONS[0]:
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(message)
        inputs = processor(images=scene.image, text=f"{prompt} {answer}", return_tensors="pt")
        alone.append(model(**inputs).logits[0, -2:])
    assert (packed - torch.cat(alone)).abs().max() < 1e-4


def test_patch_classes_mark_the_objects(scene):
    classes = tiny_llava.patch_classes(scene).reshape(24, 24)
    assert len(np.unique(classes[classes > 0])) == len({(s.shape, s.color) for s in scene.objects})
    for source, (left, top, right, bottom) in zip(scene.objects, scene.boxes):
        number = 1 + SHAPES.index(source.shape) * 8 + COLORS.index(source.color)
        assert classes[(top + bottom) // 16, (left + right) // 16] == number
    assert (classes == 0).mean() > 0.5


def test_patch_middles(scene):
    middles = tiny_llava.patch_middles(scene).reshape(24, 24)
    assert middles.sum() == len(scene.objects)
    for left, top, right, bottom in scene.boxes:
        assert middles[(top + bottom) // 16, (left + right) // 16]


def test_stages_train_what_they_say(tmp_path):
    """The tower learns first and is frozen then; every weight that is read gets a gradient."""
    run = recipe.Run(tmp_path, 0, dict.fromkeys(recipe.STAGES, 1))
    seen = {}
    for run.stage in recipe.STAGES:
        run.model.zero_grad(set_to_none=True)
        run.heads.zero_grad(set_to_none=True)
        run.loss()[0].backward()
        graded = {
            name for name, p in [*run.model.named_parameters(), *run.heads.named_parameters()] if p.grad is not None
        }
        assert len(graded) == len(run._parameters())
        seen[run.stage] = {"vision_tower" in name for name in graded}
    assert seen == {"vision": {True, False}, "align": {False}, "answer": {False}, "sizes": {False}}


def test_the_last_stage_sees_every_share_of_ground(scene):
    """Never fewer tokens than the scene has: other scenes, from full ones to some with hardly any ground."""
    plans = [recipe.plan_step("sizes", step, 0.5, random.Random(step)) for step in range(400)]
    assert {plan.grid for plan in plans} == {(rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3)}
    assert min(plan.cell for plan in plans) < max(plan.cell for plan in plans) == 64
    assert sum(plan.grid == (3, 3) and plan.cell == 64 for plan in plans) > 160
    # Small scenes come in larger numbers, and no step is much dearer than one of full scenes.
    assert max(plan.scenes * plan.tokens for plan in plans) == 6 * 576
    assert max(plan.scenes for plan in plans) == 16
    for number, plan in enumerate(plans[:60]):
        rng = random.Random(number)
        drawn = make_scene(rng, sources("train"), plan.objects, grid=plan.grid, cell=plan.cell)
        assert len(drawn.objects) <= plan.grid[0] * plan.grid[1]
        assert tiny_llava.pixels_of([drawn], tiny_llava.build_processor())[0, 0].numel() == plan.tokens * 64


def test_questions_of_the_last_stage_differ_and_ask_for_numbers_most(scene):
    plan = recipe.plan_step("sizes", 0, 0.5, random.Random(0))
    questions = recipe.questions_about(scene, plan, random.Random(0))
    assert len(set(questions)) == len(questions) == plan.questions
    counts = sum(question.startswith("how many") for question, _ in questions)
    assert counts >= plan.questions / 3


def test_model_card():
    entries = [("vision", 50, 0.5, 60.0), ("vision", 80, 0.7, 120.0), ("answer", 50, 0.9, 6.0)]
    log = [
        {"stage": stage, "step": step, "loss": 0.25, "accuracy": right, "seconds_per_step": seconds}
        for stage, step, right, seconds in entries
    ]
    about = {
        "steps": dict.fromkeys(recipe.STAGES, 80),
        "seed": 3,
        "threads": 2,
        "machine": "toaster",
        "versions": {"torch": "2.x", "transformers": "5.y"},
    }
    card = recipe.model_card(recipe.CARD, 4_900_000, {**about, "log": log})
    # 50 steps of a minute and 30 of two; 50 of six seconds.
    assert "| vision | 80 | 0.250 | 0.700 | 110 |\n| answer | 50 | 0.250 | 0.900 | 5 |" in card
    assert "--seed 3" in card
    assert "toaster" in card


def test_alignment_goes_on_until_it_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "LOG_EVERY", 1)
    run = recipe.Run(tmp_path, 0, {"vision": 0, "align": 2, "answer": 1, "sizes": 0})
    answered = iter([0.95, 0.5, 0.6, 0.91, 0.3])
    weight = run.model.lm_head.weight
    monkeypatch.setattr(run, "loss", lambda: (weight.square().sum(), next(answered)))
    run.train(save_every=10)
    assert [(entry["stage"], entry["step"]) for entry in run.log] == [
        *(("align", step) for step in (1, 2, 3, 4)),
        ("answer", 1),
    ]


def test_a_killed_run_goes_on(tmp_path, monkeypatch, capsys):
    grids = {"vision": (2, 2), "align": (2, 2), "answer": (3, 3), "sizes": (1, 2)}
    monkeypatch.setattr(recipe, "plan_step", lambda stage, *rest: recipe.Plan(1, grids[stage], (1, 2), questions=2))
    steps = ["--steps", "2", "1", "1", "3", "--save-every", "1"]
    assert recipe.main(["--output", str(tmp_path / "whole"), *steps]) == 0
    save, saves = recipe.Run.save, []

    def killed_after(run):
        save(run)
        saves.append(run.stage)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe.Run, "save", killed_after)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(["--output", str(tmp_path / "cut"), *steps])
    monkeypatch.setattr(recipe.Run, "save", save)
    assert recipe.main(["--output", str(tmp_path / "cut"), *steps]) == 0
    one, other = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert type(AutoProcessor.from_pretrained(tmp_path / "whole")).__name__ == "LlavaProcessor"
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size < 12e6
    assert one.dtype == torch.float32
    assert json.loads((tmp_path / "whole" / "log.json").read_text())["steps"] == {
        "vision": 2,
        "align": 1,
        "answer": 1,
        "sizes": 3,
    }

    assert recipe.main(["--output", str(tmp_path / "cut"), "--seed", "5", *steps]) == 2
    assert "another seed" in capsys.readouterr().err
    whole = (tmp_path / "cut" / "run.pt").read_bytes()
    (tmp_path / "cut" / "run.pt").write_bytes(whole[: len(whole) // 2])
    assert recipe.main(["--output", str(tmp_path / "cut"), *steps]) == 2
    assert "damaged" in capsys.readouterr().err
    (tmp_path / "cut" / "run.pt").write_bytes(whole)
    monkeypatch.setattr(tiny_llava, "WORDS", tiny_llava.WORDS[:-1])
    assert recipe.main(["--output", str(tmp_path / "cut"), *steps]) == 2
    assert "another model" in capsys.readouterr().err
