"""What `fused_topk_kl` refuses, and in which words; on the CPU it looks at values too."""

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from disc_kernels import fused_topk_kl

LOG = torch.tensor([[0.5, 0.3], [0.7, 0.2]]).log()
IDS = torch.tensor([[3, 1], [0, 4]])


def good(**changed):
    return {
        "student_hidden": torch.zeros(2, 4),
        "student_weight": torch.zeros(5, 4),
        "topk_ids": IDS,
        "topk_logprobs": LOG,
        **changed,
    }


BAD = {
    "ids of a list": ({"topk_ids": [[1]]}, TypeError, "topk_ids: expected a tensor, got list"),
    "ids of floats": ({"topk_ids": IDS.float()}, TypeError, "topk_ids: expected dtype torch.int64 or torch.int32, got"),
    "ids of another shape": (
        {"topk_ids": IDS[:, :1]},
        ValueError,
        "topk_ids: expected shape [2, 2], as topk_logprobs, got [2, 1]",
    ),
    "sparse ids": ({"topk_ids": IDS.to_sparse()}, TypeError, "topk_ids: expected a dense tensor, got layout"),
    "ids elsewhere": ({"topk_ids": IDS.to("meta")}, ValueError, "topk_ids: expected device cpu, as the hidden states"),
    "an id too large": (
        {"topk_ids": IDS + 1},
        ValueError,
        "topk_ids: expected entries from 0 to 4, got 5 in row 1 of those compared",
    ),
    "an id above vocab_size": ({"vocab_size": 4}, ValueError, "topk_ids: expected entries from 0 to 3, got 4 in"),
    "a negative id": ({"topk_ids": IDS - 1}, ValueError, "topk_ids: expected entries from 0 to 4, got -1 in row 1"),
    "an id twice": (
        {"topk_ids": torch.tensor([[3, 1], [4, 4]])},
        ValueError,
        "topk_ids: expected different entries in a row, got 4 in row 1",
    ),
    "more entries than there are": (
        {"topk_ids": torch.arange(6).expand(2, 6), "topk_logprobs": torch.full((2, 6), -9.0)},
        ValueError,
        "topk_ids: expected at most 5 entries a row, the whole vocabulary, got 6",
    ),
    "other rows": (
        {"topk_ids": IDS[:1], "topk_logprobs": LOG[:1]},
        ValueError,
        "topk_ids: expected 2 rows, one for each row of student_hidden, got 1; student_index or mask choose",
    ),
    "log-probabilities of integers": (
        {"topk_logprobs": IDS},
        TypeError,
        "topk_logprobs: expected float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "no entries": (
        {"topk_ids": IDS[:, :0], "topk_logprobs": LOG[:, :0]},
        ValueError,
        "topk_logprobs: expected shape [..., K], K not 0, got [2, 0]",
    ),
    "one dimension": ({"topk_logprobs": LOG[0]}, ValueError, "topk_logprobs: expected shape [..., K]"),
    "probabilities": (
        {"topk_logprobs": LOG.exp()},
        ValueError,
        "topk_logprobs: expected log-probabilities, none above 0, got 0.5 in row 0",
    ),
    "NaN": (
        {"topk_logprobs": LOG * torch.tensor([[1.0], [torch.nan]])},
        ValueError,
        "topk_logprobs: expected log-probabilities, none above 0, got nan in row 1",
    ),
    "a sum above 1": (
        {"topk_logprobs": LOG + 0.15},
        ValueError,
        "topk_logprobs: expected probabilities that sum to at most 1, got 1.045651 in row 1",
    ),
    "tail": ({"tail": "drop"}, ValueError, "tail: expected one of 'bucket', 'renormalise', got 'drop'"),
    "mask": (
        {"mask": torch.ones(3, dtype=torch.bool)},
        ValueError,
        "mask: expected shape [2], as student_hidden's tokens, got [3]",
    ),
    "mask of other rows": (
        {"mask": torch.ones(2, dtype=torch.bool), "topk_logprobs": LOG[:1], "topk_ids": IDS[:1]},
        ValueError,
        "mask: expected shape [1], as topk_logprobs's tokens, got [2]",
    ),
    "workspace": ({"max_workspace_bytes": 8}, ValueError, "max_workspace_bytes: expected at least"),
    "divergence": ({"divergence": "kl"}, ValueError, "divergence: expected one of 'forward_kl'"),
    "weight": ({"student_weight": torch.zeros(5, 3)}, ValueError, "student_hidden: expected last dimension 3"),
}


@pytest.mark.parametrize("changed, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input(changed, error, message):
    fused_topk_kl(**good())
    with pytest.raises(error, match=re.escape(message)):
        fused_topk_kl(**good(**changed))


def test_a_divided_dtensor_is_named_as_the_caller_knows_it(lonely_group):
    logprobs = distribute_tensor(LOG, init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match=r"topk_logprobs: expected a plain tensor, or a DTensor .*got \[Shard"):
        fused_topk_kl(**good(topk_logprobs=logprobs))


def test_checks_know_no_implementation(impl):
    with pytest.raises(ValueError, match="topk_ids: expected different entries"):
        fused_topk_kl(**good(topk_ids=IDS * 0), impl=impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_error(dtype):
    """Of a whole distribution in 16 bits, whose probabilities sum to 1.002 and more."""
    logprobs, ids = torch.randn(50, 40).log_softmax(-1).to(dtype).topk(40)
    assert logprobs.double().exp().sum(-1).max() > (1.001 if dtype == torch.bfloat16 else 1)
    loss = fused_topk_kl(torch.zeros(50, 4), torch.zeros(40, 4), ids, logprobs)
    assert loss.isfinite()


def test_what_fills_a_row_is_not_looked_at(impl):
    logprobs, ids = LOG.clone(), IDS.clone()
    logprobs[0, 1], ids[0, 1] = -torch.inf, 3  # another of the same
    values = fused_topk_kl(**good(topk_ids=ids, topk_logprobs=logprobs, reduction="none", impl=impl))
    alone = fused_topk_kl(**good(topk_ids=ids[:, :1], topk_logprobs=logprobs[:, :1], reduction="none", impl=impl))
    assert torch.allclose(values[0], alone[0])


def test_rows_that_are_not_compared_are_not_looked_at():
    logprobs, ids = LOG.clone(), IDS.clone()
    logprobs[0], ids[0] = torch.nan, -3
    keep = torch.tensor([False, True])
    assert fused_topk_kl(**good(topk_ids=ids, topk_logprobs=logprobs, mask=keep)).isfinite()
