"""A Gradio app: a question about a picture, answered from all of it and from what two cuts leave of it.

    python app.py

The environment variable LEARNPRUNER_MODEL names another checkpoint, a folder or a Hub id.
"""

import base64
import html
import io
import json
import os
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from learnpruner.compare import Comparison, compare, dim_dropped, load, load_image, patch_grids, token_side

HERE = Path(__file__).parent
LONGEST = 500
# A picture is decoded whole: three bytes each.
MOST_PIXELS = 50_000_000
SHIPPED_NOTE = (
    "**The model here is tiny.** It was taught colored shapes and nothing else: circles, rectangles and triangles, and "
    "the kinds of questions that the examples ask, in lower case. A photo means nothing to it."
)
TITLE = """# Which parts of a picture does the answer need?
A vision-language model reads a picture as hundreds of patches. [LearnPruner](https://huggingface.co/papers/2604.23950)
drops most of them in two cuts. Ask something, move the slider, and see what is left and whether the answer holds."""
CSS = """
.block.note { border-left: 4px solid var(--color-accent); padding-left: .75rem !important; }
.lp p { margin: 0; }
.lp .verdict { font-size: 1.25rem; font-weight: 600; }
.lp .small { font-size: .875rem; opacity: .75; }
.lp .answers, .lp .stages { display: grid; gap: .75rem; margin: .75rem 0; }
.lp .answers { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.lp .stages { grid-template-columns: repeat(3, minmax(0, 1fr)); margin-bottom: .25rem; }
.lp .card { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .6rem .9rem; }
.lp .card.pruned { border: 2px solid var(--color-accent); }
.lp .card b { display: block; font-size: 1.35rem; overflow-wrap: anywhere; }
.lp figure { margin: 0; }
.lp figure img { width: 100%; border-radius: .375rem; border: 1px solid var(--border-color-primary); }
.lp .count { font-size: 1.35rem; }
.lp table { width: 100%; border: 0; table-layout: fixed; border-collapse: collapse; margin: 1rem 0 .5rem; }
.lp table :is(tr, th, td) { border: 0; text-align: left; vertical-align: top; font-weight: 400; }
.lp table :is(th, td) { padding: .45rem .75rem .45rem 0; }
.lp table tr + tr :is(th, td) { border-top: 1px solid var(--border-color-primary); }
.lp .bar { height: .4rem; min-width: 2px; border-radius: .2rem; margin-top: .3rem; background: var(--color-accent); }
.lp .bar.full { background: var(--body-text-color-subdued); }
@media (max-width: 640px) {
  .lp .stages { grid-template-columns: 1fr; }
  .lp figure { display: grid; grid-template-columns: 3fr 2fr; gap: .75rem; align-items: center; }
}
"""


def shipped_model() -> str:
    """The small trained model: beside this file in a Space, among the examples in the repository."""
    places = (HERE, HERE / ".." / ".." / "examples" / "easy_vqa")
    return str(next(place / "learnpruner-tiny-llava" for place in places if (place / "tiny-llava").is_dir()))


def to_picture(pixels: torch.Tensor) -> str:
    """`(height, width, 3)` in [0, 1] as the source of an HTML image."""
    data = io.BytesIO()
    Image.fromarray((pixels * 255).round().byte().numpy()).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def in_words(pruned: float, full: float, less: str, more: str) -> str:
    """By what factor they differ, or nothing where they do not."""
    factor = f"{max(pruned, full) / min(pruned, full):.1f}"
    return "" if factor == "1.0" else f"{factor}&times; {less if pruned < full else more}"


def render(comparison: Comparison, patch_size: int, layer: int, layers: int) -> str:
    """An answer as HTML: the verdict, both answers, the picture after each cut, and what it took.

    Args:
        layer, layers (`int`): Decoder layers before the second cut, and all.
    """
    share = comparison.mean_tokens / comparison.tokens[0]
    same = comparison.answer == comparison.stock_answer
    answer, stock_answer = (html.escape(text) or "(nothing)" for text in (comparison.answer, comparison.stock_answer))
    captions = ("patches in the picture", "left after cut 1", "left after cut 2")
    pictures = (comparison.pixels, *dim_dropped(comparison, patch_size))
    figures = "".join(
        f'<figure><img src="{to_picture(picture)}" alt="{count} {caption}">'
        f'<figcaption><b class="count">{count}</b> {caption}</figcaption></figure>'
        for picture, count, caption in zip(pictures, comparison.tokens, captions)
    )
    legend = (
        "Dark patches are gone. Cut 1 drops what looks redundant, before the question is read. Cut 2, after "
        f"{layer} of the language model's {layers} layers, keeps what the question attends to."
    )
    cuts = ", then ".join(map(str, comparison.tokens[1:]))
    rows = (
        (
            "Vision tokens",
            "mean over the layers",
            (comparison.mean_tokens, comparison.tokens[0]),
            (f"{comparison.mean_tokens:.0f}" + (f" ({cuts})" if cuts else ""), f"{comparison.tokens[0]}"),
            ("fewer", "more"),
        ),
        (
            "Time",
            "to the end of the answer",
            (comparison.seconds, comparison.stock_seconds),
            tuple(f"{value * 1e3:,.0f} ms" for value in (comparison.seconds, comparison.stock_seconds)),
            ("faster", "slower"),
        ),
        (
            "Cache",
            "keys and values held in memory",
            (comparison.cache_bytes, comparison.stock_cache_bytes),
            tuple(f"{value / 1e6:,.2f} MB" for value in (comparison.cache_bytes, comparison.stock_cache_bytes)),
            ("smaller", "larger"),
        ),
    )
    table = "".join(
        f'<tr><th>{name}<br><span class="small">{meaning}</span></th>'
        f"<td>{texts[0]} <b>{in_words(*values, *words) if comparison.kept else ''}</b>"
        f"{bar(values[0], max(values), '')}</td>"
        f"<td>{texts[1]}{bar(values[1], max(values), 'full')}</td></tr>"
        for name, meaning, values, texts, words in rows
    )
    if comparison.kept and comparison.tokens[0] > patch_grids(comparison, patch_size)[0].numel() + 1:
        legend += " The counts include the enlarged parts that this model also reads, which are not drawn."
    return f"""<div class="lp">
<p class="verdict">{"The same answer" if same else "The answers differ"}, with {share:.0%} of the vision tokens</p>
<p class="small">“{html.escape(comparison.question)}”</p>
<div class="answers">
<div class="card pruned"><span class="small">Pruned</span><b>{answer}</b></div>
<div class="card"><span class="small">Full model</span><b>{stock_answer}</b></div>
</div>
<div class="stages">{figures}</div>
<p class="small">{legend if comparison.kept else "Nothing was dropped."}</p>
<table><tr class="small"><th></th><th>Pruned</th><th>Full model</th></tr>{table}</table>
<p class="small">Time: the median of three runs on this machine, one question at a time.</p>
</div>"""


def bar(value: float, longest: float, kind: str) -> str:
    return f'<div class="bar {kind}" style="width: {100 * value / longest:.1f}%"></div>'


def refuse(message: str) -> gr.Error:
    return gr.Error(html.escape(message), print_exception=False)


def open_picture(path: Path) -> Image.Image:
    try:
        # Opening reads the size alone.
        with Image.open(path) as header:
            if header.width * header.height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{header.width} x {header.height}")
        return load_image(path)
    except Image.DecompressionBombError as error:
        raise refuse(f"This picture is too large: send {MOST_PIXELS // 1_000_000} million pixels at most.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise refuse("This file is damaged, or no picture. Upload a PNG or JPEG.") from error


def ask(model: PreTrainedModel, processor: ProcessorMixin, upload, question, percent) -> str:
    """An answer as HTML.

    Args:
        upload (`dict`, *optional*): A picture, as Gradio's Image component sends it.
        question (`str`, *optional*).
        percent (`float`, *optional*): Mean share of vision tokens to keep, from 1 to 100.

    Raises:
        [`gr.Error`]: a message for the page, where there is nothing to answer or the model fails.
    """
    if not isinstance(upload, dict) or not isinstance(upload.get("path"), str):
        raise refuse("Choose a picture first: upload one, or click an example.")
    if not isinstance(question, str | None):
        raise refuse("Write the question as text.")
    question = (question or "").strip()
    if not question:
        raise refuse("Write a question about the picture first.")
    if len(question) > LONGEST:
        raise refuse(f"The question has {len(question):,} characters. Ask in {LONGEST} characters at most.")
    if any("\ud800" <= character <= "\udfff" for character in question):
        raise refuse("The question holds half a character. Write it again.")
    if processor.image_token in question:
        raise refuse(f"Leave {processor.image_token} out of the question: the picture has its place already.")
    if not isinstance(percent, int | float) or not 1 <= percent <= 100:
        raise refuse("Set the share of vision tokens to a number from 1 to 100.")
    image = open_picture(Path(upload["path"]))
    tokenizer = processor.tokenizer
    words = question.split()
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    unknown = [word.strip("?.,!") for word, own in zip(words, ids) if tokenizer.unk_token_id in own]
    if unknown:
        gr.Warning(html.escape(f"The model was never taught these words: {', '.join(unknown)}. It can only guess."))
    try:
        comparison = compare(model, processor, image, question, percent / 100)
    except (RuntimeError, ValueError) as error:
        raise refuse(f"The model could not answer: {error}") from error
    config = model.config
    return render(comparison, token_side(processor), config.pruner_layer, config.text_config.num_hidden_layers)


def build(model: PreTrainedModel, processor: ProcessorMixin, *notes: str) -> gr.Blocks:
    """The page.

    Args:
        notes (`str`): Markdown to stand above the answer.
    """
    if not model.config.pruner_trained:
        free = "its first cut is training-free, by the vision encoder's features alone."
        notes = (f"**The pruner is not trained yet:** {free}", *notes)
    rows = json.loads((HERE / "examples" / "examples.json").read_text())
    examples = [[str(HERE / "examples" / row["image"]), row["question"]] for row in rows]

    def answer(upload, question, percent):
        return ask(model, processor, upload, question, percent)

    with gr.Blocks(title="LearnPruner", analytics_enabled=False) as page:
        gr.Markdown(TITLE)
        for note in notes:
            gr.Markdown(note, elem_classes="note")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(examples[0][0], label="Picture", height=220, sources=["upload", "clipboard"])
                question = gr.Textbox(examples[0][1], label="Question", max_length=LONGEST)
                percent = gr.Slider(
                    1,
                    100,
                    round(100 * model.config.pruner_ratio),
                    step=1,
                    label="Share of vision tokens kept (%)",
                    info="On average over the layers of the language model. At 100 nothing is dropped.",
                )
                button = gr.Button("Ask", variant="primary")
                chosen = gr.Examples(
                    examples, [image, question], label="Examples: a picture and a question each", visible_columns=[0]
                )
            with gr.Column(scale=5, min_width=300):
                shown = gr.HTML(padding=False)
        # Unprocessed, so that what is wrong with a value is said by `ask`. One queue: runs side by side would share
        # the machine that they are timed on.
        run = {
            "fn": answer,
            "inputs": [image, question, percent],
            "outputs": shown,
            "preprocess": False,
            "concurrency_id": "model",
        }
        gr.on([page.load, button.click, question.submit, percent.change], trigger_mode="always_last", **run)
        chosen.load_input_event.then(api_visibility="private", **run)
    return page


def main() -> None:
    other = os.environ.get("LEARNPRUNER_MODEL")
    try:
        pair = load(other or shipped_model())
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"LEARNPRUNER_MODEL={other or ''}: the model cannot be opened: {error}") from error
    # Fonts of the visitor's system, so that nothing is fetched from elsewhere, and colors of enough contrast.
    theme = gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )
    page = build(*pair, *([] if other else [SHIPPED_NOTE]))
    page.launch(theme=theme, css=CSS, max_file_size="20mb", footer_links=["gradio"])


if __name__ == "__main__":
    main()
