"""A causal language model: weights from transformers, run on ragged batches over a pool of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapid.errors import ModelFileError
from rapid.kernels.cpu.attention import RunAttention
from rapid.kernels.cpu.linear import CompiledLinear
from rapid.kernels.cuda.attention import PagedAttention
from rapid.kernels.cuda.choice import choose_kernel
from rapid.kernels.cuda.fused import choose_writer
from rapid.kernels.interface import AttentionBackend, Batch, BatchEntry, QueryWatcher, Tokens
from rapid.kernels.kv_dtype import KV_DTYPES, check_kv_dtype
from rapid.kernels.linear import check_scheme
from rapid.kernels.transfer import upload
from rapid.kernels.watching import WatchedBatch
from rapid.kv_cache.pool import KVLayout, KVPool
from rapid.models.compiled_steps import CompiledSteps
from rapid.models.draft_head import DraftHead
from rapid.models.draft_vocabulary import DraftVocabulary, Size, num_columns
from rapid.models.info import GraphLimits, ModelInfo
from rapid.models.recorded_cuda import GraphRunner, recorder_of
from rapid.models.registry import decoder_class
from rapid.models.tensor_parallel import Group, NewPool, Pass, local, together


class Model:
    """Weights, tokenizer and the ragged forward pass.

    ``vocab_size`` is the tokenizer's: a checkpoint may pad its output rows beyond it, and padded rows are cut off. The
    constructor takes the weights out of ``network`` and repacks them.

    Raises:
        ModelFileError: the architecture, the quantisation or ``kv_dtype`` is not supported.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        *,
        quantization: str = "none",
        kv_dtype: str = "auto",
        attention: AttentionBackend | None = None,
        group: Group | None = None,
    ) -> None:
        check_scheme(quantization, network.device, network.dtype)
        config = network.config.get_text_config()
        weight_bytes = sum(local(p).nbytes for p in network.parameters())
        eos = eos_token_ids(network)
        try:
            decoder = decoder_class(config.model_type)
            self._decoder = decoder(
                network.eval().requires_grad_(False), quantization, group, fits_fp8=kv_dtype == "fp8"
            )
        except ModelFileError as error:
            raise ModelFileError(f"{name}: {error.message}") from error
        self.tokenizer = tokenizer
        self.vocab_size = min(config.vocab_size, len(tokenizer)) if tokenizer is not None else config.vocab_size
        self.layout = KVLayout(
            num_kv_heads=self._decoder.num_kv_heads,
            head_dim=self._decoder.head_dim,
            dtype=network.dtype,
            devices=self._decoder.devices,
            kv_dtype=KV_DTYPES[kv_dtype],
        )
        if attention is None:
            check_kv_dtype(self.layout)
        devices = sorted(set(self.layout.devices), key=self.layout.devices.index)
        self.attention: AttentionBackend = attention or (
            RunAttention()
            if network.device.type == "cpu"
            else PagedAttention(
                choose_kernel(self.layout, self._decoder.num_heads),
                writer=choose_writer(self.layout, self._decoder.num_heads),
            )
        )
        self.group = group
        self._graphs: WeakKeyDictionary[KVPool, GraphRunner] = WeakKeyDictionary()
        self.info = ModelInfo(
            name=name,
            window=config.max_position_embeddings,
            vocab_size=self.vocab_size,
            eos_token_ids=eos,
            dtype=str(network.dtype).removeprefix("torch."),
            quantization=quantization,
            device=", ".join(map(str, devices)),
            attention=self.attention.name,
            weight_bytes=weight_bytes,
            kv_bytes_per_token=self.layout.bytes_per_token,
        )

    @property
    def balanced_context(self) -> float:
        """The context over which a token's attention takes as many operations as the products with all weights."""
        numbers_read = self.info.weight_bytes / self.layout.dtype.itemsize
        num_heads: int = self._decoder.num_heads
        return numbers_read / (2 * self.layout.num_layers * num_heads * self.layout.head_dim)

    def new_pool(self, budget_bytes: int) -> KVPool:
        """A pool of keys and values, in the attention backend's layout.

        Raises:
            EngineLost: the model is shared by several ranks, and one is gone.
        """
        if self.group is not None:
            with together(self.info.name):
                self.group.broadcast(NewPool(budget_bytes))
        return self.attention.pool(self.layout, budget_bytes)

    @torch.inference_mode()
    def record(self, pool: KVPool, limits: GraphLimits) -> GraphRunner | None:
        """Records passes of few new tokens over ``pool``; `forward` replays them as long as the pool lives.

        Returns None, and all passes run eagerly, where nothing can be recorded: on a CPU, with an attention kernel that
        is not recordable, over several devices, or with several ranks, to whom the host announces each pass.
        """
        kernel, devices = self.attention, set(self.layout.devices)
        if self.group is not None or len(devices) > 1 or not isinstance(kernel, PagedAttention):
            return None
        recorder = recorder_of(self.layout.device) if kernel.can_be_recorded else None
        if recorder is None:
            return None
        self._graphs[pool] = GraphRunner(self._decoder, kernel, pool, recorder, window=self.info.window, limits=limits)
        return self._graphs[pool]

    def compiled_steps(self) -> CompiledSteps | None:
        """Draft steps in few calls, on a CPU; None where a kernel is missing."""
        return self._decoder.compiled_steps()

    @torch.inference_mode()
    def draft_head(self, size: Size, wanted: Iterable[int]) -> DraftHead | None:
        """The output layer over a draft vocabulary of ``size`` that has ``wanted`` tokens, the first before the rest.

        None if it is the whole vocabulary, or the head's rows cannot be gathered: on CUDA, in float32, or in parts.
        """
        head, columns = self._decoder.head, num_columns(size, self.vocab_size)
        if self.group is not None or columns is None or not isinstance(head, CompiledLinear):
            return None
        return DraftHead(head, DraftVocabulary(columns, self.vocab_size, wanted))

    @torch.inference_mode()
    def forward(
        self,
        entries: Sequence[BatchEntry],
        *,
        heads: Sequence[DraftHead | None] = (),
        abandoned: Callable[[], bool] = lambda: False,
        watchers: Sequence[QueryWatcher | None] = (),
    ) -> list[Tensor]:
        """Appends tokens to several sequences in one pass.

        Returns for each entry the logits of its last ``num_rows`` positions, [rows, V] in float32, or [rows, N] where
        the entry has one of ``heads``. Every cache is longer by the entry's tokens afterwards. The ``watchers``, where
        there is one for an entry, are called with its queries, layer by layer. With several ranks these are the queries
        of the first rank's heads.

        Raises:
            PassAbandoned: ``abandoned`` returned True while the layers ran; no cache is longer.
            EngineLost: the model is shared by several ranks, and one is gone.
        """
        sizes = [num_rows for _, _, num_rows in entries]
        if any(heads):
            rows = self._by_heads(self._decoder.hidden(*self._inputs(entries, watchers), abandoned).split(sizes), heads)
        else:
            rows = list(self._logits(entries, abandoned, watchers)[:, : self.vocab_size].float().split(sizes))
        for cache, tokens, _ in entries:
            cache.advance(len(tokens))
        return rows

    def _logits(
        self, entries: Sequence[BatchEntry], abandoned: Callable[[], bool], watchers: Sequence[QueryWatcher | None]
    ) -> Tensor:
        """[rows, padded vocabulary], by all ranks, from a graph, or eagerly."""
        if self.group is not None:
            with together(self.info.name):
                self.group.broadcast(Pass.of(entries))
                return self.compute(entries, watchers=watchers)
        graphs = self._graphs.get(entries[0].cache.pool)
        logits = None if graphs is None or any(watchers) else graphs.run(entries)
        return self.compute(entries, abandoned, watchers) if logits is None else logits

    def _by_heads(self, hidden: Sequence[Tensor], heads: Sequence[DraftHead | None]) -> list[Tensor]:
        """The logits of each entry's ``hidden`` rows; those without a head of their own read the model's together."""
        whole = [x for x, head in zip(hidden, heads, strict=True) if head is None]
        shared: Iterator[Tensor] = iter(())
        if whole:
            logits = self._decoder.head(torch.cat(whole))[:, : self.vocab_size].float()
            shared = iter(logits.split([len(x) for x in whole]))
        return [next(shared) if head is None else head(x).float() for x, head in zip(hidden, heads, strict=True)]

    def warm_up(self) -> None:
        """Runs one pass: it compiles kernels and reads the weights into memory, which takes up to a second."""
        pool = self.new_pool(1)
        cache = pool.open([0], 1)
        assert cache is not None
        self.forward([BatchEntry(cache, [0], 1)])

    @torch.inference_mode()
    def compute(
        self,
        entries: Sequence[BatchEntry],
        abandoned: Callable[[], bool] = lambda: False,
        watchers: Sequence[QueryWatcher | None] = (),
    ) -> Tensor:
        """Logits [rows, padded vocabulary] of the requested rows; no cache gets longer."""
        logits: Tensor = self._decoder(*self._inputs(entries, watchers), abandoned)
        return logits

    def _inputs(
        self, entries: Sequence[BatchEntry], watchers: Sequence[QueryWatcher | None]
    ) -> tuple[Tensor, Tensor, Batch, Tensor]:
        """Tokens, positions, the batch for attention, and the rows that are wanted: what a decoder is called with."""
        device = self.layout.device
        positions: list[int] = []
        wanted: list[int] = []
        watched: list[tuple[slice, QueryWatcher]] = []
        for (table, tokens, num_rows), watch in zip_longest(entries, watchers):
            start = len(positions)
            positions.extend(range(table.position, table.position + len(tokens)))
            wanted.extend(range(len(positions) - num_rows, len(positions)))
            if watch is not None:
                watched.append((slice(start, len(positions)), watch))
        batch = self.attention.batch(entries)
        return (
            gather_tokens([tokens for _, tokens, _ in entries], device),
            upload(positions, "int64", device),
            WatchedBatch(batch, watched, self.layout.num_kv_heads) if watched else batch,
            upload(wanted, "int64", device),
        )


def gather_tokens(parts: Sequence[Tokens], device: torch.device) -> Tensor:
    """One [total] tensor on ``device``; parts that are on the device already are not copied to the host."""
    return torch.cat([part if isinstance(part, Tensor) else upload(part, "int64", device) for part in parts])


def eos_token_ids(network: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a sequence, from the checkpoint's generation settings."""
    generation = getattr(network, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None) or network.config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
