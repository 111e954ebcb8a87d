"""Gates in training: as a mask on the stock model, on every backend, dtype and kind of checkpointing."""

import copy
from unittest import mock

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from learnpruner import attention_learnpruner as attention_file
from learnpruner.attention_learnpruner import gated_attention, log_gates
from learnpruner.compat_learnpruner import CACHE
from learnpruner.cuts_learnpruner import Cut, LearnedScore

from tiny_models import (
    FAMILIES,
    LAYERS,
    build_inputs,
    labelled,
    samples_of,
    tiny_pair,
    vision_tower,
    with_checkpointing,
    with_videos,
)

pytestmark = pytest.mark.core
TWO = pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
BACKENDS = pytest.mark.parametrize("attention", ["sdpa", "eager"])
HALF = 0.5


@pytest.fixture(autouse=True)
def _gradients():
    with torch.enable_grad():
        yield


class Given(LearnedScore):
    """Gates that a test chooses, for the patches of all images behind one another; hard ones from a threshold."""

    def __init__(self, gates, threshold=None):
        super().__init__(diversity=0)
        self.gates, self.threshold = gates, threshold

    def gate(self, scores, shares):
        return list(self.gates[: sum(map(len, scores))].split([len(score) for score in scores]))

    def harden(self, gates, shares):
        return None if self.threshold is None else [gate > self.threshold for gate in gates]


def schedule(score):
    return (Cut(0, lambda size: max(1, size // 2), score),)


def drawn(count=600, low=0.01, seed=0):
    torch.manual_seed(seed)
    return (torch.rand(count) * (1 - low) + low).requires_grad_()


def gates_in_prompt(model, inputs, gates, structure=1.0):
    """`(batch, sequence)`, 1 at text, and a value at structure, which no gate is for."""
    prompt = model.model.read_prompt(inputs)
    with torch.no_grad():
        features = model.model.pruner_features(model.model.encode_images(inputs, prompt), prompt)
    spread = torch.ones(prompt.kinds.shape)
    places = {1: [], 2: []}
    start = 0
    for kind, modality in ((1, "image"), (2, "video")):
        for part in features.get(modality, ()):
            patch = ~part.isnan().any(-1)
            values = torch.full((len(part),), structure).masked_scatter(patch, gates[start : start + int(patch.sum())])
            start += int(patch.sum())
            places[kind].append(values)
        if places[kind]:
            spread = spread.masked_scatter(prompt.kinds == kind, torch.cat(places[kind]))
    return spread


def oracle_mask(gates, attention_mask, dtype=torch.float32):
    """What is added to the logits of row i at key j: log of j's gate, 0 at i itself, the lowest number where j is
    padding or comes later."""
    batch, length = gates.shape
    mask = torch.full((batch, 1, length, length), torch.finfo(dtype).min)
    rows, columns = torch.ones(length, length).tril().nonzero().unbind(1)
    bias = gates.log().masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)
    mask = mask.index_put((torch.arange(batch)[:, None], torch.tensor(0), rows, columns), bias[:, columns])
    own = torch.arange(length)
    return mask.index_put((torch.arange(batch)[:, None], torch.tensor(0), own, own), torch.zeros(1)).to(dtype)


def stock_logits(stock, pruned, inputs, mask):
    """The stock model on a prepared mask. Its positions come from the mask that the caller has."""
    prepared = {**inputs, "attention_mask": mask}
    if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        layout = {name: inputs[name] for name in names if name in inputs}
        prepared["position_ids"], _ = stock.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            attention_mask=inputs["attention_mask"],
            **layout,
        )
    return stock(**prepared, use_cache=False).logits


@BACKENDS
@pytest.mark.parametrize(("family", "batch"), with_videos(("one", "padded", "mixed")))
def test_gates_are_a_mask_on_the_stock_model(family, batch, attention):
    """Logits within 1e-5 and gradients within 1e-4 of the largest, for gates of 0.01 and more."""
    stock, model = tiny_pair(family, attention=attention)
    inputs = build_inputs(family, samples_of(batch, family))
    gates, same = drawn(), drawn()
    logits = model.train()(**inputs, schedule=schedule(Given(gates))).logits
    expected = stock_logits(
        stock, model, inputs, oracle_mask(gates_in_prompt(model, inputs, same), inputs["attention_mask"])
    )
    valid = inputs["attention_mask"].bool()
    scale = expected[valid].abs().max()
    assert (logits - expected)[valid].abs().max() < 1e-5 * max(1, scale)
    torch.manual_seed(1)
    weights = torch.randn_like(expected[valid])
    (logits[valid] * weights).sum().backward()
    (expected[valid] * weights).sum().backward()
    assert same.grad.abs().max() > 1e-3
    assert (gates.grad - same.grad).abs().max() < 1e-4 * same.grad.abs().max()
    # The proof can fail: the gates mattered.
    with torch.no_grad():
        assert (stock(**inputs).logits - expected)[valid].abs().max() > 1e-2


def sharpen(model, factor=30.0):
    """Attention whose logits lie far apart."""
    for layer in model.model.language_model.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight.mul_(factor)


@BACKENDS
@pytest.mark.parametrize("how", ["soft", "hard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_of_0_is_the_cut(family, how, attention):
    """Where attention is sharp, too: 20 and more between the logits of a row's keys."""
    _, model = tiny_pair(family, attention=attention)
    sharpen(model)
    inputs = build_inputs(family, samples_of("mixed", family))
    open_ = torch.rand(600, generator=torch.Generator().manual_seed(3)) < HALF

    score = Given(open_.float(), threshold=None if how == "soft" else HALF)
    gated = model.train()(**inputs, schedule=schedule(score)).logits
    # A hard forward is the cut, at which structure leaves first.
    kept = gates_in_prompt(model, inputs, open_.float(), structure=float(how == "soft")).bool()
    kept &= inputs["attention_mask"].bool()
    expected = stock_of_kept(family, attention, model, inputs, kept)
    assert (gated - expected)[kept].abs().max() < 1e-4
    with torch.no_grad():
        whole = model(**inputs, pruner_ratio=1.0).logits
    assert (whole - expected)[kept].abs().max() > 1e-2


def stock_of_kept(family, attention, model, inputs, kept):
    """The stock model with every dropped key out of sight in every layer."""
    stock, _ = tiny_pair(family, attention=attention)
    sharpen(stock)
    with torch.no_grad():
        return stock_logits(stock, model, inputs, oracle_mask(torch.ones(kept.shape), kept.long()))


def plain_attention(query, key, value, gates, valid, scale, own_key=True):
    """Attention by its definition, in the precision that it is given: each key's exponential times its gate."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.mT * scale
    length = logits.shape[-1]
    weights = gates[:, None, None].expand(-1, 1, length, -1)
    if own_key:
        weights = weights.masked_fill(torch.eye(length, dtype=torch.bool), 1)
    seen = torch.ones(length, length).tril().bool() & (valid[:, None, None] | torch.eye(length, dtype=torch.bool))
    exponentials = (
        weights * seen * (logits - logits.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)).clamp(max=0).exp()
    )
    return (exponentials / exponentials.sum(-1, keepdim=True) @ value).transpose(1, 2)


def operands(size, dtype=torch.float32, batch=2, length=40, heads=4, kv_heads=2):
    torch.manual_seed(size)
    shapes = [(batch, heads, length, size)] + [(batch, kv_heads, length, size)] * 2
    states = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[1:, :5] = False
    gates = torch.rand(batch, length).clamp(min=0.01).masked_fill(torch.arange(length) < 3, 1).requires_grad_()
    return states, gates, valid


class Module(torch.nn.Module):
    is_causal, num_key_value_groups, training = True, 2, True


def stock_function(name):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS["sdpa"]


def run_op(name, states, gates, valid, hard=None, dropout=0.0):
    scale = states[0].shape[-1] ** -0.5
    bias = log_gates(gates, valid)
    output, _ = gated_attention(
        stock_function(name), name == "sdpa", Module(), tuple(states), bias, hard, scaling=scale, dropout=dropout
    )
    return output


@BACKENDS
@pytest.mark.parametrize("size", [8, 16, 20, 22, 64, 72, 80, 96, 128, 256])
def test_every_head_size_and_grouped_heads(size, attention):
    states, gates, valid = operands(size)
    output = run_op(attention, states, gates, valid)
    doubles = [part.detach().double().requires_grad_() for part in states]
    double = gates.detach().double().requires_grad_()
    expected = plain_attention(*doubles, double, valid, size**-0.5)
    assert output.shape == expected.shape
    assert (output - expected)[valid].abs().max() < 1e-5
    weights = torch.randn(expected[valid].shape)
    (output[valid] * weights).sum().backward()
    (expected[valid] * weights.double()).sum().backward()
    for found, wanted in zip([*states, gates], [*doubles, double]):
        assert (found.grad - wanted.grad).abs().max() < 1e-4 * wanted.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BACKENDS
def test_low_precision(dtype, attention):
    """As near to the plain form as a mask of that precision is."""
    states, gates, valid = operands(64, dtype)
    output = run_op(attention, states, gates, valid)
    assert output.dtype == dtype
    doubles = [part.detach().double() for part in states]
    double = gates.detach().double().requires_grad_()
    expected = plain_attention(*doubles, double, valid, 64**-0.5)
    # Of the numbers' precision, and of that of the gates' logarithm: about 4 in the worst case.
    eps = torch.finfo(dtype).eps
    assert (output - expected)[valid].abs().max() < 4 * eps * expected[valid].abs().max()
    output[valid].float().square().sum().backward()
    expected[valid].square().sum().backward()
    assert gates.grad.isfinite().all()
    # At a gate of exactly 1 (text here, and of vision tokens where their score is saturated) float16 has no gradient of
    # what its own row lacks, which is nothing.
    below = gates.detach() < 1
    assert (gates.grad - double.grad)[below].abs().max() < 16 * eps * double.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", ["text", "vision"])
@pytest.mark.parametrize("gap", [0, 10, 40, 90, 300])
@BACKENDS
def test_sharp_attention(attention, gap, first, dtype):
    """The logits of a row's own key and its neighbours lie `gap` above that of the first key, which all rows see, and
    which may be a vision token that is nearly closed."""
    states, gates, valid = operands(64, dtype)
    with torch.no_grad():
        direction = F.normalize(torch.ones(64), dim=0)
        states[0].add_((direction * 8 * max(1, gap / 8)).to(dtype))
        states[1][:, :, 6:].add_((direction * min(8, gap)).to(dtype))
        if first == "vision":
            gates[:, :6] = 1e-6
    output = run_op(attention, states, gates, valid)
    doubles = [part.detach().double() for part in states]
    double = gates.detach().double().requires_grad_()
    expected = plain_attention(*doubles, double, valid, 64**-0.5)
    # A logit of this size is rounded to so much.
    eps = max(torch.finfo(dtype).eps * 4, 1e-6) * max(1, gap)
    assert (output - expected)[valid].abs().max() < eps * max(1, expected[valid].abs().max())
    output[valid].float().square().sum().backward()
    expected[valid].square().sum().backward()
    assert all(part.grad.isfinite().all() for part in (*states, gates))
    # One part in a million of a key that outweighs all others by e^300 is rounding divided by a millionth.
    if dtype is torch.float32 and (first, gap) != ("vision", 300):
        assert (gates.grad - double.grad)[valid].abs().max() < 1e-4 * max(1, gap) * double.grad[valid].abs().max()


@BACKENDS
def test_hard_gates_hand_on_the_gradient_of_soft_ones(attention):
    """Forward the cut; backward, to the gates, what soft gates have: bounded, and no zero for what was dropped."""
    states, gates, valid = operands(64)
    hard = gates.detach() > HALF
    output = run_op(attention, states, gates, valid, hard)
    cut = [part.detach().double().requires_grad_() for part in states]
    expected = plain_attention(*cut, hard.double(), valid, 64**-0.5)
    rows = valid & hard
    assert (output - expected)[rows].abs().max() < 1e-5
    weights = torch.randn(output[valid].shape)
    (output[valid] * weights).sum().backward()
    double = gates.detach().double().requires_grad_()
    soft = plain_attention(*[part.detach().double() for part in states], double, valid, 64**-0.5)
    (soft[valid] * weights.double()).sum().backward()
    assert (gates.grad - double.grad).abs().max() < 1e-4 * double.grad.abs().max()
    # To queries, keys and values the gradient of the cut, once.
    (expected[valid] * weights.double()).sum().backward()
    for found, wanted in zip(states, cut):
        assert (found.grad - wanted.grad).abs().max() < 1e-4 * wanted.grad.abs().max()
    others = torch.arange(gates.shape[1]) < gates.shape[1] - 1  # the last key is seen by its own row alone
    assert (gates.grad[valid & ~hard & others] != 0).all()
    # Of the gates' logarithm it is at most the sum over rows of |weight| |value - output|, whatever the logits are.
    sharp = [part.detach() * 40 for part in states[:2]] + [states[2].detach()]
    gates = gates.detach().requires_grad_()
    (run_op(attention, sharp, gates, valid, hard)[valid] * weights).sum().backward()
    bound = 2 * sharp[2].norm(dim=-1).amax() * weights.flatten(2).norm(dim=-1).sum()
    assert (gates.grad * gates).abs().max() < bound


def test_gates_need_no_mask_on_sdpa():
    """None of sequence x sequence goes to the kernel, with padding neither."""
    _, model = tiny_pair(attention="sdpa")
    inputs = build_inputs("llava", samples_of("mixed", "llava"))
    masks = []
    real = F.scaled_dot_product_attention

    def noting(query, key, value, attn_mask=None, **options):
        masks.append((attn_mask, options["is_causal"]))
        return real(query, key, value, attn_mask=attn_mask, **options)

    encoded = model.model.encode_images(inputs, model.model.read_prompt(inputs))
    with mock.patch.object(F, "scaled_dot_product_attention", noting):
        model.train()(**encoded)
    assert masks == [(None, True)] * LAYERS


@BACKENDS
def test_dropout(attention):
    """Its mean is the attention without: the same for each row, to what chance leaves of so many draws."""
    states, gates, valid = operands(16, batch=1, length=8)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([run_op(attention, states, gates, valid, dropout=0.2)[valid] for _ in range(3000)])
        expected = run_op(attention, states, gates, valid)[valid]
    assert draws.std(0).max() > 0.05
    error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5).clamp_min(1e-6)
    assert error.abs().max() < 5
    assert error.square().mean() < 1.3


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@BACKENDS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("everything", [True, False], ids=["all", "pruner"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family, everything, reentrant, attention):
    _, model = tiny_pair(family, attention=attention)
    model.train()
    if not everything:
        model.train_pruner_only()
    inputs = labelled(family, samples_of("mixed", family))
    expected = gradients(model, inputs)
    with_checkpointing(model, reentrant)
    found = gradients(model, inputs)
    assert any("pruner" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@TWO
def test_reentrant_checkpointing_of_the_text_model_alone(family):
    """Switched on behind the back of the classes of this package."""
    _, model = tiny_pair(family)
    model.train_pruner_only()
    inputs = labelled(family, samples_of("padded", family))
    expected = gradients(model, inputs)
    with_checkpointing(model.model.language_model, True)
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    copy.deepcopy(model)


@TWO
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_float16_base_trains_under_bfloat16(family, reentrant):
    _, model = tiny_pair(family)
    model.train_pruner_only()
    # Of its tower, PyTorch has no LayerNorm of float16 weights and bfloat16 inputs on the CPU.
    model.model.language_model.half()
    model.lm_head.half()
    if reentrant is not None:
        with_checkpointing(model, reentrant)
    inputs = labelled(family, samples_of("mixed", family))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    grads = [parameter.grad for parameter in model.model.pruner.parameters()]
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_backends_are_refused_before_the_images_are_encoded(family, name):
    _, model = tiny_pair(family)
    model.train()
    model.config.text_config._attn_implementation = name
    encoded = []
    vision_tower(model).register_forward_pre_hook(lambda *_: encoded.append(1))
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model(**labelled(family, samples_of("one", family)))
    assert not encoded


class Plain(torch.nn.Module):
    """Attention that does not ask transformers for its function."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


@TWO
def test_a_layer_whose_attention_cannot_be_weighed(family):
    _, model = tiny_pair(family)
    layers = model.train().model.language_model.layers
    layers[1].self_attn = Plain(layers[1].self_attn)
    with pytest.raises(RuntimeError, match="no vision token was weighed"):
        model(**labelled(family, samples_of("one", family)))


@TWO
def test_a_cache_of_earlier_tokens_is_refused(family):
    stock, model = tiny_pair(family)
    inputs = labelled(family, samples_of("one", family))
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        stock(input_ids=torch.tensor([[5, 6, 7]]), **{CACHE: cache})
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (3, 0), value=1)
    if "mm_token_type_ids" in inputs:
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with pytest.raises(ValueError, match="whole prompts"):
        model.train()(**inputs, **{CACHE: cache})


def test_names_of_the_gates_stay_inside():
    """What the hooks add to the arguments reaches no attention function of the user."""
    _, model = tiny_pair()
    seen = []
    real = attention_file.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def noting(module, *args, **kwargs):
        seen.append(set(kwargs))
        return real(module, *args, **kwargs)

    with mock.patch.dict(attention_file.ALL_ATTENTION_FUNCTIONS._local_mapping, {"sdpa": noting}):
        model.train()(**labelled("llava", samples_of("one", "llava")))
    assert seen
    assert not any("prune" in name for names in seen for name in names)


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("hard", [False, True])
def test_every_kernel_of_the_cpu(kernel, hard):
    states, gates, valid = operands(64)
    found = []
    for kernels in ([kernel], [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        inputs = [part.detach().requires_grad_() for part in (*states, gates)]
        with sdpa_kernel(kernels):
            output = run_op("sdpa", inputs[:3], inputs[3], valid, inputs[3].detach() > HALF if hard else None)
        output[valid].square().sum().backward()
        found.append([output, *(part.grad for part in inputs)])
    for one, other in zip(*found):
        assert (one - other).abs().max() < 1e-5 * max(1, other.abs().max())


@pytest.mark.parametrize("kind", CheckpointImpl)
@TWO
def test_checkpoint_wrapper(family, kind):
    """Torch's own, around each layer."""
    _, model = tiny_pair(family)
    model.train_pruner_only()
    inputs = labelled(family, samples_of("mixed", family))
    expected = gradients(model, inputs)
    layers = set(model.model.language_model.layers)
    apply_activation_checkpointing(
        model, lambda module: checkpoint_wrapper(module, checkpoint_impl=kind), check_fn=lambda module: module in layers
    )
    found = gradients(model, inputs)
    assert expected
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_low_precision_trains(family, dtype, attention):
    """Its pruner stays in float32, as from_pretrained has it."""
    _, exact = tiny_pair(family, attention=attention)
    _, model = tiny_pair(family, attention=attention, dtype=dtype)
    model.model.pruner.float().load_state_dict(exact.model.pruner.state_dict())
    inputs = labelled(family, samples_of("mixed", family))
    low = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    loss = model.train_pruner_only()(**low, use_cache=False).loss
    loss.backward()
    expected = exact.train()(**inputs, use_cache=False).loss
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.model.pruner.parameters()])
    assert gradient.isfinite().all()
    assert gradient.any()
