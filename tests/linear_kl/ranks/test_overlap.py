"""What ranks add up of a chunk is waited for only when the next chunk's products are under way."""

import pytest
import torch
import torch.distributed as dist

from disc_kernels import TeacherSummary, expected_embedding_kl, fused_suffix_kl, teacher_summary
from disc_kernels.frozen_head import softmax
from disc_kernels.linear_kl import logits

SHAPE = {
    "student_hidden": (8, 24),
    "student_weight": (1000, 24),
    "teacher_hidden": (8, 24),
    "teacher_weight": (1000, 24),
}
WORKSPACE = 50_000  # of a few rows


@pytest.fixture
def events(monkeypatch):
    """In order: "product" with a head, "start" and "wait" of a sum over the ranks that goes on behind."""
    noted = []

    class Work:
        def __init__(self, work):
            self.work = work

        def wait(self):
            noted.append("wait")
            return self.work.wait()

    all_reduce = dist.all_reduce

    def noted_reduce(*arguments, **options):
        work = all_reduce(*arguments, **options)
        if not options.get("async_op"):
            return work
        noted.append("start")
        return Work(work)

    monkeypatch.setattr(dist, "all_reduce", noted_reduce)
    for module in (logits, softmax):

        def noted_project(*arguments, project=module.project):
            noted.append("product")
            project(*arguments)

        monkeypatch.setattr(module, "project", noted_project)
    return noted


def fused(t, group):
    t["student_hidden"].requires_grad_()
    fused_suffix_kl(**t, vocab_group=group, max_workspace_bytes=2 * WORKSPACE)


def summarised(t, group):
    heads = t["teacher_weight"], t["student_weight"]
    teacher_summary(t["teacher_hidden"], *heads, vocab_group=group, max_workspace_bytes=WORKSPACE)


def from_summary(t, group):
    hidden, summary = (
        t["student_hidden"].requires_grad_(),
        TeacherSummary(torch.ones(8, 24), torch.ones(8), torch.ones(8)),
    )
    expected_embedding_kl(hidden, t["student_weight"], summary, vocab_group=group, max_workspace_bytes=WORKSPACE)


@pytest.mark.parametrize("call", [fused, summarised, from_summary])
def test_sums_go_on_behind_the_next_product(events, lonely_group, call):
    call({name: torch.randn(shape) for name, shape in SHAPE.items()}, lonely_group)
    assert events.count("start") == events.count("wait") >= 2
    assert events[-1] == "wait"
    under_way = 0
    for event in events[:-1]:
        under_way += {"start": 1, "wait": -1}.get(event, 0)
        if event == "wait":
            assert under_way == 1  # this chunk's own sum, that began after its products
        elif event == "product":
            assert under_way <= 1
