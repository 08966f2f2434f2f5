# SPDX-License-Identifier: Apache-2.0
"""What is collected on data equals brute force: input rows, second moments and gradients, with masks and companions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import UsageError
from tunesmith.core.sample import Sample, gradients, inputs, look, rows_of_input, second_moments
from tunesmith.core.toys import toys


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sample_of(batches: list[Any], **kw: Any) -> Sample:
    """Batches of keyword inputs, or of (x, y); the loss is a fixed function of the output."""

    def run(base: Base, batch: Any) -> Any:
        return base.model(**batch) if isinstance(batch, dict) else base.model(batch[0])

    def loss(base: Base, batch: Any) -> Tensor:
        out = run(base, batch)
        out = out["logits"] if isinstance(out, dict) else out
        return F.cross_entropy(out.flatten(0, -2), batch[1], reduction="sum") if isinstance(batch, tuple) else out.sum()

    return Sample(lambda: batches, run, loss, **kw)


CONVS = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same"}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": (3, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "dilation": (2, 1)}),
    (nn.Conv2d, {"kernel_size": 2, "padding": "valid", "stride": 3}),
    (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}),
    (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("cls", "options"), CONVS, ids=lambda v: str(v) if isinstance(v, dict) else v.__name__)
def test_rows_times_the_weight_are_the_convolution(cls: Any, options: dict[str, Any]) -> None:
    conv = cls(3, 5, bias=False, **options)
    one = cls is nn.Conv1d
    x = torch.randn(2, 3, 11) if one else torch.randn(2, 3, 9, 11)
    site = Base(nn.Sequential(conv), example=(x,)).sites["0"]
    with torch.no_grad():
        y = conv(x)  # [B, out, ...]
    rows = rows_of_input(site, x)
    want = y.flatten(2).transpose(1, 2).reshape(-1, 5)
    torch.testing.assert_close(rows @ conv.weight.detach().flatten(1).T, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows_of_input(site, x[0]), rows[: len(rows) // 2], msg="an input without a batch axis")


def test_groups_and_tables_have_no_rows() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 2))
    grouped = Base(model, example=(torch.randn(1, 4, 1, 1),)).sites["0"]
    table = toys()[0].sites["embed"]
    for site, x in ((grouped, torch.randn(1, 4, 1, 1)), (table, torch.zeros(1, 2, dtype=torch.long))):
        with pytest.raises(UsageError, match="cannot be collected"):
            rows_of_input(site, x)


def mlp() -> Base:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).train()
    return Base(model, example=(torch.randn(2, 4),))


def test_inputs_of_linears_are_what_they_multiply() -> None:
    base = mlp()
    batches = [(torch.randn(5, 4), None), (torch.randn(2, 3, 4), None)]
    got = list(inputs(base, [base.sites["0"], base.sites["3"]], sample_of(batches)))
    for (x, _), found in zip(batches, got, strict=True):
        torch.testing.assert_close(found["0"], x.reshape(-1, 4))
        hidden = torch.tanh(base.model[0](x)).reshape(-1, 6).detach()  # type: ignore[index, operator]
        torch.testing.assert_close(found["3"], hidden, msg="dropout must be off")
        assert not found["3"].requires_grad
    assert base.model.training, "modes are put back"


def test_a_delta_in_use_is_seen_and_a_site_that_does_not_run_is_left_out() -> None:
    base = mlp()
    delta = Delta.create(base, ts.LoRA(rank=2, targets="0"))
    with torch.no_grad():
        delta.parts[0].parameter("0", "B").normal_()
    batches = [(torch.randn(5, 4), None)]
    sites = [base.sites["3"]]
    plain = next(inputs(base, sites, sample_of(batches)))["3"]
    with base.using(delta):
        moved = next(inputs(base, sites, sample_of(batches)))["3"]
    assert (plain - moved).abs().max() > 1e-3
    idle = Base(Skipping(), example=(torch.randn(2, 4),))
    assert set(next(inputs(idle, [idle.sites["used"], idle.sites["never"]], sample_of(batches)))) == {"used"}


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.never = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def lm_batch(width: int = 7) -> tuple[dict[str, Tensor], Tensor]:
    """Three rows of 3, 5 and 6 tokens padded to `width`, with labels from the third token on."""
    lengths, g = torch.tensor([3, 5, 6]), torch.Generator().manual_seed(4)
    ids = torch.randint(1, 37, (3, 6), generator=g)
    ids = F.pad(ids, (0, width - 6))
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(width) < 2), -100)
    return {"input_ids": ids * mask, "attention_mask": mask}, labels


def masked(width: int = 7) -> Sample:
    batch, labels = lm_batch(width)

    def keep(_: Any, supervised: bool = False) -> Tensor:
        return labels != -100 if supervised else batch["attention_mask"].bool()

    return sample_of([batch], keep=keep)


def test_padding_is_left_out_and_its_amount_changes_nothing() -> None:
    base = toys()[0]
    sites = base.sites.select("all-linear", ("linear",))
    narrow, wide = (next(inputs(base, sites, masked(w))) for w in (7, 13))
    batch, _ = lm_batch()
    for site in sites:
        assert narrow[site.path].shape == (14, site.shape[1])
        torch.testing.assert_close(narrow[site.path], wide[site.path], atol=1e-6, rtol=0)
    one = {k: v[1:2, :5] for k, v in batch.items()}  # the second row alone, without any padding
    alone = next(inputs(base, sites, sample_of([one])))
    for site in sites:
        torch.testing.assert_close(narrow[site.path][3:8], alone[site.path], atol=1e-5, rtol=0)


def test_supervised_positions_are_those_with_a_label() -> None:
    base = toys()[0]
    sites = base.sites.select("q", ("linear",))
    every, some = (next(inputs(base, sites, masked(), supervised=s)) for s in (False, True))
    kept = torch.tensor([2, 5, 6, 7, 10, 11, 12, 13])  # all but the first two of each row
    for site in sites:
        torch.testing.assert_close(some[site.path], every[site.path][kept])


def test_look_says_how_many_rows_belong_to_each_example() -> None:
    lm, vision = toys()[0], toys()[2]
    seen: dict[str, tuple[Tensor, list[int]]] = {}

    def see(site: Any, rows: Tensor, sizes: list[int]) -> None:
        seen[site.path] = (rows, sizes)

    sample = masked()
    look(lm, lm.sites.select("q", ("linear",)), sample, next(iter(sample.batches())), see)
    assert all(sizes == [3, 5, 6] and len(rows) == 14 for rows, sizes in seen.values()) and len(seen) == 2
    images = sample_of([(torch.randn(4, 3, 6, 6), None)])
    look(vision, [vision.sites["stem"], vision.sites["fc"]], images, next(iter(images.batches())), see)
    assert seen["stem"][1] == [36] * 4 and seen["stem"][0].shape == (144, 27)
    assert seen["fc"][1] == [4], "one matrix is taken for one example"


@pytest.mark.parametrize("scaled", [False, True])
def test_second_moments_are_the_mean_over_examples(scaled: bool) -> None:
    base = toys()[0]
    sites = base.sites.select("q,down", ("linear",))
    batch, _ = lm_batch()
    got = second_moments(base, sites, masked(), scaled=scaled)
    each = [{k: v[i : i + 1, :n] for k, v in batch.items()} for i, n in enumerate((3, 5, 6))]
    for site in sites:
        want = torch.zeros(site.shape[1], site.shape[1])
        for one in each:
            X = next(inputs(base, [site], sample_of([one])))[site.path]
            X = X / X.abs().max() if scaled else X
            want += X.T @ X / 3
        torch.testing.assert_close(got[site.path], want, atol=1e-5, rtol=1e-5)


def test_second_moments_of_a_convolution_are_of_its_patches() -> None:
    base = toys()[2]
    images = torch.randn(4, 3, 6, 6)
    site = base.sites["stem"]
    got = second_moments(base, [site], sample_of([(images[:3], None), (images[3:], None)]), scaled=False)["stem"]
    rows = rows_of_input(site, images)
    torch.testing.assert_close(got, rows.T @ rows / 4, atol=1e-4, rtol=1e-5)


def test_examples_without_rows_do_not_count() -> None:
    base = mlp()
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    got = second_moments(base, [base.sites["0"]], sample_of([(x, None)], keep=lambda *_, **__: mask), scaled=False)["0"]
    torch.testing.assert_close(got, x[0, :2].T @ x[0, :2])
    empty = sample_of([(x, None)], keep=lambda *_, **__: mask & False)
    assert second_moments(base, [base.sites["0"]], empty) == {}


@pytest.mark.parametrize("which", range(4))
def test_gradients_are_those_of_autograd(which: int) -> None:
    base = toys()[which]
    probe: Any = base.probe()
    sample = Sample(
        lambda: [probe],
        lambda b, batch: b.model(**batch) if isinstance(batch, dict) else b.model(*batch),
        lambda b, batch: _square(b, batch),
    )
    sites = base.sites.select("everything", ("linear", "conv1d", "conv2d", "embedding"))
    flags = {n: p.requires_grad for n, p in base.model.named_parameters()}
    digest = base.digest()
    got = next(gradients(base, sites, sample))
    assert {n: p.requires_grad for n, p in base.model.named_parameters()} == flags and base.digest() == digest
    assert all(p.grad is None for p in base.model.parameters())
    base.model.requires_grad_(True)
    _square(base, probe).backward()
    assert set(got) == {s.path for s in sites}
    for site in sites:
        want = site.module.weight.grad
        torch.testing.assert_close(got[site.path], want.T if site.transposed else want, atol=1e-5, rtol=1e-5)


def _square(base: Base, batch: Any) -> Tensor:
    out = base.model(**batch) if isinstance(batch, dict) else base.model(*batch)
    return (out["logits"] if isinstance(out, dict) else out).square().sum()


def test_gradients_use_the_companions() -> None:
    base = mlp()
    head = ts.Head(classes=5)
    y = torch.tensor([0, 1, 4, 3])
    batches = [(torch.randn(4, 4), y)]
    sample = sample_of(batches, companions=(head,), seed=3)
    sites = [base.sites["0"]]
    got = next(gradients(base, sites, sample))["0"]
    fresh = Delta.create(base, head, name="companions", seed=3)
    base.model.eval()
    base.model.requires_grad_(True)
    with base.using(fresh):
        F.cross_entropy(base.model(batches[0][0]), y, reduction="sum").backward()
    torch.testing.assert_close(got, base.modules["0"].weight.grad)
    assert base.active == []


def test_other_data_is_read_only_where_it_can_be() -> None:
    base = mlp()
    other = sample_of([])
    sample = sample_of([], read=lambda b, source: other if (b, source) == (base, "facts.jsonl") else sample_of([]))
    assert sample.of(base, "facts.jsonl") is other
    with pytest.raises(UsageError, match=r"'facts.jsonl' cannot be read"):
        sample_of([]).of(base, "facts.jsonl")
