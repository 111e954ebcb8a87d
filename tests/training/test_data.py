"""Samples of every layout become the same batch, and what cannot be a sample is said, not swallowed."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from learnpruner.training import rows
from learnpruner.training.data import PrunerCollator, load_samples, read_images, read_messages

import tiny_llava
import tiny_qwen2_vl
from tiny_models import tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_llava.build_processor()


@pytest.fixture
def pictures(tmp_path):
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (192, 192), color).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


QUESTION, ANSWER = "what color is the circle?", "teal"
TURNS = [
    {"from": "human", "value": f"<image>\n{QUESTION}"},
    {"from": "gpt", "value": ANSWER},
    {"from": "human", "value": "how many shapes are there?"},
    {"from": "gpt", "value": "3"},
]


def decoded_labels(processor, labels):
    return processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())


def test_layouts_agree(processor, pictures):
    picture = Image.open(pictures / "0.png")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": ANSWER},
    ]
    rows = [
        {"image": picture, "question": QUESTION, "answer": ANSWER},
        {"image": str(pictures / "0.png"), "conversations": TURNS[:2]},
        {"images": [picture], "messages": chat},
    ]
    batches = [PrunerCollator(processor)([row]) for row in rows]
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], batches[0][name]) for name in batches[0])
    assert decoded_labels(processor, batches[0]["labels"]) == [ANSWER, "</s>"]
    # What is asked for is the prompt that generation gets.
    prompt = processor.apply_chat_template(read_messages(rows[0])[:1], add_generation_prompt=True)
    expected = processor(images=picture, text=prompt, return_tensors="pt")["input_ids"]
    assert torch.equal(batches[0]["input_ids"][:, : expected.shape[1]], expected)


def test_answers_of_every_turn_are_labels_and_nothing_else(processor, pictures):
    long = {"image": str(pictures / "0.png"), "conversations": TURNS}
    text = {"conversations": [{"from": "human", "value": "is there a circle?"}, {"from": "gpt", "value": "no"}]}
    both = {
        "image": [str(pictures / "0.png"), str(pictures / "1.png")],
        "conversations": [
            {"from": "human", "value": "<image><image> what shape is red?"},
            {"from": "gpt", "value": "circle"},
        ],
    }
    batch = PrunerCollator(processor)([long, text, both])
    answers = [[ANSWER, "</s>", "3", "</s>"], ["no", "</s>"], ["circle", "</s>"]]
    assert [decoded_labels(processor, labels) for labels in batch["labels"]] == answers
    # A label is its own token: the model shifts.
    said = batch["labels"] != -100
    assert torch.equal(batch["labels"][said], batch["input_ids"][said])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [
        576,
        0,
        1152,
    ]
    assert len(batch["pixel_values"]) == 3


def test_text_only_batch(processor):
    batch = PrunerCollator(processor)([{"question": "is there a circle?", "answer": "no"}] * 2)
    assert "pixel_values" not in batch
    assert decoded_labels(processor, batch["labels"][0]) == ["no", "</s>"]


def test_truncation_never_cuts_an_image(processor, pictures):
    row = {"image": str(pictures / "0.png"), "conversations": TURNS}
    whole = PrunerCollator(processor)([row])
    length = whole["input_ids"].shape[1]
    cut = PrunerCollator(processor, max_length=length - 3)([row])
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :-3])
    assert torch.equal(cut["labels"], whole["labels"][:, :-3])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    with pytest.raises(ValueError, match="cuts image tokens"):
        PrunerCollator(processor, max_length=100)([row])


def write(folder, rows, name="data.json"):
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return folder / name


def llava_rows(*images):
    return [
        {"id": str(n), "conversations": TURNS[:2], **({} if image is None else {"image": image})}
        for n, image in enumerate(images)
    ]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_files(name, processor, pictures, caplog):
    """Images that are missing or none are counted out at once, one that is cut short when it is decoded."""
    rows = llava_rows("0.png", "missing.png", ["1.png"], "broken.png", "short.png")
    rows.append({"conversations": [{"from": "human", "value": "is there a circle?"}, {"from": "gpt", "value": "no"}]})
    path = write(pictures, rows, name)
    samples = load_samples(path)
    assert len(samples) == 4
    assert "2 of 6 samples left out" in caplog.text
    collate = PrunerCollator(processor)
    batch = collate([samples[number] for number in range(4)])
    assert len(batch["pixel_values"]) == 2
    assert len(batch["input_ids"]) == 3
    assert "1 samples left out so far" in caplog.text
    assert collate.left_out == 1
    with pytest.raises(ValueError, match=r"missing\.png"):
        load_samples(path, strict=True)
    with pytest.raises(ValueError, match="cannot be read"):
        PrunerCollator(processor, strict=True)([samples[number] for number in range(4)])
    with pytest.raises(ValueError, match="Every image of a batch"):
        collate([samples[2]])


def test_chats_in_files(processor, pictures):
    """Contents as text in one turn and as parts in another, images beside text alone."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    chat = {"messages": [user, {"role": "assistant", "content": ANSWER}], "images": ["0.png"]}
    plain = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
    samples = load_samples(write(pictures, [chat, plain]))
    batch = PrunerCollator(processor)([samples[0], samples[1]])
    for labels in batch["labels"]:
        assert decoded_labels(processor, labels) == [ANSWER, "</s>"]


@pytest.fixture
def bare():
    """As LLaVA-1.5's: roles in words, a space after each turn, nothing that ends an answer; and a tokenizer that takes
    the space before a word for a part of it."""
    processor = tiny_llava.build_processor()
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "▁", "▁USER:", "▁ASSISTANT:"]
    words += [f"▁{word}" for word in ("teal", "3", "what", "color", "is", "the", "circle?", "red", "blue")]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<image>"], **special
    )
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    return processor


def test_templates_that_do_not_end_an_answer(bare):
    turns = [
        {"from": "human", "value": "what color is the circle?"},
        {"from": "gpt", "value": "teal"},
        {"from": "human", "value": "what is red"},
        {"from": "gpt", "value": " blue\n"},
    ]
    batch = PrunerCollator(bare)([{"conversations": turns}])
    assert decoded_labels(bare, batch["labels"][0]) == ["▁teal", "</s>", "▁blue", "</s>"]
    words = bare.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert words.count("</s>") == 2
    assert words.count("▁USER:") == 2


def test_data_sets_with_an_image_column(pictures, caplog):
    rows = [{"image": str(pictures / name), "question": QUESTION, "answer": ANSWER} for name in ("0.png", "broken.png")]
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    samples = load_samples(Dataset.from_list(rows, features=features))
    assert len(samples) == 1
    assert "1 of 2 samples left out" in caplog.text
    assert read_images(samples[0])[0].size == (192, 192)


def test_a_share_of_the_samples(pictures):
    path = write(pictures, [{"question": f"{n}", "answer": "no"} for n in range(50)])
    some, same, other = (load_samples(path, share=0.1, seed=seed)["question"] for seed in (0, 0, 1))
    assert len(some) == 5
    assert list(some) == list(same) != list(other)
    whole = load_samples(path)
    assert list(some) == list(whole.shuffle(seed=0)["question"][:5]) == list(load_samples(whole, share=0.1)["question"])


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_share_is_taken_before_it_becomes_arrow(name, pictures, monkeypatch):
    """Of 665,000 rows a tenth: the others are not checked, not made columns of, and of JSON Lines not parsed."""
    path = write(pictures, [{"question": f"{n}", "answer": "no"} for n in range(1000)], name)
    checked, made, parsed = [], [], []
    for place, function, seen in (
        ("rows.read_messages", rows.read_messages, checked),
        ("data.Dataset.from_list", Dataset.from_list, made),
        ("rows._parse_line", rows._parse_line, parsed),
    ):

        def counted(*arguments, function=function, seen=seen):
            seen.append(arguments[0])
            return function(*arguments)

        monkeypatch.setattr(f"learnpruner.training.{place}", counted)
    assert len(load_samples(path, share=0.01)) == 10
    assert len(checked) <= 3 * 10
    assert [len(rows) for rows in made] == [10]
    assert len(parsed) == (10 if name == "data.jsonl" else 0)


def test_numbers_of_a_share(pictures):
    """A fault of a share is told with the row of the file."""
    samples = [{"question": f"{n}", "answer": n} for n in range(50)]
    with pytest.raises(ValueError, match=r"row (\d+): the answer is a number") as error:
        load_samples(write(pictures, samples), share=0.1)
    number = int(re.search(r"row (\d+)", str(error.value))[1])
    assert f'"{number - 1}"' in str(error.value)
    with pytest.raises(ValueError, match=f"row {number}: "):
        load_samples(Dataset.from_list(samples), share=0.1)


def test_streams_stay_streams(processor, pictures, caplog):
    rows = [{"image": str(pictures / name), "question": QUESTION, "answer": ANSWER} for name in ("0.png", "broken.png")]
    stream = load_samples(IterableDataset.from_generator(lambda: iter(rows)))
    assert isinstance(stream, IterableDataset)
    assert len(list(stream)) == 1
    assert "left out" in caplog.text
    with pytest.raises(ValueError, match="take"):
        load_samples(stream, share=0.5)
    # Relative paths, though a generator does not say what its columns are.
    relative = [{**row, "image": Path(row["image"]).name} for row in rows]
    stream = load_samples(IterableDataset.from_generator(lambda: iter(relative)), pictures)
    assert len(PrunerCollator(processor)(list(stream))["pixel_values"]) == 1
    with pytest.raises(ValueError, match="No sample is left of the stream"):
        load_samples(IterableDataset.from_generator(lambda: iter(rows[1:])))


def test_pictures_are_upright_and_opaque(processor, pictures):
    """Turned as the camera says, and on white where they are transparent; in files and in data sets."""
    photo = Image.new("RGB", (4, 2), "blue")
    photo.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first column is the top row
    photo.save(pictures / "turned.png", exif=exif)
    glass = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    glass.putpixel((0, 0), (0, 0, 255, 255))
    glass.putpixel((1, 1), (0, 0, 0, 51))
    glass.save(pictures / "glass.png")
    glass.quantize(4).save(pictures / "palette.png")
    Image.new("LA", (2, 2), (0, 0)).save(pictures / "grey.png")
    rows = [
        {"image": name, "question": QUESTION, "answer": ANSWER}
        for name in ("turned.png", "glass.png", "palette.png", "grey.png")
    ]
    samples = load_samples(write(pictures, rows))
    turned, opaque, palette, grey = (read_images(row)[0] for row in samples)
    assert turned.size == (2, 4)
    assert turned.getpixel((1, 0)) == (255, 0, 0)
    for picture in (opaque, palette):
        colors = [picture.getpixel(place) for place in ((0, 0), (1, 0), (1, 1))]
        assert colors == [(0, 0, 255), (255, 255, 255), (204, 204, 204)]
    assert grey.getpixel((0, 0)) == (255, 255, 255)
    opened = {"image": Image.open(pictures / "turned.png"), "question": QUESTION, "answer": ANSWER}
    assert read_images(opened)[0].size == (2, 4)
    rows = [{**row, "image": str(pictures / row["image"])} for row in rows]
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    seen = PrunerCollator(processor)(list(load_samples(Dataset.from_list(rows, features=features))))
    assert torch.equal(seen["pixel_values"], PrunerCollator(processor)(list(samples))["pixel_values"])


def test_data_sets_of_pictures(processor):
    rows = [{"image": Image.new("RGB", (192, 192), "red"), "question": QUESTION, "answer": ANSWER}] * 2
    samples = load_samples(Dataset.from_list(rows))
    batch = PrunerCollator(processor)([samples[0], samples[1]])
    assert batch["pixel_values"].shape == (2, 3, 192, 192)


def test_bad_samples(processor, pictures):
    collate = PrunerCollator(processor)
    with pytest.raises(ValueError, match="0 images and 1 places"):
        collate([{"conversations": TURNS}])
    with pytest.raises(ValueError, match="messages, conversations, or question"):
        collate([{"text": "x"}])
    with pytest.raises(ValueError, match="No sample is left"):
        load_samples(write(pictures, llava_rows("missing.png")))
    with pytest.raises(ValueError, match="share"):
        load_samples(write(pictures, llava_rows("0.png")), share=0)
    silent = tiny_llava.build_processor()
    silent.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        PrunerCollator(silent)


@pytest.mark.parametrize("size", [(192, 192), (384, 192), (96, 144)])
def test_foreground_follows_the_processors_crop(size, processor):
    """A box painted white is where its patches are white: whatever the processor does, it does to both."""
    width, height = size
    box = [width // 3, height // 4, width // 3 + width // 4, height // 4 + height // 3]
    picture = Image.new("RGB", size)
    picture.paste("white", tuple(box))
    rows = [
        {"image": picture, "question": QUESTION, "answer": ANSWER, "boxes": [box]},
        {"question": QUESTION, "answer": ANSWER},
        {"image": picture, "question": "how many shapes are there?", "answer": ANSWER},
    ]
    batch = PrunerCollator(processor, foreground=True)(rows)
    image = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert not batch["foreground"][1:].any()
    assert not batch["foreground"][~image].any()
    red = batch["pixel_values"][0, 0].view(24, 8, 24, 8).mean((1, 3)).flatten()
    white = red > (red.min() + red.max()) / 2
    assert torch.equal(batch["foreground"][0][image[0]], white)
    assert 20 < white.sum() < 120
    assert "foreground" not in PrunerCollator(processor)(rows)


def test_qwen_batches():
    """Images of two sizes with their grids, answers labelled with the end of their turn, and boxes on their tokens."""
    processor = tiny_qwen2_vl.build_processor()
    picture = Image.new("RGB", (64, 32))
    picture.paste("white", (8, 8, 40, 24))
    rows = [
        {"image": picture, "question": QUESTION, "answer": ANSWER, "boxes": [[8, 8, 40, 24]]},
        {"image": Image.new("RGB", (32, 32)), "conversations": TURNS},
        {"question": QUESTION, "answer": ANSWER},
    ]
    batch = PrunerCollator(processor, foreground=True)(rows)
    placeholders = batch["input_ids"] == processor.image_token_id
    assert batch["image_grid_thw"].tolist() == [[1, 8, 16], [1, 8, 8]]
    assert placeholders.sum(1).tolist() == [32, 16, 0]
    assert torch.equal(batch["mm_token_type_ids"].bool(), placeholders)
    labels = [decoded_labels(processor, row) for row in batch["labels"]]
    assert labels == [["teal", "<|im_end|>"], ["teal", "<|im_end|>", "3", "<|im_end|>"], ["teal", "<|im_end|>"]]
    marked = torch.zeros(4, 8, dtype=torch.bool)
    marked[1:3, 1:5] = True
    assert torch.equal(batch["foreground"][0][placeholders[0]], marked.flatten())
    assert not batch["foreground"][1:].any()


def test_boxes_that_cannot_be_followed(processor):
    """Boxes are for the log: those of several images, or without a size, are no reason to stop."""
    picture = Image.new("RGB", (192, 192))
    sample = {"question": QUESTION, "answer": ANSWER}
    rows = [
        {**sample, "images": [picture] * 2, "boxes": [[0, 0, 90, 90]]},
        {**sample, "image": picture, "boxes": [[5, 5, 5, 9], [0, 0, 16, 16]]},
    ]
    marked = PrunerCollator(processor, foreground=True)(rows)["foreground"]
    assert marked.sum(1).tolist() == [0, 4]


def test_boxes_on_a_model_of_several_crops(caplog):
    processor = tiny_processor("llava_next")
    processor.chat_template = tiny_llava.CHAT_TEMPLATE
    row = {"image": Image.new("RGB", (60, 30)), "question": "w5", "answer": "w6", "boxes": [[0, 0, 30, 30]]}
    batch = PrunerCollator(processor, foreground=True)([row])
    assert not batch["foreground"].any()
    assert {"image_sizes", "pixel_values"} <= set(batch)
    assert "not followed" in caplog.text
