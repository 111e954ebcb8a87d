"""Invariants 4 and 5: every mode of generate agrees with teacher forcing, on the unpruned prompt's positions."""

import copy
from itertools import product

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, set_seed
from transformers.generation.candidate_generator import CandidateGenerator

from learnpruner.compat_learnpruner import CACHE

from oracles import masked
from tiny_models import (
    FAMILIES,
    LAYERS,
    NO_PLACEHOLDERS,
    PAD,
    QWEN,
    STOCK,
    TEXT_INPUTS,
    build_inputs,
    cat_pixels,
    pixels_of,
    positions,
    row_alone,
    samples_of,
    tiny_config,
    tiny_pair,
    with_answer,
    with_videos,
)

pytestmark = pytest.mark.core
GREEDY = {"do_sample": False, "max_new_tokens": 8, **NO_PLACEHOLDERS}
# What both Qwen families share with each other is tried on one of them.
ONE_OF_EACH = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


def forced_logits(family, pruned, inputs, sequences):
    """Logits of the answer in one pruned run over prompt and answer; the answer ranks nothing."""
    prompt = inputs["input_ids"].shape[1]
    whole = with_answer(inputs, sequences)
    where = positions(family, pruned, inputs, sequences.shape[1] - prompt)
    where = where.expand(*where.shape[:-2], len(sequences), -1)
    query_mask = torch.zeros_like(sequences, dtype=torch.bool)
    query_mask[:, :prompt] = True
    outputs = pruned(**whole, position_ids=where, query_mask=query_mask)
    return outputs, outputs.logits[:, prompt - 1 : -1]


@pytest.mark.parametrize(("family", "batch"), with_videos(("one", "padded", "two_images", "mixed", "image_first")))
def test_greedy_equals_teacher_forcing(family, batch):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    generated = pruned.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    outputs, expected = forced_logits(family, pruned, inputs, generated.sequences)
    assert (torch.stack(generated.logits, 1) - expected).abs().max() < 1e-4
    prompt = inputs["input_ids"].shape[1]
    for cut in range(2):
        assert torch.equal(generated[CACHE].kept_mask[cut], outputs.kept_mask[cut][:, :prompt])
    for layer, physical in zip(generated[CACHE].layers, (0, 0, 1, 1)):
        held = int(outputs.kept_mask[physical].sum(1).max())
        assert layer.keys.shape[2] == held - 1  # the last token was never run
        assert layer.get_seq_length() == generated.sequences.shape[1] - 1


@pytest.mark.parametrize("batch", ["one", "mixed", "image_last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache_the_text_is_the_same(family, batch):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    cached, uncached = (pruned.generate(**inputs, **GREEDY, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family, mode):
    """Each beam's transition scores are those of teacher forcing, so its cache followed it through every reorder."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("two_images", family))
    generated = pruned.generate(
        **inputs, **GREEDY, **mode, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    _, forced = forced_logits(family, pruned, inputs, generated.sequences)
    answer = generated.sequences[:, inputs["input_ids"].shape[1] :]
    log_probs = forced.log_softmax(-1).gather(2, answer.unsqueeze(-1)).squeeze(-1)
    scores = pruned.compute_transition_scores(
        generated.sequences, generated.scores, generated.beam_indices, normalize_logits=False
    )
    steps = log_probs[:, :1].cumsum(1)  # the first transition starts from zero
    assert (scores[:, 0] - steps[:, 0]).abs().max() < 1e-4
    assert (scores.sum(1) - log_probs.sum(1)).abs().max() < 1e-3
    assert generated[CACHE].kept_mask[0].shape[0] == mode["num_beams"]


@pytest.mark.parametrize(("family", "batch"), with_videos(("mixed",)))
def test_beams_in_a_batch_equal_beams_alone(family, batch):
    _, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    together = pruned.generate(**inputs, **GREEDY, num_beams=3)
    for row in range(len(samples)):
        alone, _ = row_alone(family, inputs, samples, row)
        single = pruned.generate(**alone, **GREEDY, num_beams=3)
        assert torch.equal(together[row, -8:], single[0, -8:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_follows_reordered_beams(family):
    """kept_mask and vision_scores of the returned cache are those of the sample, whatever the beams did."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    expected = pruned(**inputs, position_ids=positions(family, pruned, inputs))
    cache = pruned.generate(**inputs, **GREEDY, num_beams=2, return_dict_in_generate=True)[CACHE]
    for cut in range(2):
        assert torch.equal(cache.kept_mask[cut], expected.kept_mask[cut].repeat_interleave(2, 0))
        scores = expected.vision_scores[cut].repeat_interleave(2, 0)
        assert torch.allclose(cache.vision_scores[cut], scores, equal_nan=True, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_and_several_sequences(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    set_seed(1)
    generated = pruned.generate(
        **inputs,
        **{**GREEDY, "do_sample": True},
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    _, expected = forced_logits(family, pruned, inputs, generated.sequences)
    assert (torch.stack(generated.logits, 1) - expected).abs().max() < 1e-4
    assert len({tuple(row) for row in generated.sequences.tolist()}) > 1


def assistants(family):
    text = LlamaForCausalLM(tiny_config().text_config).eval()
    text.generation_config.pad_token_id = PAD
    stock, pruned = tiny_pair(family, seed=3)[0], tiny_pair(family, seed=4)[1]
    return {"stock": stock, "pruned": pruned, "text": text, "itself": None}


# Qwen takes no assistant that reads text alone: the stock class hands it mm_token_type_ids.
@pytest.mark.parametrize(
    ("family", "batch", "assistant"),
    [
        *product(("llava",), ("one", "two_images", "image_last"), ("stock", "pruned", "text", "itself")),
        *product(("qwen2_vl",), ("two_images",), ("stock", "pruned", "itself")),
    ],
)
def test_assisted_decoding_equals_greedy(family, batch, assistant):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    arguments = {**inputs, **GREEDY, "pruner_ratio": 0.3}
    greedy = pruned.generate(**arguments)
    helper = assistants(family)[assistant] or copy.deepcopy(pruned)
    assert torch.equal(pruned.generate(**arguments, assistant_model=helper), greedy)


class Foresight(CandidateGenerator):
    """Proposes the greedy answer itself, every third time with a wrong token in it."""

    def __init__(self, answer):
        self.answer, self.calls = answer, 0

    def get_candidates(self, input_ids, **kwargs):
        self.calls += 1
        length = input_ids.shape[1]
        candidates = self.answer[:, : min(length + 4, self.answer.shape[1] - 1)].clone()
        if self.calls % 3 == 0 and candidates.shape[1] > length + 1:
            candidates[:, length + 1] = 7
        return candidates, None

    def update_candidate_strategy(self, *args):
        pass


@pytest.mark.parametrize("batch", ["one", "two_images", "image_last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_accepted_and_rejected_candidates(family, batch, monkeypatch):
    """From the very first step, where candidates stand behind the prompt that is cut."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    arguments = {**inputs, **GREEDY, "max_new_tokens": 14}
    greedy = pruned.generate(**arguments)
    monkeypatch.setattr(pruned, "_get_candidate_generator", lambda *args, **kwargs: Foresight(greedy))
    lengths = []
    pruned.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    result = pruned.generate(**arguments, prompt_lookup_num_tokens=4, return_dict_in_generate=True)
    assert torch.equal(result.sequences, greedy)
    assert len(lengths) < 7  # candidates were accepted,
    assert lengths[0] == inputs["input_ids"].shape[1] + 4  # in the first step too
    expected = pruned(**inputs)
    for cut in range(2):
        assert torch.equal(result[CACHE].kept_mask[cut], expected.kept_mask[cut])
        assert result[CACHE].vision_scores[cut].shape == expected.vision_scores[cut].shape


@ONE_OF_EACH
@pytest.mark.parametrize("batch", ["one", "two_images"])
def test_prompt_lookup_equals_greedy(batch, family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    # The prompt ends in a token that its text holds before, so that a candidate is found in the first step.
    inputs["input_ids"][:, -1] = inputs["input_ids"][:, -5]
    greedy = pruned.generate(**inputs, **GREEDY)
    assert torch.equal(pruned.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=1), greedy)


def conversation(answer, first, more, answered=None):
    """The text inputs of a second turn: a prompt, its answer (0 in `answered`: it ended there), and another prompt."""
    turn = with_answer(first, answer)
    if answered is not None:
        turn["attention_mask"][:, -answered.shape[1] :] = answered
    names = [name for name in TEXT_INPUTS if name in turn]
    return {name: torch.cat([{**turn, "input_ids": answer}[name], more[name]], dim=1) for name in names}


def next_turn(family, model, both):
    """What a second turn's images need beside them: with M-RoPE, positions that follow from both turns' images."""
    if family not in QWEN:
        return {}
    return {"mm_token_type_ids": both["mm_token_type_ids"], "position_ids": positions(family, model, both)}


@pytest.mark.parametrize("cache", [DynamicCache, lambda: DynamicCache(config=tiny_config().text_config)])
@pytest.mark.parametrize("second", ["text", "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_on_the_same_cache(family, second, cache):
    """Against a cache-less run of both turns, at the kept sets that the two turns decided."""
    _, pruned = tiny_pair(family)
    first = build_inputs(family, [[2, (32, 32), 6]])
    size = (24, 48) if family in QWEN else (30, 60)
    more = build_inputs(family, [[3, size, 5]] if second == "image" else [[5]], seed=7)
    held = cache()
    answer = pruned.generate(**first, **GREEDY, **{CACHE: held})
    kept = [mask.clone() for mask in pruned(**first).kept_mask]
    whole = torch.cat([answer, more["input_ids"]], dim=1)
    turns = [pixels_of(family, turn) for turn in (first, more)]
    both = {**conversation(answer, first, more), **cat_pixels(family, [turn for turn in turns if turn])}
    result = pruned.generate(
        input_ids=whole,
        **turns[1],
        **next_turn(family, pruned, both),
        **GREEDY,
        **{CACHE: held},
        return_dict_in_generate=True,
        output_logits=True,
    )
    if second == "image":
        new_kept = result[CACHE].kept_mask
        assert new_kept[0].shape[1] == whole.shape[1] - answer.shape[1] + 1
        kept = [
            torch.cat([old, torch.ones(1, whole.shape[1] - old.shape[1] - new.shape[1], dtype=torch.bool), new], 1)
            for old, new in zip(kept, new_kept)
        ]
    stock = STOCK[family](tiny_config(family)).eval()
    stock.load_state_dict({k: v for k, v in pruned.state_dict().items() if ".pruner." not in k})
    steps = torch.ones(1, GREEDY["max_new_tokens"], dtype=torch.bool)
    kept = [
        torch.cat([mask, torch.ones(1, whole.shape[1] - mask.shape[1], dtype=torch.bool), steps], 1) for mask in kept
    ]
    both = with_answer(both, result.sequences)
    with masked(stock, kept, (0, pruned.config.pruner_layer), both["attention_mask"], LAYERS):
        expected = stock(**both).logits
    expected = expected[:, whole.shape[1] - 1 : -1]
    assert (torch.stack(result.logits, 1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("how", ["ids", "embeddings"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_of_a_padded_batch(family, how):
    """Several images, a text-only row, a row whose first answer ended early: a gap in the mask. Against the oracle."""
    stock, pruned = tiny_pair(family)
    first = build_inputs(family, samples_of("mixed", family))
    held = DynamicCache()
    arguments = {**GREEDY, "max_new_tokens": 5, CACHE: held, "return_dict_in_generate": True}
    result = pruned.generate(**first, **arguments)
    kept_first = [mask.clone() for mask in result[CACHE].kept_mask]
    more = build_inputs(family, [[2, (32, 32), 5], [4], [1, (32, 32), 1, (32, 32), 3]], seed=9)
    answered = torch.ones(3, 5, dtype=torch.long)
    answered[1, -2:] = 0
    order = ((first, 0), (more, 0), (first, 1), (first, 2), (more, 1), (more, 2))  # by row of the batch
    pixels = [pixels_of(family, turn, slice(image, image + 1)) for turn, image in order]
    both = {**conversation(result.sequences, first, more, answered), **cat_pixels(family, pixels)}
    ids, mask = both["input_ids"], both["attention_mask"]
    prompt = {"input_ids": ids} if how == "ids" else {"inputs_embeds": pruned.get_input_embeddings()(ids)}
    prompt |= {**pixels_of(family, more), **next_turn(family, pruned, both)}
    result = pruned.generate(**prompt, attention_mask=mask, **arguments, output_logits=True)

    kept = []
    for old, new in zip(kept_first, result[CACHE].kept_mask):
        between = mask[:, old.shape[1] : ids.shape[1] - new.shape[1]].bool()
        kept.append(torch.cat([old, between, new, torch.ones(3, 5, dtype=torch.bool)], 1))
    where = positions(family, stock, both, 5)
    both = with_answer(both, torch.cat([ids, result.sequences[:, -5:]], 1))
    with masked(stock, kept, (0, pruned.config.pruner_layer), both["attention_mask"], LAYERS):
        logits = stock(**both, position_ids=where).logits
    assert (torch.stack(result.logits, 1) - logits[:, ids.shape[1] - 1 : -1]).abs().max() < 1e-4


@ONE_OF_EACH
def test_text_first_image_in_the_second_turn_with_padding(family):
    """A plain cache that the stock path filled takes a cut later, and keeps its padding masked."""
    _, pruned = tiny_pair(family)
    text = build_inputs(family, [[4], [9]])
    cache = pruned(**text, position_ids=positions(family, pruned, text))[CACHE]
    assert type(cache) is DynamicCache
    samples = [[2, (32, 32), 6], [2, (32, 32), 6]]
    image = build_inputs(family, samples, seed=5)
    both = {**image, **{name: torch.cat([text[name], image[name]], 1) for name in TEXT_INPUTS if name in image}}
    where = positions(family, pruned, both)[..., -image["input_ids"].shape[1] :]
    outputs = pruned(**{**image, "attention_mask": both["attention_mask"]}, position_ids=where, **{CACHE: cache})
    for row in range(2):
        valid = text["attention_mask"][row].bool()
        alone_cache = pruned(input_ids=text["input_ids"][row : row + 1, valid])[CACHE]
        single, _ = row_alone(family, image, samples, row)
        del single["attention_mask"]
        # LLaVA's follow from the cache.
        own = {"position_ids": where[:, row : row + 1]} if family in QWEN else {}
        alone = pruned(**single, **own, **{CACHE: alone_cache})
        assert torch.equal(alone.kept_mask[1][0], outputs.kept_mask[1][row])
        assert (alone.logits[0] - outputs.logits[row]).abs().max() < 1e-4


@ONE_OF_EACH
@pytest.mark.parametrize("batch", ["one", "mixed"])
def test_several_tokens_at_once_and_crop(batch, family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of(batch, family))
    tokens = torch.randint(5, 100, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(0))
    mask = inputs["attention_mask"]
    prompt = {"position_ids": positions(family, pruned, inputs)}

    def continue_from(cache, ids, seen):
        total = torch.cat([mask, torch.ones(len(mask), seen + ids.shape[1], dtype=torch.long)], 1)
        where = positions(family, pruned, inputs, seen + ids.shape[1])[..., -ids.shape[1] :]
        return pruned(input_ids=ids, attention_mask=total, position_ids=where, **{CACHE: cache}).logits

    cache = pruned(**inputs, **prompt)[CACHE]
    at_once = continue_from(cache, tokens, 0)
    cache.crop(-3)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 2
    again = continue_from(cache, tokens[:, 2:], 2)
    assert (again - at_once[:, 2:]).abs().max() < 1e-5
    cache = pruned(**inputs, **prompt)[CACHE]
    one_by_one = torch.cat([continue_from(cache, tokens[:, i : i + 1], i) for i in range(5)], 1)
    assert (one_by_one - at_once).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_manual_decoding_needs_no_positions(family):
    """The cache reports logical lengths, so a loop without position_ids continues at the right place."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    expected = pruned.generate(**inputs, **{**GREEDY, "suppress_tokens": None})
    outputs = pruned(**inputs)
    tokens = []
    for _ in range(8):
        tokens.append(outputs.logits[:, -1:].argmax(-1))
        outputs = pruned(input_ids=tokens[-1], **{CACHE: outputs[CACHE]})
    assert torch.equal(torch.cat(tokens, 1), expected[:, -8:])


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_from_embeddings(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    expected = pruned.generate(**inputs, **GREEDY)[:, -8:]
    # From embeddings the stock class cannot tell M-RoPE's.
    where = {"position_ids": positions(family, pruned, inputs)} if family in QWEN else {}
    embeds = pruned.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(pruned.generate(inputs_embeds=embeds, **inputs, **where, **GREEDY), expected)


@ONE_OF_EACH
def test_cache_tools_keep_the_bookkeeping(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    cache = pruned(**inputs)[CACHE]
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(2)
    copied.batch_select_indices(torch.tensor([0, 2, 4]))
    for layer, other in zip(cache.layers, copied.layers):
        assert torch.equal(layer.keys, other.keys)
        assert layer.get_seq_length() == other.get_seq_length() == inputs["input_ids"].shape[1]
        assert torch.equal(layer.prefix_valid, other.prefix_valid)
    assert torch.equal(cache.kept_mask[1], copied.kept_mask[1])
    copied.reset()
    assert copied.get_seq_length() == 0
    assert copied.kept_mask is None
    again = pruned(**inputs, **{CACHE: copied})
    assert torch.equal(again.logits, pruned(**inputs).logits)


def test_streaming():
    _, pruned = tiny_pair()
    inputs = build_inputs("llava", samples_of("one", "llava"))
    chunks = []

    class Streamer:
        def put(self, value):
            chunks.append(value)

        def end(self):
            chunks.append(None)

    expected = pruned.generate(**inputs, **GREEDY)
    pruned.generate(**inputs, **GREEDY, streamer=Streamer())
    assert torch.equal(torch.cat([chunk.flatten() for chunk in chunks[:-1]]), expected[0])
