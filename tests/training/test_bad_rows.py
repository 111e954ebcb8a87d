"""What cannot be a sample is told when the data are loaded: in one line, with file and row, and what to do."""

import codecs
import json

import pytest
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL import Image

from learnpruner.training.data import PrunerCollator, load_samples, read_images, read_messages
from learnpruner_commands import main

import tiny_llava

QUESTION, ANSWER = "what color is the circle?", "teal"
GOOD = {"question": QUESTION, "answer": ANSWER}


def says(who, text):
    return {"from": who, "value": text}


def turns(*given):
    return {"conversations": list(given)}


def chat(*given):
    return {"messages": [{"role": role, "content": content} for role, content in given]}


HUMAN, GPT = says("human", QUESTION), says("gpt", ANSWER)
USER, ASSISTANT = ("user", QUESTION), ("assistant", ANSWER)
SEEN = says("human", f"<image>\n{QUESTION}")

# The row that is broken, and what its line says.
ROWS = {
    "no object": (["teal"], "this one is a list"),
    "no layout": ({"text": "x"}, r"messages, conversations, or question and answer; this one has \['text'\]"),
    "a question alone": ({"question": QUESTION}, r"this one has \['question'\]"),
    "a null answer": ({"question": QUESTION, "answer": None}, r"this one has \['question'\]"),
    "a number as answer": ({**GOOD, "answer": 3}, 'the answer is a number, not text: write it as text, "3"'),
    "true as answer": ({**GOOD, "answer": True}, "the answer is true or false, not text"),
    "several answers": ({**GOOD, "answer": ["a", "b"]}, "the answer is a list, not text"),
    "an empty answer": ({**GOOD, "answer": " "}, "turn 2 is an empty answer"),
    "a number as question": ({**GOOD, "question": 3}, 'the question is a number, not text: write it as text, "3"'),
    "a place in a question": ({**GOOD, "question": "<image> what?"}, "the question holds <image>"),
    "half a character": ({**GOOD, "answer": "\ud83d"}, "half of a character"),
    "turns in an object": ({"conversations": {"0": HUMAN}}, "conversations is a list of turns, and here it is an obj"),
    "no turns": ({"conversations": []}, "conversations is a list of turns, and here it is empty"),
    "a turn of text": (turns(QUESTION, ANSWER), "turn 1 of conversations is an object"),
    "an unknown speaker": (turns(says("robot", "x"), GPT), "is from one of .*, not from 'robot'"),
    "speakers": (turns(says(["human"], QUESTION), GPT), r"is from one of .*, not from \['human'\]"),
    "no speaker": (turns({"value": QUESTION}, GPT), "is from one of .*, not from None"),
    "a turn without text": (turns(HUMAN, {"from": "gpt"}), "the value of a turn is missing or null"),
    "a number as turn": (turns(HUMAN, says("gpt", 3)), "the value of a turn is a number"),
    "a leading answer": (turns(GPT, HUMAN, GPT), "turn 1 is an answer of the assistant that follows no question"),
    "two answers": (turns(HUMAN, GPT, GPT), "turn 3 is an answer of the assistant that follows no question"),
    "no answer": (turns(HUMAN), "nothing to learn"),
    "an empty turn": (turns(HUMAN, says("gpt", "")), "turn 2 is an empty answer"),
    "an unknown role": (chat(USER, ("gpt", ANSWER)), r"one of \['system', 'user', 'assistant'\], got 'gpt'"),
    "no content": (chat(USER, ("assistant", None)), "content of a message is text or a list of parts"),
    "a place in a message": (chat(("user", "<image> what?"), ASSISTANT), "the text of a message holds <image>"),
    "an unknown part": (chat(("user", [{"type": "audio"}]), ASSISTANT), r"a part of a message is .*'audio'"),
    "a part of text": (chat(("user", [QUESTION]), ASSISTANT), "a part of a message is"),
    "a part without text": (chat(("user", [{"type": "text"}]), ASSISTANT), "the text of a message is missing"),
    "images in both ways": (
        {**chat(("user", [{"type": "image", "image": "0.png"}]), ASSISTANT), "image": "0.png"},
        "inside the messages and beside them",
    ),
    "a place too many": ({**turns(says("human", "<image><image> x"), GPT), "image": "0.png"}, "1 images and 2 places"),
    "an image too many": ({**turns(HUMAN, GPT), "image": "0.png"}, "1 images and 0 places"),
    "no image for a place": (turns(SEEN, GPT), "0 images and 1 places"),
    "a number as image": ({**GOOD, "image": 0}, "an image is a path, and here it is a number"),
    "an empty path": ({**GOOD, "image": ""}, "an image is a path, and here it is empty"),
    "a list in a list": ({**GOOD, "image": [["0.png"]]}, "an image is a path, and here it is a list"),
    "an address": ({**GOOD, "image": "https://example.org/0.png"}, "download it first"),
    "three numbers": ({**GOOD, "image": "0.png", "boxes": [[1, 2, 3]]}, "a box is left, top, right and bottom"),
    "a huge number in a box": ({**GOOD, "image": "0.png", "boxes": [[1, 2, 3, 10**30]]}, "a box is left, top, right"),
    "no number in a box": ({**GOOD, "image": "0.png", "boxes": [[float("nan"), 2, 3, 4]]}, "a box is left, top, right"),
    "no end of a box": ({**GOOD, "image": "0.png", "boxes": [[1, 2, float("inf"), 4]]}, "a box is left, top, right"),
    "boxes on two lines": ({**GOOD, "image": "0.png", "boxes": "1\n2"}, "a box is left, top, right and bottom"),
    "half a character in a path": ({**GOOD, "image": "\ud83d.png"}, "the path of an image holds half of a character"),
    "a line break in a path": ({**GOOD, "image": "a\nb.png"}, r"the path of an image holds a line break .*'a\\nb.png'"),
    "a zero in a path": ({**GOOD, "image": "a\0.png"}, "the path of an image holds a line break or the like"),
    "a part on two lines": (chat(("user", ["a\nb"]), ASSISTANT), "a part of a message is"),
    "an image in an answer": (
        chat(USER, ("assistant", [{"type": "image", "image": "0.png"}, {"type": "text", "text": ANSWER}])),
        "turn 2 is an answer of the assistant that holds an image",
    ),
    "a place in an answer": (
        {**turns(HUMAN, says("gpt", f"<image> {ANSWER}")), "image": "0.png"},
        "turn 2 is an answer of the assistant that holds an image",
    ),
    "img": ({**GOOD, "img": "0.png"}, "this row's picture is under 'img', which is not read: name it \"image\" or"),
    "image_path": ({**turns(HUMAN, GPT), "image_path": "0001"}, "this row's picture is under 'image_path'"),
    "pictures": ({**chat(USER, ASSISTANT), "Pictures": ["0.png"]}, "this row's picture is under 'Pictures'"),
    "a name that nobody knows": ({**GOOD, "file_name": "0.png"}, "this row's picture is under 'file_name'"),
    "video": ({**turns(HUMAN, GPT), "video": "x.mp4"}, "'video' is not read: .*pictures, under \"image\" or"),
    "videos and an image": ({**GOOD, "image": "0.png", "videos": ["x.mp4"]}, "'videos' is not read"),
    "audio": ({**GOOD, "audio": {"path": "x.wav"}}, "'audio' is not read"),
    "a place for a video": (turns(says("human", "<video>\nwhat?"), GPT), "turn 1 has a <video>, which is not read"),
    "a video in a question": ({**GOOD, "question": "<video> what?"}, "turn 1 has a <video>, which is not read"),
}
# Columns that nobody reads, and that hide no picture.
UNREAD = [
    {"id": "0.png", "source": "coco.jpg", "image": None, "img": "", "video": None, "videos": []},
    {"image_id": 3, "has_image": False, "image_size": [8, 8], "note": "as in 0.png"},
    {"image": "0.png", "image_path": "elsewhere/0.png", "mask": "1.png", "boxes": [[1, 2.5, 3, 4]]},
    {"answer": "<video> embeds a clip", "question": "what does <video></video> do?", "digits": 10**30},
]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.png")
    return tmp_path


def write(folder, rows, name="data.json"):
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return folder / name


def one_line(error, start):
    text = str(error.value)
    assert text.startswith(str(start))
    assert "\n" not in text
    assert len(text) < 400 + len(str(start))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_files(kind, name, folder):
    row, text = ROWS[kind]
    path = write(folder, [GOOD, row, GOOD], name)
    with pytest.raises(ValueError, match=text) as error:
        load_samples(path)
    one_line(error, f"{path}, row 2: ")
    assert len(load_samples(path, skip_bad_rows=True)) == 2


@pytest.mark.parametrize("columns", UNREAD)
def test_columns_that_hide_no_picture(columns, folder):
    row = {**GOOD, **columns}
    assert len(load_samples(write(folder, [row]))) == 1
    assert len(load_samples(Dataset.from_list([{**row, "digits": 3}]), folder)) == 1


# What Arrow itself would refuse, or make something else of, cannot be in a data set.
IN_DATA_SETS = ["no layout", "a number as answer", "an unknown speaker", "a leading answer", "no answer"]
IN_DATA_SETS += ["an image too many", "no image for a place", "a place in a message", "a line break in a path"]
IN_DATA_SETS += ["img", "video", "a place for a video"]


@pytest.mark.parametrize("kind", IN_DATA_SETS)
def test_rows_of_data_sets(kind, folder):
    row, text = ROWS[kind]
    for data in (Dataset.from_list([row]), IterableDataset.from_generator(lambda: iter([row]))):
        with pytest.raises(ValueError, match=text) as error:
            load_samples(data, folder)
        one_line(error, "the data set, row 1: ")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("data.json", b"", "is empty"),
        ("data.jsonl", b"\n \n", "is empty"),
        ("data.json", b"[]", "no list of samples: its list is empty"),
        ("data.json", b'{"question": 1}', "no list of samples, but an object"),
        ("data.json", b'"text"', "no list of samples, but text"),
        ("data.json", b"[{", "is not JSON: .* in line 1, column 3"),
        ("data.json", b'[\n{"question": "a"},\n]', "is not JSON: .* in line"),
        ("data.json", b'{"question": "a"}\n{"question": "b"}', r"JSON Lines: name it data\.jsonl"),
        ("data.jsonl", b'{"question": "q", "answer": "a"}\n\n{"question"', "row 3: this line is not JSON"),
        ("data.jsonl", b'[\n{"question": "q", "answer": "a"}]', r"row 1: this line is not JSON.*name it \.json"),
        ("data.jsonl", b'question,answer\n"a","b"', "row 1: this line is not JSON"),
        ("data.json", b'[\n{"question": "caf\xe9"}]', "line 2: the byte 0xe9 is not UTF-8"),
        ("data.jsonl", b'{"question": "q", "answer": ' + b"1" * 5000 + b"}", "row 1: the answer is a number"),
        (
            "data.json",
            b'[{"question": "q", "answer": ' + b"1" * 5000 + b"}]",
            "row 1: the answer is a number, not text",
        ),
        ("data.jsonl", b"\n" + b"[" * 100_000, "row 2: this line is nested too deeply"),
        ("data.json", b'[{"question": "]"}, 1, ' + b'{"a": ' * 100_000, "row 3: this row is nested too deeply"),
        ("data.json", b'{"a": ' * 100_000, "is not JSON: it is nested too deeply"),
        ("data.json", codecs.BOM_UTF16_LE + "[]".encode("utf-16-le"), "is UTF-16 text: save it as UTF-8"),
        ("data.json", codecs.BOM_UTF32_LE + "[]".encode("utf-32-le"), "is UTF-32 text: save it as UTF-8"),
    ],
)
def test_files(name, data, text, folder):
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=text) as error:
        load_samples(folder / name)
    one_line(error, folder / name)


def test_a_picture_of_a_data_set_under_another_name(folder):
    data = Dataset.from_list([{**GOOD, "png": "0.png"}]).cast_column("png", ImageFeature())
    with pytest.raises(ValueError, match="the data set, row 1: this row's picture is under 'png'"):
        load_samples(data, folder)


def test_what_is_nested_deeply_is_told_shortly(folder):
    """Deep enough to be read, and too deep to be written out."""
    part = "[" * 960 + "]" * 960
    text = f'{{"messages": [{{"role": "user", "content": [{part}]}}]}}'
    (folder / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"row 1: (a part of a message is|this line is nested)") as error:
        load_samples(folder / "data.jsonl")
    one_line(error, folder / "data.jsonl")


def test_no_file(folder):
    with pytest.raises(OSError, match=r"nowhere\.json"):
        load_samples(folder / "nowhere.json")
    with pytest.raises(OSError, match="is a folder"):
        load_samples(folder)


def test_all_that_is_wrong_is_counted(folder):
    path = write(folder, [GOOD, {**GOOD, "answer": 3}, GOOD, {**GOOD, "answer": 4}, ["x"]])
    with pytest.raises(ValueError, match=r"row 2: .*2 more rows are none; skip_bad_rows: true"):
        load_samples(path)
    with pytest.raises(ValueError, match=r"No sample is left of 1: .*row 1: the answer is a number"):
        load_samples(write(folder, [{**GOOD, "answer": 3}]), skip_bad_rows=True)


def test_a_broken_row_is_one_line_of_the_command(folder, capsys):
    settings = {"model_name_or_path": str(folder), "train_data": str(write(folder, [["x"]])), "use_cpu": True}
    (folder / "config.yaml").write_text(json.dumps({**settings, "output_dir": str(folder / "out")}))
    assert main(["train", str(folder / "config.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"learnpruner: {folder / 'data.json'}, row 1: a row is an object")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("missing.png", r"there is no image file {0}/missing\.png: 'missing\.png' was looked for in {0}; image_folder"),
        ("/nowhere/missing.png", r"there is no image file /nowhere/missing\.png"),
        ("inside", "there is no image file"),
        ("empty.png", r"empty\.png is not an image that Pillow can read"),
        ("text.png", r"text\.png is not an image that Pillow can read"),
    ],
)
def test_images(image, text, folder, caplog):
    (folder / "inside").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    path = write(folder, [GOOD, {**GOOD, "image": image}])
    with pytest.raises(ValueError, match=text.format(folder)) as error:
        load_samples(path, strict=True)
    one_line(error, f"{path}, row 2: ")
    assert len(load_samples(path)) == 1
    (left,) = [line for line in caplog.messages if "1 of 2 samples left out" in line]
    assert f"{path}, row 2: " in left


@pytest.mark.parametrize(
    ("row", "settings", "text"),
    [
        ({**GOOD, "image": "short.png"}, {}, r"Every image of a batch is damaged.*{0}, row 2: .*short\.png is damaged"),
        ({**GOOD, "image": "short.png"}, {"strict": True}, r"^{0}, row 2: .*short\.png is damaged"),
        ({**GOOD, "image": "0.png"}, {"max_length": 90}, "^{0}, row 2: max_length=90 cuts image tokens"),
    ],
)
def test_what_is_found_out_in_training(row, settings, text, folder):
    """A picture that is cut short, or too long for the row, is told with file and row, too."""
    Image.effect_noise((192, 192), 50).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "short.png").write_bytes(whole[: len(whole) // 2])
    path = write(folder, [GOOD, row])
    collate = PrunerCollator(tiny_llava.build_processor(), **settings)
    with pytest.raises(ValueError, match=text.format(path)) as error:
        collate([load_samples(path)[1]])
    assert "\n" not in str(error.value)


def test_the_image_folder_is_named(folder):
    path = write(folder, [{**GOOD, "image": "0.png"}])
    (folder / "elsewhere").mkdir()
    with pytest.raises(ValueError, match=f"looked for in {folder}/elsewhere; image_folder says"):
        load_samples(path, folder / "elsewhere")


def test_a_space_of_another_kind_in_a_path(folder):
    """As macOS names its screenshots."""
    name = "at 9.00\u202fAM.png"
    (folder / "0.png").rename(folder / name)
    assert len(load_samples(write(folder, [{**GOOD, "image": name}]), strict=True)) == 1


def test_text_of_every_kind(folder):
    """A byte order mark, Windows' line ends, and line separators inside a string are no faults."""
    row = {"question": QUESTION, "answer": "a\u2028b \u00e9"}
    text = json.dumps(row, ensure_ascii=False)
    (folder / "mark.json").write_bytes(codecs.BOM_UTF8 + f"[{text}]".encode())
    (folder / "lines.jsonl").write_bytes(f"{text}\r\n{text}\r\n\r\n".encode())
    assert load_samples(folder / "mark.json")["answer"][0] == row["answer"]
    assert list(load_samples(folder / "lines.jsonl")["answer"]) == [row["answer"]] * 2


def test_images_inside_chat_content(folder):
    """As Qwen's data and transformers' own chats have them: the same as images beside the messages."""
    Image.new("RGB", (8, 8), "blue").save(folder / "1.png")
    parts = [
        {"type": "image", "image": "0.png"},
        {"type": "text", "text": QUESTION},
        {"type": "image", "path": "1.png"},
    ]
    row = chat(("user", parts), ("assistant", [{"type": "text", "text": ANSWER}]))
    for data in (write(folder, [row, GOOD]), Dataset.from_list([row])):
        sample = load_samples(data, folder)[0]
        assert [image.getpixel((0, 0)) for image in read_images(sample)] == [(255, 0, 0), (0, 0, 255)]
        kinds = [part["type"] for part in read_messages(sample)[0]["content"]]
        assert kinds == ["image", "text", "image"]


def test_layouts_in_one_file(folder):
    """What only a later row has is not lost."""
    # Fields that nobody reads may be of one kind here and of another there.
    noted = chat(USER, ("assistant", [{"type": "text", "text": ANSWER, "note": 3}]))
    noted["messages"][0]["note"] = "x"
    rows = [turns(HUMAN, GPT), GOOD, chat(USER, ASSISTANT), {**turns(SEEN, GPT), "image": "0.png", "id": 3}]
    rows += [noted, {**noted, "id": "x"}]
    rows[-1]["messages"] = [{**noted["messages"][0], "note": 4}, noted["messages"][1]]
    rows += [turns({**HUMAN, "note": 3}, GPT), turns({**HUMAN, "note": "x"}, GPT), {**turns(HUMAN, GPT), "answer": 3}]
    samples = load_samples(write(folder, rows))
    assert [read_messages(row)[-1]["content"][0]["text"] for row in samples] == [ANSWER] * 9
    assert [len(read_images(row)) for row in samples] == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert "boxes" not in samples.column_names
