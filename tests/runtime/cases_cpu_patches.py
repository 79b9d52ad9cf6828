"""Every patch, left out and then applied, in one launch of two processes.

The cases run in the order in which ``install()`` applies the patches, so each one sees all the
patches before its own and none after it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from unimoe_mcore.runtime import cpu, without_te
from unimoe_mcore.runtime.quiet import silence_import_remarks


def ablate() -> dict[str, dict[str, Any]]:
    """Name of a patch -> what the code that needs it did ``without`` and ``patched``."""
    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # which a prepared parent process hands down
    silence_import_remarks()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import megatron.core.models.hybrid.hybrid_block
    import megatron.core.optimizer.distrib_optimizer  # noqa: F401  (all of it, unpatched)

    results = {}
    cases: list[tuple[Callable[[], None], Callable[[], Any]]] = [
        (cpu.patch_compile, compiled_function),
        (cpu.patch_nccl_names, nccl_group),
        (cpu.patch_current_device, current_device),
        (cpu.patch_streams, token_dispatcher),
        (cpu.patch_cuda_rng, seeds),
        (cpu.patch_device_strings, gradient_norm),
        (cpu.patch_tensor_type, mixed_precision_optimizer),
        (cpu.patch_rng_tracker, forked_draw),
        (cpu.patch_rng_warning, warnings_of_a_fork),
        (cpu.patch_moe_splits, expert_all_to_all),
        (cpu.patch_uneven_gather, uneven_gather_and_scatter),
        (without_te.patch_torch_norm, norm_under_sequence_parallelism),
        (without_te.patch_hybrid_final_norm, hybrid_stack),
        (without_te.patch_adam, optimizer_state_before_a_step),
        (without_te.patch_thd_rope, packed_rotations),
        (without_te.patch_weight_gradients, weight_gradient_in_its_buffer),
        (without_te.patch_multi_tensor, clipped_gradients),
        (without_te.patch_chunk_order, tokens_in_order),
        (without_te.patch_gated_mlp, gated_expert),
    ]
    for patch, action in cases:
        without = attempt(action)
        patch()
        results[patch.__name__] = {"without": without, "patched": attempt(action)}
    return results


def attempt(action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or its error as ``Type: message``."""
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compiled_function() -> list[float]:
    """A function that Megatron decorates with ``jit_fuser``, where no compiler is installed."""
    import torch._inductor.config
    from megatron.core.fusions import fused_bias_swiglu

    module = importlib.reload(fused_bias_swiglu)  # the decorator is evaluated anew
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        return module.swiglu(torch.tensor([0.0, 1.0])).tolist()


def nccl_group() -> str:
    """``bridge_communicator.py:199``."""
    group = dist.new_group([0, 1], backend="nccl")
    return str(dist.get_backend(group))


def current_device() -> dict[str, Any]:
    """``tensor_parallel/layers.py:1000`` and ``async_utils.py:565``."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.tensor_parallel import ColumnParallelLinear

    def layer() -> list[int]:
        zeros, config = torch.nn.init.zeros_, small_config()
        layer = ColumnParallelLinear(
            4, 6, config=config, init_method=zeros, tp_group=lonely_group()
        )
        return list(layer.weight.shape)

    def checkpoint_worker() -> str:
        jobs: Any = queue.Queue()
        jobs.put("DONE")
        level = logging.getLogger().level
        PersistentAsyncCaller.async_loop(1, jobs, None, None, level, 0, None)
        return "done"

    return {"layer": attempt(layer), "checkpoint worker": attempt(checkpoint_worker)}


def token_dispatcher() -> str:
    """``token_dispatcher.py:469``."""
    return type(small_dispatcher(lonely_group())).__name__


def seeds() -> bool:
    """``tensor_parallel/random.py:303``, which sets no state yet while its own patch is missing."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    tracker.add("two", 2)
    states = tracker.get_states()
    return not torch.equal(states["one"], states["two"])


def gradient_norm() -> float:
    """``clip_grads.py:96``, and ``.cuda()`` of ``language_module.py:307``."""
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    norm = get_grad_norm_fp32([torch.tensor([3.0, 4.0]).cuda()], grad_stats_parallel_group=None)
    with torch.device("meta"):
        assert torch.empty(1).is_meta  # torch still knows its factories
    return float(norm)


def mixed_precision_optimizer() -> str:
    """``optimizer.py:1009``."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = Float16OptimizerWithFloat16Params(
        torch.optim.SGD([parameter]), OptimizerConfig(bf16=True), None, lambda *_: None
    )
    main = optimizer.fp32_from_float16_groups[0][0]
    assert parameter.type(main.type()).dtype == torch.float32  # a cast by that string still works
    return str(main.dtype)


def forked_draw() -> dict[str, Any]:
    """A draw inside a fork comes from the fork's own seed and leaves the outer sequence alone."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(7)
    tracker = CudaRNGStatesTracker()
    tracker.add("experts", 1)
    tracker.add("tensor", 2)
    before = torch.get_rng_state()
    with tracker.fork("experts"):
        draw = torch.rand(1)
    outer_untouched = torch.equal(before, torch.get_rng_state())
    expected = torch.rand(1, generator=torch.Generator().manual_seed(1))
    return {"own sequence": torch.equal(draw, expected), "outer untouched": outer_untouched}


def warnings_of_a_fork() -> int:
    """Lines that reach the terminal from one draw inside a fork."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    tracker = CudaRNGStatesTracker()
    tracker.add("experts", 1)
    logging.getLogger().addHandler(handler)
    with tracker.fork("experts"):
        torch.rand(1)
    logging.getLogger("megatron.core.tensor_parallel.random").warning("something else")
    logging.getLogger().removeHandler(handler)
    return len(lines)


def expert_all_to_all() -> list[float]:
    """``token_dispatcher.py:927`` over two expert-parallel ranks: send tokens there and back."""
    rank = dist.get_rank()
    with layout(expert=2):
        dispatcher = small_dispatcher(dist.group.WORLD)
        tokens = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]) + 10 * rank
        tokens = tokens[: 3 - rank].view(-1, 1, 2)  # another number on each rank
        routing = torch.zeros(tokens.shape[0], 2, dtype=torch.bool)
        routing[:, 1] = True
        routing[0] = torch.tensor([True, False])
        sent, probabilities = dispatcher.dispatch_preprocess(tokens, routing, routing.float())
        sent, probabilities = dispatcher.token_dispatch(sent, probabilities)
        sent, _, _ = dispatcher.dispatch_postprocess(sent, probabilities)
        back = dispatcher.token_combine(dispatcher.combine_preprocess(sent))
        return dispatcher.combine_postprocess(back)[:, 0, 0].tolist()


def uneven_gather_and_scatter() -> list[list[float]]:
    """``mappings.py:155,194`` with three rows on one rank and two on the other."""
    from megatron.core.tensor_parallel import mappings

    rank, sizes = dist.get_rank(), [3, 2]
    part = torch.full((sizes[rank], 1), float(rank))
    whole = mappings._gather_along_first_dim(part, dist.group.WORLD, sizes)
    mine = mappings._reduce_scatter_along_first_dim(
        torch.arange(5.0).view(5, 1), dist.group.WORLD, sizes
    )
    return [whole[:, 0].tolist(), mine[:, 0].tolist()]


def norm_under_sequence_parallelism() -> dict[str, Any]:
    """``torch_norm.py:53``; what it refuses for good reason stays refused."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = small_config()
    config.sequence_parallel = True
    norm: Any = WrappedTorchNorm(config, 8, eps=1e-3)
    config.persist_layer_norm = True
    return {
        "marked": norm.weight.sequence_parallel,
        "eps": norm.eps,
        "persistent": attempt(lambda: WrappedTorchNorm(config, 8)),
    }


def hybrid_stack() -> str:
    """``hybrid_block.py:215``."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.process_groups_config import ProcessGroupCollection

    with layout():
        stack = HybridStack(
            small_config(),
            HybridStackSubmodules(),
            layer_type_list=[],
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    return type(stack.final_norm).__name__


def optimizer_state_before_a_step() -> dict[str, Any]:
    """``distrib_optimizer.py:839``: what a checkpoint asks for before the first step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    with layout():
        model = DistributedDataParallel(
            small_config(),
            DistributedDataParallelConfig(use_distributed_optimizer=True),
            torch.nn.Linear(4, 4),
        )
        config = OptimizerConfig(lr=1e-3, use_distributed_optimizer=True)
        optimizer = get_megatron_optimizer(config, [model])
        before = optimizer.state_dict()
        for parameter in model.parameters():
            parameter.main_grad.fill_(1.0)
        optimizer.step()
        after = optimizer.state_dict()
    groups = after["optimizer"]["param_groups"]
    return {"before": "optimizer" in before, "steps": [group["step"] for group in groups]}


def packed_rotations(sequences: int = 50) -> dict[str, Any]:
    """``rope_utils.py:261``: number of rotations for a pack, a digest of the result, the time."""
    from megatron.core.models.common.embeddings import rope_utils

    calls = 0
    original = rope_utils._apply_rotary_pos_emb_bshd

    def counted(*arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments, **keywords)

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (sequences,), generator=generator)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rotary = 12  # narrower than a head: the rest of it passes through
    frequencies = torch.rand(int(lengths.max()), 1, 1, rotary, generator=generator)
    tokens = torch.rand(int(lengths.sum()), 4, 16, generator=generator, requires_grad=True)
    weights = torch.rand(tokens.shape, generator=generator)
    digests = []
    rope_utils._apply_rotary_pos_emb_bshd = counted
    for interleaved in (False, True):
        rotated = rope_utils._apply_rotary_pos_emb_thd(
            tokens, bounds, frequencies, rotary_interleaved=interleaved, cp_group=lonely_group()
        )
        (slope,) = torch.autograd.grad((rotated * weights).sum(), tokens)
        digests += [rotated.double().sum().item(), *rotated.flatten()[::97].tolist()]
        digests += [slope.double().sum().item(), *slope.flatten()[::97].tolist()]
    per_token = torch.rand(tokens.shape[0], 1, 1, rotary, generator=generator)
    exact = rope_utils._apply_rotary_pos_emb_thd(tokens, bounds, per_token, cp_group=lonely_group())
    digests.append(exact.double().sum().item())
    rope_utils._apply_rotary_pos_emb_bshd = original

    start = time.perf_counter()
    for _ in range(20):
        rotated = rope_utils._apply_rotary_pos_emb_thd(
            tokens, bounds, frequencies, cp_group=lonely_group()
        )
        torch.autograd.grad((rotated * weights).sum(), tokens)
    milliseconds = (time.perf_counter() - start) / 20 * 1e3
    return {"calls": calls, "digests": digests, "milliseconds": milliseconds}


def weight_gradient_in_its_buffer() -> dict[str, Any]:
    """``layers.py:1070``: two products added to a buffer, and a layer that has none."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer = ColumnParallelLinear(
        2,
        3,
        config=small_config(gradient_accumulation_fusion=True),
        init_method=torch.nn.init.ones_,
        bias=False,
        tp_group=lonely_group(),
    )
    inputs = torch.tensor([[1.0, 2.0]], requires_grad=True)
    layer(inputs)[0].sum().backward()
    assert layer.weight.grad is not None
    alone, layer.weight.grad = layer.weight.grad.tolist(), None
    layer.weight.main_grad = torch.full((3, 2), 10.0)
    for _ in range(2):
        layer(inputs)[0].sum().backward()
    buffer = layer.weight.main_grad.tolist()
    return {"alone": alone, "buffer": buffer, "grad": layer.weight.grad}


def clipped_gradients() -> dict[str, Any]:
    """``clip_grads.py:44``: norm, clipped gradients, and how many values the host waits for."""
    from megatron.core.optimizer import clip_grads

    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(8)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.tensor([3.0, 4.0]) if number < 4 else torch.zeros(2)
    gradients = [parameter.grad for parameter in parameters]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        norm = clip_grads.get_grad_norm_fp32(gradients, grad_stats_parallel_group=lonely_group())
        clip_grads.clip_grad_by_total_norm_fp32(parameters, 5.0, norm)
    waits = sum(event.count for event in seen.key_averages() if event.key == "aten::item")
    total = torch.stack(gradients).sum(0)  # type: ignore[arg-type]
    return {"norm": norm, "clipped": total.tolist(), "few waits": waits < len(parameters)}


def tokens_in_order() -> dict[str, Any]:
    """``sort_chunks_by_idxs`` of the dispatcher: chunks in order, and chunks that are not."""
    from megatron.core.transformer.moe import token_dispatcher

    tokens, sizes = torch.arange(6.0).view(6, 1), torch.tensor([1, 2, 3])
    found = {}
    for name, order in (("in order", [0, 1, 2]), ("out of order", [2, 0, 1])):
        moved, weights = token_dispatcher.sort_chunks_by_idxs(
            tokens, sizes, torch.tensor(order), probs=tokens[:, 0]
        )
        found[name] = [moved[:, 0].tolist(), weights.tolist(), moved is tokens]
    return found


def gated_expert() -> dict[str, Any]:
    """An expert's output and gradients in fp64, and what it does beside its matrix products."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    generator = torch.Generator().manual_seed(0)
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    with layout():
        config = small_config(
            hidden_size=2,
            ffn_hidden_size=12,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            params_dtype=torch.float64,
        )
        expert = MLP(config, parts, is_expert=True, ffn_hidden_size=12, tp_group=lonely_group())
        for weight in expert.parameters():
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        tokens = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        scale = torch.rand(5, generator=generator, dtype=torch.float64).requires_grad_()
        with _Passes() as passes:
            output, _ = expert(tokens, scale)
            output.square().sum().backward()
    found = [output, tokens.grad, scale.grad, *(weight.grad for weight in expert.parameters())]
    return {
        "values": [value.flatten().tolist() for value in found if value is not None],
        "widest": passes.widest,
        "idle": passes.idle,
    }


class _Passes(TorchDispatchMode):
    """How wide tokens are where they are weighed, and how often numbers are only moved.

    Attributes:
        widest: numbers of the widest product with one factor per token.
        idle: joins, and additions of a constant.
    """

    widest = 0
    idle = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mul.Tensor and args[1].shape[-1:] == (1,):
            self.widest = max(self.widest, args[0].numel())
        constant = func is torch.ops.aten.add.Tensor and not isinstance(args[1], torch.Tensor)
        self.idle += func is torch.ops.aten.cat.default or constant
        return func(*args, **(kwargs or {}))


_lonely: list[Any] = []


def lonely_group() -> Any:
    """A process group of this rank alone."""
    if not _lonely:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _lonely.append(groups[dist.get_rank()])
    return _lonely[0]


@contextlib.contextmanager
def layout(**sizes: int) -> Iterator[None]:
    """Megatron's process groups and nothing of the project's own."""
    from megatron.core import parallel_state

    expert = sizes.get("expert", 1)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def small_config(**fields: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "perform_initialization": False,
            "gradient_accumulation_fusion": False,
            "persist_layer_norm": False,
            "add_bias_linear": False,
            **fields,
        }
    )


def small_dispatcher(experts: Any) -> Any:
    """An all-to-all dispatcher of two experts over the group ``experts``."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    groups = ProcessGroupCollection()
    groups.ep, groups.expt_tp, groups.tp_ep, groups.tp = (
        experts, lonely_group(), experts, lonely_group(),
    )  # fmt: skip
    local = 2 // experts.size()
    return MoEAlltoAllTokenDispatcher(
        local,
        [experts.rank() * local + index for index in range(local)],
        small_config(
            num_moe_experts=2,
            moe_router_topk=1,
            moe_router_pre_softmax=True,
            moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=experts.size(),
        ),
        groups,
    )
