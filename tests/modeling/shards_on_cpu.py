"""One of two processes that share a model's layers (FSDP2): argv is a file of cases."""

import os
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from learnpruner.compat_learnpruner import CACHE
from learnpruner.methods import METHODS


def gradients(model, inputs):
    model.train()
    with torch.enable_grad():
        outputs = model(**inputs, use_cache=False)
        outputs.logits.logsumexp(-1).square().mean().backward()
    model.eval()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return outputs, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def main(path):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    for kind, config, weights, inputs, whole in torch.load(path, weights_only=False):
        model = kind(config).eval()
        model.load_state_dict(weights)
        model.model.pruner.requires_grad_(False)
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
        with torch.no_grad():
            outputs = model(**inputs)
            generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            for name, wanted in whole["methods"].items():
                # What ranks before the decoder may read its first layer, whose weights are gathered only while it runs.
                mine = model(**inputs, schedule=METHODS[name](0.7))
                assert (mine.logits - wanted["logits"]).abs().max() < 1e-5
                assert all(torch.equal(*pair) for pair in zip(mine.kept_mask, wanted["kept_mask"], strict=True))
                tokens = model.generate(**inputs, schedule=METHODS[name](0.7), max_new_tokens=6, do_sample=False)
                assert torch.equal(tokens, wanted["generated"])
        trained, found = gradients(model, inputs)
        assert isinstance(next(model.model.language_model.layers[1].parameters()), DTensor)
        for mine, wanted in ((outputs, whole["outputs"]), (trained, whole["outputs"])):
            assert (mine.logits - wanted["logits"]).abs().max() < 1e-5
            assert all(torch.equal(*pair) for pair in zip(mine.kept_mask, wanted["kept_mask"], strict=True))
        assert outputs[CACHE].get_seq_length() == inputs["input_ids"].shape[1]
        assert torch.equal(generated, whole["generated"])
        assert found.keys() == whole["gradients"].keys()
        assert any("language_model.layers.0" in name for name in found)
        worst = max((found[name] - whole["gradients"][name]).abs().max() for name in found)
        assert worst < 1e-5, worst
        print("equal", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
