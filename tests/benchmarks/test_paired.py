"""Paired intervals over scenes against plain loops, and what is no pair."""

import json
import math
import random

import numpy as np
import pytest

import paired
from recorded import accuracy_record


def run_of(given, scenes, method="random", seed=0, **changes):
    """A record whose answers are right where `given` is true."""
    said = ["2" if right else "red" for right in given]
    answers = {"scene": list(scenes), "expected": ["two"] * len(said), "given": said}
    made = accuracy_record(method, "b", None, 0.5, {"color": 0.5}, [2], 2.0, 0.1)
    return {**made, "seed": seed, "answers": answers, "pixels_sha256": "e" * 64, **changes}


def drawn(seed, number):
    """Scenes of different numbers of questions, and runs of them that differ more in some scenes."""
    rng = random.Random(seed)
    scenes = [scene for scene in range(number) for _ in range(rng.randint(1, 5))]
    better = {scene: rng.random() for scene in range(number)}
    runs = [[rng.random() < bonus * better[scene] + 0.3 for scene in scenes] for bonus in (0.6, 0.6, 0.1)]
    return scenes, runs


def slowly(gained, scenes, confidence, resamples, seed):
    """Scene by scene and draw by draw."""
    names, rng, means = sorted(set(scenes)), np.random.default_rng(seed), []
    for _ in range(resamples):
        values = []
        for _ in names:
            scene = names[int(rng.integers(len(names)))]
            values += [value for value, own in zip(gained, scenes) if own == scene]
        means.append(sum(values) / len(values))
    means.sort()
    ends = []
    for share in ((1 - confidence) / 2, (1 + confidence) / 2):
        place = share * (len(means) - 1)
        under = means[math.floor(place)]
        ends.append(under + (place - math.floor(place)) * (means[math.ceil(place)] - under))
    return ends


@pytest.mark.parametrize("confidence", [0.95, 0.5])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_interval_is_that_of_plain_loops(seed, confidence, monkeypatch):
    monkeypatch.setattr(paired, "ROWS_AT_A_TIME", 40)
    scenes, (one, other, against) = drawn(seed, 12)
    ones = [run_of(one, scenes), run_of(other, scenes, seed=1)]
    found = paired.paired_interval(ones, [run_of(against, scenes)], confidence, 101, seed)
    gained = [(a + b) / 2 - c for a, b, c in zip(one, other, against)]
    assert found.difference == pytest.approx(sum(gained) / len(gained))
    assert [found.low, found.high] == pytest.approx(slowly(gained, scenes, confidence, 101, seed))
    assert found.low < found.difference < found.high


def test_questions_of_a_scene_are_not_independent():
    """Four questions of a scene that are right together are worth one."""
    scenes = [number // 4 for number in range(400)]
    right = [number // 4 % 2 == 0 for number in range(400)]
    none = [False] * 400
    over_scenes = paired.paired_interval([run_of(right, scenes)], [run_of(none, scenes)])
    over_questions = paired.paired_interval([run_of(right, range(400))], [run_of(none, range(400))])
    assert over_scenes.difference == over_questions.difference == 0.5
    assert over_scenes.high - over_scenes.low == pytest.approx(2 * (over_questions.high - over_questions.low), rel=0.1)


def test_a_pair_is_of_the_same_questions():
    scenes, (one, other, _) = drawn(0, 4)
    first = run_of(one, scenes)
    assert paired.paired_interval([first], [first]) == (0, 0, 0)
    for change, says in (
        ({"answers": None}, "recorded no answers: measure it again"),
        ({"pixels_sha256": None}, "recorded no pixels_sha256"),
        ({"pixels_sha256": "f" * 64}, "not asked the same"),
        ({"data": "f"}, "A paired interval compares .* differ in data"),
        ({"base_sha256": "f"}, "differ in base_sha256"),
        ({"answers": {name: held[::-1] for name, held in first["answers"].items()}}, "not asked the same"),
    ):
        with pytest.raises(ValueError, match=says):
            paired.paired_interval([first], [run_of(other, scenes, **change)])
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match="between 0 and 1"):
            paired.paired_interval([first], [first], confidence)


def test_the_command(tmp_path, capsys):
    scenes, runs = drawn(0, 12)
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text(json.dumps(run_of(runs[number], scenes, seed=number)))
    assert paired.main([*map(str, paths[:2]), "--against", str(paths[2])]) == 0
    found = paired.paired_interval(
        *([json.loads(path.read_text()) for path in side] for side in (paths[:2], paths[2:]))
    )
    low, high = 100 * found.low, 100 * found.high
    expected = f"{100 * found.difference:+.2f} points ({low:+.2f} to {high:+.2f}, 95 %, over scenes)\n"
    assert capsys.readouterr().out == expected
    old = accuracy_record("random", "b", None, 0.5, {"color": 0.5}, [2], 2.0, 0.1)
    paths[0].write_text(json.dumps(old))
    assert paired.main([str(paths[0]), "--against", str(paths[0])]) == 2
    assert "random recorded no answers" in capsys.readouterr().err
    answers = {"scene": [True], "expected": ["two"], "given": ["2"]}
    paths[0].write_text(json.dumps({**old, "answers": answers}))
    assert paired.main([str(paths[0]), "--against", str(paths[0])]) == 2
    assert "answers is {'expected': ['two']" in capsys.readouterr().err
