"""List every training step that is measured: the model's shape, where its documents are split, how many make a step."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from disc_train.data.dataset import DocumentDataset
from disc_train.data.splits import TokenizedDocument
from disc_train.models.live_teacher import freeze

DOCUMENTS = 64  # in all; a step takes the next ones, and after the last the first again
SENTENCES, LEAST, MOST = 16, 15, 35  # a document's sentences, and a sentence's tokens: 400 a document in the mean
LOOP = "per_split_loop"  # the system that the others' results are checked against and their times compared with
ATTENTIONS = (LOOP, "ours", "ours_sdpa", "ours_flex", "ours_varlen")
STRATEGIES = {"sentence": "sentence_boundary", "to-end": "random_token_fixed"}  # by the suffixes they give


@dataclass(frozen=True)
class Shape:
    """Hold a model's shape and the dtypes it is trained in: mixed precision where teacher and student differ."""

    name: str
    config: Callable[..., PreTrainedConfig]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    teacher_dtype: torch.dtype = torch.bfloat16
    student_dtype: torch.dtype = torch.float32

    @property
    def autocast(self) -> bool:
        return self.student_dtype != self.teacher_dtype

    @property
    def precision(self) -> str:
        if self.autocast:
            return "mixed"
        return str(self.student_dtype).removeprefix("torch.")

    def teacher(self, device: str) -> PreTrainedModel:
        """Make a teacher with random weights, the same at every call."""
        sizes = {name: value for name, value in vars(self).items() if not isinstance(value, str | type | torch.dtype)}
        # Logits have a standard deviation of 1. Smaller weights would give the same ones behind any prefix.
        config = self.config(**sizes, initializer_range=self.hidden_size**-0.5)
        torch.manual_seed(0)
        with torch.device(device):
            return freeze(AutoModelForCausalLM.from_config(config, dtype=self.teacher_dtype))

    def student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Make a student with the teacher's weights, as at the first step."""
        return deepcopy(teacher).to(self.student_dtype).requires_grad_(True)  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepCase:
    shape: Shape
    suffixes: str  # a key of `STRATEGIES`
    documents: int  # in a step
    systems: tuple[str, ...] = (LOOP, "ours")
    rank: int = 1  # cases of a lower rank are measured first
    rehearsal: bool = False  # on the CPU, one round

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.suffixes}-d{self.documents}"

    def describe(self) -> dict[str, Any]:
        """Return what a row of results says of the case."""
        return {
            "case": self.name,
            "shape": self.shape.name,
            "precision": self.shape.precision,
            "suffixes": self.suffixes,
            "documents": self.documents,
        }

    def rehearsed(self) -> StepCase:
        """Return the case with a model of the same kind that takes a step in about a second on the CPU."""
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return replace(self, shape=replace(self.shape, **sizes, **heads), rehearsal=True)

    def dataset(self) -> DocumentDataset:
        """Draw documents of random tokens, the same at every call, each with the method's five splits."""
        generator = np.random.default_rng(0)
        documents = []
        for number in range(DOCUMENTS):
            ends = generator.integers(LEAST, MOST, SENTENCES, endpoint=True).cumsum().tolist()
            ids = generator.integers(0, self.shape.vocab_size, ends[-1], dtype=np.int32)
            documents.append(TokenizedDocument(str(number), ids, (0, *ends[:-1])))
        return DocumentDataset(documents, split_strategy=STRATEGIES[self.suffixes])


TINY = Shape("tiny", Qwen2Config, 256, 1024, 4, 4, 2, 8192, True, torch.float32)  # 6 million parameters
CPU_CASES = tuple(
    StepCase(TINY, suffixes, documents)
    # To-end suffixes at 16 documents would take as long as all the others together.
    for suffixes, documents in (("sentence", 1), ("sentence", 4), ("sentence", 16), ("to-end", 1), ("to-end", 4))
)

QWEN_HALF_B = Shape("qwen2.5-0.5b", Qwen2Config, 896, 4864, 24, 14, 2, 151936, True)
QWEN_1_5B = Shape("qwen2.5-1.5b", Qwen2Config, 1536, 8960, 28, 12, 2, 151936, True)
# In mixed precision a parameter takes 16 bytes in the student, with its gradient and AdamW's states, 2 in the copy that
# autocast makes and 2 in the teacher: for 7.6 billion of them 142 GiB, more than the largest GPU has that this was
# written for (139 GiB). So the largest models are bfloat16 throughout, states included: 71 and 75 GiB.
QWEN_7B = Shape("qwen2.5-7b", Qwen2Config, 3584, 18944, 28, 28, 4, 152064, False, student_dtype=torch.bfloat16)
LLAMA_8B = Shape("llama-3.1-8b", LlamaConfig, 4096, 14336, 32, 32, 8, 128256, False, student_dtype=torch.bfloat16)
GPU_CASES = (
    *(StepCase(QWEN_1_5B, "sentence", documents, ATTENTIONS) for documents in (1, 16)),
    *(StepCase(QWEN_1_5B, suffixes, 4, rank=3) for suffixes in STRATEGIES),
    # The others' loops would take minutes with every combination.
    *(
        StepCase(shape, suffixes, documents, rank=3)
        for shape in (QWEN_HALF_B, QWEN_7B, LLAMA_8B)
        for suffixes, documents in (("sentence", 1), ("sentence", 16), ("to-end", 4))
    ),
)
