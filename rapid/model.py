"""A causal language model: weights from transformers, run on ragged batches over a pool of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rapid import catalog
from rapid.attention import Extension, Kernel, RunAttention, Tokens
from rapid.decoder import Decoder
from rapid.device_map import spread
from rapid.errors import EngineLost, ModelFileError
from rapid.graphs import GraphRunner
from rapid.kv_cache import KVLayout, KVPool
from rapid.linear import check_scheme
from rapid.model_info import ModelInfo
from rapid.paged_attention import PagedAttention
from rapid.parallel import Group, NewPool, Pass, Place, local
from rapid.tokenization import load_tokenizer


class Model:
    """Weights, tokenizer and the ragged forward pass.

    ``vocab_size`` is the tokenizer's: a checkpoint may pad its output rows beyond it, and those never take part.
    ``network`` is consumed: its weights are repacked.

    Raises:
        ModelFileError: the architecture or the quantisation is not supported.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        *,
        quantization: str = "none",
        kernel: Kernel | None = None,
        group: Group | None = None,
    ) -> None:
        check_scheme(quantization, network.device, network.dtype)
        config = network.config.get_text_config()
        weight_bytes = sum(local(p).nbytes for p in network.parameters())
        eos = _eos_token_ids(network)
        try:
            self._decoder = Decoder(network.eval().requires_grad_(False), quantization, group)
        except ModelFileError as error:
            raise ModelFileError(f"{name}: {error.message}") from error
        self.tokenizer = tokenizer
        self.vocab_size = min(config.vocab_size, len(tokenizer)) if tokenizer is not None else config.vocab_size
        self.layout = KVLayout(
            num_kv_heads=self._decoder.num_kv_heads,
            head_dim=self._decoder.head_dim,
            dtype=network.dtype,
            devices=self._decoder.devices,
        )
        devices = sorted(set(self.layout.devices), key=self.layout.devices.index)
        self.kernel: Kernel = kernel or (RunAttention() if network.device.type == "cpu" else PagedAttention())
        self._group = group
        self._graphs = None
        # A graph is of one device, and other ranks are told of each pass by the host.
        if isinstance(self.kernel, PagedAttention) and group is None and len(devices) == 1:
            self._graphs = GraphRunner(self._decoder, self.kernel, network.device)
        self.info = ModelInfo(
            name=name,
            window=config.max_position_embeddings,
            vocab_size=self.vocab_size,
            eos_token_ids=eos,
            dtype=str(network.dtype).removeprefix("torch."),
            quantization=quantization,
            device=", ".join(map(str, devices)),
            weight_bytes=weight_bytes,
            kv_bytes_per_token=self.layout.bytes_per_token,
        )

    @classmethod
    def load(
        cls,
        ref: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | None = None,
        quantization: str = "none",
        place: Place | None = None,
    ) -> Model:
        """Loads an embedded model by name, a local folder, or a Hugging Face hub id.

        With ``device_map`` "auto" its layers are spread over all GPUs there are. With a ``place`` it meets the other
        ranks and loads this one's share of the weights, and no more.

        Raises:
            ModelFileError: the files are missing, unreadable, or of an unsupported architecture, or find no room.
            EngineLost: the other ranks did not come, or one is gone.
        """
        device = default_device() if device == "auto" else device
        # Products with few bits on a CPU take bfloat16 rows, also where dense ones are quicker in float32.
        few_bits = quantization != "none" and device == "cpu"
        automatic = torch.bfloat16 if few_bits else default_dtype(device)
        torch_dtype = automatic if dtype == "auto" else cast(torch.dtype, getattr(torch, dtype))
        tokenizer = load_tokenizer(ref)
        group = Group(place, device) if place is not None else None
        try:
            files = catalog.resolve(ref)
            where: dict[str, Any] = {"device_map": device}
            if group is not None:
                where = {"distributed_config": group.plan()}
            elif device_map == "auto":
                where = {"device_map": spread(files, torch_dtype)}
            network = AutoModelForCausalLM.from_pretrained(files, dtype=torch_dtype, **where)
        except (OSError, ValueError, KeyError) as error:
            raise ModelFileError(f"the model {ref!r} could not be loaded: {error}") from error
        model = cls(network, tokenizer, ref, quantization=quantization, group=group)
        if group is not None:
            with model._together():
                group.wait()  # a disk is slower for one than for another, and a pass has no patience for that
        if group is None or group.place.rank == 0:
            model._warm_up()
        return model

    def follow(self) -> None:
        """On every rank but the first: computes this rank's share of the first one's passes, until the process ends.

        Raises:
            EngineLost: a rank is gone.
        """
        assert self._group is not None
        pool: KVPool | None = None
        while True:
            with self._together():
                heard = self._group.hear()
                if isinstance(heard, NewPool):
                    pool = self.kernel.pool(self.layout, heard.budget_bytes)
                else:
                    assert pool is not None
                    self._eager(heard.extensions(pool))

    def new_pool(self, budget_bytes: int) -> KVPool:
        """Room for keys and values, in the kernel's layout.

        Raises:
            EngineLost: the model is shared by several ranks, and one is gone.
        """
        if self._group is not None:
            with self._together():
                self._group.say(NewPool(budget_bytes))
        return self.kernel.pool(self.layout, budget_bytes)

    @torch.inference_mode()
    def forward(
        self, extensions: Sequence[Extension], *, abandoned: Callable[[], bool] = lambda: False
    ) -> list[Tensor]:
        """Appends tokens to several sequences in one pass.

        Returns for each extension the logits of its last ``num_rows`` positions, [rows, V] in float32. Every cache is
        as many tokens longer afterwards.

        Raises:
            PassAbandoned: ``abandoned`` said, while the layers ran, that nobody wants the result; no cache is longer.
            EngineLost: the model is shared by several ranks, and one is gone.
        """
        if self._group is not None:
            with self._together():
                self._group.say(Pass.of(extensions))
                logits = self._eager(extensions)
        elif self._graphs is not None and self._graphs.takes(extensions):
            logits = self._graphs.run(extensions)
        else:
            logits = self._eager(extensions, abandoned)
        for cache, tokens, _ in extensions:
            cache.advance(len(tokens))
        return list(logits[:, : self.vocab_size].float().split([num_rows for _, _, num_rows in extensions]))

    @contextmanager
    def _together(self) -> Iterator[None]:
        # gloo and NCCL say in many words that a rank is gone; and after any error the others are in another place.
        try:
            yield
        except Exception as error:
            raise EngineLost(f"{self.info.name}: what several ranks do together failed: {error}") from error

    def _warm_up(self) -> None:
        # The first pass builds kernels and brings the weights into memory, up to a second that no request should pay.
        pool = self.new_pool(1)
        cache = pool.open([0], 1)
        assert cache is not None
        self.forward([Extension(cache, [0], 1)])

    @torch.inference_mode()
    def _eager(self, extensions: Sequence[Extension], abandoned: Callable[[], bool] = lambda: False) -> Tensor:
        device = self.layout.device
        positions: list[int] = []
        wanted: list[int] = []
        for cache, tokens, num_rows in extensions:
            positions.extend(range(cache.length, cache.length + len(tokens)))
            wanted.extend(range(len(positions) - num_rows, len(positions)))
        return self._decoder(
            gather_tokens([tokens for _, tokens, _ in extensions], device),
            torch.tensor(positions, device=device),
            self.kernel.batch(extensions),
            torch.tensor(wanted, dtype=torch.long, device=device),
            abandoned,
        )


def gather_tokens(parts: Sequence[Tokens], device: torch.device) -> Tensor:
    """One [total] tensor on ``device``; parts that are there already are not brought to the host."""
    return torch.cat([torch.as_tensor(part, dtype=torch.long, device=device) for part in parts])


def default_device() -> str:
    """The first CUDA device when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _eos_token_ids(network: PreTrainedModel) -> frozenset[int]:
    generation = getattr(network, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None) or network.config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
