"""Uni-MoE's official training step, written anew in plain PyTorch from what its code does.

Each of its costly habits can be switched on alone. Towers, weights and trained parts are those of
our stage 3, so that the loss must be ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.reading.collate import MicroBatch
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import RATE, SAMPLES_PER_FEATURE
from unimoe_mcore.config.model import LanguageConfig, LoRAConfig, moe_blocks
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.initialise import initial_value
from unimoe_mcore.model.towers.tower import Tower


@dataclass(frozen=True)
class Habits:
    """What of the official step is switched on; nothing is a fast plain step.

    Attributes:
        loop: each expert searches for its tokens and adds to the result in place, one after
            another; else tokens are sorted by expert once.
        eager: attention with its scores written out, a 4-D mask added to them, and a softmax;
            else PyTorch's fused one.
        padded: all samples are as long as the longest, also outside attention; else one row.
        everywhere: logits and losses of all places; else of those with a label.
        few: micro-batches of four samples, gradients added up; else all at once.
        dummies: a sample without a picture gets a black one, one without a video a black one;
            both are encoded and thrown away.
        uncached: frozen encoders run in every step; else their features are read from the cache.
        single: recordings are encoded one at a time; else together, as long as the longest.
        half_minute: recordings are padded to 30 s.
    """

    loop: bool = False
    eager: bool = False
    padded: bool = False
    everywhere: bool = False
    few: bool = False
    dummies: bool = False
    uncached: bool = False
    single: bool = False
    half_minute: bool = False


@dataclass(frozen=True)
class Layout:
    """Where tokens are in a batch of sequences that are equally long.

    Attributes:
        place: of each token, in ``[sequences * longest]``.
        mask: 0 where a place may look at another one, else very negative,
            ``[sequences, 1, longest, longest]``.
        rotation: cosine and sine, for each token or each place, ``[2, ..., 1, head]``.
        padded: hidden states are kept for every place.
    """

    place: Tensor
    mask: Tensor
    rotation: Tensor
    padded: bool

    def grid(self, x: Tensor) -> Tensor:
        """``[tokens, heads, head]`` as ``[sequences, heads, longest, head]``."""
        sequences, _, longest, _ = self.mask.shape
        if not self.padded:
            x = x.new_zeros(sequences * longest, *x.shape[1:]).index_copy(0, self.place, x)
        return x.view(sequences, longest, *x.shape[1:]).transpose(1, 2)

    def line(self, x: Tensor) -> Tensor:
        """``[sequences, heads, longest, head]`` as ``[tokens, heads * head]``."""
        flat = x.transpose(1, 2).flatten(2).flatten(0, 1)
        return flat if self.padded else flat.index_select(0, self.place)


def lay_out(batch: MicroBatch, language: LanguageConfig, padded: bool) -> Layout:
    """Layout of a micro-batch without padding."""
    ends, longest = batch.cu_seqlens.long(), batch.max_seqlen
    lengths = ends.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = batch.position_ids[0]
    places = torch.arange(longest)
    seen = (places < lengths[:, None])[:, None, None] & (places <= places[:, None])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    head = language.hidden // language.heads
    turns = language.rope_base ** (-torch.arange(0, head, 2) / head)
    if padded:
        position = places.repeat(len(lengths))
    angle = (position[:, None] * turns).repeat(1, 2)[:, None]
    rotation = torch.stack([angle.cos(), angle.sin()])
    return Layout(sequence * longest + batch.position_ids[0], mask, rotation, padded)


class Adapted(nn.Module):
    """A frozen matrix with a trained low-rank adapter."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b) * self.scale


class Weights:
    """Initial weights by the names that our engine gives them on disk."""

    def __init__(self, recipe: Recipe) -> None:
        self.language, self.seed = recipe.model.language, recipe.trainer.seed
        self.lora: LoRAConfig = recipe.stage.lora

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of the language model."""
        return initial_value(f"language_model.{name}", shape, self.seed, self.language)

    def adapted(self, name: str, out: int, into: int) -> Adapted:
        """A matrix ``[out, into]`` with its adapter."""
        return self.experts(name, 1, out, into, stacked=False)[0]

    def experts(
        self, name: str, count: int, out: int, into: int, stacked: bool = True
    ) -> list[Adapted]:
        """The same matrix of each of several experts."""
        first, rank = (count,) if stacked else (), self.lora.rank
        whole = self(f"{name}.weight", *first, out, into)
        a = self(f"{name}.lora_a.weight", *first, rank, into)
        b = self(f"{name}.lora_b.weight", *first, out, rank)
        scale = self.lora.alpha / rank
        parts = [x if stacked else x[None] for x in (whole, a, b)]
        return [
            Adapted(w.clone(), x.clone(), y.clone(), scale) for w, x, y in zip(*parts, strict=True)
        ]


class MLP(nn.Module):
    """A gated MLP: dense, or one expert."""

    def __init__(self, up: Adapted, down: Adapted) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor, habits: Habits) -> Tensor:
        """``[tokens, hidden]`` to the same."""
        gate, up = self.up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Mixture(nn.Module):
    """Top-2 of raw logits, softmax over the two."""

    def __init__(self, router: Tensor, experts: list[MLP]) -> None:
        super().__init__()
        self.router = nn.Parameter(router)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, habits: Habits) -> Tensor:
        """``[tokens, hidden]`` to the same."""
        logits, chosen = F.linear(x, self.router).topk(2)
        weights = logits.float().softmax(-1).to(x.dtype)
        if habits.loop:
            total = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows, which = torch.where(chosen == number)
                total[rows] += weights[rows, which, None] * expert(x[rows], habits)
            return total
        order = chosen.flatten().argsort(stable=True)
        rows = order // 2
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        pieces = x.index_select(0, rows).split(counts)
        done = [e(piece, habits) for e, piece in zip(self.experts, pieces, strict=True)]
        scaled = torch.cat(done) * weights.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add(0, rows, scaled)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to what came in."""

    def __init__(self, weights: Weights, number: int, experts: int) -> None:
        super().__init__()
        language = weights.language
        hidden, ffn = language.hidden, language.ffn
        self.language = language
        self.head = hidden // language.heads
        here, there = (f"decoder.layers.{2 * number + i}." for i in range(2))
        rows = (language.heads + 2 * language.kv_heads) * self.head
        self.qkv = weights.adapted(f"{here}self_attention.linear_qkv", rows, hidden)
        self.output = weights.adapted(f"{here}self_attention.linear_proj", hidden, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, language.norm_eps) for _ in range(2))
        self.norms.requires_grad_(False)
        if experts:
            name = f"{there}mlp.experts.experts.linear_"
            ups = weights.experts(f"{name}fc1", experts, 2 * ffn, hidden)
            downs = weights.experts(f"{name}fc2", experts, hidden, ffn)
            mlps = [MLP(*pair) for pair in zip(ups, downs, strict=True)]
            router = weights(f"{there}mlp.router.weight", experts, hidden)
            self.mlp: nn.Module = Mixture(router, mlps)
        else:
            self.mlp = MLP(
                weights.adapted(f"{there}mlp.linear_fc1", 2 * ffn, hidden),
                weights.adapted(f"{there}mlp.linear_fc2", hidden, ffn),
            )

    def forward(self, x: Tensor, layout: Layout, habits: Habits) -> Tensor:
        """``[tokens or places, hidden]`` to the same."""
        x = x + self.output(self._attend(self.norms[0](x), layout, habits.eager))
        added: Tensor = x + self.mlp(self.norms[1](x), habits)
        return added

    def _attend(self, x: Tensor, layout: Layout, eager: bool) -> Tensor:
        groups = self.language.kv_heads
        each = self.language.heads // groups
        parts = self.qkv(x).view(len(x), groups, each + 2, self.head).split((each, 1, 1), 2)
        query, key, value = (part.flatten(1, 2) for part in parts)
        q, k = (layout.grid(_rotated(part, layout.rotation)) for part in (query, key))
        k, v = (part.repeat_interleave(each, 1) for part in (k, layout.grid(value)))
        if not eager:
            return layout.line(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        scores = q @ k.transpose(-1, -2) / self.head**0.5 + layout.mask
        return layout.line(scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat([-second, first], -1) * rotation[1]


class Hearing:
    """Recordings through Whisper's own layers, alone or together, short or padded to 30 s.

    Spectra are computed beforehand, as in the official data loader.
    """

    def __init__(self, encoder: Any, media: list[Medium]) -> None:
        self._whisper = encoder.whisper
        self._lengths: dict[str, int] = {}
        self._spectra: dict[tuple[str, bool, bool], Tensor] = {}
        longest = max(_samples(medium) for medium in media)
        for medium in media:
            self._lengths[medium.digest] = _samples(medium) // SAMPLES_PER_FEATURE
            for single, half_minute in product((False, True), repeat=2):
                length = 30 * RATE if half_minute else _samples(medium) if single else longest
                wave = np.zeros(length, np.float32)
                wave[: _samples(medium)] = medium.content
                self._spectra[medium.digest, single, half_minute] = encoder._spectrum(
                    wave,
                    sampling_rate=RATE,
                    padding="do_not_pad",
                    truncation=False,
                    return_tensors="pt",
                )["input_features"]

    @torch.no_grad()
    def features(self, media: list[Medium], single: bool, half_minute: bool) -> list[Tensor]:
        """As many features of each recording as it is long, ``[features, size]``."""
        spectra = [self._spectra[medium.digest, single, half_minute] for medium in media]
        batches = spectra if single else [torch.cat(spectra)]
        found = [row for batch in batches for row in self._listen(batch)]
        lengths = [self._lengths[medium.digest] for medium in media]
        return [row[:length].half() for row, length in zip(found, lengths, strict=True)]

    def _listen(self, spectra: Tensor) -> Tensor:
        """``[recordings, mels, frames]`` to ``[recordings, frames / 2, size]``."""
        net = self._whisper
        x = F.gelu(net.conv1(spectra.to(net.conv1.weight.dtype)))
        x = F.gelu(net.conv2(x)).permute(0, 2, 1)
        x = x + net.embed_positions.weight[: x.shape[1]]
        for layer in net.layers:
            x = layer(x, None)
        heard: Tensor = net.layer_norm(x)
        return heard


def _samples(medium: Medium) -> int:
    assert medium.content is not None
    return len(medium.content)


class OfficialModel(nn.Module):
    """Towers spliced into a sparse language model."""

    def __init__(self, recipe: Recipe, towers: dict[str, Tower], markers: dict[str, int]) -> None:
        super().__init__()
        weights = Weights(recipe)
        language = self.language = recipe.model.language
        sparse = moe_blocks(recipe.model.moe.placement, language.blocks)
        self.towers = nn.ModuleDict(towers)
        self.markers = markers
        table = weights("embedding.word_embeddings.weight", language.vocabulary, language.hidden)
        self.table = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(weights, number, len(recipe.stage.experts) if number in sparse else 0)
            for number in range(language.blocks)
        )
        self.norm = nn.RMSNorm(language.hidden, language.norm_eps).requires_grad_(False)

    def forward(self, batch: MicroBatch, hearing: Hearing, habits: Habits) -> Tensor:
        """Sum of the losses of all label tokens."""
        layout = lay_out(batch, self.language, habits.padded)
        x = self._embed(batch, hearing, habits)
        labels = batch.labels[0].masked_fill(batch.loss_mask[0] == 0, -100)
        if habits.padded:
            places = layout.mask.shape[0] * layout.mask.shape[2]
            x = x.new_zeros(places, x.shape[1]).index_copy(0, layout.place, x)
            labels = labels.new_full((places,), -100).index_copy(0, layout.place, labels)
        for block in self.blocks:
            x = block(x, layout, habits)
        if not habits.everywhere:
            kept = (labels != -100).nonzero()[:, 0]
            x, labels = x.index_select(0, kept), labels[kept]
        logits = F.linear(self.norm(x), self.table).float()
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    def _embed(self, batch: MicroBatch, hearing: Hearing, habits: Habits) -> Tensor:
        """Embeddings of text and media, ``[tokens, hidden]``."""
        ids = batch.input_ids[0]
        x = F.embedding(ids, self.table)
        for name, tower in self.towers.items():
            assert isinstance(tower, Tower)
            media = batch.media[name]
            if media:
                tokens = tower.connect(_features(tower, name, media, hearing, habits))
                x = x.index_put(((ids == self.markers[name]).nonzero()[:, 0],), tokens)
            if name == "image" and habits.dummies:
                _encode_dummies(tower, batch)
        return x


def _features(
    tower: Tower, name: str, media: list[Medium], hearing: Hearing, habits: Habits
) -> list[Tensor]:
    if not habits.uncached:
        return tower.features.features(media)
    if name == "image":
        return tower.features.encoder.encode(media)
    return hearing.features(media, habits.single, habits.half_minute)


def _encode_dummies(tower: Tower, batch: MicroBatch) -> None:
    """Black pictures and videos of the samples that have none: encoded, connected, dropped."""
    encoder = tower.features.encoder.config
    side, frames = encoder.resolution, encoder.frames
    blank = torch.zeros(frames, side, side, 3, dtype=torch.uint8).numpy()
    have = [[medium.modality for medium in sample.media] for sample in batch.samples]
    pictures = [Medium("image", b"", "dummy", blank[0]) for found in have if "image" not in found]
    videos = [Medium("video", b"", "dummy", blank) for found in have if "video" not in found]
    features = tower.features.encoder.encode([*pictures, *videos])
    tower.connect(features[: len(pictures)])
    if videos and tower.frame_reducer is not None:
        tower.frame_reducer(torch.stack(features[len(pictures) :]))
