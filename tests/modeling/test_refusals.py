"""Invariant 9: what cannot work raises an error that says what to do, and only where a cut would happen."""

from itertools import product

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from learnpruner import Cut, LearnedScore, TextAttention
from learnpruner.compat_learnpruner import CACHE

from tiny_models import (
    FAMILIES,
    IMAGE,
    LAYERS,
    QWEN,
    build_inputs,
    pixels_of,
    positions,
    samples_of,
    tiny_config,
    tiny_pair,
    vision_tower,
)

pytestmark = pytest.mark.core
NEW = {"max_new_tokens": 4, "do_sample": False}
# What both Qwen families share with each other is tried on one of them.
ONE_OF_EACH = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])

# What each case passes to generate, a word of the message, and whether the stock model runs it here.
GENERATE = {
    "static": ({"cache_implementation": "static"}, "cache_implementation", True),
    "offloaded": ({"cache_implementation": "offloaded"}, "cache_implementation", False),
    "quantized": ({"cache_implementation": "quantized"}, "cache_implementation", False),
    "chunked": ({"prefill_chunk_size": 8}, "prefill_chunk_size", True),
}


@pytest.mark.parametrize("case", GENERATE)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, case):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    arguments, message, runs = GENERATE[case]
    seen = []
    handle = vision_tower(pruned).register_forward_pre_hook(lambda *args: seen.append(args))
    with pytest.raises(ValueError, match=message) as error:
        pruned.generate(**inputs, **NEW, **arguments)
    assert "pruner_ratio=1.0" in str(error.value)
    assert not seen, "refused before any work"
    handle.remove()
    if runs:
        expected = stock.generate(**inputs, **NEW, **arguments)
        assert torch.equal(pruned.generate(**inputs, **NEW, **arguments, pruner_ratio=1.0), expected)
        text = build_inputs(family, [[6]])
        assert torch.equal(pruned.generate(**text, **NEW, **arguments), stock.generate(**text, **NEW, **arguments))


class PlainQuantized(QuantizedLayer):
    """A quantised layer without the package that would quantise."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def cache_of(kind, family="llava"):
    text_config = tiny_config(family).text_config
    if kind == "static":
        return StaticCache(config=text_config, max_cache_len=64)
    if kind == "sliding":
        return DynamicCache(config=tiny_config(text="mistral", sliding_window=8).text_config)
    cache = DynamicCache(config=text_config)
    if kind == "quantized":
        cache.layers = [PlainQuantized() for _ in cache.layers]
    else:
        cache.offloading = True  # what offloading=True sets, without the accelerator that it needs
    return cache


@ONE_OF_EACH
@pytest.mark.parametrize("cache", ["static", "sliding", "quantized", "offloaded"])
def test_caches_whose_layers_cannot_differ(cache, family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    for call in (pruned, lambda **kwargs: pruned.generate(**NEW, **kwargs)):
        with pytest.raises(ValueError, match="DynamicCache"):
            call(**inputs, **{CACHE: cache_of(cache, family)})


@ONE_OF_EACH
def test_static_cache_in_forward_runs_where_nothing_is_cut(family):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    results = [
        model(**inputs, **{CACHE: cache_of("static", family)}, **ratio).logits
        for model, ratio in ((stock, {}), (pruned, {"pruner_ratio": 1.0}))
    ]
    assert torch.equal(*results)


def refused(model, inputs, message):
    """The same in a forward that would cut and in one that would gate; and that a ratio of 1 is refused nothing."""
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    model.train()
    with pytest.raises(ValueError, match=message):
        model(**inputs, labels=inputs["input_ids"])
    assert model(**inputs, labels=inputs["input_ids"], pruner_ratio=1.0).loss.isfinite()
    model.eval()


@pytest.mark.parametrize(("family", "text"), [("llava", "mistral"), ("llava", "qwen2"), ("qwen2_vl", None)])
def test_sliding_window_layers(family, text):
    fields = {"sliding_window": 8}
    if text != "mistral":
        fields |= {"use_sliding_window": True, "max_window_layers": 2}
    config = tiny_config(family, text, **fields)
    stock, pruned = tiny_pair(family, config=config)
    inputs = build_inputs(family, samples_of("one", family))
    refused(pruned, inputs, "sliding_window = None")
    with pytest.raises(ValueError, match="sliding_window = None"):
        pruned.generate(**inputs, **NEW)
    assert torch.equal(pruned(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)
    # What the message says.
    config.text_config.sliding_window = None
    if text != "mistral":
        config.text_config.layer_types = ["full_attention"] * LAYERS
    _, pruned = tiny_pair(family, config=config)
    assert pruned(**inputs).kept_mask is not None


@ONE_OF_EACH
def test_right_padding_in_generate(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family), side="right")
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        pruned.generate(**inputs, **NEW)
    pruned.generate(**inputs, **NEW, pruner_ratio=1.0)


@ONE_OF_EACH
def test_prepared_masks(family):
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    if family in QWEN:
        # From a prepared mask the stock class can tell no positions.
        inputs["position_ids"] = positions(family, stock, inputs)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.zeros(1, 1, length, length)
    refused(pruned, inputs, "2D attention_mask")
    assert torch.equal(pruned(**inputs, pruner_ratio=1.0).logits, stock(**inputs).logits)


@ONE_OF_EACH
def test_prepared_masks_on_a_pruned_cache(family):
    _, pruned = tiny_pair(family)
    cache = pruned(**build_inputs(family, samples_of("one", family)))[CACHE]
    with pytest.raises(ValueError, match="2D attention_mask"):
        pruned(input_ids=torch.tensor([[5]]), **{CACHE: cache}, attention_mask=torch.zeros(1, 1, 1, 40))
    for columns in (0, 1, cache.get_seq_length(), cache.get_seq_length() + 2):
        with pytest.raises(ValueError, match="whole conversation"):
            pruned(input_ids=torch.tensor([[5]]), **{CACHE: cache}, attention_mask=torch.ones(1, columns))


@pytest.mark.parametrize(
    ("family", "how"), [*product(("llava", "qwen2_vl"), ("positions", "lengths")), *((name, "rows") for name in QWEN)]
)
def test_packed_sequences(family, how):
    """In M-RoPE's form a row with the text's positions, which begin again, stands in front of the three."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, [[3, (32, 32), 6, (32, 32), 4]])
    three = positions(family, stock, inputs)
    del inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    text = torch.arange(length).unsqueeze(0)
    if how == "positions":
        packed = {"position_ids": text % 24, "use_cache": False}
    elif how == "rows":
        packed = {"position_ids": torch.cat([text.unsqueeze(0) % 24, three]), "use_cache": False}
        whole = {"position_ids": torch.cat([text.unsqueeze(0), three]), "use_cache": False}
        assert torch.equal(pruned(**inputs, **whole).logits, pruned(**inputs, use_cache=False).logits)
    else:
        packed = {"cu_seq_lens_q": torch.tensor([0, 24, length])}
    refused(pruned, {**inputs, **packed}, "packed")
    assert torch.equal(pruned(**inputs, **packed, pruner_ratio=1.0).logits, stock(**inputs, **packed).logits)
    if how == "rows":
        # The stock class sees that they are two.
        assert not torch.equal(stock(**inputs, **packed).logits, stock(**inputs, **whole).logits)


@ONE_OF_EACH
def test_tensor_parallelism(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    pruned._tp_size = 2
    with pytest.raises(ValueError, match="tensor parallelism"):
        pruned(**inputs)
    with pytest.raises(ValueError, match="tensor parallelism"):
        pruned.generate(**inputs, **NEW)
    pruned(**inputs, pruner_ratio=1.0)


@ONE_OF_EACH
def test_continuous_batching(family):
    _, pruned = tiny_pair(family)
    with pytest.raises(ValueError, match="continuous batching"):
        pruned.generate_batch([[1, 5, 6], [1, IMAGE, 7]])
    inputs = build_inputs(family, samples_of("one", family))
    pruned.config.text_config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="continuous batching"):
        pruned(**inputs)


@ONE_OF_EACH
@pytest.mark.parametrize("remove", [1, 3])
def test_cropping_into_the_pruned_prompt_changes_nothing(remove, family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    cache = pruned(**inputs)[CACHE]
    before = [(layer.keys.shape[2], layer.get_seq_length()) for layer in cache.layers]
    with pytest.raises(ValueError, match="fresh cache"):
        cache.crop(-remove)
    assert [(layer.keys.shape[2], layer.get_seq_length()) for layer in cache.layers] == before
    cache.crop(0)
    unpruned = pruned(**inputs, pruner_ratio=1.0)[CACHE]
    unpruned.crop(-remove)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.2, float("nan"), "0.5"])
def test_ratio_of_a_call(ratio):
    _, pruned = tiny_pair()
    inputs = build_inputs("llava", samples_of("one", "llava"))
    with pytest.raises(ValueError, match="pruner_ratio"):
        pruned(**inputs, pruner_ratio=ratio)
    with pytest.raises(ValueError, match="pruner_ratio"):
        pruned.generate(**inputs, **NEW, pruner_ratio=ratio)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_placeholders_that_do_not_match(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    fewer = {**inputs, **pixels_of(family, inputs, slice(1))}
    none_expected = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 7)}
    for wrong in (fewer, none_expected):
        for call in (pruned, lambda **kwargs: pruned.generate(**NEW, **kwargs)):
            with pytest.raises(ValueError, match="do not match"):
                call(**wrong)


@ONE_OF_EACH
def test_an_image_split_over_two_samples_is_refused(family):
    """In sum the placeholders match, and a stock model would mix the images up."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, [[3, (32, 32), 6], [3, (32, 32), 6]])
    inputs["input_ids"][0, 4] = 7
    inputs["input_ids"][1, -1] = IMAGE
    with pytest.raises(ValueError, match="do not match"):
        pruned(**inputs)


@ONE_OF_EACH
def test_a_placeholder_that_the_attention_mask_hides_is_refused(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    inputs["attention_mask"][0, :6] = 0
    with pytest.raises(ValueError, match="do not match"):
        pruned(**inputs)


def test_encoder_outputs_without_hidden_states():
    _, pruned = tiny_pair()
    inputs = build_inputs("llava", samples_of("one", "llava"))
    encoded = pruned.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    expected = pruned(**inputs, mm_encoder_outputs={"image": encoded}).logits
    assert expected.shape[:2] == inputs["input_ids"].shape
    encoded.hidden_states = None
    with pytest.raises(ValueError, match="get_image_features"):
        pruned(**inputs, mm_encoder_outputs={"image": encoded})


@ONE_OF_EACH
def test_images_given_twice(family):
    """As the stock class says it."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    encoded = pruned.model.get_image_features(**pixels_of(family, inputs), return_dict=True)
    with pytest.raises(ValueError, match=r"both pixel_values.* and mm_encoder_outputs"):
        pruned(**inputs, mm_encoder_outputs={"image": encoded})


@ONE_OF_EACH
def test_query_mask_of_another_shape(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    wrong = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="query_mask has the shape"):
        pruned(**inputs, query_mask=wrong)
    with pytest.raises(ValueError, match="query_mask has the shape"):
        pruned.generate(**inputs, **NEW, query_mask=wrong)


def test_schedules():
    _, pruned = tiny_pair()
    inputs = build_inputs("llava", samples_of("one", "llava"))
    first, second = Cut(0, lambda n: n // 2, LearnedScore(0.0)), Cut(2, lambda n: n // 4, TextAttention("all"))
    for wrong in ((second, first), (second, second), (Cut(4, lambda n: 1, TextAttention("all")),)):
        with pytest.raises(ValueError, match="ascending"):
            pruned(**inputs, schedule=wrong)
    with pytest.raises(ValueError, match="not both"):
        pruned(**inputs, schedule=(first, second), pruner_ratio=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_budgets_keep_one_token_of_each_image(family):
    _, pruned = tiny_pair(family, pruner_ratio=1e-9)
    inputs = build_inputs(family, samples_of("mixed", family))
    for kept in pruned(**inputs).kept_mask:
        assert [(kept[row] & (inputs["input_ids"][row] == IMAGE)).sum().item() for row in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_mask_for_several_samples(family):
    """It would broadcast in the stock model, and say wrong lengths here."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"][:1])
    with pytest.raises(ValueError, match="attention_mask has 1 rows, the prompt 3: give each sample one"):
        pruned(**inputs)
