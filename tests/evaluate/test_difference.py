# SPDX-License-Identifier: Apache-2.0
"""What a delta changed, measured by several probes: which run, what is refused, the report and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith as ts
from tunesmith.core.base import Base
from tunesmith.core.delta import Delta
from tunesmith.core.errors import BaseMismatch, TrainingError, UsageError
from tunesmith.core.probe import PROBES, Finding
from tunesmith.core.sample import Sample
from tunesmith.core.toys import toys
from tunesmith.evaluate.difference import split
from tunesmith.evaluate.difference_html import page, plots

WEIGHTS = ["norms", "localisation", "drift", "spectra", "intruders"]


@pytest.fixture
def base() -> Base:
    return toys()[0]


@pytest.fixture
def delta(base: Base) -> Delta:
    made = Delta.create(base, ts.LoRA(rank=2), name="moved")
    g = torch.Generator().manual_seed(0)
    for _, t in made.items():
        t.data += 0.3 * torch.randn(t.shape, generator=g)
    return made


@pytest.fixture
def sample(base: Base) -> Sample:
    ids = base.probe()["input_ids"]
    labels = torch.cat([torch.full_like(ids[:, :3], -100), ids[:, 3:]], 1)

    def keep(batch: Any, supervised: bool = False) -> torch.Tensor:
        return batch["labels"] != -100 if supervised else torch.ones_like(batch["input_ids"]).bool()

    return Sample(
        lambda: [{"input_ids": ids, "labels": labels}],
        lambda b, x: b.model(input_ids=x["input_ids"]),
        lambda b, x: torch.zeros(()),
        keep,
    )


def test_what_runs_by_default(base: Base, delta: Delta, sample: Sample) -> None:
    before = base.digest(), delta.digest
    told: list[str] = []
    found = ts.diff(base, delta, tell=told.append)
    assert [f.probe for f in found.findings] == WEIGHTS == told and not found.skipped
    with_data = ts.diff(base, delta, sample=sample)
    assert [f.probe for f in with_data.findings] == [*WEIGHTS, "depth-kl"]
    assert "tokenizer" in with_data.skipped["prior"] and "1 skipped" in with_data.proof()
    assert (base.digest(), delta.digest) == before
    assert before[0][:12] in found.proof() and "5 probes" in found.proof() and "\n" not in found.proof()
    assert found.finding("norms").values["tensors"] == 14
    with pytest.raises(UsageError, match="did you mean 'norms'"):
        found.finding("norm")
    with pytest.raises(UsageError, match="no tokenizer"):
        with_data.finding("prior")


def test_named_probes_must_apply(base: Base, delta: Delta, sample: Sample) -> None:
    found = ts.diff(base, delta, "intruders:k=3,eps=0.9, prior:neutral_ids=[1,2],norms", sample=sample)
    assert [f.probe for f in found.findings] == ["intruders", "prior", "norms"]
    assert found.options["intruders"]["k"] == 3 and found.options["intruders"]["eps"] == 0.9
    for probes, match in (
        ("norm", "unknown probe 'norm'"),
        ("norms:k=3", "no option 'k'"),
        ("norms,norms", "named twice"),
        ("", "no probes given"),
        ("depth-kl", "needs data"),
        ("intruders:eps=2", "outside"),
    ):
        with pytest.raises(UsageError, match=match):
            ts.diff(base, delta, probes)


def test_what_has_no_answer_is_refused(base: Base) -> None:
    with pytest.raises(UsageError, match="changes no tensor"):
        ts.diff(base, Delta.create(base, ts.PrefixTuning(tokens=2)))
    with pytest.raises(BaseMismatch):
        ts.diff(toys(1)[0], Delta.create(base, ts.LoRA()))
    with pytest.raises(UsageError, match="expected a Delta"):
        ts.diff(base, "demo")


def test_a_probe_that_touches_the_base_is_caught(base: Base, delta: Delta) -> None:
    class Vandal:
        info = PROBES.get("norms")

        def measure(self, base: Base, delta: Delta, sample: Sample | None = None) -> Finding:
            base.modules["norm"].bias.data += 1
            return Finding("vandal", "done")

    import dataclasses

    with pytest.raises(TrainingError, match="left the base or the delta changed"):
        ts.diff(base, delta, [dataclasses.dataclass(frozen=True)(Vandal)()])


def test_strength_counts(base: Base, delta: Delta) -> None:
    one, half = (ts.diff(base, d, "norms").finding("norms").values["norm"] for d in (delta, delta.at(0.5)))
    assert half == pytest.approx(one / 2)


def test_lists_of_probes() -> None:
    assert split("norms, intruders:k=5,eps=0.6 ,drift,") == ["norms", "intruders:k=5,eps=0.6", "drift"]
    assert split("spectra:k=1,novelty:start=2") == ["spectra:k=1", "novelty:start=2"]
    assert split("prior:neutral_ids=[1,2],ablate=true,drift") == ["prior:neutral_ids=[1,2],ablate=true", "drift"]


def test_the_json_is_whole(base: Base, delta: Delta, sample: Sample, tmp_path: Path) -> None:
    found = ts.diff(base, delta, sample=sample)
    data = json.loads(found.write(tmp_path / "a" / "diff.json").read_text())
    assert data["format"] == "tunesmith-diff/1" and data["base_digest"] == base.digest()
    assert [f["probe"] for f in data["findings"]] == [*WEIGHTS, "depth-kl"]


def test_the_page_is_inert_and_whole(base: Base, delta: Delta, sample: Sample, tmp_path: Path) -> None:
    delta.name = "<script>alert(1)</script>"
    everything = "norms,localisation,drift,spectra,intruders,depth-kl:layers=true,prior:neutral_ids=[1],ablate=true,novelty:start=1,n=4,length=4"
    found = ts.diff(base, delta, everything, sample=sample)
    text = found.write_html(tmp_path / "diff.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", text)
    assert text.count("<svg") == 16
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search(r": #01010\d", text)  # every placeholder colour became one of the page's
    assert "mathdefault" not in text  # log axes label their ticks in plain numbers
    for f in found.findings:
        assert f.summary.split(";")[0][:40].replace("'", "&#x27;") in text


def test_the_same_difference_gives_the_same_bytes(base: Base, delta: Delta) -> None:
    found = ts.diff(base, delta, "norms")
    assert page(found) == page(found) and len(plots(found.finding("norms"))) == 2


def test_every_probe_has_its_title_and_columns(base: Base, delta: Delta) -> None:
    from tunesmith.evaluate import difference_html as html

    for info in PROBES.all():
        assert info.name in html._TITLES and info.name in html._PLOTS
        assert isinstance(info.facts.get("data"), bool)
    for f in ts.diff(base, delta).findings:
        missing = [c for c in html._COLUMNS[f.probe] if not any(c in r for r in f.rows)]
        assert not missing


def test_probes_that_train_are_named_and_drawn(base: Base, delta: Delta, sample: Sample) -> None:
    from tunesmith.evaluate import difference_html as html
    from tunesmith.objectives import SFT

    batch = next(iter(sample.batches()))
    old = Sample(lambda: [batch, batch], sample.run, lambda b, x: SFT().loss(b, x), sample.keep)
    found = ts.diff(base, delta, "revival:lr=0.01,steps=4,wrapper:top_k=2", sample=old)
    assert [f.probe for f in found.findings] == ["revival", "wrapper"]
    for f in found.findings:
        assert not [c for c in html._COLUMNS[f.probe] if f.rows and not any(c in r for r in f.rows)]
        assert len(html.plots(f)) == bool(f.rows)
