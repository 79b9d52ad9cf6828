"""Our training step beside transformers' Mixtral and beside the official Uni-MoE step."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.children import Child
from benchmarks.side_by_side import write
from tests.distributed import free_port

TOLERANCE = 1e-5
"""Largest relative difference of losses and gradient norms of sides that are compared."""
MIXTRAL, OFFICIAL, TWO = 1.0, 3.0, 1.5
"""Promised: throughput over Mixtral's, over the official step's, of two processes over one."""

Found = dict[str, list[dict[str, float]]]
"""Side -> what each of its steps gave."""


@dataclass(frozen=True)
class Size:
    """A language model and its global batch.

    Attributes:
        name: for the table.
        sequences: of the batch, all of ``length`` tokens, without padding.
        rounds: steps of each side that are counted.
        warm: steps that the balancing loss has before two processes are timed.
        language: fields of ``LanguageConfig``.
    """

    name: str
    sequences: int
    length: int
    rounds: int
    warm: int
    language: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length


SIZES = (
    Size("hidden 256", 4, 256, 15, 20),
    Size(
        "SmolLM2-135M's",
        2,
        128,
        5,
        4,
        {
            "blocks": 30,
            "hidden": 576,
            "ffn": 1536,
            "heads": 9,
            "kv_heads": 3,
            "vocabulary": 49152,
            "rope_base": 100_000,
        },
    ),
)
QUICK = (
    Size("quick", 2, 32, 2, 2, {"blocks": 2, "hidden": 32, "ffn": 48, "vocabulary": 128}),
    Size("quick, 2 groups", 2, 64, 2, 2, {"blocks": 2, "hidden": 48, "ffn": 64, "kv_heads": 2}),
)
SAMPLES, ROUNDS = 16, 7
ALONE: dict[str, tuple[str, ...]] = {
    "experts in a loop that searches and adds in place": ("loop",),
    "eager attention with a 4-D mask": ("eager",),
    "padding to the longest sample": ("padded",),
    "logits at all places": ("everywhere",),
    "micro-batches of 4 samples": ("few",),
    "dummy pictures and videos encoded and thrown away": ("dummies",),
    "no feature cache": ("uncached",),
    "no feature cache, recordings one at a time": ("uncached", "single"),
    "no feature cache, recordings padded to 30 s": ("uncached", "half_minute"),
}
"""What is switched on, on top of a fast plain step."""
EXACT = ("loop", "eager", "padded", "everywhere", "few", "dummies")
"""Habits that leave the loss as it is."""
EVERYTHING = (*EXACT, "uncached", "single", "half_minute")


def step(children: Iterable[Child], **options: Any) -> dict[str, float]:
    """One step of a side, of however many processes; the slowest counts."""
    children = list(children)
    for child in children:
        child.tell("step", **options)
    answers = [child.answer() for child in children]
    slowest = max(answers, key=lambda answer: answer["seconds"])
    return {**slowest, "cpu": sum(answer["cpu"] for answer in answers)}


def started(stack: ExitStack, module: str, ranks: int = 1, **build: Any) -> list[Child]:
    """Processes of one side, built and ready."""
    port = str(free_port())
    children = []
    for rank in range(ranks):
        layout = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**layout, **address} if ranks > 1 else {}
        children.append(stack.enter_context(Child(module, **environment)))
    for child in children:
        child.tell("build", **build)
    for child in children:
        child.answer()
    return children


FIRST, LATER = ("loss", "norm"), ("loss",)
"""What must be the same in the first step, and in the second. Not the norm: Adam's first step
divides every gradient by its own size, so that where it is nearly zero rounding chooses the sign
of the next weight (two ways to compute one side differ as well)."""


def require_same(
    what: str, ours: dict[str, float], theirs: dict[str, float], keys: Sequence[str] = FIRST
) -> str:
    """Refuse to time two sides that compute different things.

    Norms are compared as added up in fp64 where both sides give that: over the 28 million gradients
    of one embedding the fp32 sum is wrong by 2e-5, on either side.

    Raises:
        RuntimeError: naming what differs and by how much.
    """
    sides = [{"loss": s["loss"], "norm": s.get("exact", s["norm"])} for s in (ours, theirs)]
    apart = {key: abs(sides[0][key] / sides[1][key] - 1) for key in FIRST}
    for key, difference in apart.items():
        if key in keys and not difference <= TOLERANCE:
            one, other = (side[key] for side in sides)
            raise RuntimeError(
                f"{what}: {key} {one:.8g} against {other:.8g}, a relative difference "
                f"of {difference:.1e}; nothing is timed"
            )
    return f"{what}: loss {apart['loss']:.0e}, gradient norm {apart['norm']:.0e}"


def like(what: str, steps: Sequence[dict[str, float]], children: list[Child]) -> list[str]:
    """The first steps of another side, which must be the same."""
    return [
        require_same(f"{what}, step {number}", one, step(children, exact=True), keys)
        for number, (one, keys) in enumerate(zip(steps, (FIRST, LATER), strict=True), 1)
    ]


def in_turn(sides: dict[str, Callable[[], dict[str, float]]], rounds: int) -> Found:
    """A step of each side in every round; one before that is not counted."""
    found: Found = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, take in sides.items():
            taken = take()
            if number:
                found[name].append(taken)
    return found


def ratio(found: Found, side: str, over: str, key: str = "seconds") -> float:
    """How much longer ``over`` takes than ``side``: the median over rounds."""
    pairs = zip(found[side], found[over], strict=True)
    return statistics.median(b[key] / a[key] for a, b in pairs)


def row(case: str, side: str, found: Found, tokens: int, compared: str) -> str:
    """One row of the table."""
    wall = [1e3 * one["seconds"] for one in found[side]]
    cpu = statistics.median(1e3 * one["cpu"] for one in found[side])
    middle = statistics.median(wall)
    cells = [case, side, f"{middle:.1f}", f"{min(wall):.1f} to {max(wall):.1f}", f"{cpu:.1f}"]
    cells += [f"{1e3 * tokens / middle:,.0f}", compared, str(len(wall))]
    print("| " + " | ".join(cells) + " |", flush=True)
    return "| " + " | ".join(cells) + " |"


def compared(found: Found, side: str, over: str, name: str) -> str:
    """Cell: throughput in multiples of another side's, by the clock and by processor time."""
    by_cpu = ratio(found, side, over, "cpu")
    return f"{ratio(found, side, over):.2f} of {name} ({by_cpu:.2f} by processor time)"


def met(what: str, value: float, target: float) -> str:
    """A target and what became of it."""
    return f"{what}: {value:.2f}, promised {target:.1f}: {'met' if value >= target else 'not met'}."


def language(size: Size, rows: list[str], said: list[str]) -> None:
    """Ours beside Mixtral, then two of our processes beside one."""
    build = {"language": size.language, "length": size.length}
    beside_mixtral(size, build, rows, said)
    two_beside_one(size, build, rows, said)
    said.append(at_once(size, build))


LANGUAGE = "benchmarks.language_step"


def beside_mixtral(size: Size, build: dict[str, Any], rows: list[str], said: list[str]) -> None:
    """Ours and transformers' model, one process each."""
    build = {**build, "sequences": size.sequences}
    with ExitStack() as stack:
        ours = started(stack, LANGUAGE, side="ours", **build)
        first = [step(ours, exact=True) for _ in range(2)]
        mixtral = started(stack, LANGUAGE, side="mixtral", **build)
        same = like(f"{size.name}, Mixtral", first, mixtral)
        mixtral[0].tell("choose")
        choice = mixtral[0].answer()
        found = in_turn({"Mixtral": lambda: step(mixtral), "ours": lambda: step(ours)},
                        size.rounds)  # fmt: skip
    rows.append(row(size.name, "Mixtral", found, size.tokens, ""))
    cell = compared(found, "ours", "Mixtral", "Mixtral's")
    rows.append(row(size.name, "ours", found, size.tokens, cell))
    said.append(met(f"{size.name}, ours over Mixtral", ratio(found, "ours", "Mixtral"), MIXTRAL))
    said.append(f"Relative differences of the first two steps: {'; '.join(same)}.")
    said.append(f"{size.name}: Mixtral's experts are computed by `{choice['chosen']}`, the fastest "
                f"here: {_told(choice['tried'])}.")  # fmt: skip


def two_beside_one(size: Size, build: dict[str, Any], rows: list[str], said: list[str]) -> None:
    """Experts divided between two processes, with the balancing loss that this calls for."""
    build = {**build, "sequences": size.sequences, "balanced": True}
    with ExitStack() as stack:
        one = started(stack, LANGUAGE, side="ours", **build)
        first = [step(one, exact=True) for _ in range(2)]
        two = started(stack, LANGUAGE, ranks=2, side="ours", **build)
        same = like(f"{size.name}, EP=2", first, two)
        for _ in range(size.warm):
            step(one), step(two)
        found = in_turn({"one": lambda: step(one), "EP=2": lambda: step(two)}, size.rounds)
        busier = step(two, record=True)["busier"]
    rows.append(row(size.name, "ours, balanced", found | {"ours, balanced": found["one"]},
                    size.tokens, "beside two processes"))  # fmt: skip
    cell = compared(found, "EP=2", "one", "one process's")
    rows.append(row(size.name, "EP=2", found, size.tokens, cell))
    said.append(met(f"{size.name}, EP=2 over one process", ratio(found, "EP=2", "one"), TWO))
    fastest = [min(one["seconds"] for one in found[side]) for side in ("one", "EP=2")]
    said.append(
        f"{size.name}, EP=2 over one process, the fastest step of each: "
        f"{fastest[0] / fastest[1]:.2f}; the busier process has {busier:.2f} of its share of "
        f"tokens."
    )
    said.append(f"Relative differences of the first two steps: {'; '.join(same)}.")


def at_once(size: Size, build: dict[str, Any]) -> str:
    """What two processes lose by nothing but running at the same time on this machine."""
    build = {**build, "sequences": size.sequences // 2}
    with ExitStack() as stack:
        pair = [started(stack, LANGUAGE, side="ours", **build)[0] for _ in range(2)]
        found = in_turn({"alone": lambda: step(pair[:1]), "both": lambda: step(pair)}, size.rounds)
    return (
        f"{size.name}, two processes that share nothing, half of the sequences each: computing at "
        f"once, each takes {1 / ratio(found, 'both', 'alone'):.2f} times as long as alone."
    )


def _told(tried: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in tried.items())


def mixed(samples: int, rounds: int, rows: list[str], said: list[str]) -> None:
    """Ours beside the official step and each of its habits alone."""
    module = "benchmarks.mixed_step"
    with tempfile.TemporaryDirectory() as cache, ExitStack() as stack:
        ours = started(stack, module, side="ours", cache=cache, samples=samples)
        official = started(stack, module, side="official", cache=cache, samples=samples)
        tokens = int(step(ours)["tokens"])

        def plain(*habits: str) -> dict[str, float]:
            return step(official, **dict.fromkeys(habits, True))

        plain()  # beside ours above, so that both have taken a step
        same = [
            require_same(f"mixed samples, {what}", step(ours), plain(*habits))
            for what, habits in (
                ("plain", ()),
                ("habits that change no number", EXACT),
                ("without the cache too", (*EXACT, "uncached", "single")),
            )
        ]
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "ours, cache warm": lambda: step(ours),
            "ours, cache cold": lambda: step(ours, prepare={"cold": True}),
            "official, all of these": lambda: plain(*EVERYTHING),
            "fast plain step": plain,
            **{name: partial(plain, *habits) for name, habits in ALONE.items()},
        }
        found = in_turn(sides, rounds)
    for name in sides:
        cell = ""
        if name.startswith("ours"):
            cell = compared(found, name, "official, all of these", "the official step's")
        elif name != "fast plain step":
            cell = f"{ratio(found, 'fast plain step', name):.2f} times the fast plain step's time"
        rows.append(row("mixed samples", name, found, tokens, cell))
    warm, cold = (
        ratio(found, f"ours, cache {state}", "official, all of these") for state in ("warm", "cold")
    )
    said.append(met("Mixed samples, ours with a warm cache over the official step", warm, OFFICIAL))
    said.append(met("Mixed samples, ours with a cold cache over the official step", cold, OFFICIAL))
    fast = ratio(found, "ours, cache warm", "fast plain step")
    said.append(f"Mixed samples, ours with a warm cache over the fast plain step: {fast:.2f}.")
    said.append(f"Relative differences: {'; '.join(same)}.")


COLUMNS = (
    *("case", "side", "step, ms", "lowest to highest", "processor time, ms", "tokens/s"),
    *("throughput", "rounds"),
)

NOTES = (
    "All sides: fp32, one thread a process, AdamW on all trained parameters (one fused kernel), "
    "gradient clipping, and a step that is refused if a gradient is not finite. Processes live "
    "through the run and compute in turn, never two sides at once; medians over rounds, ratios are "
    "medians of each round's. Reading, decoding and collating are outside the clock on all sides.",
    "Language model: all parts train, experts in all blocks (4, top-2), every token but each "
    "sequence's last is learnt. Mixtral is transformers' `MixtralForCausalLM` with sdpa attention "
    "on the sequences as a batch without padding; ours is `TrainModule` and `train_step` on one "
    "packed row. Both start from the same weights. EP=2 is half of the sequences a rank, beside "
    "one process with all of them; both train with the balancing loss over the global batch "
    "(0.05), since a process that has more than its share of tokens keeps the other waiting.",
    f"Mixed samples: stage 3 of the tiny recipe (LoRA, router and connectors train), {SAMPLES} "
    "samples: pictures of 160 x 160, speech of 2 to 5 s, sounds of 1 to 4 s, text alone, a quarter "
    "each; real EfficientNet-Lite0 and Whisper tiny.en. The official step is written anew in plain "
    "PyTorch from a description of what the published code does. The same on both sides: samples, "
    "connectors, initial weights, rank and places of the adapters, trained parts, loss over all "
    "label tokens of the step, optimizer, clipping (the official one does not clip).",
    "Left out of the official step, which would make it slower: gradient checkpointing; separate "
    "query, key and value (gate and up) matrices with an adapter each; dropout in adapters; "
    "spectra (computed beforehand; ours with a cold cache computes them); 8 frames in a dummy "
    "video (the recipe has 4); its unfused optimizer and norms. Put in, though official: batches "
    "of 4 samples, of which two are added up in its scripts, four here. A recording is as many "
    "tokens as in ours, not 50 for each 30 s. 'No feature cache' alone encodes recordings "
    "together, padded to the longest; ours with a cold cache encodes each at its own length and "
    "writes the features to disk.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is kept")
    parser.add_argument("--only", choices=("language", "mixed"), help="half of it; nothing is kept")
    arguments = parser.parse_args()
    rows: list[str] = []
    said: list[str] = []
    if arguments.only != "mixed":
        for size in QUICK if arguments.quick else SIZES:
            language(size, rows, said)
    if arguments.only != "language":
        samples, rounds = (4, 2) if arguments.quick else (SAMPLES, ROUNDS)
        mixed(samples, rounds, rows, said)
    if arguments.quick or arguments.only:
        print("\n".join(said))
        return
    write("training_step", "One training step, beside others", rows, COLUMNS, (*said, *NOTES))


if __name__ == "__main__":
    main()
