"""Qwen2-VL and Qwen2.5-VL alone: M-RoPE, tokens of merged patches, budgets of videos. The rest of their proof is in the
suite that all families share."""

import pytest
import torch
from transformers import DynamicCache

from learnpruner.budget_learnpruner import keep_counts
from learnpruner.compat_learnpruner import CACHE

import oracles
from tiny_models import (
    IMAGE,
    LAYERS,
    NO_PLACEHOLDERS,
    QWEN,
    VIDEO,
    build_inputs,
    covering,
    image_tokens,
    pixels_of,
    positions,
    samples_of,
    tiny_pair,
    vision_tower,
    with_answer,
)

pytestmark = [pytest.mark.core, pytest.mark.parametrize("family", QWEN)]
BATCHES = ("one", "padded", "two_images", "mixed", "video", "image_and_video")
NEW = {"max_new_tokens": 6, "do_sample": False, **NO_PLACEHOLDERS}


def seven(ids, scores):
    return torch.full_like(scores, -1e9).index_fill(1, torch.tensor(7), 0)


# One answer from every model.
SAME = {"max_new_tokens": 4, "do_sample": False, "logits_processor": [seven]}


def encoded(model, inputs):
    """The encoder's outputs, by modality."""
    outputs = {}
    if "pixel_values" in inputs:
        outputs["image"] = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
    if "pixel_values_videos" in inputs:
        outputs["video"] = model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        )
    return outputs


def parts_of(samples, row, per_frame=True):
    """The parts of a sample that have budgets of their own: kind, and number of tokens."""
    for part in samples[row]:
        if isinstance(part, tuple) and len(part) == 3 and per_frame:
            yield from [(VIDEO, image_tokens("qwen2_vl", *part[1:]))] * part[0]
        elif isinstance(part, tuple):
            yield IMAGE if len(part) == 2 else VIDEO, image_tokens("qwen2_vl", *part)


def rotary_of_each_layer(model, log):
    """Logs cos and sin of M-RoPE as each decoder layer gets them."""
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: log.append(kwargs["position_embeddings"]), with_kwargs=True
        )


@pytest.mark.parametrize("mode", ["forward", "generate"])
@pytest.mark.parametrize("batch", BATCHES)
def test_mrope_is_the_stock_models_token_by_token(family, batch, mode):
    """Positions that both classes find by themselves, in the prompt and in every step behind it."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    logs = {}
    for model in (stock, pruned):
        logs[model] = []
        rotary_of_each_layer(model, logs[model])
        if mode == "forward":
            result = model(**inputs)
        else:
            cache = model.generate(**inputs, **SAME, return_dict_in_generate=True)[CACHE]
            result = {"kept_mask": cache.kept_mask if model is pruned else None}
    kept_mask = result["kept_mask"]
    steps = 1 if mode == "forward" else SAME["max_new_tokens"]
    assert len(logs[stock]) == len(logs[pruned]) == LAYERS * steps
    for number, (expected, given) in enumerate(zip(logs[stock], logs[pruned])):
        kept = kept_mask[0 if number % LAYERS < pruned.config.pruner_layer else 1]
        for theirs, ours in zip(expected, given):
            if number >= LAYERS:  # a step behind the prompt
                assert torch.equal(ours, theirs)
                continue
            for row, columns in enumerate(kept):
                rows = theirs[row, columns]
                assert torch.equal(ours[row, -len(rows) :], rows)
    assert torch.equal(pruned.model.rope_deltas, stock.model.rope_deltas)
    assert (stock.model.rope_deltas != 0).any()


@pytest.mark.parametrize("batch", ["video", "image_and_video"])
def test_videos_at_a_ratio_of_one_are_the_stock_class(family, batch):
    stock, pruned = tiny_pair(family, pruner_ratio=1.0)
    inputs = build_inputs(family, samples_of(batch, family))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected, outputs = (model(**inputs, labels=labels) for model in (stock, pruned))
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
    for mode in ({}, {"num_beams": 3}, {"use_cache": False}):
        assert torch.equal(pruned.generate(**inputs, **NEW, **mode), stock.generate(**inputs, **NEW, **mode))


def test_seconds_per_grid(family):
    """Qwen2.5-VL's frames lie apart in time: other seconds are other positions, cut or not, and the answers follow."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("image_and_video", family))
    if family == "qwen2_vl":
        # Its frames have none: as in the stock class, generate refuses them, and forward passes them on unread.
        seconds = torch.ones(len(inputs["video_grid_thw"]))
        for model in (stock, pruned):
            with pytest.raises(ValueError, match="second_per_grid_ts"):
                model.generate(**inputs, **NEW, second_per_grid_ts=seconds)
            assert torch.equal(model(**inputs, second_per_grid_ts=seconds).logits, model(**inputs).logits)
        return
    slow = {**inputs, "second_per_grid_ts": 8 * inputs["second_per_grid_ts"]}
    where, later = (positions(family, stock, given) for given in (inputs, slow))
    assert not torch.equal(where, later)
    for given, place in ((inputs, where), (slow, later)):
        # As a processor without return_tensors has them, too.
        for seconds in (given["second_per_grid_ts"], given["second_per_grid_ts"].tolist()):
            given = {**given, "second_per_grid_ts": seconds}
            assert torch.equal(pruned(**given).logits, pruned(**given, position_ids=place).logits)
            assert torch.equal(pruned(**given, pruner_ratio=1.0).logits, stock(**given).logits)
            assert torch.equal(pruned.generate(**given, **NEW), pruned.generate(**given, **NEW, position_ids=place))
            assert torch.equal(pruned.generate(**given, **NEW, pruner_ratio=1.0), stock.generate(**given, **NEW))
    assert not torch.equal(pruned(**inputs).logits, pruned(**slow).logits)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_scorer_reads_what_the_merger_reads(family, batch):
    """In the order of the merged tokens: what the pruner is given, merged, is what the model puts into the prompt."""
    _, pruned = tiny_pair(family, pruner_per_frame=False)
    inputs = build_inputs(family, samples_of(batch, family))
    seen = []
    pruned.model.pruner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pruned(**inputs)
    tokens = [token for outputs in encoded(pruned, inputs).values() for token in outputs.pooler_output]
    assert len(seen[0]) == len(tokens)
    for features, expected in zip(seen[0], tokens):
        patches = features[: len(expected)].reshape(4 * len(expected), -1)
        torch.testing.assert_close(pruned.model.visual.merger(patches), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("batch", ["mixed", "video", "image_and_video"])
def test_first_cut_of_each_part(family, batch, per_frame):
    """Each image, each group of frames (or clip), is cut for itself, by the scores of its own tokens."""
    _, pruned = tiny_pair(family, pruner_ratio=0.3, pruner_diversity=0.5, pruner_per_frame=per_frame)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    seen = []
    pruned.model.pruner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    kept_mask = pruned(**inputs).kept_mask[0]
    images, videos = (
        [part for row in range(len(samples)) for part in parts_of(samples, row, per_frame) if part[0] == kind]
        for kind in (IMAGE, VIDEO)
    )
    features = {IMAGE: list(seen[0][: len(images)]), VIDEO: list(seen[0][len(images) :])}
    assert len(features[VIDEO]) == len(videos)
    for row in range(len(samples)):
        columns = torch.isin(inputs["input_ids"][row], torch.tensor([IMAGE, VIDEO])).nonzero().flatten()
        for kind, tokens in parts_of(samples, row, per_frame):
            own, columns = columns[:tokens], columns[tokens:]
            count, _ = oracles.keep_counts(tokens, 0.3, LAYERS, pruned.config.pruner_layer, 3.0)
            expected = oracles.first_cut(pruned.model.pruner, list(features[kind].pop(0)[:tokens]), count, 0.5)
            assert kept_mask[row, own].nonzero().flatten().tolist() == expected
        assert not len(columns)


@pytest.mark.parametrize(
    ("ratio", "floor", "per_frame", "batch"),
    covering(
        [(ratio, floor) for ratio in (0.05, 0.2, 0.5) for floor in (1, 7)],
        (True, False),
        ("mixed", "video", "image_and_video"),
    ),
)
def test_budgets(family, batch, ratio, per_frame, floor):
    """Exact: by the tokens of each image, each group of frames or each clip, with a floor for the small."""
    _, pruned = tiny_pair(family, pruner_ratio=ratio, pruner_per_frame=per_frame, pruner_min_tokens=floor)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    first, second = pruned(**inputs).kept_mask
    for row in range(len(samples)):
        columns = torch.isin(inputs["input_ids"][row], torch.tensor([IMAGE, VIDEO])).nonzero().flatten()
        vision, total = columns, 0
        for _, tokens in parts_of(samples, row, per_frame):
            own, columns = columns[:tokens], columns[tokens:]
            r1, r2 = oracles.keep_counts(tokens, ratio, LAYERS, pruned.config.pruner_layer, 3.0)
            least = min(floor, tokens)
            assert first[row, own].sum() == max(r1, least)
            total += max(min(r1, r2), least)
        assert not len(columns)
        assert second[row, vision].sum() == total


def test_an_image_whose_share_rounds_to_zero_keeps_a_token(family):
    _, pruned = tiny_pair(family, pruner_ratio=0.1)
    inputs = build_inputs(family, [[3, (8, 8), 2, (56, 32), 4], [2, (8, 16), 5]])
    first, second = pruned(**inputs).kept_mask
    vision = inputs["input_ids"] == IMAGE
    assert first[0, vision[0]][0]
    assert first[1, vision[1]].sum() == 1
    # At the second cut the text decides which image matters, out of a budget that counts every image.
    assert [second[row, vision[row]].sum().item() for row in range(2)] == [1 + keep_of(28, pruned.config)[1], 1]
    generated = pruned.generate(**inputs, **NEW, return_dict_in_generate=True)
    assert torch.equal(generated[CACHE].kept_mask[1], second)


def keep_of(tokens, config):
    return keep_counts(
        tokens, config.pruner_ratio, num_layers=LAYERS, pruner_layer=config.pruner_layer, stage_ratio=3.0
    )


@pytest.mark.parametrize("last", [(24, 32), (2, 24, 32)])
def test_a_vision_token_that_ends_a_sample_is_never_dropped(family, last):
    """Behind another image and another video: the last of its own kind."""
    for seed in range(4):
        _, pruned = tiny_pair(family, pruner_ratio=0.05, seed=seed)
        samples = [[2, (32, 32), 1, (2, 32, 32), 3, last], [1, (24, 32), 2, (2, 24, 24), 4]]
        inputs = build_inputs(family, samples, seed=seed)
        for kept in pruned(**inputs).kept_mask:
            assert kept[:, -1].all()


@pytest.mark.parametrize("mode", [{"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
def test_a_placeholder_in_an_answer_is_text(family, mode):
    """What no image belongs to stands in the answer as any other token does."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    script = torch.tensor([9, VIDEO, VIDEO, 11, 12, 13])

    def follow(ids, scores):
        token = script[ids.shape[1] - inputs["input_ids"].shape[1]]
        return torch.full_like(scores, -1e9).index_fill(1, token, 0)

    arguments = {
        **inputs,
        **NEW,
        "suppress_tokens": None,
        "logits_processor": [follow],
        "return_dict_in_generate": True,
    }
    cached, other = (pruned.generate(**arguments, **extra, output_logits=True) for extra in ({}, mode))
    assert torch.equal(cached.sequences, other.sequences)
    assert (torch.stack(cached.logits) - torch.stack(other.logits)).abs().max() < 1e-4


def test_grids_of_a_whole_conversation(family):
    """Encoded images of a second turn, with all grids for the positions: the last of them are this turn's."""
    _, pruned = tiny_pair(family)
    whole = build_inputs(family, [[2, (32, 32), 6, (24, 48), 5]])
    new = 2 + 18 + 5
    where = positions(family, pruned, whole)[..., -new:]
    first = {name: whole[name][:, :-new] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    turn = {"input_ids": whole["input_ids"][:, -new:], "position_ids": where}
    pixels = pixels_of(family, whole, slice(1, 2))
    results = []
    for images in (
        pixels,
        {"image_grid_thw": whole["image_grid_thw"], "mm_encoder_outputs": encoded(pruned, pixels)},
    ):
        cache = pruned(**first, **pixels_of(family, whole, slice(0, 1)))[CACHE]
        results.append(pruned(**turn, **images, **{CACHE: cache}))
    assert torch.equal(results[0].kept_mask[1], results[1].kept_mask[1])
    assert torch.equal(results[0].logits, results[1].logits)


CALLS = {
    "forward": lambda model, **kwargs: model(**kwargs),
    "generate": lambda model, **kwargs: model.generate(**kwargs, **NEW),
}


def refused(model, call, inputs, message):
    """The call fails with `message` before the encoder runs; at a ratio of 1 it is the stock class's affair."""
    seen = []
    handle = vision_tower(model).register_forward_pre_hook(lambda *args: seen.append(args))
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, **inputs)
    handle.remove()
    assert not seen, "refused before any work"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch", ["one", "video"])
def test_missing_token_types(family, batch, call):
    """The stock class would take the positions of text: in generate it says nothing."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    where = positions(family, pruned, inputs)
    expected = CALLS[call](pruned, **inputs)
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        CALLS[call](pruned, **inputs)
    # Not needed where the positions are given.
    outputs = CALLS[call](pruned, **inputs, position_ids=where)
    if call == "generate":
        assert torch.equal(outputs, expected)
    else:
        assert torch.equal(outputs.logits, expected.logits)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("batch", "wrong"),
    [
        ("padded", torch.zeros_like),
        ("padded", torch.ones_like),
        ("padded", lambda types: types[:, 1:]),
        ("padded", lambda types: types[:1]),
        ("padded", lambda types: 2 * types),
        ("video", lambda types: types.clamp(max=1)),
        ("image_and_video", lambda types: types.roll(1, 1)),
    ],
    ids=["zeros", "ones", "short", "one row", "images as videos", "videos as images", "shifted"],
)
def test_wrong_token_types(family, batch, wrong, call):
    """The stock class would take other positions for them, or fail where nobody would look for them."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    types = inputs["mm_token_type_ids"]
    refused(pruned, call, {**inputs, "mm_token_type_ids": wrong(types)}, "mm_token_type_ids")


@pytest.mark.parametrize("call", CALLS)
def test_token_types_of_padding_do_not_matter(family, call):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    other = inputs["mm_token_type_ids"].masked_fill(inputs["attention_mask"] == 0, 2)
    assert not torch.equal(other, inputs["mm_token_type_ids"])
    one, two = (
        CALLS[call](pruned, **{**inputs, "mm_token_type_ids": types}) for types in (inputs["mm_token_type_ids"], other)
    )
    assert torch.equal(*((result if call == "generate" else result.logits) for result in (one, two)))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch", ["padded", "video"])
def test_embeddings_need_positions(family, batch, call):
    """From embeddings alone the stock class takes those of text, or of the call before."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    where = positions(family, pruned, inputs)
    expected = CALLS[call](pruned, **inputs)
    embeds = {**inputs, "inputs_embeds": pruned.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    refused(pruned, call, embeds, "position_ids")
    outputs = CALLS[call](pruned, **embeds, position_ids=where)
    if call == "generate":
        assert torch.equal(outputs, expected[:, -NEW["max_new_tokens"] :])
    else:
        assert torch.equal(outputs.logits, expected.logits)


def two_turns(family):
    """Both turns of a conversation with an image in each, and how many tokens the second has."""
    return build_inputs(family, [[2, (32, 32), 6, (24, 48), 5]]), image_tokens(family, 24, 48) + 5


def test_a_later_image_needs_positions(family):
    """In a second forward on one cache: with them it is the masked oracle over both turns."""
    stock, pruned = tiny_pair(family)
    whole, new = two_turns(family)
    where = positions(family, stock, whole)[..., -new:]
    ids, types = whole["input_ids"], whole["mm_token_type_ids"]
    turn = {"input_ids": ids[:, -new:], "mm_token_type_ids": types[:, -new:], **pixels_of(family, whole, slice(1, 2))}
    embeds = {**turn, "input_ids": None, "inputs_embeds": pruned.get_input_embeddings()(turn["input_ids"])}
    results = []
    for given in (turn, embeds):
        first = pruned(
            input_ids=ids[:, :-new], mm_token_type_ids=types[:, :-new], **pixels_of(family, whole, slice(0, 1))
        )
        cache = first[CACHE]
        refused(pruned, "forward", {**given, CACHE: cache}, "position_ids")
        results.append(pruned(**given, **{CACHE: cache}, position_ids=where))
    assert torch.equal(results[0].logits, results[1].logits)
    kept = [torch.cat(masks, 1) for masks in zip(first.kept_mask, results[0].kept_mask)]
    with oracles.masked(stock, kept, (0, pruned.config.pruner_layer), whole["attention_mask"], LAYERS):
        expected = stock(**whole).logits[:, -new:]
    rows = results[0].kept_mask[-1]
    assert (results[0].logits - expected)[rows].abs().max() < 1e-4


@pytest.mark.parametrize("pixels", ["all", "of the turn"])
def test_pixels_of_a_whole_conversation(family, pixels):
    """A processor call over both turns gives too many pixels for the second, and the error says what to do."""
    _, pruned = tiny_pair(family)
    whole, new = two_turns(family)
    both = {"image_grid_thw": whole["image_grid_thw"], "pixel_values": whole["pixel_values"]}
    if pixels == "of the turn":
        both["pixel_values"] = pixels_of(family, whole, slice(1, 2))["pixel_values"]
    first = {name: whole[name][:, :-new] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    cache = pruned(**first, **pixels_of(family, whole, slice(0, 1)))[CACHE]
    where = positions(family, pruned, whole)
    turn = {"input_ids": whole["input_ids"][:, -new:], "position_ids": where[..., -new:], **both}
    refused(pruned, "forward", {**turn, CACHE: cache}, "turn")
    for given in ({}, {"position_ids": where}):
        refused(pruned, "generate", {**whole, **both, **given, CACHE: cache}, "turn")


def test_generate_finds_the_positions_of_a_second_turn(family):
    """As the error says: the new image encoded, grids and token types of the whole conversation."""
    _, pruned = tiny_pair(family)
    first = build_inputs(family, [[2, (32, 32), 6]])
    more = build_inputs(family, [[3, (24, 48), 5]], seed=7)
    results = []
    for given in (False, True):
        cache = DynamicCache()
        answer = pruned.generate(**first, **NEW, **{CACHE: cache})
        both = with_answer(first, answer)
        both = {
            name: torch.cat([both[name], more[name]], 1)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        } | {"image_grid_thw": torch.cat([first["image_grid_thw"], more["image_grid_thw"]])}
        where = {"position_ids": positions(family, pruned, both)} if given else {}
        images = pruned.model.get_image_features(more["pixel_values"], more["image_grid_thw"], return_dict=True)
        results.append(
            pruned.generate(
                **both,
                **where,
                **NEW,
                mm_encoder_outputs={"image": images},
                **{CACHE: cache},
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    found, given = results
    assert torch.equal(found.sequences, given.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(given.logits))
    assert found[CACHE].kept_mask[0].shape[1] == more["input_ids"].shape[1] + 1
    # A wrong account of the whole is found, too.
    wrong = {**both, "mm_token_type_ids": both["mm_token_type_ids"].roll(1, 1), "mm_encoder_outputs": {"image": images}}
    refused(pruned, "generate", {**wrong, CACHE: cache}, "mm_token_type_ids")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("batch", "grid"), [("one", "image_grid_thw"), ("video", "video_grid_thw")])
def test_missing_grids(family, batch, grid, call):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    del inputs[grid]
    refused(pruned, call, inputs, f"need {grid}")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch", ["padded", "video"])
def test_grids_that_do_not_describe_the_pixels(family, batch, call):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    pixels, grid = ("pixel_values", "image_grid_thw")
    if batch == "video":
        pixels, grid = ("pixel_values_videos", "video_grid_thw")
    refused(pruned, call, {**inputs, pixels: inputs[pixels][:-4]}, f"{grid} describes")
    refused(pruned, call, {**inputs, grid: inputs[grid][:1]}, f"{grid} describes")
    # As many patches, of other images and videos than the prompt has.
    refused(pruned, call, {**inputs, grid: inputs[grid].flip(0)}, "do not match")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda grid: grid[0],
        lambda grid: grid[:, :2],
        lambda grid: grid.float(),
        lambda grid: torch.tensor([[1, 1, int(grid[0].prod())]]),
        lambda grid: torch.tensor([[int(grid[0].prod()), 1, 1]]),
        lambda grid: grid * torch.tensor([-1, -1, 1]),
    ],
    ids=["one dimension", "two columns", "floats", "odd height", "odd sides", "negative"],
)
@pytest.mark.parametrize(("part", "grid"), [((32, 32), "image_grid_thw"), ((2, 24, 32), "video_grid_thw")])
def test_grids_that_are_none(family, part, grid, wrong, call):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, [[3, part, 6]])
    refused(pruned, call, {**inputs, grid: wrong(inputs[grid])}, grid)


def test_encoder_outputs_without_features(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    outputs = encoded(pruned, inputs)
    expected = pruned(**inputs)
    del inputs["pixel_values"]
    assert torch.equal(pruned(**inputs, mm_encoder_outputs=outputs).logits, expected.logits)
    outputs["image"].last_hidden_state = None
    with pytest.raises(ValueError, match="get_image_features"):
        pruned(**inputs, mm_encoder_outputs=outputs)
