"""Pictures in prompts that TRL hands a colocated engine. Written against TRL 1.16 (``generate`` and
``sync_weights`` of ``VLLMGeneration``)."""

from __future__ import annotations

from typing import Any

from ..engine.pictures import Pictures
from ..errors import InterceptionError
from .instrumentation import require_attributes

__all__ = ["encode_pictures_anew", "expand_pictures_once", "keeps_pictures"]


def expand_pictures_once(trainer: Any) -> None:
    """Hand the trainer's colocated engine prompts in which a picture's tokens are not yet put in.

    TRL's processor puts them in for its own pass, and hands the same ids to vLLM, which puts them in once more
    (huggingface/trl#6294): the engine answers another prompt than the trainer scores. A prompt that TRL hands over as
    vLLM wants it is left alone, and so is a server's. Call it before ``trainer.train()``.

    Raises InterceptionError for a trainer without vLLM.
    """
    generation = _generation(trainer, "generate")
    generate = generation.generate

    def as_vllm_wants(prompts: Any, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        if images is not None and generation.mode == "colocate":
            pairs = zip(prompts, images, strict=True)
            prompts = [_short(generation.llm, ids, some) if some else ids for ids, some in pairs]
        return generate(prompts, images, *args, **kwargs)

    generation.generate = as_vllm_wants


def encode_pictures_anew(trainer: Any) -> None:
    """Have the trainer's colocated engine forget the features of pictures whenever it is given weights.

    vLLM keeps them from request to request by what a picture shows (its encoder cache), and TRL's sync empties the
    prefix cache alone: a picture that comes again is read with the vision tower of its first time. Call it before
    ``trainer.train()``.

    Raises InterceptionError for a trainer without vLLM, or with a server, which can't be told to forget.
    """
    generation = _generation(trainer, "sync_weights")
    if generation.mode != "colocate":
        raise InterceptionError(
            f"vllm_mode is {generation.mode!r}. Expected 'colocate': TRL's server empties no encoder cache. Freeze "
            "the vision tower."
        )
    sync = generation.sync_weights

    def sync_weights(*args: Any, **kwargs: Any) -> None:
        sync(*args, **kwargs)
        generation.llm.llm_engine.reset_encoder_cache()

    sync_weights.empties_encoder_cache = True  # type: ignore[attr-defined]
    generation.sync_weights = sync_weights


def keeps_pictures(capture: Any) -> bool:
    """Whether a colocated engine of a run with pictures keeps features that training makes old."""
    generation = capture.generation
    if capture.pictures is None or getattr(generation.sync_weights, "empties_encoder_cache", False):
        return False
    sees = ("visual", "vision", "connector", "projector")  # a tower, and what leads from it to the language model
    return any(p.requires_grad and any(part in name for part in sees) for name, p in capture.policy.named_parameters())


def _generation(trainer: Any, method: str) -> Any:
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise InterceptionError(f"{type(trainer).__name__} has no vLLM engine. Expected use_vllm=True.")
    require_attributes(generation, ("mode", method))
    return generation


def _short(llm: Any, ids: list[int], images: list[Any]) -> list[int]:
    given = {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
    try:
        short: list[int] = Pictures(llm, given).request(ids)["prompt_token_ids"]
    except ValueError:  # no picture's tokens are in it
        return ids
    return short
