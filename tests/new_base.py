"""A stock checkpoint for commands that read one: the anatomy of an example's small model, with new weights."""

import torch

import tiny_llava


def save_base(folder, anatomy=tiny_llava):
    """Model and processor in `folder`, the same ones each time. `anatomy` is the file that builds both."""
    torch.manual_seed(0)
    processor = anatomy.build_processor()
    for part in (anatomy.build_model(processor), processor):
        part.save_pretrained(folder)
