"""Rotary embedding of a packed row: one application against Megatron's loop over sequences."""

from __future__ import annotations

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import torch  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from benchmarks.side_by_side import compare, write  # noqa: E402
from unimoe_mcore.config.parallel import ParallelConfig  # noqa: E402
from unimoe_mcore.runtime import groups  # noqa: E402


def main() -> None:
    cp = groups.initialise(ParallelConfig(processes=1)).cp
    ours = rope_utils._apply_rotary_pos_emb_thd
    theirs = ours.__wrapped__
    rows = []
    for sequences, length, heads, head in ((50, 20, 4, 64), (24, 32, 4, 64), (8, 256, 8, 64)):
        ends = torch.arange(sequences + 1, dtype=torch.int32) * length
        t = torch.randn(sequences * length, heads, head, requires_grad=True)
        freqs = torch.randn(length, 1, 1, head)

        def work(apply: object) -> None:
            apply(t, ends, freqs, cp_group=cp).sum().backward()  # type: ignore[operator]  # noqa: B023

        rows.append(
            compare(
                f"{sequences} sequences of {length}, {heads} heads of {head}",
                ("gather", lambda: work(ours)),
                ("loop", lambda: work(theirs)),
                rounds=30,
            )
        )
    write("thd_rope", "Rotary embedding of a packed row, forward and backward, one thread", rows)


if __name__ == "__main__":
    main()
