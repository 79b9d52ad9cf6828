"""Adam as Megatron's optimizers expect it, for where neither Transformer Engine nor Apex is."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam with the contract of Apex's ``FusedAdam``, on torch's own fused kernel.

    The contract is what Megatron's distributed optimizer saves and loads: the number of steps is
    ``step`` in each parameter group (torch keeps a tensor per parameter), the state of a parameter
    is ``exp_avg`` and ``exp_avg_sq``, shaped like it, and a group without parameters does not
    count.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decay; decoupled (AdamW) or added to the gradient (Adam).
        adam_w_mode: decoupled weight decay, https://arxiv.org/abs/1711.05101.
        capturable: accepted for the contract; CUDA graphs are refused.

    Raises:
        ValueError: if ``capturable`` is set.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("optimizer_cuda_graph needs the Adam of Transformer Engine")
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not called."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moved:
                continue
            for parameter in moved:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            steps = torch.tensor(float(group["step"]), device=moved[0].device)
            self._kernel(
                moved,
                [parameter.grad for parameter in moved],
                [self.state[parameter]["exp_avg"] for parameter in moved],
                [self.state[parameter]["exp_avg_sq"] for parameter in moved],
                [],
                [steps] * len(moved),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=float(group["weight_decay"]),
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
