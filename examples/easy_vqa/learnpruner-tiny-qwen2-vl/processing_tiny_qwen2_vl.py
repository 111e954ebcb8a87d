"""Qwen2-VL's processor for images alone: the stock one reads videos too, for which it needs torchvision.

A copy lies beside the weights of the small Qwen2-VL, whose `AutoProcessor` this is (`trust_remote_code=True`).
"""

from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs


class TinyQwen2VLProcessor(ProcessorMixin):
    """Images through the image processor; in the text as many placeholders for each as the model makes tokens of it."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        """As `Qwen2VLProcessor`'s, its keyword arguments, too; `videos` and `audio` have to be `None`."""
        if videos is not None or audio is not None:
            raise ValueError("This small processor takes images alone.")
        options = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        for_text, return_tensors = options["text_kwargs"], options["text_kwargs"].pop("return_tensors", None)
        for_text.pop("return_mm_token_type_ids", None)  # they are always returned: the model needs them
        texts, features, sizes = [text] if isinstance(text, str) else list(text), {}, []
        if images is not None:
            features = self.image_processor(images=images, **options["images_kwargs"])
            sizes = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in features["image_grid_thw"]]
        places = sum(one.count(self.image_token) for one in texts)
        if places != len(sizes):
            raise ValueError(f"The text has places for {places} images, and {len(sizes)} were given.")
        counts = iter(sizes)
        for number, one in enumerate(texts):
            first, *rest = one.split(self.image_token)
            texts[number] = first + "".join(self.image_token * next(counts) + piece for piece in rest)
        encoded = self.tokenizer(texts, **for_text)
        types = [[int(token == self.image_token_id) for token in row] for row in encoded["input_ids"]]
        return BatchFeature({**encoded, "mm_token_type_ids": types, **features}, tensor_type=return_tensors)


TinyQwen2VLProcessor.register_for_auto_class("AutoProcessor")
