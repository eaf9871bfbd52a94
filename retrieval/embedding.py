"""Texts to unit vectors, with FlagEmbedding. Only this module imports FlagEmbedding.

FlagEmbedding loads the models, pools their states, and holds BGE-M3's head. Batching is done here, because its own
`encode` runs the first batch twice to find a size that fits, draws progress bars, and may start processes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from tokenizers import Tokenizer

from retrieval.caches import VectorCache, digest
from retrieval.device import DeviceTurns, Passes
from retrieval.errors import RetrievalError
from retrieval.sparse import SparseVector, sparse, weighs_words

Row = TypeVar("Row")
Result = TypeVar("Result")
# Padded tokens in one forward pass: alone at the device, and where others wait for its end. A CPU takes a quarter more
# time for small passes, and is no faster with larger ones.
_BATCH_TOKENS = {"cpu": (512, 256), "cuda": (8192, 8192)}
_USUAL_TOKENS = 512
_LONGEST_TOKEN = 64  # characters: a text is read as far as it goes with tokens of this length
_REMEMBERED = 16_384  # vectors; 64 MiB at 1,024 dimensions
_OTHER_FRAMEWORKS = ["onnx/*", "openvino/*", "*.onnx", "*.msgpack", "*.h5", "*.ot"]


class Embedder:
    """One embedding model on one device. Several threads may call it; they take turns at the device.

    Attributes:
        name: the model's folder or hub id.
        dimension: length of a vector.
        max_tokens: tokens read of each text, special tokens included; later tokens are ignored.
        has_sparse: whether the model weighs words itself; else BM25 does.
        passes: runs the forward passes.
    """

    has_sparse = False
    passes: Passes

    def __init__(
        self, name: str, *, tokenizer: Any, forward: Callable[[Any], torch.Tensor], max_tokens: int, device: str
    ) -> None:
        """`forward` takes the padded inputs [batch, tokens] and returns the pooled vectors [batch, dimension]."""
        self.name, self.max_tokens = name, max_tokens
        self._most = _LONGEST_TOKEN * max_tokens  # characters
        self._tokenizer, self._forward, self._device = tokenizer, forward, device
        self.passes = DeviceTurns()
        self.dimension = self._embed(["dimension"]).shape[1]
        self._memory = VectorCache(_REMEMBERED, self.dimension)

    def embed(self, texts: Sequence[str], salt: str = "") -> NDArray[np.float32]:
        """Return one unit vector for each text: [len(texts), dimension].

        The vectors of the latest texts are cached by digest, so the next question about a document, and the next turn
        of a chat, embed only new texts. They are found by calls with the same `salt` alone: else the time of a call
        would tell whether another client has asked for a text.
        """
        names = [digest(text, salt) for text in texts]
        vectors = self._memory.recall(names)
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in vectors}
        if new:
            vectors.update(zip(new, self._embed(list(new.values()), salt), strict=True))
        self._memory.remember(vectors)
        rows = [vectors[name] for name in names]
        return np.stack(rows) if rows else np.zeros((0, self.dimension), dtype=np.float32)

    def embed_query(self, query: str, salt: str = "") -> NDArray[np.float32]:
        """Return the query's unit vector: [dimension]."""
        vector: NDArray[np.float32] = self._embed([query], salt, is_query=True)[0]
        return vector

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, special tokens included.

        A text that is not read to its end, whatever its tokens are, is said to have one more than `max_tokens`.
        """
        return [self.max_tokens + 1 if len(text) > self._most else self._length(text) for text in texts]

    def _length(self, text: str) -> int:
        [encoding] = self._counting.encode_batch_fast([_readable(text)])
        return len(encoding)

    @cached_property
    def _counting(self) -> Tokenizer:
        """A copy, since other threads have the passes' tokenizer cut texts off. Its calls for a batch leave the
        interpreter to others."""
        copy = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        return copy

    def sparse(self, texts: Sequence[str], salt: str = "") -> list[SparseVector]:
        """Return the model's own weight of each token of each text, where it `has_sparse`."""
        raise NotImplementedError

    def compute(self, forward: Callable[[], Result], *, is_query: bool) -> Result:
        """Return what `forward` computes, a pass for a query or one for documents."""
        return self.passes.run(forward, is_query=is_query)

    def _embed(self, texts: Sequence[str], salt: str = "", *, is_query: bool = False) -> NDArray[np.float32]:
        rows: list[NDArray[np.float32]] = self._each(texts, self._pass, is_query=is_query)
        return np.stack(rows)

    def _pass(self, inputs: Any) -> list[NDArray[np.float32]]:
        return list(torch.nn.functional.normalize(self._forward(inputs).float(), dim=-1).cpu().numpy())

    def _each(self, texts: Sequence[str], compute: Callable[[Any], list[Row]], *, is_query: bool = False) -> list[Row]:
        """Return what `compute` makes of each text; it is given the padded inputs of a few texts at a time."""
        # A tokenizer reads a text to its end before it cuts it off.
        readable = [_readable(text[: self._most]) for text in texts]
        tokens = self._tokenizer(readable, truncation=True, max_length=self.max_tokens)
        rows: dict[int, Row] = {}
        alone, beside_others = _BATCH_TOKENS["cpu" if self._device == "cpu" else "cuda"]
        lengths = [len(ids) for ids in tokens["input_ids"]]
        for batch in _batches(lengths, lambda: beside_others if self.passes.is_wanted else alone):
            unpadded = {name: [values[i] for i in batch] for name, values in tokens.items()}
            inputs = self._tokenizer.pad(unpadded, padding=True, return_tensors="pt").to(self._device)
            computed = self.compute(partial(torch.inference_mode()(compute), inputs), is_query=is_query)
            rows.update(zip(batch, computed, strict=True))
        return [rows[i] for i in range(len(texts))]


class BgeM3Embedder(Embedder):
    """BGE-M3 (arXiv 2402.03216): dense vectors, a weight for each token, and a vector for each token."""

    has_sparse = True

    def __init__(self, name: str, *, model: Any, **how: Any) -> None:
        """`model` is FlagEmbedding's, with the heads."""
        self._model = model
        self._weights: OrderedDict[bytes, SparseVector] = OrderedDict()  # the least recently used first
        super().__init__(name, forward=self._dense, **how)

    def sparse(self, texts: Sequence[str], salt: str = "") -> list[SparseVector]:
        """Return each text's token weights. Those of texts that were embedded lately with this `salt` are cached."""
        names = [digest(text, salt) for text in texts]
        found = {name: weights for name in names if (weights := self._weights.get(name)) is not None}
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in found}
        if new:
            found.update(zip(new, self._each(list(new.values()), self._token_weights), strict=True))
        return [found[name] for name in names]

    def late_interaction(self, query: str, texts: Sequence[str]) -> list[float]:
        """Return ColBERT's score of each text: for each token of the query the best cosine, on average."""
        [asked] = self._each([query], self._token_vectors)
        return [
            float((asked @ vectors.T).max(dim=1).values.mean()) for vectors in self._each(texts, self._token_vectors)
        ]

    def _embed(self, texts: Sequence[str], salt: str = "", *, is_query: bool = False) -> NDArray[np.float32]:
        both = self._each(texts, self._dense_and_weights, is_query=is_query)
        for text, (_, weights) in zip(texts, both, strict=True):
            self._weights.pop(digest(text, salt), None)
            self._weights[digest(text, salt)] = weights
        while len(self._weights) > _REMEMBERED:
            self._weights.popitem(last=False)
        return np.stack([vector for vector, _ in both])

    def _dense(self, inputs: Any) -> torch.Tensor:
        dense: torch.Tensor = self._model(inputs, return_dense=True)["dense_vecs"]
        return dense

    def _dense_and_weights(self, inputs: Any) -> list[tuple[NDArray[np.float32], SparseVector]]:
        output = self._model(inputs, return_dense=True, return_sparse=True)
        dense = torch.nn.functional.normalize(output["dense_vecs"].float(), dim=-1).cpu().numpy()
        return list(zip(dense, self._read_weights(inputs, output), strict=True))

    def _token_weights(self, inputs: Any) -> list[SparseVector]:
        return self._read_weights(inputs, self._model(inputs, return_dense=False, return_sparse=True))

    def _read_weights(self, inputs: Any, output: Any) -> list[SparseVector]:
        unused = set(self._tokenizer.all_special_ids)
        rows = []
        for ids, weights in zip(inputs["input_ids"].tolist(), output["sparse_vecs"][..., 0].tolist(), strict=True):
            most: dict[int, float] = {}
            for token, weight in zip(ids, weights, strict=True):
                if weight > 0 and token not in unused:
                    most[token] = max(weight, most.get(token, 0.0))
            rows.append(sparse(most))
        return rows

    def _token_vectors(self, inputs: Any) -> list[torch.Tensor]:
        vectors = self._model(inputs, return_dense=False, return_colbert_vecs=True)["colbert_vecs"].float()
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            row[: length - 1] for row, length in zip(vectors.cpu(), lengths, strict=True)
        ]  # none of the first token


def _readable(text: str) -> str:
    """`text` without lone surrogates: JSON can contain them, and tokenizers refuse them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def load_embedder(
    model: str | Path,
    *,
    kind: Literal["auto", "bge-m3", "dense"] = "auto",
    max_tokens: int | None = None,
    device: str = "cpu",
) -> Embedder:
    """Load an embedding model from a folder or by hub id.

    Args:
        kind: "bge-m3" for BGE-M3 and its fine-tuned copies (the paper's choice), whose own token weights replace BM25,
            "dense" for any other encoder; "auto" looks for BGE-M3's own files.
        max_tokens: tokens to read of each text; by default the number in the model's files.
        device: "cpu", "cuda" or "cuda:0"; half precision on CUDA.

    A dense model's pooling ("cls" or "mean") and length come from the files that sentence-transformers keeps beside it
    (`1_Pooling/config.json`, `sentence_bert_config.json`); without them, "cls" and the tokenizer's length.

    Raises RetrievalError when the model cannot be found or loaded, ValueError when `max_tokens` is more than the model
    can read.
    """
    # This import takes seconds (it includes training code), and processes that only name options do not need it.
    from FlagEmbedding import BGEM3FlagModel, FlagModel  # type: ignore[import-untyped]

    folder = model_folder(str(model))
    settings = {"devices": device, "use_fp16": device.startswith("cuda")}
    if kind == "auto":
        kind = "bge-m3" if weighs_words(folder) else "dense"
    try:
        if kind == "bge-m3":
            flag = BGEM3FlagModel(str(folder), **settings)
        else:
            flag = FlagModel(str(folder), pooling_method=_pooling(folder), **settings)
        flag.model.to(device).eval()
        declared = int(flag.tokenizer.model_max_length)
        longest = declared if declared < 10**6 else _USUAL_TOKENS  # transformers uses 10**30 for "not known"
        length = int(_read_json(folder / "sentence_bert_config.json").get("max_seq_length") or longest)
    except RetrievalError:
        raise
    except Exception as error:  # each file format has its own errors
        raise RetrievalError(
            f"the embedding model in {folder} cannot be loaded ({type(error).__name__}: {error}). "
            "It needs config.json, the weights and the tokenizer's files, whole; download it again."
        ) from error
    if max_tokens is not None and not 1 <= max_tokens <= longest:
        raise ValueError(f"max_tokens must be between 1 and {longest} for the model {model}, got {max_tokens}")

    how = {"tokenizer": flag.tokenizer, "max_tokens": max_tokens or length, "device": device}
    if kind == "bge-m3":
        return BgeM3Embedder(str(model), model=flag.model, **how)

    def forward(inputs: Any) -> torch.Tensor:
        pooled: torch.Tensor = flag.pooling(flag.model(**inputs).last_hidden_state, inputs["attention_mask"])
        return pooled

    return Embedder(str(model), forward=forward, **how)


def load_cross_encoder(name: str) -> tuple[Any, Any]:
    """Load a cross-encoder from a folder or by hub id: (model, tokenizer). Raises RetrievalError when it is none."""
    from FlagEmbedding import FlagReranker  # as slow as above

    folder = model_folder(name)
    try:
        flag = FlagReranker(str(folder), devices="cpu", use_fp16=False)
    except Exception as error:  # each file format has its own errors
        raise RetrievalError(
            f"the reranker in {folder} cannot be loaded ({type(error).__name__}: {error}). It needs config.json, the "
            "weights and the tokenizer's files of a sequence classifier with one output."
        ) from error
    if flag.model.config.num_labels != 1:
        raise RetrievalError(f"the model in {folder} has {flag.model.config.num_labels} outputs; a reranker has one")
    return flag.model, flag.tokenizer


def model_folder(model: str) -> Path:
    """Return the folder of a model, which may be named by its hub id. Raises RetrievalError if it cannot be had."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, ignore_patterns=_OTHER_FRAMEWORKS))
    except (OSError, ValueError) as error:
        raise RetrievalError(
            f"no embedding model {model!r}: it is not a folder here, and it cannot be fetched from the hub ({error}). "
            "Give the path of a model folder, or a hub id that this machine can reach or has in its cache."
        ) from error


def _pooling(folder: Path) -> str:
    """Return FlagEmbedding's name for the model's pooling."""
    config = _read_json(folder / "1_Pooling" / "config.json")
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    names = {(): "cls", ("pooling_mode_cls_token",): "cls", ("pooling_mode_mean_tokens",): "mean"}
    if tuple(chosen) not in names:
        raise RetrievalError(f"{folder / '1_Pooling'} asks for {', '.join(chosen)}; only cls and mean are known")
    return names[tuple(chosen)]


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _batches(lengths: Sequence[int], batch_tokens: Callable[[], int]) -> Iterator[list[int]]:
    """Group the indices of `lengths`, longest first; a group padded to its longest stays within `batch_tokens`, asked
    for each."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens() // lengths[order[0]])
        yield order[:size]
        order = order[size:]
