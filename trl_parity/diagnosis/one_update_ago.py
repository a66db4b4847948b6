"""The policy's weights before its last update, from what Adam keeps of it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["one_update_ago"]


def one_update_ago(optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Of the parameters that have been updated, what they were: empty where no Adam tells, or rounding hides it.

    w = (1 - lr wd) w' - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)    (AdamW: Loshchilov and Hutter 2019)

    solved for w'. The learning rate is the next update's: a schedule moves it by little.
    """
    before: dict[torch.nn.Parameter, torch.Tensor] = {}
    for group in [] if optimizer is None else optimizer.param_groups:
        if not {"lr", "betas", "eps", "weight_decay"} <= group.keys():
            return {}
        (b1, b2), decay = group["betas"], group["lr"] * group["weight_decay"]
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter) or {}
            if not {"step", "exp_avg", "exp_avg_sq"} <= kept.keys() or kept["exp_avg"].shape != parameter.shape:
                continue
            if torch.finfo(parameter.dtype).bits < 32:  # most of an update is lost in rounding, and not to be undone
                return {}
            t, first, second = float(kept["step"]), kept["exp_avg"].float(), kept["exp_avg_sq"].float()
            update = first / (1.0 - b1**t) / ((second / (1.0 - b2**t)).sqrt() + group["eps"])
            was = (parameter.detach().float() + group["lr"] * update) / (1.0 - decay)
            before[parameter] = was.to(parameter.dtype)
    return before
