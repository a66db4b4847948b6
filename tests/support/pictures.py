"""Tiny random models that take pictures, saved with their processors as real ones are, and prompts for them."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .models import save_tokenizer

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.125, "tie_word_embeddings": False,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip

VISION = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.125}

TEMPLATE = """
{%- for message in messages -%}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}{{ 'IMAGE' if part.type == 'image' else part.text }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


def save_tiny_qwen(directory: Path) -> Path:
    """A random Qwen2.5-VL: pictures of any size, positions in three dimensions, layers that see windows alone."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorPil,
    )

    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer, ids = _tokenizer(directory, names)
    pixels = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 6})
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    Qwen2_5_VLProcessor(pixels, tokenizer, chat_template=template).save_pretrained(directory)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "window_size": 56,
                                "fullatt_block_indexes": [1]},
        image_token_id=ids[0], video_token_id=ids[1], vision_start_token_id=ids[2], vision_end_token_id=ids[3],
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _save(directory, Qwen2_5_VLForConditionalGeneration, config, ids)


def save_tiny_idefics(directory: Path) -> Path:
    """A random Idefics3: pictures padded to one size and masked, four tokens each between two that mark them."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    names = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tokenizer, ids = _tokenizer(directory, names)
    edge = {"longest_edge": 56}
    pixels = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    template = TEMPLATE.replace("IMAGE", "<image>")
    Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(directory)
    config = Idefics3Config(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer), "head_dim": 32},
        vision_config=VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
        image_token_id=ids[0], eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _save(directory, Idefics3ForConditionalGeneration, config, ids)


FAMILIES = {"qwen2_5_vl": save_tiny_qwen, "idefics3": save_tiny_idefics}


def _tokenizer(directory: Path, names: tuple[str, ...]) -> tuple[Any, list[int]]:
    tokenizer = save_tokenizer(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    return tokenizer, tokenizer.convert_tokens_to_ids(list(names))


def _save(directory: Path, kind: type[Any], config: Any, never: list[int]) -> Path:
    """A model that hardly ever samples the tokens ``never``, which it would be given no picture for.

    One feature is the same in all token embeddings, no layer writes to it, and the head reads those tokens off it.
    """
    import torch

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = kind(config)
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings.normal_()
        embeddings[:, 0] = 1.0
        for layer in (
            model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
        ).layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head.normal_(std=0.25)
        head[never] = 0.0
        head[never, 0] = -60.0
    model.save_pretrained(directory)
    return directory


@contextmanager
def without_torchvision():
    """Inside, what these models need is found without torchvision, which is not installed.

    Qwen's processor goes without its part for videos, and vLLM's model gets the one function it wants from the module
    that transformers has for Pillow. That of Idefics3 is taken for one that needs torchvision: its comments name it.
    """
    from transformers import Qwen2_5_VLProcessor
    from transformers.models import idefics3
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pillow
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
        patch.setattr(Qwen2_5_VLProcessor, "get_attributes", parts)
        patch.setitem(sys.modules, pillow.__name__.replace("_pil", ""), pillow)
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())  # a child would look for it anew
        patch.setattr(idefics3, "Idefics3ImageProcessorPil", Idefics3ImageProcessorPil)
        yield


def picture_prompts(pictures: bool = True, n: int = 64) -> Any:
    """Sums, each with a picture of noise and a size of its own; the text of some is the same."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    draw = np.random.default_rng(0)
    rows = []
    for i in range(n):
        row = {"prompt": [{"role": "user", "content": f"{i % 5}+{i // 20}="}]}
        if pictures:
            height, width = 28 * (1 + i % 2), 28 * (1 + i % 3)
            row["image"] = Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))
        rows.append(row)
    return Dataset.from_list(rows)


def digits_said(completions: Any, **kwargs: Any) -> list[float]:
    """Share of digits in answers of a chat."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]
