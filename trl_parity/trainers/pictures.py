"""Pictures in prompts that TRL hands a colocated engine. Written against TRL 1.16 (``VLLMGeneration.generate``)."""

from __future__ import annotations

from typing import Any

from ..engine.pictures import Pictures
from ..errors import InterceptionError
from .instrumentation import require_attributes

__all__ = ["expand_pictures_once"]


def expand_pictures_once(trainer: Any) -> None:
    """Hand the trainer's colocated engine prompts in which a picture's tokens are not yet put in.

    TRL's processor puts them in for its own pass, and hands the same ids to vLLM, which puts them in once more
    (huggingface/trl#6294): the engine answers another prompt than the trainer scores. A prompt that TRL hands over as
    vLLM wants it is left alone, and so is a server's. Call it before ``trainer.train()``.

    Raises InterceptionError for a trainer without vLLM.
    """
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise InterceptionError(f"{type(trainer).__name__} has no vLLM engine. Expected use_vllm=True.")
    require_attributes(generation, ("mode", "generate"))
    generate = generation.generate

    def as_vllm_wants(prompts: Any, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        if images is not None and generation.mode == "colocate":
            pairs = zip(prompts, images, strict=True)
            prompts = [_short(generation.llm, ids, some) if some else ids for ids, some in pairs]
        return generate(prompts, images, *args, **kwargs)

    generation.generate = as_vllm_wants


def _short(llm: Any, ids: list[int], images: list[Any]) -> list[int]:
    given = {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
    try:
        short: list[int] = Pictures(llm, given).request(ids)["prompt_token_ids"]
    except ValueError:  # no picture's tokens are in it
        return ids
    return short
