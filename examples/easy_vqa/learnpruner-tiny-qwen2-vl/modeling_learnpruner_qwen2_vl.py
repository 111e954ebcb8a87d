# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Qwen2-VL with LearnPruner (arXiv 2604.23950): native resolution, several images, video, M-RoPE."""

import math

import torch
from transformers import PreTrainedConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel

from .compat_learnpruner import CACHE
from .configuration_learnpruner import LearnPrunerQwen2VLConfig
from .guards_learnpruner import OR_NO_PRUNING
from .head_learnpruner import PROMPT, PrunedGenerationMixin
from .hub_learnpruner import HubMixin
from .model_learnpruner import PrunedModelMixin
from .prompt_learnpruner import Prompt

# The pixels of each modality, and the grids that lay them out.
INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class PrunedQwenVLModelMixin(PrunedModelMixin):
    """What Qwen2-VL and Qwen2.5-VL share: the merger makes a token of 2 x 2 patches, and the pruner reads the encoder's
    features of those four, side by side. A budget is an image's, or one of a video's groups of frames."""

    pixel_arguments = ("pixel_values", "pixel_values_videos")
    grid_arguments = ("image_grid_thw", "video_grid_thw")
    image_layout = "image_grid_thw"

    @staticmethod
    def encoder_width(config: PreTrainedConfig) -> int:
        return config.vision_config.embed_dim * config.vision_config.spatial_merge_size**2

    def vision_kinds(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        tokens = (self.config.image_token_id, self.config.video_token_id)
        images, videos = (self.marks(token, input_ids, inputs_embeds) for token in tokens)
        return images.to(torch.int8) + 2 * videos.to(torch.int8)

    def check_images(self, arguments: dict, prompt: Prompt) -> None:
        for modality, (name, grid) in INPUTS.items():
            pixels, encoded = arguments.get(name), (arguments.get("mm_encoder_outputs") or {}).get(modality)
            if pixels is None and encoded is None:
                continue
            if grid not in prompt.grids:
                raise ValueError(f"{modality.capitalize()}s need {grid}, which the processor returns beside {name}.")
            self._check_grid(modality, pixels, prompt)
            if pixels is None and encoded.last_hidden_state is None:
                raise ValueError(
                    "The pruner reads the vision encoder's features, and mm_encoder_outputs has none: pass what "
                    f"model.get_{modality}_features(..., return_dict=True) returned."
                )
        if prompt.mistyped and arguments.get("position_ids") is None:
            raise ValueError(
                f"mm_token_type_ids are wrong for {prompt.mistyped} tokens (0 text, 1 image, 2 video): pass what the "
                f"processor returned beside input_ids, padded as they are. {OR_NO_PRUNING}"
            )

    def check_positions(self, arguments: dict) -> None:
        """Where positions are left to the model, it finds them from token ids and their types, of the whole prompt."""
        if arguments.get("position_ids") is not None:
            return
        cache = arguments.get(CACHE)
        if arguments.get("input_ids") is None or (cache is not None and cache.get_seq_length() > 0):
            raise ValueError(
                "Positions of images are found from the ids of the whole prompt: with inputs_embeds, or for images in "
                "a later call on one cache (also of prefix tuning), pass position_ids (model.model.get_rope_index(...) "
                f"makes them of the whole). Prompt tuning and p-tuning pass none: use LoRA. {OR_NO_PRUNING}"
            )
        if arguments.get("mm_token_type_ids") is None:
            raise ValueError(
                "Images and videos need mm_token_type_ids, which the processor returns beside input_ids: without them "
                f"the positions would be those of text. {OR_NO_PRUNING}"
            )

    def _check_grid(self, modality: str, pixels: torch.Tensor | None, prompt: Prompt) -> None:
        (name, grid), merge = INPUTS[modality], self.config.vision_config.spatial_merge_size
        rows = prompt.grids[grid]
        if any(len(row) != 3 or min(row) < 1 or row[1] % merge or row[2] % merge for row in rows):
            raise ValueError(
                f"A row of {grid} is frames, height and width in patches, the last two multiples of {merge}: {rows}."
            )
        if pixels is None:
            return
        patches = [math.prod(row) for row in rows]
        if sum(patches) != len(pixels):
            raise ValueError(
                f"{grid} describes {sum(patches)} patches, and {name} has {len(pixels)}: build both with one processor "
                "call. For a new image in a later turn on one cache, encode it first: pass mm_encoder_outputs of the "
                "new images alone (model.model.get_image_features(..., return_dict=True)), grids and "
                "mm_token_type_ids of the whole conversation."
            )
        prompt.owners(modality, [count // merge**2 for count in patches])

    def count_parts(self, arguments: dict) -> int:
        images, videos = (arguments.get(grid) for _, grid in INPUTS.values())
        groups = 0 if videos is None else int(videos[:, 0].sum()) if self.config.pruner_per_frame else len(videos)
        return groups + (0 if images is None else len(images))

    def encode_images(self, arguments: dict, prompt: Prompt) -> dict:
        outputs = dict(arguments.get("mm_encoder_outputs") or {})
        for modality, (pixels, grid) in INPUTS.items():
            if arguments.get(pixels) is not None:
                encode = self.get_image_features if modality == "image" else self.get_video_features
                outputs[modality] = encode(arguments[pixels], arguments.get(grid), return_dict=True)
        return {**arguments, **dict.fromkeys(self.pixel_arguments), "mm_encoder_outputs": outputs}

    def encoder_features(self, arguments: dict) -> dict[str, torch.Tensor]:
        outputs = arguments["mm_encoder_outputs"]
        return {name: outputs[name].last_hidden_state for name in INPUTS if outputs.get(name) is not None}

    def lay_out(self, modality: str, values: torch.Tensor, arguments: dict, prompt: Prompt) -> list[torch.Tensor]:
        sizes = [sum(map(math.prod, part)) for part in self.grids(modality, arguments, prompt)]
        return list(values.view(sum(sizes), -1).split(sizes))

    def grids(self, modality: str, arguments: dict, prompt: Prompt) -> list[list[tuple[int, int]]]:
        merge, parts = self.config.vision_config.spatial_merge_size, []
        per_frame = modality == "video" and self.config.pruner_per_frame
        # A continued conversation may give the grids of all its images; the encoded ones are the last.
        encoded = len(arguments["mm_encoder_outputs"][modality].pooler_output)
        for frames, height, width in prompt.grids[INPUTS[modality][1]][-encoded:]:
            grid = (height // merge, width // merge)
            parts += [[grid]] * frames if per_frame else [[grid] * frames]
        return parts

    @staticmethod
    def first_image(inputs: dict, image_processor) -> torch.Tensor:
        (_, rows, columns), merge = inputs["image_grid_thw"][0].tolist(), image_processor.merge_size
        # Patches come block by block, each of them with its channels and its two equal frames.
        shape = (rows // merge, columns // merge, merge, merge, 3, -1, *[image_processor.patch_size] * 2)
        blocks = inputs["pixel_values"][: rows * columns].view(shape)
        return blocks[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4).flatten(3, 5).flatten(0, 2)

    @staticmethod
    def token_side(processor) -> int:
        return processor.image_processor.patch_size * processor.image_processor.merge_size


class PrunedQwenVLGenerationMixin(PrunedGenerationMixin):
    """What the heads of both share."""

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        if self.read_generate_prompt(inputs_tensor, model_kwargs, model_kwargs["attention_mask"].shape[1]) is not None:
            # The stock class would go on from the positions of the model's last prompt, whatever is new; without the
            # cache it finds those of the whole conversation, of which a cache may hold the beginning.
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in (CACHE, PROMPT)}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


class LearnPrunerQwen2VLModel(PrunedQwenVLModelMixin, Qwen2VLModel):
    config: LearnPrunerQwen2VLConfig


class LearnPrunerQwen2VLForConditionalGeneration(
    HubMixin, PrunedQwenVLGenerationMixin, Qwen2VLForConditionalGeneration
):
    """[`Qwen2VLForConditionalGeneration`] on fewer vision tokens. See [`LearnPrunerQwen2VLConfig`]."""

    config: LearnPrunerQwen2VLConfig
    model_class = LearnPrunerQwen2VLModel
