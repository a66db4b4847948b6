"""Tiny random models and their tokenizers, saved as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHARS = "0123456789+-*=abcdefghijklmnopqrstuvwxyz ?.,"


def save_tokenizer(directory: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?")
    fast.save_pretrained(directory)
    return fast


CHAT_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role }} {{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant {% endif -%}
"""


def save_tool_tokenizer(directory: Path) -> Any:
    """The same with a chat template and tokens that spell a whole tool call, so that a random model makes some."""
    from transformers import PreTrainedTokenizerFast
    from trl import chat_template_utils as templates

    base = save_tokenizer(directory)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?"
    )
    fast.add_tokens(
        [f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": 2}}}}\n</tool_call>' for a in range(8)]
    )
    fast.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.response_template = getattr(templates, "qwen3_template", None)  # TRL 1.0 to 1.6 have none
    fast.save_pretrained(directory)
    return fast


def save_tiny_model(directory: Path, *, logit_std: float = 2.0, tokenizer: Any = None, **config: Any) -> Path:
    """A random Qwen3 of 0.3 M parameters whose logits spread enough that temperature and truncation matter."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tokenizer or save_tokenizer(directory)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**(settings | config)))
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=logit_std / settings["hidden_size"] ** 0.5)
    model.save_pretrained(directory)
    return directory


def save_tiny_gemma(directory: Path) -> Path:
    """A random Gemma 2: logit soft cap, scaled embeddings, tied head, a sliding window in every other layer."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = save_tokenizer(directory)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=256, sliding_window=64,
        final_logit_softcapping=4.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config)
        for name, parameter in model.named_parameters():  # so that the layers matter and tokens are not repeated
            if parameter.ndim == 2:
                parameter.data.mul_(15.0 if "embed" in name else 3.0)
    model.save_pretrained(directory)
    return directory


def save_tiny_moe(directory: Path) -> Path:
    """A random Qwen3-MoE: 8 experts of which 2 are taken, whose width the CPU's kernel need not pad."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = save_tokenizer(directory)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, max_position_embeddings=512,
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        for name, parameter in model.named_parameters():  # so that which experts are taken matters
            if "mlp" in name:
                parameter.data.mul_(1.5)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.25)
    model.save_pretrained(directory)
    return directory
