"""Sort-KD with Hugging Face's `Trainer`, from hidden states: a two-layer causal language model on made sequences.

Four things around the one call of the loss have to be right:

* The models are asked for their last hidden states and for the logits of one position only (`logits_to_keep=1`), which
  goes through DDP's and Accelerate's wrappers as any call does. The loss makes the logits itself, some rows at a time.
* Position i predicts token i + 1. The *labels* move by one place and the last position gets `ignore_index`; rows to
  ignore, padding among them, cost no matrix product.
* The loss is a sum with the denominator `num_items_in_batch`, the tokens that count in all the micro-batches of one
  step. With a mean of each micro-batch, the tokens of short sequences would weigh more under gradient accumulation.
* The labels here are the data's, so a teacher that contradicts them is wrong. Where the tokens are the student's own
  samples (on-policy distillation) there is no label to correct by: use `correction="none"` there.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from sortkd_kernels import FusedLinearSortKDLoss

VOCABULARY, LENGTH, IGNORE = 64, 24, -100


class SortKDTrainer(Trainer):
    """A `Trainer` whose loss is Sort-KD; it holds the teacher, so no checkpoint, optimizer or DDP wrapper sees it."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.criterion = FusedLinearSortKDLoss(
            2.0, ce_weight=0.5, kd_weight=0.5, reduction="sum", ignore_index=IGNORE
        )  # fmt: skip

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        # With the labels, either model would make a cross-entropy of its own, of all logits.
        tokens = {name: value for name, value in inputs.items() if name != "labels"}
        tokens |= {"output_hidden_states": True, "logits_to_keep": 1}
        target = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
        outputs = model(**tokens)
        with torch.no_grad():
            of_teacher = self.teacher(**tokens)
        if num_items_in_batch is None:  # then the Trainer divides by the number of micro-batches itself
            num_items_in_batch = (target != IGNORE).sum().clamp(min=1)
        elif self.args.average_tokens_across_devices:  # then it counts all processes, whose gradients DDP averages
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        loss = self.criterion(
            outputs.hidden_states[-1],
            self.accelerator.unwrap_model(model).lm_head.weight,
            target,
            teacher_hidden=of_teacher.hidden_states[-1],
            teacher_weight=self.teacher.lm_head.weight,
            denominator=num_items_in_batch,
        )
        return (loss, outputs) if return_outputs else loss


def made_data(rows: int) -> list[dict[str, Tensor]]:
    """Arithmetic progressions modulo the vocabulary, of random lengths, padded."""
    start, step = torch.randint(VOCABULARY, (rows, 1)), torch.randint(1, 4, (rows, 1))
    tokens = (start + step * torch.arange(LENGTH)) % VOCABULARY
    mask = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (rows, 1))
    labels = tokens.masked_fill(~mask, IGNORE)
    # Nothing predicts the first token, but not every version of the Trainer leaves it out of its count.
    labels[:, 0] = IGNORE
    columns = {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": labels}
    return [{name: column[row] for name, column in columns.items()} for row in range(rows)]


def tiny_llama(width: int) -> LlamaForCausalLM:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, max_position_embeddings=LENGTH)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, use_cache=False))


def train(trainer: type[Trainer], model: nn.Module, data: list[dict[str, Tensor]], **options: Any) -> list[float]:
    """Train on the CPU, two micro-batches a step; the losses over `data` before and after."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        sizes = dict(per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-2)
        arguments = TrainingArguments(folder, use_cpu=True, **sizes, **quiet)
        run = trainer(model, arguments, train_dataset=data, eval_dataset=data, **options)
        run.remove_callback(PrinterCallback)
        before = run.evaluate()["eval_loss"]
        run.train()
        return [before, run.evaluate()["eval_loss"]]


def main() -> None:
    torch.manual_seed(0)
    data, teacher, student = made_data(256), tiny_llama(64), tiny_llama(32)
    train(Trainer, teacher, data)
    before, after = train(SortKDTrainer, student, data, teacher=teacher)
    if not after < before:  # so written, NaN fails too
        raise RuntimeError(f"the loss did not fall: {before} -> {after}")
    print(f"huggingface_trainer: loss a token {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
