"""VisionZip's whole chain against one image at a time, in plain loops: what is kept, and what each kept token holds."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from learnpruner.methods import METHODS

from tiny_models import PATCHES, build_inputs, covering, samples_of, tiny_pair, tokens_of


def tower(stock, pixels):
    """Of each crop: what [CLS] pays each patch, keys `(patches, heads, d)`, and features; of the layer before last."""
    seen = []
    vision = stock.model.vision_tower
    block = vision.encoder.layers[-2].self_attn
    before = vision.config._attn_implementation
    vision.set_attn_implementation("eager")
    with torch.no_grad(), block.k_proj.register_forward_hook(lambda *of: seen.append(of[2])):
        outputs = vision(pixels, output_attentions=True, output_hidden_states=True)
    vision.set_attn_implementation(before)
    keys = seen[0].view(len(pixels), 1 + PATCHES, block.num_heads, block.head_dim)
    return outputs.attentions[-2][:, :, 0, 1:].sum(1), keys[:, 1:], outputs.hidden_states[-2][:, 1:]


def reference(paid, keys, features, count, share, must=None):
    """Tokens kept of one image, and for each contextual one its features. Lists over tokens, `None` for newlines."""
    patches = [token for token, value in enumerate(paid) if value is not None]
    ranked = sorted(patches, key=lambda token: -paid[token])
    ranked += [token for token, value in enumerate(paid) if value is None]
    if must is not None:
        ranked = [must] + [token for token in ranked if token != must]
    contextual = min(round(share * count), count - 1)
    dominant = ranked[: count - contextual]
    rest = [token for token in patches if token not in dominant]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    gathered = {target: [] for target in targets}
    for token in rest:
        if token not in targets and targets:
            own = keys[token].mean(0)
            similar = [cosine_similarity(own, keys[target].mean(0), dim=0).item() for target in targets]
            gathered[targets[similar.index(max(similar))]].append(token)
    merged = {}
    for target, others in gathered.items():
        merged[target] = features[target].clone()
        if others:
            merged[target] += sum(features[other] for other in others) / len(others)
    kept = dominant + targets
    kept += [token for token, value in enumerate(paid) if value is None and token not in kept][: count - len(kept)]
    return sorted(kept), merged


@pytest.mark.parametrize(
    ("family", "ratio", "batch", "share"),
    covering(
        [(family, ratio) for family in ("llava", "llava_next") for ratio in (1 / 16, 0.3, 0.6, 0.94)],
        ("mixed", "image_last"),
        (10 / 64, 0.5, 0.9),
    ),
)
def test_the_chain_is_the_formulas(family, batch, ratio, share):
    stock, pruned = tiny_pair(family)
    samples = samples_of(batch, family)
    inputs = build_inputs(family, samples)
    seen = []
    with pruned.model.language_model.register_forward_pre_hook(
        lambda *of: seen.append(of[2]["inputs_embeds"]), with_kwargs=True
    ):
        outputs = pruned(**inputs, schedule=METHODS["visionzip"](ratio, contextual=share))
    newline = stock.model.image_newline if family == "llava_next" else None
    project = stock.model.multi_modal_projector
    image = 0
    for row, sample in enumerate(samples):
        columns = (inputs["input_ids"][row] == pruned.config.image_token_id).nonzero().flatten().tolist()
        sizes = [part for part in sample if isinstance(part, tuple)]
        for number, size in enumerate(sizes):
            pixels = inputs["pixel_values"][image]
            paid, keys, features = tower(stock, pixels[None] if family == "llava" else pixels)
            tokens = tokens_of(family, size)
            paid, keys, features = (
                [None if token is None else values[token] for token in tokens] for values in (paid, keys, features)
            )
            count = max(1, round(ratio * len(tokens)))
            must = len(tokens) - 1 if batch == "image_last" and number == len(sizes) - 1 else None
            kept, merged = reference(paid, keys, features, count, share, must)
            assert len(kept) == count
            places = [columns.pop(0) for _ in tokens]
            assert [place for place in places if outputs.kept_mask[0][row, place]] == [places[token] for token in kept]
            for token in kept:
                value = newline if features[token] is None else project(merged.get(token, features[token]))
                assert (seen[0][row, places[token]] - value).abs().max() < 1e-5
            image += 1
        assert not columns


def test_the_share_is_checked():
    with pytest.raises(ValueError, match="contextual is a share"):
        METHODS["visionzip"](contextual=1.0)
