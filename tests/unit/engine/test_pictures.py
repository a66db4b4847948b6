"""Prompts with pictures as vLLM's own processors read them, without an engine."""

from types import SimpleNamespace

import pytest
from support.pictures import FAMILIES, picture_prompts, without_torchvision

from trl_parity.engine.colocated import _prompt
from trl_parity.engine.pictures import Pictured, Pictures
from trl_parity.trainers.pictures import expand_pictures_once

pytestmark = pytest.mark.slow_unit


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_is_asked_for_so_that_vllm_reads_it_whatever_the_run_handed_over(family, tmp_path):
    from transformers import AutoProcessor
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config

    rows = list(picture_prompts(n=5))[1:]
    pictures = [[row["image"]] for row in rows] + [[rows[0]["image"], rows[2]["image"]]]
    text = {"type": "text", "text": "1+"}
    asked = [[{"role": "user", "content": [text, {"type": "image", "image": p[0]}, text]}] for p in pictures[:-1]]
    first, second = ({"type": "image", "image": picture} for picture in pictures[-1])
    asked.append([{"role": "user", "content": [first, text, second, text]}])
    with without_torchvision():
        directory = str(FAMILIES[family](tmp_path))
        limits = {"image": 2, "video": 0}
        config = EngineArgs(model=directory, max_model_len=256, limit_mm_per_prompt=limits).create_engine_config()
        llm = SimpleNamespace(renderer=renderer_from_config(config))
        processor = AutoProcessor.from_pretrained(directory)
        whole = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
        handed = []
        generation = SimpleNamespace(mode="colocate", llm=llm, generate=lambda prompts, images: handed.extend(prompts))
        expand_pictures_once(SimpleNamespace(vllm_generation=generation))
        generation.generate(whole["input_ids"], pictures)
        for ours, short, some in zip(whole["input_ids"], handed, pictures, strict=True):

            def read(ids, some=some):
                request = {"prompt_token_ids": list(ids), "multi_modal_data": {"image": some}}
                return list(llm.renderer.render_cmpl([request], skip_mm_cache=True)[0]["prompt_token_ids"])

            assert len(short) < len(ours) < len(read(ours))  # as TRL 1.16 hands it over: put in twice
            assert read(short) == ours
            for run in (short, ours):
                given = Pictures(llm, {"prompt_token_ids": run, "multi_modal_data": {"image": some}})
                for ids in ([*ours, 3, 4], [*read(run), 3, 4]):
                    assert read(_prompt(Pictured(ids, given))["prompt_token_ids"]) == ids
                    fresh, kept = (_prompt(Pictured(ids, given), name) for name in ("anew", ""))
                    fresh, kept = (llm.renderer.render_cmpl([asked], skip_mm_cache=True)[0] for asked in (fresh, kept))
                    assert fresh["prompt_token_ids"] == kept["prompt_token_ids"] == ids
                    names = fresh["mm_hashes"]["image"]  # by which the engine keeps features
                    assert len({*names, *kept["mm_hashes"]["image"]}) == 2 * len(some)
