"""The decoder stack of the Llama family, with few operations a layer, because most of a decode step is overhead.

The weights and the rotary embedding come from a transformers model. The result is the same as transformers', but q, k
and v are one product, gate and up are another, and attention reads the pages of a `rapid.kv_cache.pool.KVPool`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from torch import Tensor
from transformers import PreTrainedModel

from rapid.errors import ModelFileError, PassAbandoned
from rapid.kernels.cpu.linear import CompiledLinear
from rapid.kernels.cuda.fused import choose_rows
from rapid.kernels.interface import Batch, Rotation
from rapid.kernels.linear import Linear, make_linear
from rapid.models.compiled_steps import CompiledSteps
from rapid.models.fp8_range import fit_fp8
from rapid.models.layers import Heads, Layer, RMSNorm
from rapid.models.recorded_cpu import CompiledLayers
from rapid.models.tensor_parallel import Group, local

_CHANGING_ROPE = ("dynamic", "longrope")


class Decoder:
    """Takes the weights out of ``network``, which cannot be used afterwards.

    ``quantization`` is a scheme of `rapid.kernels.linear`.

    With ``fits_fp8`` keys and values can be stored as 8-bit floats (`rapid.models.fp8_range`).

    With a ``group`` the network holds this rank's share: some heads, some of the MLP, some of the vocabulary. The ranks
    all_reduce the outputs of an attention or an MLP, and all_gather the logits. Hidden states are the same on all
    ranks.

    Layers may lie on several ``devices``. A pass begins and ends on the first layer's device, and goes from one to the
    next.

    Raises:
        ModelFileError: a layer has no full attention, the heads cannot be shared equally, or on CUDA the rotary
            embedding changes from pass to pass.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        quantization: str = "none",
        group: Group | None = None,
        *,
        fits_fp8: bool = False,
    ) -> None:
        config = network.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        unlisted = (
            "full_attention" if window is None or window >= config.max_position_embeddings else "sliding_attention"
        )
        kinds = set(getattr(config, "layer_types", None) or [unlisted])
        if kinds != {"full_attention"} or config.hidden_act != "silu":
            raise ModelFileError(
                f"only full attention in every layer and SiLU are supported, found {config.model_type} with "
                f"{', '.join(sorted(kinds))} and {config.hidden_act}"
            )
        num_ranks = group.placement.num_ranks if group else 1
        if config.num_key_value_heads % num_ranks:
            raise ModelFileError(f"{config.num_key_value_heads} KV heads cannot be shared by {num_ranks} ranks equally")
        kind = str(getattr(network.model.rotary_emb, "rope_type", "default"))
        if network.device.type == "cuda" and kind in _CHANGING_ROPE:
            raise ModelFileError(
                f"rope_type {kind} is not supported on CUDA: its frequencies depend on the longest sequence of a pass, "
                "so every pass would wait for the device. Use a CPU, or a checkpoint with another rope_type"
            )
        self._group = group
        self.num_heads, self.num_kv_heads = (
            heads // num_ranks for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_layers = config.num_hidden_layers
        self._scaling = self.head_dim**-0.5
        # accelerate's hooks would move each module's input; here a pass moves it where the device changes.
        remove_hook_from_module(network, recurse=True)
        body: Any = network.model
        self._embedding: Tensor = local(body.embed_tokens.weight)
        self._num_embeddings: int = body.embed_tokens.weight.shape[0]
        sizes = Heads(self.num_heads, self.num_kv_heads, self.head_dim, self._scaling)
        self._rows = choose_rows(
            network.device, network.dtype, config.hidden_size, config.intermediate_size // num_ranks
        )
        self._layers = []
        for i, layer in enumerate(body.layers):
            if fits_fp8:
                fit_fp8(layer.self_attn, layer.input_layernorm, sizes)
            self._layers.append(self._take_layer(layer, quantization))
            body.layers[i] = torch.nn.Identity()  # frees each original at once: at most one layer exists twice
        head: Any = network.get_output_embeddings()
        self._head_device = head.weight.device
        self._norm = self._take_norm(body.norm.to(self._head_device))
        self.devices = tuple(layer.device for layer in self._layers)
        can_record = group is None and CompiledLayers.can_record(self._layers, sizes)
        self._compiled = CompiledLayers(self._layers, sizes) if can_record else None
        self._rotary = body.rotary_emb.to(self.devices[0])
        self._num_logits: int = head.weight.shape[0]
        self.head = make_linear(
            local(head.weight), None if head.bias is None else local(head.bias), quantization, is_head=True
        )

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        batch: Batch,
        rows: Tensor,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """Logits [len(rows), padded vocabulary] after ``tokens`` [total] at ``positions`` [total].

        Raises:
            PassAbandoned: ``abandoned``, called before every layer, returned True.
        """
        last = self.hidden(tokens, positions, batch, rows, abandoned)
        if self._group is None:
            return self.head(last).to(tokens.device)
        # Every rank knows the number of rows, so all of them skip the output layer if there are none.
        logits = self.head(last) if len(rows) else last.new_empty(0, self._num_logits)
        return self._group.all_gather(logits, self._num_logits) if len(rows) else logits

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        batch: Batch,
        rows: Tensor,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """What the ``head`` multiplies for these logits, [len(rows), hidden], on the head's device."""
        x = self._embed(tokens)  # [total, hidden]
        cos, sin = (angles[0] for angles in self._rotary(x, positions[None]))  # [total, d]
        more: Tensor | None = None  # what the last layer adds to x, so that one kernel adds it and computes the norm
        if self._compiled is not None and self._compiled.supports(batch, len(tokens)):
            x = self._compiled(x, cos, sin, batch, abandoned)
        else:
            for i, layer in enumerate(self._layers):
                if abandoned():
                    raise PassAbandoned
                if layer.device != x.device:
                    x, cos, sin = x.to(layer.device), cos.to(layer.device), sin.to(layer.device)
                    more = None if more is None else more.to(layer.device)
                x, more = self._through(layer, i, x, more, (cos, sin), batch)
        rows = rows.to(x.device)
        last, more = x[rows].to(self._head_device), None if more is None else more[rows].to(self._head_device)
        return self._norm.added(last, more)[1]

    def compiled_steps(self) -> CompiledSteps | None:
        """Draft steps in few calls; None where a kernel is missing."""
        if self._compiled is None or not isinstance(self.head, CompiledLinear):
            return None
        return CompiledSteps(self._compiled, self._embedding, self._rotary, self._norm, self.head)

    def _through(
        self, layer: Layer, i: int, x: Tensor, more: Tensor | None, rotation: Rotation, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """From x and what is still to be added to it before the layer, to the same behind it."""
        x, normed = layer.attention_norm.added(x, more)
        heads = layer.qkv(normed).view(len(x), -1, self.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
            heads = torch.cat((layer.query_norm(query), layer.key_norm(key), value), 1)
        attended = self._summed(layer.output(batch.attend(i, heads, rotation, self._scaling)))
        x, normed = layer.mlp_norm.added(x, attended)
        return x, self._summed(layer.down(self._rows.gate(layer.gate_up(normed))))

    def _embed(self, tokens: Tensor) -> Tensor:
        if self._group is None:
            return F.embedding(tokens.to(self._embedding.device), self._embedding).to(tokens.device)
        share = self._group.share(self._num_embeddings)
        ours = (tokens >= share.start) & (tokens < share.stop)
        rows = F.embedding((tokens - share.start).where(ours, 0), self._embedding)
        return self._group.all_reduce(rows * ours.unsqueeze(-1))

    def _summed(self, part: Tensor) -> Tensor:
        return part if self._group is None else self._group.all_reduce(part)

    def _take_layer(self, layer: Any, quantization: str) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp

        def fused(*parts: Any) -> Linear:
            weight = torch.cat([local(part.weight) for part in parts])
            bias = None if parts[0].bias is None else torch.cat([local(part.bias) for part in parts])
            return make_linear(weight, bias, quantization)

        def summed(part: Any) -> Linear:
            # The bias must be added once to the sum over the ranks, so only the first rank adds it.
            bias = None if part.bias is None or (self._group and self._group.placement.rank) else local(part.bias)
            return make_linear(local(part.weight), bias, quantization)

        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return Layer(
            attention.o_proj.weight.device,
            self._take_norm(layer.input_layernorm),
            fused(attention.q_proj, attention.k_proj, attention.v_proj),
            self._take_norm(query_norm) if query_norm is not None else None,
            self._take_norm(key_norm) if key_norm is not None else None,
            summed(attention.o_proj),
            self._take_norm(layer.post_attention_layernorm),
            fused(mlp.gate_proj, mlp.up_proj),
            summed(mlp.down_proj),
        )

    def _take_norm(self, norm: Any) -> RMSNorm:
        return RMSNorm(local(norm.weight), norm.variance_epsilon, self._rows)
