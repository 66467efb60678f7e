"""Make a cache of a tiny teacher that was saved in a folder."""

from types import SimpleNamespace

import pytest
import torch

from disc_train.models.causal_lm import use_attention
from disc_train.models.frozen_head import freeze_head
from disc_train.teacher_cache.open import CacheSettings, TeacherCache
from disc_train.teacher_cache.sequences import sources
from tests.train.world import make_model, perturbed


@pytest.fixture
def make_cache(tmp_path, tokenizer, make_dataset):
    """Return make_cache(...): it gives a cache, its student (perturbed) and teacher in float64; `fill()` fills it."""

    def make(
        dataset=None,
        architecture="llama",
        frozen=True,
        folder="cache",
        stored=torch.float32,
        compare_all=True,
        **options,
    ):
        teacher = make_model(architecture).double().eval()
        saved = tmp_path / f"{architecture}-model"
        if not saved.exists():
            teacher.save_pretrained(saved)
        student = perturbed(teacher)
        for model in (student, teacher):
            use_attention(model, "auto")
        if frozen:
            freeze_head(student)
        settings = {
            "folder": str(tmp_path / folder),
            "teacher_name_or_path": str(saved),
            "dtype": torch.float64,
            "stored": stored,
            "temperature": 2.0,
            "autocast": None,
            "forward_kl": True,
            "start": [],
        }
        dataset = dataset or make_dataset(3, num_splits=2)
        read = [(each, 2) for each in sources(dataset, compare_all)]
        cache = TeacherCache(CacheSettings(**settings | options), read, tokenizer, student)
        return SimpleNamespace(
            cache=cache,
            student=student,
            teacher=teacher,
            dataset=dataset,
            folder=tmp_path / folder,
            fill=lambda batch_size=2: cache.fill(teacher, batch_size),
        )

    return make
