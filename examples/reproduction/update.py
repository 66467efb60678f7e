"""Make one run: update a fresh copy of the initial model with new documents, and measure what came of it."""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from candidates import distill_or_tell
from cells import Cell
from corpus import Corpus, join, new_corpus, one_a_document, one_of_each
from measures import Record, Retention, uptake
from own_words import own_sentences, share_true
from pretrain import pretraining_names
from top_k import distilling, training_by
from training_sets import training_set
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, TrainingArguments

from disc_train.data.example import Example
from disc_train.evaluation import kl_to_reference
from disc_train.models.adapters import add_lora
from disc_train.models.frozen_head import freeze_head
from disc_train.objectives.methods import WITH_TEACHER
from disc_train.packing.collator import PackedBatch
from disc_train.trainer import DiscTrainer

NUM_READINGS = 50
LORA_DROPOUT = 0.1


class Laboratory:
    """Hold the initial model and what all runs have in common: the names it has met, and what it should not forget."""

    def __init__(self, model: Path, device: str, pretraining_steps: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.to(device).eval()  # type: ignore[arg-type]
        self.met = pretraining_names(pretraining_steps)
        unread = new_corpus("reading", NUM_READINGS, 3, self.met)
        self.met |= {entity.name for entity in unread.entities}
        self.retention = Retention(self.model, self.tokenizer, unread)

    def corpora(self, seed: int, documents: int, said: int, wrong: bool = False) -> list[Corpus]:
        """Make the documents of a first update, and those of a second."""
        first = new_corpus(f"{seed}", documents, said, self.met, wrong)
        names = {entity.name for entity in first.entities}
        return [first, new_corpus(f"{seed}, second", documents, said, self.met | names, wrong)]

    @lru_cache(maxsize=2)  # noqa: B019  a process has one laboratory
    def own_words(self, seed: int, documents: int, said: int) -> list[list[str]]:
        """Return what the initial model writes about each document of a first update, no more than stands in it."""
        corpus = self.corpora(seed, documents, said)[0]
        torch.manual_seed(seed)
        return [
            own_sentences(self.model, self.tokenizer, document.text, entity.name, said * len(entity.facts))
            for document, entity in zip(corpus.documents, corpus.entities, strict=True)
        ]

    def initial(self, seed: int, documents: int, said: int, wrong: bool, joined: int) -> Record:
        """Measure the initial model on a seed's probes, closed book, and with their documents, as a teacher reads."""
        corpus = self.corpora(seed, documents, said, wrong)[0]
        in_context = {form: one_a_document(corpus, form, joined) for form in corpus.probes}
        own = zip(self.own_words(seed, documents, said), corpus.entities, strict=True)
        return {
            "closed_book": uptake(self.model, self.tokenizer, corpus.probes, corpus.wrong),
            "in_context": uptake(self.model, self.tokenizer, in_context, one_of_each(corpus, corpus.wrong)),
            "kept": self.retention.measure(self.model),
            "own_sentences_true": share_true([(sentence, entity) for text, entity in own for sentence in text]),
        }

    def run(self, cell: Cell) -> Record:
        """Train and measure. A run that breaks down, with a loss or a model that is not finite, is a result as well."""
        try:
            return self._measured(cell)
        except FloatingPointError as error:
            return {"failed": str(error)}

    def _measured(self, cell: Cell) -> Record:
        corpora = self.corpora(cell.seed, cell.documents, cell.said, cell.wrong)[: cell.updates]
        trained, compute = self._trained(replace(cell, interpolate=1.0))
        student = interpolated(self.model, trained, cell.interpolate)
        texts = [document.text for document in corpora[-1].documents]
        result = {
            "uptake": uptake(student, self.tokenizer, corpora[-1].probes, corpora[-1].wrong),
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

    @lru_cache(maxsize=16)  # noqa: B019  one training, several interpolations
    def _trained(self, cell: Cell) -> tuple[PreTrainedModel, dict[str, float]]:
        """Return the student after all its updates, and what they cost."""
        student = copy.deepcopy(self.model)
        compute: dict[str, float] = {}
        for corpus in self.corpora(cell.seed, cell.documents, cell.said, cell.wrong)[: cell.updates]:
            teacher = copy.deepcopy(self.model if cell.initial_teacher else student)
            for name, value in self._train(student, teacher, corpus, cell).items():
                compute[name] = compute.get(name, 0) + value
        return student.eval(), compute

    def _train(
        self, student: PreTrainedModel, teacher: PreTrainedModel, corpus: Corpus, cell: Cell
    ) -> dict[str, float]:
        """Train the student in place; return what it cost."""
        trainer = self.trainer(student, teacher, corpus, cell)
        tokens = _count_tokens(trainer)
        start = time.perf_counter()
        with training_by(distill_or_tell) if cell.told else distilling(cell.top_k, cell.tail):
            trainer.train()
        return {"steps": trainer.state.global_step, **tokens, "seconds": round(time.perf_counter() - start, 2)}

    def trainer(self, student: PreTrainedModel, teacher: PreTrainedModel, corpus: Corpus, cell: Cell) -> DiscTrainer:
        own: list[list[str]] = []
        if cell.method == "cd" or cell.texts == "own" or cell.own_sentences:
            own = self.own_words(cell.seed, cell.documents, cell.said)
        torch.manual_seed(cell.seed)
        if cell.lora_rank:
            add_lora(student, cell.lora_rank, 2 * cell.lora_rank, LORA_DROPOUT)
        if cell.freeze_head:
            freeze_head(student)
        student.model.layers[: cell.frozen_layers].requires_grad_(False)
        trainer = DiscTrainer(
            student,
            teacher if cell.method in WITH_TEACHER and not cell.lora_rank else None,
            _arguments(cell, on_cpu=student.device.type == "cpu"),
            training_set(cell, self.model, self.tokenizer, join(corpus.documents, cell.joined), own),
            method=cell.method,
            temperature=cell.temperature,
            ce_weight=cell.ce_weight,
            kl_weight=cell.kl_weight,
            kl_clip=cell.kl_clip,
            teacher_ema_decay=cell.teacher_ema_decay,
            teacher_sync_steps=cell.teacher_sync_steps,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


@torch.no_grad()
def interpolated(initial: PreTrainedModel, trained: PreTrainedModel, share: float) -> PreTrainedModel:
    """Make a model whose weights are initial + share * (trained - initial), as WiSE-FT has it (arXiv 2109.01903)."""
    if share == 1:
        return trained
    model = copy.deepcopy(initial)
    for weight, moved in zip(model.parameters(), trained.parameters(), strict=True):
        weight.lerp_(moved, share)
    return model


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
    """Return counts of the tokens that each model reads, padding included, which go up as the trainer runs."""
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
