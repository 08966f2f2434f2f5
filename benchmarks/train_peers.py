# SPDX-License-Identifier: Apache-2.0
"""The peers of `train.py`: PEFT with the transformers Trainer, TRL's SFTTrainer, and a plain torch loop.

Each gets settings a careful user would choose: no logging, saving or evaluation on the way, no gradient checkpointing,
rows in the given order, weights and autocast in the same number format as ours. Frozen batch norms stay in eval mode, and
a body of which nothing trains runs without recording gradients.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import measure
import torch
import torch.nn.functional as F
import train_data
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

IGNORED = -100


class Marks:
    """The time at every optimiser step of this process, whoever takes it."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> Marks:
        self._hook = register_optimizer_step_post_hook(self._mark)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()

    def _mark(self, *_: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def result(self, losses: Sequence[float], peak: int, job: Mapping[str, Any]) -> dict[str, Any]:
        """Rates after the first step; `of_run` is the share that one unit has of the run."""
        units = job["units"] - job["first_units"]
        last = max(1, len(losses) // 5)
        return {
            "rate": units / (self.wall[-1] - self.wall[0]), "cpu_rate": units / (self.cpu[-1] - self.cpu[0]),
            "peak_memory": peak, "final_loss": sum(losses[-last:]) / last, "of_run": 1 / job["units"], "losses": list(losses),
        }  # fmt: skip


def run(job: Mapping[str, Any], work: Any) -> dict[str, Any]:
    """Train one peer of a row and measure it."""
    torch.manual_seed(job["seed"])
    rows, order, pad = train_data.read_encoded(Path(job["folder"]))
    half = job["dtype"] == "bf16"
    build: Callable[..., nn.Module] = {"text": causal, "gsm8k": causal, "banking": encoder, "cifar": vision}[work.data]
    model = build(job, work, half)
    losses: list[Tensor] = []
    with tempfile.TemporaryDirectory(dir=job["folder"]) as out, Marks() as marks:
        if job["peer"] == "loop":
            loop(model, rows, order, work, half, losses)
        else:
            trainer = trained(job, work, model, rows, order, pad, half, out, losses)
            measure.reset_peak_resident()
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
            return marks.result([float(v) for v in losses], measure.peak_resident(), job) | {"seconds": seconds}
    return marks.result([float(v) for v in losses], measure.peak_resident(), job)


# The models


def lora(rank: int, alpha: int, targets: Any, task: str | None = None) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type=task)


def chosen(method: str) -> dict[str, int]:
    """rank and alpha in a method's text."""
    pairs = (c.split("=") for c in method.partition(":")[2].split(",") if "=" in c)
    return {k: int(v) for k, v in pairs if v.isdigit()}


def causal(job: Mapping[str, Any], work: Any, half: bool) -> nn.Module:
    """SmolLM2 with PEFT's LoRA, or all of it trainable: in fp32 under autocast, or ("trainer-half") in bf16 throughout."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = work.method.startswith("lora")
    narrow = half and (adapted or job["peer"] == "trainer-half")
    dtype = torch.bfloat16 if narrow else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["weights"], dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if not adapted:
        return model
    options = chosen(work.method)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, lora(options["rank"], options["alpha"], names, "CAUSAL_LM"))


class Pooled(nn.Module):
    """An encoder, the mean over its real tokens, and a linear head: what `tunesmith.tune` puts on MiniLM."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.classifier = body, nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        keep = attention_mask[..., None].to(h.dtype)
        pooled = (h * keep).sum(1) / keep.sum(1)
        logits = self.classifier(pooled)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


def encoder(job: Mapping[str, Any], work: Any, half: bool) -> nn.Module:
    from peft import get_peft_model
    from transformers import AutoModel

    from tunesmith.models.bundled import BUNDLED, locate

    body = AutoModel.from_pretrained(
        str(locate(BUNDLED[work.model])), add_pooling_layer=False, attn_implementation="sdpa"
    )
    options = chosen(work.method)
    adapted = get_peft_model(body, lora(options["rank"], options["alpha"], "all-linear"))
    return Pooled(adapted, body.config.hidden_size, job["classes"])


class Pictures(nn.Module):
    """EfficientNet-Lite0 with a new output layer; batch norms in eval mode; without gradients where nothing trains."""

    def __init__(self, net: Any, classes: int) -> None:
        super().__init__()
        self.net, self.classifier = net, nn.Linear(1280, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def train(self, mode: bool = True) -> Pictures:
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        frozen = not any(p.requires_grad for p in self.net.parameters())
        with torch.no_grad() if frozen else nullcontext():
            h = self.net.features(pixel_values)
        logits = self.classifier(h)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


class ScaleShift(nn.Module):
    """What SSF puts after an operation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


def vision(job: Mapping[str, Any], work: Any, half: bool) -> nn.Module:
    from tunesmith.models.load import load_parts

    net: Any = load_parts(work.model, dtype="float32").model
    net.requires_grad_(False)
    net._fc = nn.Identity()
    if work.method.startswith("ssf"):
        for parent in list(net.modules()):
            for name, m in list(parent.named_children()):
                if isinstance(m, nn.Conv2d | nn.BatchNorm2d):
                    channels = m.out_channels if isinstance(m, nn.Conv2d) else m.num_features
                    setattr(parent, name, nn.Sequential(m, ScaleShift(channels)))
    elif work.method.startswith("lora"):
        net = _with_conv_lora(net, chosen(work.method))
    return Pictures(net, job["classes"])


def _with_conv_lora(net: Any, options: Mapping[str, int]) -> Any:
    """PEFT's LoRA on the 1x1 convolutions, made plain `nn.Conv2d` first: PEFT builds its factors from that class."""
    from peft import inject_adapter_in_model

    wanted = ("_expand_conv", "_project_conv", "_conv_head")
    for parent in list(net.modules()):
        for name, m in list(parent.named_children()):
            if name in wanted:
                plain = nn.Conv2d(m.in_channels, m.out_channels, 1, bias=False)
                plain.weight = m.weight
                setattr(parent, name, plain)
    return inject_adapter_in_model(lora(options["rank"], options["alpha"], list(wanted)), net)


# The training


class Ordered(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows in the given order."""

    def __init__(self, rows: Sequence[dict[str, Any]], order: Sequence[int]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[self.order[i]]


def padded(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """A batch padded on the right to its longest row; pictures are stacked."""
    if "pixel_values" in rows[0]:
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    width = max(len(r["input_ids"]) for r in rows)

    def filled(key: str, fill: int) -> Tensor:
        return torch.tensor([list(r[key]) + [fill] * (width - len(r[key])) for r in rows])

    ids = filled("input_ids", pad)
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    labels = (
        filled("labels", IGNORED) if isinstance(rows[0]["labels"], list) else torch.tensor([r["labels"] for r in rows])
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(
    job: Mapping[str, Any], work: Any, model: nn.Module, rows: Any, order: Any, pad: int, half: bool, out: str,
    losses: list[Tensor],
) -> Any:  # fmt: skip
    """A Trainer, or TRL's, over the rows in order, that keeps the loss of every step."""
    from transformers import Trainer, TrainingArguments

    common = {
        "output_dir": out, "num_train_epochs": 1, "per_device_train_batch_size": work.batch, "learning_rate": work.lr,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_strategy": "no",
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": job["seed"],
        "remove_unused_columns": False, "bf16": half, "gradient_checkpointing": False,
    }  # fmt: skip
    if job["peer"] == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        kind: Any = SFTTrainer
        arguments: Any = SFTConfig(
            **common, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True}
        )
        more: dict[str, Any] = {"processing_class": tokenizer(pad), "data_collator": lambda b: padded(b, pad)}
        data: Any = Dataset.from_list([rows[i] for i in order])
    else:
        kind, arguments = Trainer, TrainingArguments(**common)
        more, data = {"data_collator": lambda b: padded(b, pad)}, Ordered(rows, order)

    class Kept(kind):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            value = super().compute_loss(*args, **kwargs)
            losses.append((value[0] if isinstance(value, tuple) else value).detach())
            return value

    return Kept(model=model, args=arguments, train_dataset=data, **more)


def tokenizer(pad: int) -> Any:
    """SFTTrainer asks for one, though the rows are token lists already."""
    from tunesmith.models.skeleton import skeleton

    made = skeleton("smollm2-135m-instruct").tokenizer
    made.pad_token_id = pad
    return made


def loop(model: nn.Module, rows: Any, order: Sequence[int], work: Any, half: bool, losses: list[Tensor]) -> None:
    """The shortest loop a careful user would write."""
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=work.lr, weight_decay=0.0)
    measure.reset_peak_resident()
    for batch in batches(rows, order, work.batch):
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            loss = model(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())


def batches(rows: Any, order: Sequence[int], size: int) -> Iterator[dict[str, Tensor]]:
    for i in range(0, len(order), size):
        yield padded([rows[j] for j in order[i : i + size]], 0)
