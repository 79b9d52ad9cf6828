"""Uni-MoE: towers, spliced into a sparse language model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from data_pipeline.reading.collate import MicroBatch
from unimoe_mcore.model.marks import token_marks


class UniMoEModel(MimoModel):
    """``MimoModel`` with another forward pass.

    Towers run on the first pipeline stage, always, with an empty batch where a modality is
    absent; the padding mask and the loss mask reach the language model; and what Megatron's
    schedules and gradient finalisation ask of a model is handed through. (Upstream's forward
    fails on a later pipeline stage and drops the padding mask.)

    Attributes:
        detailed_marks: whether routers are told each token's sample and its group.
    """

    def __init__(self, config: MimoModelConfig, groups: Any) -> None:
        if not config.language_model_spec.params["pre_process"]:
            config.modality_submodules_spec = {}
        super().__init__(config, tp_group=groups.tp)
        self.groups = groups
        self.detailed_marks = False
        self._answers: Tensor | None = None
        if self.post_process:
            self.language_model.output_layer.register_forward_pre_hook(self._only_answers)

    pre_process = property(lambda self: self.language_model.pre_process)
    post_process = property(lambda self: self.language_model.post_process)
    vp_stage = property(lambda self: self.language_model.vp_stage)
    model_type = property(lambda self: self.language_model.model_type)
    share_embeddings_and_output_weights = property(
        lambda self: self.language_model.share_embeddings_and_output_weights
    )

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied embedding, for Megatron's gradient finalisation over pipeline stages."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(self, batch: MicroBatch, with_loss: bool = True) -> Tensor:
        """One packed micro-batch.

        Args:
            batch: on this model's device.
            with_loss: return losses instead of logits.

        Returns:
            On the last pipeline stage the loss of every token ``[1, tokens]`` (fp32; 0 where no
            label counts), or the logits of ``answer_places(batch)``
            ``[1, places, vocabulary / TP]``; on other stages the hidden states
            ``[tokens / (TP if sequence parallel), 1, hidden]``.
        """
        places = self.answer_places(batch)
        labels = batch.labels[:, places] if with_loss else None
        self._answers = None if self.config.sequence_parallel else places
        hidden = self.embed(batch) if self.pre_process else None
        if hidden is not None and self._recomputes and not hidden.requires_grad:
            # A block that is computed again learns that it has gradients from its input alone:
            # above frozen embeddings nothing would train, without a word.
            hidden = hidden.detach().requires_grad_()
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        hidden, labels, loss_mask, packed = self._shard_language_inputs(
            hidden, labels, batch.loss_mask, packed
        )
        padding = token_marks(batch, self.detailed_marks)
        if self.config.sequence_parallel:
            # HybridModel passes the mask on whole, but its layers hold a part of the tokens.
            tp = self.groups.tp
            padding = padding.chunk(tp.size(), 1)[tp.rank()]
        output = self.language_model(
            input_ids=None,
            position_ids=batch.position_ids,
            attention_mask=None,
            decoder_input=hidden,
            labels=labels,
            loss_mask=loss_mask,
            padding_mask=padding,
            packed_seq_params=packed,
        )
        if not (self.post_process and with_loss):
            return output
        return torch.zeros_like(batch.loss_mask, dtype=output.dtype).index_copy(1, places, output)

    def next_logits(self, hidden: Tensor, cache: StaticInferenceContext | None = None) -> Tensor:
        """Logits of the token after a sequence; one process holds all layers of the model.

        Args:
            hidden: embedded tokens ``[tokens, 1, hidden]``, see ``embed``: the whole sequence, or
                those that the cache lacks.
            cache: keys and values of the tokens before, to which those of these are added.

        Returns:
            ``[vocabulary]``, fp32.
        """
        tokens = len(hidden)
        self._answers = torch.tensor([tokens - 1], device=hidden.device)
        ends = torch.tensor([0, tokens], dtype=torch.int32, device=hidden.device)
        whole = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=tokens,
            max_seqlen_kv=tokens,
        )
        logits = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=hidden,
            inference_context=cache,
            packed_seq_params=None if cache is not None else whole,
        )
        if cache is not None:
            cache.sequence_len_offset += tokens
            cache.enable_decode_mode()
        return logits[0, 0].float()

    @property
    def _recomputes(self) -> bool:
        """Whether whole blocks are computed again in this backward pass."""
        full = self.config.recompute_granularity == "full"
        return full and self.training and torch.is_grad_enabled()

    def answer_places(self, batch: MicroBatch) -> Tensor:
        """The places of a row whose logits are computed, ``[places]`` int64.

        Those with a label that counts: they are few next to the media's, and the output layer is
        as wide as the vocabulary. All places under sequence parallelism, where every rank holds
        a part of the row.
        """
        if self.config.sequence_parallel:
            return torch.arange(batch.loss_mask.shape[1], device=batch.loss_mask.device)
        counted = batch.loss_mask[0].nonzero()[:, 0]
        return counted if len(counted) else counted.new_zeros(1)  # a row without any still runs

    def _only_answers(self, layer: torch.nn.Module, arguments: tuple[Tensor, ...]) -> Any:
        """Keep the answers' rows of the output layer's input ``[tokens, 1, hidden]``."""
        if self._answers is None:
            return None
        return (arguments[0].index_select(0, self._answers), *arguments[1:])

    def embed(self, batch: MicroBatch) -> Tensor:
        """Text embeddings with every tower's tokens in their places, ``[tokens, 1, hidden]``."""
        parts: dict[str, Tensor] = {}
        for tower in self.modality_submodules.values():
            parts.update(tower(batch.media))
        special = {m: i for m, i in self.special_token_ids.items() if m in parts}
        parts["text"] = self.get_text_embeddings(batch.input_ids, batch.position_ids, special)
        parts = {m: part.to(parts["text"].dtype) for m, part in parts.items()}
        return self.align_embeddings_by_token_positions(parts, batch.input_ids, special)
