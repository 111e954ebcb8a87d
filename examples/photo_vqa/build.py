# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Builds the photo model: an ordinary LLaVA checkpoint, of the packages' weights and of what is trained here.

    python examples/photo_vqa/build.py --packages FOLDER --trained RUN --output FOLDER

Needs the packages onnx and gguf. The output, about 630 MB, opens with `LlavaForConditionalGeneration.from_pretrained`.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Dinov2Model, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from learnpruner_commands.arguments import Parser

from packages import digest, find
from photo_llava import build_config, merged
from prompts import IMAGE, build_processor
from text_model import load_text_model
from tower import load_tower


def assemble(
    tower: Dinov2Model,
    text: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    trained: dict[str, torch.Tensor],
) -> LlavaForConditionalGeneration:
    """The stock model, float32, in evaluation.

    Args:
        trained (`dict[str, torch.Tensor]`): What train_base.py writes.

    Raises:
        `RuntimeError`, `KeyError`: where it was trained for models of other shapes.
    """
    config = build_config(tower.config, text.config, tokenizer.convert_tokens_to_ids(IMAGE))
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    weights = text.state_dict()
    layers = {name.removeprefix("text.").removesuffix(".up") for name in trained if name.endswith(".up")}
    for name in layers:
        key = f"{name}.weight"
        weights[key] = merged(weights[key], trained[f"text.{name}.down"], trained[f"text.{name}.up"])
    head = "lm_head."
    model.lm_head.load_state_dict({k.removeprefix(head): v for k, v in weights.items() if k.startswith(head)})
    inner = {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")}
    model.model.language_model.load_state_dict(inner)
    start = "projector."
    projector = {name.removeprefix(start): weight for name, weight in trained.items() if name.startswith(start)}
    model.model.multi_modal_projector.load_state_dict(projector)
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.eval()


def check(made_of: dict, packages) -> None:
    """Raises `ValueError` where other weights are installed than those that were trained with."""
    for name in ("tower", "text"):
        path = getattr(packages, name)
        if digest(path) != made_of[name]:
            raise ValueError(f"{path} is another release than the one that the photo model was trained with.")


def build(packages, trained: Path, output: Path) -> None:
    """Writes the checkpoint with its processor.

    Args:
        packages (`Packages`): Where the two models lie.
        trained (`Path`): Folder of photo-llava.safetensors and photo-llava.json.
        output (`Path`): A folder.
    """
    check(json.loads((trained / "photo-llava.json").read_text())["made_of"], packages)
    with tempfile.TemporaryDirectory() as temporary:
        text, tokenizer = load_text_model(packages.text, Path(temporary) / "text-model")
        weights = load_file(trained / "photo-llava.safetensors")
        assemble(load_tower(packages.tower), text, tokenizer, weights).save_pretrained(output)
        build_processor(tokenizer).save_pretrained(output)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Builds the photo model of the packages' weights and of what is trained here.")
    parser.add_argument(
        "--packages", type=Path, help="folder of packages.py; otherwise PHOTO_VQA_PACKAGES or the system"
    )
    parser.add_argument("--trained", type=Path, required=True, help="output of train_base.py")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    arguments = parser.parse_args(argv)
    try:
        build(find(arguments.packages), arguments.trained, arguments.output)
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        print(f"build: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
