"""Qwen2-VL's processor for images alone: the stock one reads videos too, for which it needs torchvision.

A copy lies beside the weights of the small Qwen2-VL, whose `AutoProcessor` this is (`trust_remote_code=True`).
"""

from transformers import BatchFeature, ProcessorMixin


class TinyQwen2VLProcessor(ProcessorMixin):
    """Images through the image processor; in the text as many placeholders for each as the model makes tokens of it."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(self, images=None, text=None, return_tensors=None, padding=False, **kwargs) -> BatchFeature:
        """As `Qwen2VLProcessor`'s; of its keyword arguments, `padding` and the tokenizer's `padding_side`."""
        if unknown := set(kwargs) - {"padding_side"}:
            raise ValueError(f"This small processor takes no {sorted(unknown)}.")
        texts, features, sizes = [text] if isinstance(text, str) else list(text), {}, []
        if images is not None:
            features = self.image_processor(images=images, return_tensors=return_tensors)
            sizes = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in features["image_grid_thw"]]
        places = sum(one.count(self.image_token) for one in texts)
        if places != len(sizes):
            raise ValueError(f"The text has places for {places} images, and {len(sizes)} were given.")
        counts = iter(sizes)
        for number, one in enumerate(texts):
            first, *rest = one.split(self.image_token)
            texts[number] = first + "".join(self.image_token * next(counts) + piece for piece in rest)
        encoded = self.tokenizer(texts, return_tensors=return_tensors, padding=padding, **kwargs)
        ids = encoded["input_ids"]
        if return_tensors == "pt":
            types = (ids == self.image_token_id).long()
        else:
            types = [[int(token == self.image_token_id) for token in row] for row in ids]
        return BatchFeature({**encoded, "mm_token_type_ids": types, **features}, tensor_type=return_tensors)


TinyQwen2VLProcessor.register_for_auto_class("AutoProcessor")
