"""One run: update a fresh copy of the initial model with new documents, and measure what came of it."""

import copy
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from cells import Cell
from corpus import Corpus, new_corpus, one_a_document
from measures import Record, Retention, uptake
from own_words import own_sentences, share_true
from pretrain import pretraining_names
from training_sets import training_set
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, TrainingArguments

from disc_train.data.example import Example
from disc_train.evaluation import kl_to_reference
from disc_train.models.adapters import add_lora
from disc_train.objectives.methods import WITH_TEACHER
from disc_train.packing.collator import PackedBatch
from disc_train.trainer import DiscTrainer

NUM_READINGS = 50
LORA_DROPOUT = 0.1


class Laboratory:
    """The initial model and what all runs have in common: the names it has met, and what it should not forget."""

    def __init__(self, model: Path, device: str, pretraining_steps: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.to(device).eval()  # type: ignore[arg-type]
        self.met = pretraining_names(pretraining_steps)
        unread = new_corpus("reading", NUM_READINGS, 3, self.met)
        self.met |= {entity.name for entity in unread.entities}
        self.retention = Retention(self.model, self.tokenizer, unread)

    def corpora(self, seed: int, documents: int, said: int) -> list[Corpus]:
        """The documents of a first update, and those of a second."""
        first = new_corpus(f"{seed}", documents, said, self.met)
        names = {entity.name for entity in first.entities}
        return [first, new_corpus(f"{seed}, second", documents, said, self.met | names)]

    @lru_cache(maxsize=2)  # noqa: B019  a process has one laboratory
    def own_words(self, seed: int, documents: int, said: int) -> list[list[str]]:
        """What the initial model writes about each document of a first update, at most as much as stands in it."""
        corpus = self.corpora(seed, documents, said)[0]
        torch.manual_seed(seed)
        return [
            own_sentences(self.model, self.tokenizer, document.text, entity.name, said * len(entity.facts))
            for document, entity in zip(corpus.documents, corpus.entities, strict=True)
        ]

    def initial(self, seed: int, documents: int, said: int) -> Record:
        """The initial model on a seed's probes, without their documents and with them, as a teacher reads them."""
        corpus = self.corpora(seed, documents, said)[0]
        in_context = {form: one_a_document(corpus, form) for form in corpus.probes}
        own = zip(self.own_words(seed, documents, said), corpus.entities, strict=True)
        return {
            "closed_book": uptake(self.model, self.tokenizer, corpus.probes),
            "in_context": uptake(self.model, self.tokenizer, in_context),
            "kept": self.retention.measure(self.model),
            "own_sentences_true": share_true([(sentence, entity) for text, entity in own for sentence in text]),
        }

    def run(self, cell: Cell) -> Record:
        """Train and measure. A training that breaks down, with a loss that is not finite, is a result as well."""
        corpora = self.corpora(cell.seed, cell.documents, cell.said)[: cell.updates]
        student = copy.deepcopy(self.model)
        compute: dict[str, float] = {}
        try:
            for corpus in corpora:
                teacher = copy.deepcopy(student)
                for name, value in self._train(student, teacher, corpus, cell).items():
                    compute[name] = compute.get(name, 0) + value
        except FloatingPointError as error:
            return {"failed": str(error)}
        student.eval()
        texts = [document.text for document in corpora[-1].documents]
        result = {
            "uptake": uptake(student, self.tokenizer, corpora[-1].probes),
            "kept": self.retention.measure(student),
            "kl": {
                "new documents": kl_to_reference(student, self.model, self.tokenizer, texts),
                "other text": self.retention.kl(student),
            },
            "compute": dict(compute),
        }
        if cell.updates == 2:
            result["uptake of the first"] = uptake(student, self.tokenizer, corpora[0].probes)
        return result

    def _train(
        self, student: PreTrainedModel, teacher: PreTrainedModel, corpus: Corpus, cell: Cell
    ) -> dict[str, float]:
        """Train the student in place; returns what it cost."""
        own: list[list[str]] = []
        if cell.method == "cd" or cell.texts == "own":
            own = self.own_words(cell.seed, cell.documents, cell.said)
        torch.manual_seed(cell.seed)
        if cell.lora_rank:
            add_lora(student, cell.lora_rank, 2 * cell.lora_rank, LORA_DROPOUT)
        trainer = DiscTrainer(
            student,
            teacher if cell.method in WITH_TEACHER and not cell.lora_rank else None,
            _arguments(cell, on_cpu=student.device.type == "cpu"),
            training_set(cell, self.tokenizer, corpus.documents, own),
            method=cell.method,
            temperature=cell.temperature,
            ce_weight=cell.ce_weight,
            kl_weight=cell.kl_weight,
        )
        trainer.remove_callback(PrinterCallback)
        tokens = _count_tokens(trainer)
        start = time.perf_counter()
        trainer.train()
        return {"steps": trainer.state.global_step, **tokens, "seconds": round(time.perf_counter() - start, 2)}


def _arguments(cell: Cell, on_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
        "runs/reproduction/trainer",
        learning_rate=cell.learning_rate,
        per_device_train_batch_size=cell.batch_size,
        num_train_epochs=cell.epochs,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=0,
        seed=cell.seed,
        use_cpu=on_cpu,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _count_tokens(trainer: DiscTrainer) -> dict[str, int]:
    """What both models will have read, padding included, when the trainer is done."""
    tokens = {"student tokens": 0, "teacher tokens": 0}
    collate = trainer.data_collator

    def counted(examples: Sequence[Example]) -> PackedBatch:
        batch: PackedBatch = collate(examples)  # type: ignore[arg-type, assignment]
        tokens["student tokens"] += batch["input_ids"].numel()
        if batch["teacher_input_ids"] is not None:
            tokens["teacher tokens"] += batch["teacher_input_ids"].numel()
        return batch

    trainer.data_collator = counted  # type: ignore[assignment]
    return tokens
