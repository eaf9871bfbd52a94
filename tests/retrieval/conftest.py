from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def prose() -> str:
    """About 60,000 characters of English: a novel where there is one, else a short tale and made-up sentences."""
    novel = DATA / "moby-dick.txt"
    if novel.is_file():
        return novel.read_text(encoding="utf-8")[30_000:90_000]
    rng = random.Random(0)
    vocabulary = "the whale of a ship and captain was harpoon ocean mast sailed password lighthouse message about is"
    words = vocabulary.split()
    sentences = (" ".join(rng.choices(words, k=rng.randint(4, 20))).capitalize() + "." for _ in range(1100))
    tale = (Path(__file__).parents[1] / "data" / "ferry.txt").read_text(encoding="utf-8")
    return tale + "".join(sentence + rng.choice([" ", " ", "\n", "\n\n"]) for sentence in sentences)


def byte_level_bpe(corpus: str, *, trim_offsets: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=trim_offsets)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([corpus], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def tokenizer(prose: str) -> PreTrainedTokenizerFast:
    """Like the tokenizers of Llama, Qwen and SmolLM: byte-level BPE whose spans include the space before a word."""
    return byte_level_bpe(prose, trim_offsets=False)


@pytest.fixture(scope="session")
def trimming_tokenizer(prose: str) -> PreTrainedTokenizerFast:
    """Like RoBERTa's: a space is put before the text, and spans leave spaces out."""
    return byte_level_bpe(prose, trim_offsets=True)


@pytest.fixture(scope="session")
def minilm() -> Path:
    from rapid.weights.embedded_models import local_path

    return Path(local_path("all-minilm-l6-v2"))


@pytest.fixture(scope="session")
def bge_m3(tmp_path_factory):
    """A folder laid out like BGE-M3, of random weights: 2 layers, 32 dimensions, 64 tokens."""
    folder = tmp_path_factory.mktemp("bge-m3")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the white whale swims", "over the wide sea"], trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, type_vocab_size=1,
    )  # fmt: skip
    XLMRobertaModel(config).save_pretrained(folder)
    torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
    weigh = torch.nn.Linear(32, 1)
    torch.nn.init.constant_(weigh.bias, 1.0)  # most weights are above 0
    torch.save(weigh.state_dict(), folder / "sparse_linear.pt")
    return folder


class WordEmbedder:
    """Texts that share words are near each other, others are not. Remembers what it was asked to embed."""

    name, dimension, max_tokens, has_sparse = "words", 256, 10_000, False

    def __init__(self) -> None:
        self.embedded: list[str] = []

    def embed(self, texts: list[str], salt: str = "") -> np.ndarray:
        self.embedded += texts
        return np.stack([self.embed_query(text) for text in texts])

    def embed_query(self, query: str, salt: str = "") -> np.ndarray:
        vector = np.full(self.dimension, 1e-6, dtype=np.float32)
        for word in query.lower().split():
            vector[zlib.crc32(word.strip(".,?!").encode()) % self.dimension] += 1
        return vector / np.linalg.norm(vector)


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()
