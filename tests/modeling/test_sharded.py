"""Layers shared by two processes (FSDP2): evaluation, `generate` and cuts in training equal the whole model."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learnpruner.methods import METHODS

from tiny_models import build_inputs, samples_of, tiny_pair

pytestmark = pytest.mark.core
WORKER = Path(__file__).with_name("shards_on_cpu.py")


def whole(model, inputs):
    """What the worker compares with."""
    outputs = model(**inputs)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    methods = {}
    for name in ("hawk", "divprune", "pyramiddrop"):
        method = METHODS[name](0.7)
        pruned = model(**inputs, schedule=method)
        tokens = model.generate(**inputs, schedule=method, max_new_tokens=6, do_sample=False)
        methods[name] = {"logits": pruned.logits, "kept_mask": pruned.kept_mask, "generated": tokens}
    model.model.pruner.requires_grad_(False)
    model.train()
    with torch.enable_grad():
        model(**inputs, use_cache=False).logits.logsumexp(-1).square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {
        "outputs": {"logits": outputs.logits, "kept_mask": outputs.kept_mask},
        "generated": generated,
        "methods": methods,
        "gradients": found,
    }


def test_sharded_layers(tmp_path):
    cases = []
    for family in ("llava", "qwen2_vl"):
        inputs = build_inputs(family, samples_of("padded", family))
        _, model = tiny_pair(family)
        cases.append((type(model), model.config, model.state_dict(), inputs, whole(model, inputs)))
    torch.save(cases, tmp_path / "cases.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path / "cases.pt")],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            output, errors = worker.communicate(timeout=180)
            assert worker.returncode == 0, errors[-3000:]
            assert output.count("equal") == len(cases)
    finally:
        for worker in workers:
            worker.kill()
