"""Is bf16 slower than fp32 on this CPU? Decides what ``trainer.precision=auto`` should mean."""

from __future__ import annotations

import torch

from benchmarks.side_by_side import compare, write


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for shape in ((896, 256, 1344), (896, 672, 256), (128, 256, 2048)):
        m, k, n = shape
        a, b = torch.randn(m, k), torch.randn(k, n)
        c, d = a.bfloat16(), b.bfloat16()
        rows.append(
            compare(f"{m}x{k} @ {k}x{n}", ("fp32", lambda: a @ b), ("bf16", lambda: c @ d))  # noqa: B023
        )
    write("precision", "Matrix products in fp32 and bf16, one thread", rows)


if __name__ == "__main__":
    main()
