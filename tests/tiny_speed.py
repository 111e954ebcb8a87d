"""What the tests of the speed benchmark share: presets of tiny models, and the command on them."""

import pytest
import torch

import speed
import speed_presets
from tiny_models import tiny_config

# Height and width that each family takes without padding; their tokens, from the published layouts.
IMAGES = {
    "llava": ((32, 32), 16),
    "llava_next": ((64, 32), 16 + 8 * 5),
    "qwen2_vl": ((48, 32), 6 * 4),
    "qwen2_5_vl": ((40, 56), 5 * 7),
}
TEXT = 7
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def tiny_presets():
    with pytest.MonkeyPatch.context() as patch:
        for family, (image, _) in IMAGES.items():
            preset = speed_presets.Preset(lambda family=family: tiny_config(family), image)
            patch.setitem(speed_presets.PRESETS, family, preset)
        yield


def tiny(family, batch=2):
    config = tiny_config(family)
    pair = speed_presets.build_pair(config, CPU, torch.float32)
    return *pair, speed_presets.build_inputs(config, IMAGES[family][0], batch, TEXT, CPU, torch.float32)


def run(*arguments, preset="llava"):
    return speed.main(["--preset", preset, "--text", str(TEXT), "--threads", "1", *arguments])
