"""Compute the losses of TRL's distillation trainers from hidden states and heads, without logits of all tokens.

Each class stands before a trainer of TRL (1.16) in the bases of a class, and is all that changes::

    class FusedGKDTrainer(FusedGKD, GKDTrainer): ...

The values and gradients are TRL's own up to rounding. Heads are read by `disc_kernels.hf.output_head`, so scales,
softcaps and LoRA adapters on a head come out right. The loss is computed inside `accelerator.autocast()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from disc_kernels.hf import OutputHead, last_hidden_states, output_head
from disc_kernels.hf.head import logits_of
from disc_kernels.linear_kl import LogitTransform, fused_cross_entropy, fused_suffix_kl, fused_topk_kl

# What TRL hands to models that read images too.
_IMAGES = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids"),
    *("mm_token_type_ids", "image_position_ids"),
)
_TOPK_ROWS = 512  # of which the logits are held while their largest are found


class FusedDistillation:
    """Compute the loss of `trl.DistillationTrainer`: generalised JSD of the completions' tokens."""

    def _compute_loss(
        self: Any, unwrapped_student: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the sum of the student's entropies in nats, and how many tokens were compared."""
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
        read = {name: inputs[name] for name in _IMAGES if name in inputs} | {
            "input_ids": torch.cat([prompt, completion], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            "use_cache": False,
        }
        predicted = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
        mask = nn.functional.pad(predicted, (prompt.shape[1] - 1, 1))
        self.teacher_model.eval()
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher_hidden = last_hidden_states(self.teacher_model, **read)
            hidden = last_hidden_states(unwrapped_student, **read)
            loss, stats = fused_suffix_kl(
                hidden,
                output_head(unwrapped_student),
                teacher_hidden,
                output_head(self.teacher_model),
                mask=mask,
                temperature=self.temperature,
                divergence="jsd",
                beta=self.beta,
                reduction="sum",
                return_stats=True,
            )
        compared = mask.sum()
        divisor = compared.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return loss / divisor, stats.student_entropy.sum(), compared


class FusedGKD:
    """Compute the loss of `trl.experimental.gkd.GKDTrainer`: generalised JSD of the tokens that have a label."""

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss; where the outputs are asked for as well, which hold logits, what TRL computes."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        read = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        mask = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:] != -100
        self.teacher_model.eval()
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher_hidden = last_hidden_states(self.teacher_model, **read)
            hidden = last_hidden_states(model, **read)
            loss: Any = fused_suffix_kl(
                hidden,
                output_head(model),
                teacher_hidden,
                output_head(self.teacher_model),
                mask=mask,
                divergence="jsd",
                beta=self.beta,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
        return loss if num_items_in_batch is None else loss / num_items_in_batch


class FusedSDFT:
    """Compute the losses of `trl.experimental.sdft.SDFTTrainer` with a teacher in memory, in all its modes.

    What TRL calls logits are here the hidden states and the head that they would be made of. With a teacher on a server
    TRL computes what it does without this class, full logits included.
    """

    def _forward_logits(
        self: Any, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> Any:
        """Return the completion's hidden states, [B, C, D], and the head at the trainer's temperature."""
        if self.use_teacher_server:
            return super()._forward_logits(model, input_ids, attention_mask, logits_to_keep)  # type: ignore[misc]
        with self.accelerator.autocast():
            hidden = last_hidden_states(model, input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            head = output_head(model)
        scale, softcap = head.transform.scale / self.temperature, head.transform.softcap
        at_temperature = LogitTransform(scale, None if softcap is None else softcap / self.temperature)
        return hidden[:, -logits_to_keep - 1 : -1], head._replace(transform=at_temperature)

    def _compute_rollout_logps(
        self: Any, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor | None:
        """Return the student's log-probabilities of what it sampled, where several steps train on the same sample."""
        read = torch.cat([prompt_ids, completion_ids], dim=1), torch.cat([prompt_mask, completion_mask], dim=1)
        if self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0:
            return None
        with torch.no_grad():
            return self._logprobs(self._forward_logits(self.model, *read, completion_ids.shape[1]), completion_ids)

    def _logprobs(self: Any, model: tuple[Tensor, OutputHead], labels: Tensor) -> Tensor:
        """Return log-probabilities of tokens, [B, C]; 0 where a label is -100."""
        with self.accelerator.autocast():
            return -fused_cross_entropy(*model, labels, reduction="none")

    def _compute_self_distillation_loss(self: Any, model: nn.Module, inputs: dict[str, Any], logits: Any) -> Tensor:
        """Return the mean over sequences of the mean over their tokens, and log the mean over all tokens."""
        args, student, teacher = self.args, logits.student_logits, logits.teacher_logits
        mask = logits.loss_mask != 0
        labels = logits.completion_ids.masked_fill(~mask, -100)
        options = {"divergence": "jsd", "beta": args.distillation_alpha, "reduction": "none"}
        with self.accelerator.autocast():
            if args.distillation_mode == "sampled_token":
                of_student = self._logprobs(student, labels)
                with torch.no_grad():
                    ratio = of_student - self._logprobs(teacher, labels)
                rows = (ratio * of_student)[mask]
            elif args.distillation_mode == "full_logits":
                rows = fused_suffix_kl(*student, *teacher, mask=mask, **options)
            elif args.distillation_mode != "topk_logits":
                raise ValueError(
                    "distillation_mode: expected sampled_token, full_logits or topk_logits, got"
                    f" {args.distillation_mode!r}"
                )
            elif args.distillation_topk is None:
                raise ValueError("distillation_topk: expected a number with distillation_mode topk_logits, got None")
            else:
                named = _student_topk(student, teacher, mask, args.distillation_topk)
                tail = "bucket" if args.distillation_add_tail else "renormalise"
                chosen = student[0][mask], student[1]
                rows = fused_topk_kl(*chosen, *named, tail=tail, **options)
        sampled = inputs.get("old_per_token_logps")
        if args.distillation_is_clip is not None and sampled is not None:
            with torch.no_grad():
                ratio = (self._logprobs(student, labels) - sampled)[mask].clamp(-20, 20).exp()
            rows = rows * ratio.clamp(max=args.distillation_is_clip)
        weight = (mask.to(rows.dtype) / mask.sum(-1, keepdim=True).clamp(min=1))[mask] / len(mask)
        mean = rows.detach().sum() / mask.sum().clamp(min=1)
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
        return (rows * weight).sum()


@torch.no_grad()
def _student_topk(
    student: tuple[Tensor, OutputHead], teacher: tuple[Tensor, OutputHead], mask: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the student's K largest entries of each row of the mask, and the teacher's log-probabilities of them."""
    ids, logprobs = [], []
    for hidden, teacher_hidden in zip(*(x[0][mask].split(_TOPK_ROWS) for x in (student, teacher)), strict=True):
        ids.append(logits_of(student[1], hidden).topk(k).indices)
        logits = logits_of(teacher[1], teacher_hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs.append(logits.gather(-1, ids[-1]) - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)
