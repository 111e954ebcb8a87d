"""Records as benchmarks/ and training write them, of given weights; every number differs from every other."""

import hashlib
import json

VERSIONS = {"learnpruner": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0", "python": "3.11.7"}


def digest(state):
    """sha256 of named tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def accuracy_record(method, base, pruner, accuracy, kinds, counts, mean, ratio, level="standard"):
    return {
        "method": method,
        "name": method,
        "fields": {"pruner_layer": 2, "pruner_stage_ratio": 3.0, "pruner_diversity": 0.1, "pruner_query": "all"},
        "ratio": ratio,
        "seed": 0,
        "level": level,
        "model": "tiny",
        "model_revision": None,
        "base_sha256": base,
        "pruner_sha256": pruner,
        "pruner_trained": pruner is not None,
        "data": "d" * 64,
        "batch_size": 32,
        "dtype": "float32",
        "device": "cpu",
        "versions": VERSIONS,
        "accuracy": accuracy,
        "n": 2000,
        "by_kind": {name: {"accuracy": value, "n": 1000} for name, value in kinds.items()},
        "tokens": {
            "image": 16,
            "after_cuts": counts,
            "cut_layers": [0, 2][: len(counts)],
            "mean": mean,
            "foreground_recall": [0.91, 0.52][: len(counts)],
            "objects_seen": [0.99, 0.88][: len(counts)],
        },
        "seconds": 12.5,
    }


def records(base, pruner):
    """File name -> record: unpruned, two budgets, and one that is not the pruner's."""
    kinds = {"color": 0.9975, "count": 0.9525}
    return {
        "none.json": accuracy_record("none", base, None, 0.9835, kinds, [], 16.0, 1.0),
        "half.json": accuracy_record(
            "learnpruner", base, pruner, 0.9765, {"color": 0.9865, "count": 0.9435}, [11, 4], 7.5, 0.47
        ),
        "tenth.json": accuracy_record(
            "learnpruner", base, pruner, 0.8125, {"color": 0.8315, "count": 0.7895}, [3, 1], 2.0, 0.12
        ),
        "random.json": accuracy_record(
            "random", base, None, 0.6215, {"color": 0.6415, "count": 0.5915}, [2], 2.25, 0.13
        ),
    }


SPEEDS = {"prefill_speedup": 1.83, "prefill_ceiling": 2.47, "end_to_end_speedup": 1.31, "overhead_at_ratio_one": 1.004}
OTHER_SPEEDS = {
    "prefill_share_of_ceiling": 0.741,
    "end_to_end_ceiling": 1.57,
    "end_to_end_share_of_ceiling": 0.834,
    "prefill_overhead_at_ratio_one": 1.006,
    "scoring_and_selection_share": 0.0123,
}


def interval(median):
    return {"median": median, "low": 0.99 * median, "high": 1.01 * median, "confidence": 0.9609}


def speed_record(base, pruner):
    return {
        **SPEEDS,
        "intervals": {name: interval(value) for name, value in {**SPEEDS, **OTHER_SPEEDS}.items()},
        "seconds": {
            "stock": {"prefill": interval(0.55), "decoder_prefill": interval(0.45)},
            "pruned": {"prefill": interval(0.3), "decoder_prefill": interval(0.2)},
            "parts": {"vision": interval(0.1)},
            "stock answer": {"time_to_first_token": interval(0.56)},
            "pruned answer": {"time_to_first_token": interval(0.31)},
        },
        "kv_bytes": {"stock": 5_200, "pruned": 2_600},
        "peak_memory_bytes": {"stock": 81_000, "pruned": 43_000},
        "flops": {name: {"prefill": 9_100, "decode_token": 1_700} for name in ("stock", "pruned")},
        "tokens": {"image": 16, "after_cuts": [11, 4], "mean": 7.5},
        "ratio": 0.47,
        "device": "Some GPU 80GB",
        "device_type": "cuda",
        "settings": {
            "preset": "tiny",
            "backend": "sdpa",
            "batch_size": 4,
            "text_tokens": 64,
            "new_tokens": 1,
            "dtype": "bfloat16",
            "rounds": 9,
        },
        "conditions": {"OMP_WAIT_POLICY": None, "OMP_NUM_THREADS": None, "load_average": 0.42},
        "versions": VERSIONS,
        "code_sha256": "c" * 64,
        "base_sha256": base,
        "pruner_sha256": pruner,
    }


def training_record(pruner):
    return {
        "base": "user/base",
        "seed": 7,
        "objective": "default",
        "learning_rate": 0.0017,
        "budgets": [1 / 3, 0.05],
        "samples": 961,
        "train_data": "scenes.jsonl",
        "steps": 121,
        "device": "cpu",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "pruner_sha256": pruner,
        "metrics": {"seconds": 478.25, "trained_parameters": 67331, "peak_memory_bytes": 1995726849},
        "log": [],
    }


def write(folder, named):
    folder.mkdir(exist_ok=True)
    for name, record in named.items():
        (folder / name).write_text(json.dumps(record, indent=1) + "\n")
    return [str(folder / name) for name in named]
