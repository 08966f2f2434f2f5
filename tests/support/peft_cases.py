# SPDX-License-Identifier: Apache-2.0
"""Cases of the exchange with PEFT, shared by the tests and the table in docs/peft.md."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.trace import primary
from tunesmith.export.peft import read_peft, write_peft


class Net(nn.Module):
    """A convolution, an embedding, linears and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.e = nn.Embedding(10, 8)
        self.fc1 = nn.Linear(8, 12)
        self.ln = nn.LayerNorm(12)
        self.fc2 = nn.Linear(12, 8)
        self.out = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = torch.relu(self.a(x)).mean((2, 3)) + self.e(ids).mean(1)
        return self.out(torch.tanh(self.fc2(self.ln(torch.tanh(self.fc1(h))))))


def net() -> Base:
    """The small net with fixed weights and inputs."""
    g = torch.Generator().manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    x, ids = torch.randn(3, 4, 6, 6, generator=g), torch.randint(10, (3, 4), generator=g)
    return Base(model, example={"x": x, "ids": ids}, name="net")


def llama() -> Base:
    """A small Llama with fixed weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.15)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    return Base(model, example={"input_ids": ids}, name="llama", family="causal-lm")


@dataclass(frozen=True)
class Case:
    """One kind of adapter: our method, PEFT's settings, and the base both go on."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[Any], Any]
    base: Callable[[], Base] = net


LINEARS = ["fc1", "fc2"]
ALL = ["a", "e", "fc1", "fc2"]
CASES = [
    Case("LoRA", lambda: ts.LoRA(rank=2, alpha=6.0, targets="a,e,fc1,fc2"),
         lambda P: P.LoraConfig(r=2, lora_alpha=6, target_modules=ALL)),
    Case("LoRA, rank and alpha patterns", lambda: ts.LoRA(rank=2, alpha=6.0, targets="a,fc1,fc2", rank_pattern={"fc2": 3}, alpha_pattern={"fc2": 9.0}),
         lambda P: P.LoraConfig(r=2, lora_alpha=6, target_modules=["a", *LINEARS], rank_pattern={"fc2": 3}, alpha_pattern={"fc2": 9})),
    Case("rsLoRA", lambda: ts.LoRA(rank=4, alpha=6.0, rslora=True, targets="fc1,fc2"),
         lambda P: P.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=LINEARS)),
    Case("DoRA", lambda: ts.DoRA(rank=2, alpha=6.0, targets="a,fc1,fc2"),
         lambda P: P.LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=["a", *LINEARS])),
    Case("PiSSA", lambda: ts.PiSSA(rank=2, alpha=4.0, targets="fc1,fc2"),
         lambda P: P.LoraConfig(r=2, lora_alpha=4, init_lora_weights="pissa", target_modules=LINEARS)),
    Case("OLoRA", lambda: ts.OLoRA(rank=2, alpha=4.0, targets="fc1,fc2"),
         lambda P: P.LoraConfig(r=2, lora_alpha=4, init_lora_weights="olora", target_modules=LINEARS)),
    Case("LoHa", lambda: ts.LoHa(rank=2, alpha=6.0, targets="a,fc1,fc2"),
         lambda P: P.LoHaConfig(r=2, alpha=6, target_modules=["a", *LINEARS])),
    Case("LoHa, Tucker", lambda: ts.LoHa(rank=2, alpha=6.0, targets="a,fc1,fc2", tucker=True),
         lambda P: P.LoHaConfig(r=2, alpha=6, target_modules=["a", *LINEARS], use_effective_conv2d=True)),
    Case("LoKr", lambda: ts.LoKr(rank=1, alpha=3.0, targets="a,fc1,fc2"),
         lambda P: P.LoKrConfig(r=1, alpha=3, target_modules=["a", *LINEARS])),
    Case("LoKr, full factors", lambda: ts.LoKr(rank=8, alpha=3.0, targets="a,fc1,fc2"),
         lambda P: P.LoKrConfig(r=8, alpha=3, target_modules=["a", *LINEARS])),
    Case("LoKr, Tucker, both low-rank", lambda: ts.LoKr(rank=1, alpha=3.0, targets="a,fc1,fc2", both=True, tucker=True),
         lambda P: P.LoKrConfig(r=1, alpha=3, target_modules=["a", *LINEARS], decompose_both=True, use_effective_conv2d=True)),
    Case("VeRA", lambda: ts.VeRA(rank=3, targets="fc1,fc2"), lambda P: P.VeraConfig(r=3, target_modules=LINEARS)),
    Case("VeRA, pair not saved", lambda: ts.VeRA(rank=3, targets="fc1,fc2"),
         lambda P: P.VeraConfig(r=3, target_modules=LINEARS, save_projection=False)),
    Case("FourierFT", lambda: ts.FourierFT(n=7, scale=20.0, targets="fc1,fc2"),
         lambda P: P.FourierFTConfig(n_frequency=7, scaling=20.0, target_modules=LINEARS)),
    Case("HiRA", lambda: ts.HiRA(rank=2, targets="a,e,fc1,fc2"), lambda P: P.HiraConfig(r=2, target_modules=ALL)),
    Case("MiSS", lambda: ts.MiSS(rank=4, targets="fc1,fc2"), lambda P: P.MissConfig(r=4, target_modules=LINEARS)),
    Case("MiSS, mini", lambda: ts.MiSS(rank=4, mode="mini", mini_rank=4, targets="fc1,fc2"),
         lambda P: P.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=LINEARS)),
    Case("Bone (MiSS, bat)", lambda: ts.Bone(block=4, targets="fc1,fc2"),
         lambda P: P.MissConfig(r=4, init_weights="bat", target_modules=LINEARS)),
    Case("OFT", lambda: ts.OFT(block=4, targets="fc1,fc2"),
         lambda P: P.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=LINEARS)),
    Case("OFT, series", lambda: ts.OFT(block=4, neumann_terms=5, targets="fc1,fc2"),
         lambda P: P.OFTConfig(r=0, oft_block_size=4, target_modules=LINEARS)),
    Case("BOFT", lambda: ts.BOFT(block=4, factors=1, targets="fc1,fc2"),
         lambda P: P.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=LINEARS)),
    Case("IA3", lambda: ts.IA3(targets="fc1,fc2", inputs="fc2"),
         lambda P: P.IA3Config(target_modules=LINEARS, feedforward_modules=["fc2"])),
    Case("SHiRA", lambda: ts.SHiRA(rank=2, targets="fc1,fc2"), lambda P: P.ShiraConfig(r=2, target_modules=LINEARS)),
    Case("LN tuning", lambda: ts.NormTuning(targets="norms"), lambda P: P.LNTuningConfig(target_modules=["ln"])),
    Case("trainable tokens", lambda: ts.TrainableTokens(tokens=[3, 5, 60]),
         lambda P: P.TrainableTokensConfig(token_indices=[5, 3, 60], target_modules=["embed_tokens"]), llama),
    Case("prompt tuning", lambda: ts.PromptTuning(tokens=3),
         lambda P: P.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), llama),
    Case("prefix tuning", lambda: ts.PrefixTuning(tokens=3),
         lambda P: P.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), llama),
    Case("P-tuning", lambda: None,
         lambda P: P.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16), llama),
    Case("AdaLoRA", lambda: None,
         lambda P: P.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=6, total_step=10, target_modules=LINEARS)),
    Case("EVA (as LoRA)", lambda: None,
         lambda P: P.LoraConfig(r=2, lora_alpha=6, target_modules=LINEARS, rank_pattern={"fc1": 3}, alpha_pattern={"fc1": 9})),
    Case("LoRA with biases, a whole module and rows", lambda: None,
         lambda P: P.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", modules_to_save=["lm_head"], trainable_token_indices=[4, 2]), llama),
]  # fmt: skip


def jiggled(model: nn.Module, size: float = 0.2) -> None:
    """Move everything that trains, so that an adapter does something."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad and p.is_floating_point():
                p.add_(size * torch.randn(p.shape, generator=g))


def outputs(model: nn.Module, base: Base) -> Tensor:
    """The output on the base's probe."""
    with torch.no_grad():
        found = primary(model(**base.probe()))  # type: ignore[arg-type]
    assert found is not None
    return found


def from_peft(case: Case, folder: Path) -> tuple[float, float]:
    """(gap of outputs to PEFT, effect) of an adapter that PEFT made and saved."""
    import peft

    base = case.base()
    untouched = base.probe_outputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base.model), case.theirs(peft)).eval()
        jiggled(model)
        model.save_pretrained(folder)
    want = outputs(model, base)[:, -untouched.shape[1] :]
    delta = read_peft(folder, base)
    with base.using(delta):
        got = base.probe_outputs()
    return float((got - want).abs().max()), float((want - untouched).abs().max())


def to_peft(case: Case, folder: Path) -> tuple[float, float]:
    """(gap of outputs to ours, effect) of a delta made here and loaded by PEFT."""
    import peft

    base = case.base()
    delta = Delta.create(base, case.ours(), tied="untie" if case.name == "LoRA" else "both")
    jiggled(delta)
    before = base.probe_outputs()
    with base.using(delta):
        want = base.probe_outputs()
    write_peft(delta, base, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder)).eval()
    got = outputs(model, base)[:, -before.shape[1] :]
    return float((got - want).abs().max()), float((want - before).abs().max())


def rows() -> list[dict[str, Any]]:
    """One row for each case and direction: name, direction, gap, effect."""
    out: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, case in enumerate(CASES):
            for direction, run in (("read", from_peft), ("write", to_peft)):
                if direction == "write" and case.ours() is None:
                    continue
                gap, effect = run(case, Path(scratch) / f"{i}-{direction}")
                out.append({"adapter": case.name, "direction": direction, "gap": gap, "effect": effect})
    return out
