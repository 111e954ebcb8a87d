"""The recipe of the small Qwen2-VL: its inputs are the stock ones, its packing, its stages, and that it goes on."""

import random

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLImageProcessorPil

import tiny_llava
import tiny_qwen2_vl
import train_tiny_qwen2_vl as recipe
from scenes import make_scene, scene_at, sources
from train_tiny_llava import Plan

QUESTIONS = [
    [("what color is the circle?", "teal"), ("how many shapes are there?", "3"), ("is a red shape present?", "no")]
]


@pytest.fixture(scope="module")
def model_and_processor():
    torch.manual_seed(0)
    processor = tiny_qwen2_vl.build_processor()
    return tiny_qwen2_vl.build_model(processor).eval(), processor


@pytest.fixture(scope="module")
def scenes():
    """Two of different sizes: 24 x 24 and 16 x 32 tokens."""
    return [scene_at("train", level, 0, 0, 1)[0] for level in ("standard", "wide")]


def ask(processor, question):
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(message, add_generation_prompt=True)


def test_anatomy(model_and_processor):
    model, processor = model_and_processor
    assert 4e6 < model.num_parameters() < 6e6
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.config.vision_config.spatial_merge_size == 2
    words = {word for number in range(200) for row in scene_at("train", "hard", 0, number, 4)[1] for word in row[1:]}
    ids = processor.tokenizer(sorted(words), add_special_tokens=False).input_ids
    assert processor.tokenizer.unk_token_id not in {number for row in ids for number in row}


@pytest.mark.parametrize(("images", "places"), [(1, 2), (2, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("texts", [1, 2])
def test_places_without_images_and_images_without_places(images, places, texts, model_and_processor, scenes):
    _, processor = model_and_processor
    text = [f"{processor.image_token * places} is there a circle?", "is there a square?"][:texts]
    given = [scene.image for scene in scenes[:images]] or None
    with pytest.raises(ValueError, match=f"places for {places} images, and {images} were given"):
        processor(images=given, text=text, padding=True, return_tensors="pt")


@pytest.mark.parametrize("unknown", ["videos", "audio"])
def test_what_the_processor_does_not_take(unknown, model_and_processor):
    _, processor = model_and_processor
    with pytest.raises(ValueError, match="images alone"):
        processor(text="is there a circle?", **{unknown: 3})


def test_inputs_are_those_of_the_stock_image_processor(model_and_processor, scenes):
    _, processor = model_and_processor
    stock = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size=processor.image_processor.size
    )
    expected = stock(images=[scene.image for scene in scenes], return_tensors="pt")
    pixels, grids = tiny_qwen2_vl.pixels_of(scenes, processor)
    assert torch.equal(grids, expected["image_grid_thw"])
    assert grids.tolist() == [[1, 48, 48], [1, 32, 64]]
    assert torch.allclose(pixels, expected["pixel_values"], atol=1e-5)
    inputs = processor(
        images=[scene.image for scene in scenes],
        text=[ask(processor, "how many circles are there?"), ask(processor, "what shape is red?")],
        padding=True,
        return_tensors="pt",
    )
    placeholders = inputs["input_ids"] == processor.image_token_id
    assert placeholders.sum(1).tolist() == [576, 512]
    assert torch.equal(inputs["mm_token_type_ids"].bool(), placeholders)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    # Lists where no tensors are asked for, text alone, and two images of one prompt.
    assert processor(text="how many circles are there?")["mm_token_type_ids"] == [[0] * 6]
    two = processor(images=[scene.image for scene in scenes], text="<|image_pad|> a <|image_pad|>", return_tensors="pt")
    assert (two["input_ids"] == processor.image_token_id).sum() == 576 + 512
    assert two["input_ids"][0].tolist().index(processor.tokenizer.convert_tokens_to_ids("a")) == 576


@torch.no_grad()
def test_packed_questions_are_answered_as_if_alone(model_and_processor, scenes):
    """The stock model, which finds its positions by itself, on each question's own prompt."""
    model, processor = model_and_processor
    for scene, grid in zip(scenes, ((24, 24), (16, 32))):
        pixels, grids = tiny_qwen2_vl.pixels_of([scene], processor)
        batch = tiny_qwen2_vl.pack_questions(QUESTIONS, processor, grid)
        labels = batch.pop("labels")[0]
        logits = model(pixel_values=pixels, image_grid_thw=grids, **batch).logits[0, :-1]
        packed = logits[labels[1:] != -100]
        alone = []
        for question, answer in QUESTIONS[0]:
            text = f"{ask(processor, question)} {answer}"
            alone.append(model(**processor(images=scene.image, text=text, return_tensors="pt")).logits[0, -2:])
        assert (packed - torch.cat(alone)).abs().max() < 1e-4


@torch.no_grad()
def test_the_text_model_begins_as_the_small_llavas(model_and_processor):
    """On words alone, whose M-RoPE positions are plain ones, the two are the same function."""
    model, processor = model_and_processor
    llava = AutoModelForImageTextToText.from_pretrained(recipe.LLAVA).eval()
    words = tiny_llava.build_processor().tokenizer
    tiny_qwen2_vl.start_from_llava(model, processor, llava, words)
    text = "how many red shapes are there? 3"
    mine = processor.tokenizer(text, return_tensors="pt").input_ids
    theirs = words(text, return_tensors="pt", add_special_tokens=False).input_ids
    given, expected = model(mine).logits[0], llava(theirs).logits[0]
    for word in ("teal", "yes", "2"):
        columns = [t.convert_tokens_to_ids(word) for t in (processor.tokenizer, words)]
        # Their norms add another epsilon.
        assert torch.allclose(given[:, columns[0]], expected[:, columns[1]], atol=2e-3)


def test_stages_train_what_they_say(tmp_path):
    run = recipe.QwenRun(tmp_path, 0, dict.fromkeys(recipe.STEPS, 1))
    seen = {}
    for run.stage in recipe.STEPS:
        run.model.zero_grad(set_to_none=True)
        run.heads.zero_grad(set_to_none=True)
        run.loss()[0].backward()
        named = [*run.model.named_parameters(), *run.heads.named_parameters()]
        graded = {name for name, parameter in named if parameter.grad is not None}
        assert len(graded) == len(run._parameters())
        seen[run.stage] = {"visual.blocks" in name for name in graded}, {"language_model" in name for name in graded}
    assert seen == {"vision": ({True, False}, {False}), "answer": ({False}, {True, False})}


def test_answers_are_learned_on_scenes_of_every_size():
    plans = [recipe.plan_step("answer", random.Random(step)) for step in range(400)]
    assert {plan.grid for plan in plans} == {(rows, columns) for rows in (1, 2, 3) for columns in (1, 2, 3, 4)}
    assert max(plan.scenes * plan.tokens for plan in plans) <= 4 * 576
    for number, plan in enumerate(plans[:40]):
        rng = random.Random(number)
        scene = make_scene(rng, sources("train"), plan.objects, grid=plan.grid, cell=plan.cell)
        assert scene.image.width * scene.image.height == plan.tokens * 64


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "plan_step", lambda *_: Plan(1, (1, 2), (1, 2), questions=2))
    steps = ["--steps", "2", "2", "--save-every", "1"]
    assert recipe.main(["--output", str(tmp_path / "whole"), *steps]) == 0
    save, saves = recipe.QwenRun.save, []

    def killed_after(run):
        save(run)
        saves.append(run.stage)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe.QwenRun, "save", killed_after)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(["--output", str(tmp_path / "cut"), *steps])
    monkeypatch.setattr(recipe.QwenRun, "save", save)
    assert recipe.main(["--output", str(tmp_path / "cut"), *steps]) == 0
    one, other = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    processor = AutoProcessor.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    assert type(processor).__name__ == "TinyQwen2VLProcessor"
    assert "| answer | 2 |" in (tmp_path / "whole" / "README.md").read_text()
