"""Passes over some rows of a batch whose prompts hold images: each is given its own. TRL's method, tiny models."""

import types
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from trl_parity.diagnosis.forward_passes import ForwardPass, ForwardPasses
from trl_parity.engine.base import Capability
from trl_parity.engine.pictures import Pictures
from trl_parity.errors import InterceptionError
from trl_parity.records import SamplingSettings
from trl_parity.trainers.capture import MeasurementSettings
from trl_parity.trainers.grpo import GRPOCapture
from trl_parity.trainers.pictures import encode_pictures_anew, expand_pictures_once, keeps_pictures
from trl_parity.trainers.row_keys import picture_key, prompt_keys, row_keys

pytestmark = pytest.mark.slow_unit

IMAGE, START, PAD, KEEP, TEMPERATURE = 60, 61, 0, 6, 0.7

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip


def qwen():
    """Qwen2.5-VL: one row of pixels a patch, as many as an image's grid says; four patches a token."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    ids = {"image_token_id": IMAGE, "video_token_id": 62, "vision_start_token_id": START, "vision_end_token_id": 63}
    config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **ids)
    grid = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 4, 4], [1, 2, 4]])
    pixels = {"pixel_values": torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4), "image_grid_thw": grid}
    return Qwen2_5_VLForConditionalGeneration(config), pixels, (grid.prod(-1) // 4).tolist()


def llava():
    """LLaVA: one picture of one size an image."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 32, "initializer_range": 0.3,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=vision, image_token_index=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(4, 3, 8, 8)}, [4, 4, 4, 4]


@pytest.mark.parametrize("family", [qwen, llava])
def test_a_pass_over_some_rows_is_given_their_images(family):
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    model, pixels, lengths = family()
    model.eval()
    add_fused_lm_head(model, temperature=TEMPERATURE)
    num_images = [1, 0, 2, 1]
    left = iter(lengths)
    prompts = []
    for count in num_images:
        ids = torch.randint(2, 60, (3,)).tolist()
        for _ in range(count):
            ids += [START] + [IMAGE] * next(left) + [5]
        prompts.append(ids)
    width = max(map(len, prompts))
    out = pixels | {
        "prompt_ids": torch.tensor([[PAD] * (width - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.randint(2, 60, (4, KEEP)),
        "completion_mask": torch.ones(4, KEEP, dtype=torch.long),
        "num_images": num_images,
    }
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    attention = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
    if family is qwen:
        out["mm_token_type_ids"] = (ids == IMAGE).long()

    trainer = SimpleNamespace(
        model=model, temperature=TEMPERATURE, _last_loaded_step=0,
        args=SimpleNamespace(
            per_device_train_batch_size=2, gradient_checkpointing_kwargs=None, report_to=[], world_size=1
        ),
        accelerator=SimpleNamespace(
            unwrap_model=lambda model: model, distributed_type=DistributedType.NO, mixed_precision="no",
            autocast=nullcontext, is_main_process=True,
        ),
        state=SimpleNamespace(global_step=0),
    )  # fmt: skip
    score = types.MethodType(GRPOTrainer._get_per_token_logps_and_entropies, trainer)
    trainer._get_per_token_logps_and_entropies = score
    images = {name: out[name] for name in (*pixels, "num_images", "mm_token_type_ids") if name in out}
    with torch.no_grad():
        whole = score(model, ids, attention, KEEP, batch_size=4, **images)[0]

    capture = object.__new__(GRPOCapture)
    capture.trainer, capture.training, capture.output = trainer, True, out
    capture._observer = SimpleNamespace(measurement=MeasurementSettings())
    capture.step, capture.last_in_step, capture._generated = 0, True, None
    capture.sampling = SamplingSettings(temperature=TEMPERATURE)
    out |= {"sampling_per_token_logps": whole, "old_per_token_logps": whole}
    rollout = capture.rollout()
    assert rollout.image_keys.tolist()[1] == 0
    assert len(rollout.image_keys.unique()) == 4
    for rows in ([0, 1, 2, 3], [3, 0], [2], [1], [1, 1]):
        scores, own = capture.forward(rollout, torch.tensor(rows))
        torch.testing.assert_close(own, whole[rows], atol=2e-5, rtol=0)
        torch.testing.assert_close(scores.plain, whole[rows], atol=2e-5, rtol=0)
    some, every = torch.tensor([1, 3]), torch.arange(KEEP)
    row, column = torch.tensor([0] * KEEP + [1] * KEEP), every.repeat(2)
    engine = SimpleNamespace(capabilities=frozenset(Capability), hf_config=model.config)
    passes = ForwardPasses(capture, rollout, engine, rows=some, row=row, column=column, few=torch.tensor([0, 1]))
    states = passes.states(ForwardPass())
    for other in (
        {"layout": "single"},
        {"layout": "unpadded"},
        {"model": "engine_config"},
        {"layout": "unpadded", "few": True},
    ):
        torch.testing.assert_close(passes.states(ForwardPass(**other)), states, atol=2e-5, rtol=0)
    alone = torch.cat([rollout.prompt_ids[3][rollout.prompt_mask[3].bool()], rollout.completion_ids[3]])
    start = len(alone) - KEEP
    seen, logits = passes.own_logits(alone, start + every, 3, start)
    torch.testing.assert_close(seen, states[KEEP:], atol=2e-5, rtol=0)
    said = (logits / TEMPERATURE).log_softmax(-1).gather(-1, rollout.completion_ids[3][:, None])[:, 0]
    torch.testing.assert_close(said, whole[3], atol=2e-5, rtol=0)
    blind = score(model, ids, attention, KEEP, batch_size=4)[0]
    assert (blind - whole)[0].abs().mean() > 0.05


def test_pictures_are_handed_over_again_as_the_request_had_them():
    """One stands for a picture in the request, three are read; the second request has them put in already."""
    place = SimpleNamespace(offset=2, length=3)
    twice = [5, 6, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 7]  # what is read then
    for asked, read in ([5, 6, IMAGE, 7], [5, 6, IMAGE, IMAGE, IMAGE, 7]), ([5, 6, IMAGE, IMAGE, IMAGE, 7], twice):
        told = {"prompt_token_ids": read, "mm_placeholders": {"image": [place]}}
        llm = SimpleNamespace(renderer=SimpleNamespace(render_cmpl=lambda prompts, skip_mm_cache, told=told: [told]))
        pictures = Pictures(llm, {"prompt_token_ids": asked, "multi_modal_data": {"image": "it"}})
        assert pictures.asked == asked
        assert pictures.request([*read, 8]) == {"prompt_token_ids": [*asked, 8], "multi_modal_data": {"image": "it"}}
        ours = [5, 6, IMAGE, IMAGE, IMAGE, 7, 8]
        assert pictures.request(ours)["prompt_token_ids"] == [5, 6, IMAGE, 7, 8]
        [named] = pictures.request(ours, "anew")["multi_modal_uuids"]["image"]
        assert named.startswith("anew-")
        with pytest.raises(ValueError, match="3 tokens to the engine, which are not in these 3 ids"):
            pictures.request([5, IMAGE, IMAGE])


def test_prompts_with_pictures_tokens_in_them_reach_a_colocated_engine_without():
    def render(prompts, skip_mm_cache):  # vLLM puts three in for the first that stands there
        ids = prompts[0]["prompt_token_ids"]
        at = ids.index(IMAGE)
        place = SimpleNamespace(offset=at, length=3)
        return [{"prompt_token_ids": ids[:at] + [IMAGE] * 3 + ids[at + 1 :], "mm_placeholders": {"image": [place]}}]

    seen = []
    generation = SimpleNamespace(
        mode="colocate", llm=SimpleNamespace(renderer=SimpleNamespace(render_cmpl=render)),
        generate=lambda prompts, images, num_generations: seen.append(prompts),
    )  # fmt: skip
    expand_pictures_once(SimpleNamespace(vllm_generation=generation))
    long, short = [5, IMAGE, IMAGE, IMAGE, 7], [5, IMAGE, 7]
    generation.generate(prompts=[long, [5, 7], short], images=[["it"], None, ["it"]], num_generations=1)
    generation.generate(prompts=[long], images=None, num_generations=1)
    generation.mode = "server"
    generation.generate([long], [["it"]], num_generations=1)
    assert seen == [[short, [5, 7], short], [long], [long]]
    with pytest.raises(InterceptionError, match="has no vLLM engine"):
        expand_pictures_once(SimpleNamespace(vllm_generation=None))


def test_a_sync_drops_what_the_engine_keeps_of_pictures_after_it():
    told = []
    engine = SimpleNamespace(reset_encoder_cache=lambda: told.append("dropped"))
    generation = SimpleNamespace(
        mode="colocate", llm=SimpleNamespace(llm_engine=engine), sync_weights=lambda: told.append("synced")
    )
    encode_pictures_anew(SimpleNamespace(vllm_generation=generation))
    generation.sync_weights()
    assert told == ["synced", "dropped"]
    tower = torch.nn.ModuleDict({"visual": torch.nn.Linear(1, 1), "text": torch.nn.Linear(1, 1)})
    capture = SimpleNamespace(generation=generation, pictures=[None], policy=tower)
    assert not keeps_pictures(capture)
    generation.sync_weights = lambda: None  # TRL's own
    assert keeps_pictures(capture)
    tower["visual"].requires_grad_(False)
    assert not keeps_pictures(capture)
    tower.requires_grad_(True)
    capture.pictures = None
    assert not keeps_pictures(capture)
    generation.mode = "server"
    with pytest.raises(InterceptionError, match="server empties no encoder cache"):
        encode_pictures_anew(SimpleNamespace(vllm_generation=generation))


def test_the_same_text_with_another_picture_is_another_prompt():
    ids = torch.tensor([[1, 2, 3]] * 4)
    pixels = [torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 0)]
    keys = torch.stack([*map(picture_key, pixels), torch.tensor(0)])
    rollout = SimpleNamespace(
        prompt_ids=ids, prompt_mask=torch.ones_like(ids), completion_ids=ids, completion_mask=torch.ones_like(ids),
        image_keys=keys,
    )  # fmt: skip
    for found in (prompt_keys(rollout), row_keys(rollout)):
        assert found[0] == found[2]
        assert len(found.unique()) == 3
    assert picture_key(pixels[0]) != picture_key(pixels[0].flip(0))
    wide = torch.randn(200_000)
    assert picture_key(wide) == picture_key(wide.clone()) != picture_key(wide.view(2, -1).T)


def test_rewards_are_grouped_by_what_pictures_show_not_by_where_they_lie():
    from PIL import Image

    def prompt(colour):
        return [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (4, 4), colour)}]}]

    capture = object.__new__(GRPOCapture)
    capture.output = {"completion_ids": torch.zeros(3, 1)}
    capture.trainer = SimpleNamespace(
        _logs={"prompt": [prompt("red"), prompt("red"), prompt("blue")]}, accelerator=SimpleNamespace(num_processes=1)
    )
    first, second, third = capture.reward_prompts()
    assert first == second != third
