"""What a caller sees: layouts, shapes, labels, positions, and a model that holds nothing between two calls."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from learnpruner import Cut, LearnedScore, PrunedCache, TextAttention
from learnpruner.compat_learnpruner import CACHE

from oracles import masked
from tiny_models import (
    FAMILIES,
    IMAGE,
    LAYERS,
    LLAVA,
    PRUNED,
    QWEN,
    STOCK,
    VOCAB,
    build_inputs,
    image_states,
    labelled,
    pixels_of,
    positions,
    samples_of,
    tiny_pair,
    with_checkpointing,
    with_videos,
)

pytestmark = pytest.mark.core
# What both Qwen families share with each other is tried on one of them.
ONE_OF_EACH = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_names_all_that_the_stock_class_takes(family):
    """`generate` takes, and the Trainer keeps, what the signature names; `**kwargs` would not do."""
    stock, ours = (
        {name for name, one in inspect.signature(model.forward).parameters.items() if one.kind != one.VAR_KEYWORD}
        for model in (STOCK[family], PRUNED[family])
    )
    assert {"input_ids", "pixel_values", "labels"} <= stock
    assert stock <= ours


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family):
    stock, pruned = tiny_pair(family, attention="eager")
    inputs = build_inputs(family, samples_of("mixed", family))
    expected = stock(**inputs, output_hidden_states=True, output_attentions=True)
    outputs = pruned(**inputs, output_hidden_states=True, output_attentions=True)
    batch, sequence = inputs["input_ids"].shape
    assert outputs.logits.shape == expected.logits.shape
    if family in LLAVA:
        assert image_states(outputs).shape == image_states(expected).shape
    assert [kept.shape for kept in outputs.kept_mask] == [(batch, sequence)] * 2
    assert [scores.dtype for scores in outputs.vision_scores] == [torch.float32] * 2
    assert type(outputs[CACHE]) is PrunedCache
    # Physical: R1 rows before the second cut, R2 from there on.
    first, second = (int(kept.sum(1).max()) for kept in outputs.kept_mask)
    k = pruned.config.pruner_layer
    assert [states.shape[1] for states in outputs.hidden_states] == [first] * (k + 1) + [second] * (LAYERS - k)
    assert [weights.shape[-1] for weights in outputs.attentions] == [first] * k + [second] * (LAYERS - k)
    model_outputs = pruned.model(**inputs)
    assert model_outputs.last_hidden_state.shape[:2] == (batch, sequence)
    assert torch.equal(pruned.lm_head(model_outputs.last_hidden_state), outputs.logits)
    assert torch.equal(model_outputs.kept_mask[1], outputs.kept_mask[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_cover_what_was_scored(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    outputs = pruned(**inputs)
    vision = inputs["input_ids"] == IMAGE
    assert outputs.vision_scores[0][~vision].isnan().all()
    assert not outputs.vision_scores[1][vision & outputs.kept_mask[0]].isnan().any()
    assert outputs.vision_scores[1][~(vision & outputs.kept_mask[0])].isnan().all()


@ONE_OF_EACH
@pytest.mark.parametrize("keep", [1, 5, torch.tensor([-3, -1])])
def test_logits_to_keep(keep, family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    logits = pruned(**inputs).logits
    expected = logits[:, keep] if isinstance(keep, torch.Tensor) else logits[:, -keep:]
    assert torch.allclose(pruned(**inputs, logits_to_keep=keep).logits, expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_needs_no_other_labels(family):
    """Cross-entropy of the masked oracle over the labels that surviving rows predict."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : labels.shape[1] // 2] = -100
    outputs = pruned(**inputs, labels=labels)
    with masked(stock, outputs.kept_mask, (0, pruned.config.pruner_layer), inputs["attention_mask"], LAYERS):
        logits = stock(**inputs).logits
    losses = [
        torch.nn.functional.cross_entropy(logits[row, column - 1], labels[row, column])
        for row in range(len(labels))
        for column in range(1, labels.shape[1])
        if labels[row, column] != -100 and outputs.kept_mask[1][row, column - 1]
    ]
    assert outputs.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


@ONE_OF_EACH
@pytest.mark.parametrize("keep", [5, torch.tensor([30, 31, 32, 35])])
def test_labels_of_the_kept_logits(keep, family):
    """As the stock class takes them: labels of just the rows whose logits were asked for."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, [[2, (32, 32), 18]])
    rows = slice(-keep, None) if isinstance(keep, int) else keep
    labels = inputs["input_ids"][:, rows]
    assert stock(**inputs, labels=labels, logits_to_keep=keep).loss.isfinite()
    query_mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    query_mask[:, torch.arange(query_mask.shape[1])[rows].min() :] = False
    outputs = pruned(**inputs, labels=labels, logits_to_keep=keep)
    expected = pruned(**inputs, query_mask=query_mask)
    assert torch.equal(outputs.kept_mask[1], expected.kept_mask[1])
    assert torch.allclose(outputs.logits, expected.logits[:, rows], atol=1e-5)
    assert outputs.loss.isfinite()


@ONE_OF_EACH
def test_shifted_labels_of_dropped_rows_are_ignored(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    labels = inputs["input_ids"]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = pruned(**inputs, labels=labels).loss
    assert pruned(**inputs, labels=labels, shift_labels=shifted).loss.item() == pytest.approx(expected.item())


def test_return_dict_of_the_text_configuration():
    _, pruned = tiny_pair()
    inputs = build_inputs("llava", samples_of("one", "llava"))
    expected = pruned(**inputs).logits
    pruned.config.text_config.return_dict = False
    assert torch.equal(pruned(**inputs).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_the_unpruned_prompt(family):
    """Invariant 5, read off the rotary embeddings that each layer gets."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    where = positions(family, stock, inputs)
    seen = []
    for layer in pruned.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_embeddings"][0]), with_kwargs=True
        )
    outputs = pruned(**inputs, position_ids=where)
    cos, _ = stock.model.language_model.rotary_emb(torch.zeros(1, 1, 32), where)
    for number, given in enumerate(seen):
        kept = outputs.kept_mask[0 if number < pruned.config.pruner_layer else 1]
        for row in range(2):
            expected = cos[row, kept[row]]
            assert torch.equal(given[row, -len(expected) :], expected)


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 1, 3), (1, 2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_schedule_of_cuts(family, layers):
    """Other lists of cuts run on the same rails: masked oracle, generate, cache lengths."""
    stock, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    schedule = tuple(
        Cut(layer, lambda n, share=number + 2: n // share, TextAttention("all") if layer else LearnedScore(0.0))
        for number, layer in enumerate(layers)
    )
    outputs = pruned(**inputs, schedule=schedule)
    assert len(outputs.kept_mask) == len(layers)
    with masked(stock, outputs.kept_mask, layers, inputs["attention_mask"], LAYERS):
        expected = stock(**inputs).logits
    rows = outputs.kept_mask[-1]
    assert (outputs.logits - expected)[rows].abs().max() < 1e-4
    arguments = {**inputs, "max_new_tokens": 6, "do_sample": False, "schedule": schedule}
    assert torch.equal(pruned.generate(**arguments), pruned.generate(**arguments, use_cache=False))
    assert torch.equal(
        pruned.generate(**arguments, num_beams=2), pruned.generate(**arguments, num_beams=2, use_cache=False)
    )


def state_of(model):
    """Every attribute of every module, but for Qwen's `rope_deltas`, which are the stock class's and of the last
    prompt."""
    attributes = {
        (place, name): value
        for place, module in model.named_modules()
        for name, value in vars(module).items()
        if name != "rope_deltas"
    }
    return attributes | {("", name): value for name, value in model.config.to_dict().items()}


def assert_unchanged(model, before):
    after = state_of(model)
    assert after.keys() == before.keys()
    changed = [name for name, value in after.items() if value is not before[name] and value != before[name]]
    assert changed == []


@ONE_OF_EACH
def test_no_state_between_calls(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    first = pruned(**inputs)  # also lets transformers install the hooks by which the vision tower captures outputs
    before = state_of(pruned)
    pruned.generate(**inputs, max_new_tokens=3, num_beams=2, pruner_ratio=0.2)
    with pytest.raises(ValueError, match="pruner_ratio"):
        pruned(**inputs, pruner_ratio=7.0)
    assert_unchanged(pruned, before)
    pruned(**build_inputs(family, [[2, (32, 32), 9]], seed=1))
    assert torch.equal(pruned(**inputs).logits, first.logits)


@pytest.mark.parametrize("reentrant", [False, True])
@ONE_OF_EACH
def test_no_state_behind_a_step_of_training(family, reentrant):
    """But that the pruner counts as trained."""
    _, pruned = tiny_pair(family, pruner_trained=True)
    with_checkpointing(pruned.train_pruner_only(), reentrant)
    inputs = labelled(family, samples_of("mixed", family))
    with torch.enable_grad():
        pruned(**inputs).loss.backward()  # also lets transformers install its hooks
        before = state_of(pruned)
        pruned(**inputs).loss.backward()
    assert_unchanged(pruned, before)
    layers = pruned.model.language_model.layers
    assert len({layer._gradient_checkpointing_func for layer in layers}) == 1
    assert all(layer._gradient_checkpointing_func.func is checkpoint for layer in layers)


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@ONE_OF_EACH
def test_arguments_that_nobody_here_knows_reach_the_attention(family, ratio, monkeypatch):
    """As they do in the stock model, which hands them on; its `generate` refuses them, in its own words."""
    seen, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, *args, **kwargs):
        seen.append((type(module).__name__, {name: kwargs.get(name) for name in ("made_up", "num_items_in_batch")}))
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    inputs, given = build_inputs(family, samples_of("mixed", family)), {"made_up": 3, "num_items_in_batch": 5}
    reached = []
    for model in tiny_pair(family):
        seen.clear()
        model(**inputs, **given, **({"pruner_ratio": ratio} if type(model) is PRUNED[family] else {}))
        reached.append([entry for entry in seen if "Vision" not in entry[0] and "CLIP" not in entry[0]])
        with pytest.raises(ValueError, match=r"not used by the model: \['made_up'\]"):
            model.generate(**inputs, made_up=3, max_new_tokens=1)
    stock, pruned = reached
    assert stock == pruned
    assert [values for _, values in stock] == [given] * LAYERS


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@ONE_OF_EACH
def test_a_generate_reads_its_prompt_and_makes_its_schedule_once(family, options, monkeypatch):
    _, pruned = tiny_pair(family)
    made, kind = [], type(pruned.model)

    def counted(method):
        def count(*args, **kwargs):
            made.append(method.__name__)
            return method(*args, **kwargs)

        return count

    for name in ("read_prompt", "pruner_schedule"):
        monkeypatch.setattr(kind, name, counted(getattr(kind, name)))
    pruned.generate(**build_inputs(family, samples_of("mixed", family)), max_new_tokens=5, min_new_tokens=5, **options)
    assert sorted(made) == ["pruner_schedule", "read_prompt"]


@ONE_OF_EACH
def test_threads_with_different_ratios(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    ratios = (0.1, 0.3, 0.5, 1.0)
    expected = {ratio: pruned(**inputs, pruner_ratio=ratio).logits for ratio in ratios}
    wrong = []

    def work(ratio):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(pruned(**inputs, pruner_ratio=ratio).logits, expected[ratio]):
                    wrong.append(ratio)

    threads = [threading.Thread(target=work, args=(ratio,)) for ratio in ratios]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@ONE_OF_EACH
def test_copies_of_model_and_cache(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("padded", family))
    outputs = pruned(**inputs)
    assert torch.equal(copy.deepcopy(pruned)(**inputs).logits, outputs.logits)
    cache = pickle.loads(pickle.dumps(outputs[CACHE]))
    token = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, cache.get_seq_length() + 1)}
    token["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    if family in QWEN:
        # With a mask the stock class has no positions of single tokens.
        token["position_ids"] = positions(family, pruned, inputs, 1)[..., -1:]
    one, other = (pruned(**token, **{CACHE: held}).logits for held in (cache, outputs[CACHE]))
    assert torch.equal(one, other)


@ONE_OF_EACH
def test_tied_embeddings_and_resizing(family):
    _, pruned = tiny_pair(family)
    pruned.config.tie_word_embeddings = pruned.config.text_config.tie_word_embeddings = True
    pruned.tie_weights()
    assert pruned.lm_head.weight is pruned.get_input_embeddings().weight
    pruned.resize_token_embeddings(VOCAB + 8)
    inputs = build_inputs(family, samples_of("one", family))
    assert pruned(**inputs).logits.shape[-1] == VOCAB + 8


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_does_not_round_the_scores(family):
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("mixed", family))
    expected = pruned(**inputs)
    images = pruned.model.get_image_features(**pixels_of(family, inputs), return_dict=True)
    del inputs["pixel_values"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = pruned(**inputs, mm_encoder_outputs={"image": images})
    assert outputs.logits.dtype == torch.bfloat16
    assert torch.equal(outputs.kept_mask[0], expected.kept_mask[0])
    assert torch.equal(outputs.vision_scores[0].nan_to_num(), expected.vision_scores[0].nan_to_num())
    assert len(outputs.vision_scores[1].unique()) > 8


@pytest.mark.parametrize(("family", "batch"), with_videos(("mixed",)))
def test_counts_do_not_depend_on_the_pixels(family, batch):
    """Invariant 6: counts follow from configuration, token ids and grids alone."""
    _, pruned = tiny_pair(family)
    counts = set()
    for scale in (0.0, 1.0, 100.0):
        inputs = build_inputs(family, samples_of(batch, family))
        for name in {"pixel_values", "pixel_values_videos"} & set(inputs):
            inputs[name] = inputs[name] * scale
        counts.add(tuple(tuple(kept.sum(1).tolist()) for kept in pruned(**inputs).kept_mask))
    assert len(counts) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_really_fewer_rows_and_keys(family):
    """Every layer's MLP sees the kept rows alone, and the cache holds no more."""
    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, samples_of("one", family))
    seen = []
    for layer in pruned.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    outputs = pruned(**inputs)
    first, second = (int(kept.sum()) for kept in outputs.kept_mask)
    k = pruned.config.pruner_layer
    assert seen == [first] * k + [second] * (LAYERS - k)
    assert [layer.keys.shape[2] for layer in outputs[CACHE].layers] == seen


@ONE_OF_EACH
def test_no_attention_map_of_the_prompt_is_formed(family):
    """Invariant 8: the second cut forms text rows x keys; no tensor is sequence x sequence."""

    _, pruned = tiny_pair(family)
    inputs = build_inputs(family, [[2, (32, 32), 1, (32, 32), 1, (32, 32), 1, (32, 32), 3]])
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "attention" not in str(function):
                sizes.append((result.shape, str(function)))
            return result

    with Watch():
        outputs = pruned(**inputs)
    length = int(outputs.kept_mask[0].sum())
    heads = pruned.config.text_config.num_attention_heads
    maps = [size for size in sizes if len(size[0]) == 4 and size[0][1] == heads and size[0][2:] == (length, length)]
    assert not maps
    text = int((inputs["input_ids"] != IMAGE).sum())
    assert any(size[0] == (1, heads, text, length) for size in sizes)
