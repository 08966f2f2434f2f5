# SPDX-License-Identifier: Apache-2.0
"""Verbs on saved deltas: show, list, verify, merge, chat."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tunesmith.cli import merge as merging
from tunesmith.cli.verify import gap_check
from tunesmith.core import landing
from tunesmith.core.errors import ResourceError
from tunesmith.core.store import save

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def soft(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta that no weight can hold."""
    base = tunesmith.load(tiny, device="cpu")
    folder = tmp_path_factory.mktemp("soft") / "soft"
    save(tunesmith.Delta.create(base, tunesmith.PromptTuning(tokens=2), name="soft"), folder, base=base)
    return folder


def test_show_needs_no_model(run: Run, saved: Path) -> None:
    found = run("show", saved)
    assert found.code == 0, found.err
    assert "lora" in found.out and "14 sites" in found.out
    last = found.out.splitlines()[-1]
    assert last.startswith("proof: 28 tensors, 2,048 values")
    data = run("show", saved, "--json").json
    assert data["name"] == "moved"
    assert data["parts"][0]["options"]["rank"] == 2
    assert "tensors" not in data["provenance"]["base"]
    assert data["digest"][:12] in data["proof"]


def test_a_delta_is_found_by_run_name_and_run_folder(run: Run, saved: Path, home: Path) -> None:
    shutil.copytree(saved, home / "first" / "delta")
    by_name = run("show", "first", "--json").json
    assert by_name["digest"] == run("show", home / "first", "--json").json["digest"]
    assert by_name["folder"] == str(home / "first" / "delta")


def test_list_names_deltas_and_damage(run: Run, saved: Path, home: Path) -> None:
    empty = run("list", "--json").json
    assert empty["runs"] == [] and empty["deltas"] == []
    shutil.copytree(saved, home / "good")
    shutil.copytree(saved, home / "bad")
    (home / "bad" / "delta.json").write_text("{")
    (home / "broken").mkdir()
    (home / "broken" / "run.json").write_text("not json")
    found = run("list", "--json").json
    rows = {r["name"]: r for r in [*found["runs"], *found["deltas"]]}
    assert rows["good"]["method"] == ["lora"] and rows["good"]["model"] == "tiny" and rows["good"]["bytes"] > 0
    assert rows["bad"]["status"] == "damaged"
    assert rows["broken"]["status"].startswith("damaged")
    assert run("list").code == 0


def test_verify_measures_effect_undo_and_merge(run: Run, tiny: Path, saved: Path) -> None:
    found = run("verify", saved, "--model", tiny, "--json")
    assert found.code == 0, found.err
    checks = {c["name"]: c for c in found.json["checks"]}
    assert list(checks) == ["files", "base", "effect", "undo", "merge"]
    assert all(c["ok"] for c in checks.values())
    assert checks["effect"]["measured"] > 0.1
    assert 0 <= checks["merge"]["measured"] < 1e-3
    assert "bound tensors 28/28" in found.json["proof"]


def test_verify_refuses_a_delta_that_does_nothing(run: Run, tiny: Path, tmp_path: Path) -> None:
    base = tunesmith.load(tiny, device="cpu")
    save(tunesmith.Delta.create(base, tunesmith.LoRA(), name="idle"), tmp_path / "idle", base=base)
    found = run("verify", tmp_path / "idle", "--model", tiny)
    assert found.code == 4
    assert "changes nothing" in found.err
    found = run("merge", tmp_path / "idle", "--model", tiny, "--into", tmp_path / "m")
    assert found.code == 4 and "changes nothing" in found.err
    assert not (tmp_path / "m").exists()


def test_verify_says_what_cannot_merge(run: Run, tiny: Path, soft: Path) -> None:
    found = run("verify", soft, "--model", tiny, "--json").json
    assert found["holds"] is True
    assert found["checks"][-1]["ok"] is None and "prompt-tuning" in found["checks"][-1]["detail"]


def test_a_merge_that_equals_the_base_or_is_lost_fails_the_check() -> None:
    base, applied = torch.zeros(2, 3), torch.full((2, 3), 1e-5)
    applied[0, 0] = 1.0
    assert gap_check("m", base, applied, applied).ok
    assert not gap_check("m", base, applied, base).ok
    faint = torch.full((2, 3), 10.0)
    assert not gap_check("m", faint, faint + 1e-4, faint).ok  # within tolerance of the outputs, but the base itself
    assert not gap_check("m", base, applied, torch.zeros(2, 4)).ok


def test_merge_writes_a_folder_that_transformers_reads(run: Run, tiny: Path, saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "new" / "merged"
    found = run("merge", saved, "--model", tiny, "--into", target, "--json")
    assert found.code == 0, found.err
    assert found.json["gap_to_applied"] < 1e-3 < found.json["difference_from_base"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= set(found.json["files"])
    assert not list(target.glob("*.bin"))
    base = tunesmith.load(tiny, device="cpu")
    delta = tunesmith.Delta.load(saved, base)
    ids = torch.tensor([[5, 9, 40, 41]])
    plain = base.model(input_ids=ids).logits
    with base.using(delta):
        applied = base.model(input_ids=ids).logits
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.no_grad():
        merged = model(input_ids=ids).logits
    assert torch.allclose(merged, applied, atol=1e-3)
    assert not torch.allclose(merged, plain, atol=1e-2)
    assert AutoTokenizer.from_pretrained(target).chat_template
    again = run("merge", saved, "--model", tiny, "--into", target, "--json")
    assert again.code == 0, again.err
    assert [p.name for p in target.parent.iterdir()] == ["merged"]


def test_merge_leaves_foreign_folders_and_no_remains(
    run: Run, tiny: Path, saved: Path, soft: Path, tmp_path: Path
) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("x")
    found = run("merge", saved, "--model", tiny, "--into", target)
    assert found.code == 2 and "not overwritten" in found.err
    assert [p.name for p in target.iterdir()] == ["thesis.txt"]
    found = run("merge", soft, "--model", tiny, "--into", tmp_path / "a" / "b")
    assert found.code == 2 and "cannot be merged" in found.err
    assert not (tmp_path / "a").exists()


def test_a_folder_with_anything_added_to_a_merge_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    record = {"format": landing.FORMAT, "files": ["model.safetensors"]}
    (tmp_path / landing.RECORD).write_text(json.dumps(record))
    assert landing.is_merge(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert not landing.is_merge(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_merge_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "deep" / "merged"
    with pytest.raises((ResourceError, KeyboardInterrupt)) as caught, merging._scratch(target) as fresh:
        (fresh / "model.safetensors").write_text("half")
        raise error
    if isinstance(error, OSError):
        assert "the disk is full" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_chat_answers_with_the_stored_template(run: Run, tiny: Path, saved: Path) -> None:
    found = run("chat", saved, "--model", tiny, "--message", "hi", "--max-tokens", 6, "--json")
    assert found.code == 0, found.err
    data = found.json
    assert list(data["turns"][0]["answers"]) == ["tuned"]
    assert "base outputs after: bit-identical" in data["proof"]
    base = tunesmith.load(tiny, device="cpu")
    from tunesmith.evaluate.generate import chat

    messages = [{"role": "user", "content": "hi"}]
    delta = tunesmith.Delta.load(saved, base)
    assert data["turns"][0]["answers"]["tuned"] == chat(base, messages, delta, max_new_tokens=6)
    compared = run("chat", saved, "--model", tiny, "--message", "hi", "--max-tokens", 6, "--compare", "--json").json
    assert compared["turns"][0]["answers"] == {
        "base": chat(base, messages, max_new_tokens=6), "tuned": data["turns"][0]["answers"]["tuned"]
    }  # fmt: skip


def test_chat_reads_turns_until_the_end_and_keeps_the_history(
    run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\none\n/reset\none\n/nonsense\n/quit\nnever\n"))
    found = run("chat", "--model", tiny, "--max-tokens", 6, "--json")
    assert found.code == 0, found.err
    first, second, third = (t["answers"]["base"] for t in found.json["turns"])
    assert first == third
    assert first != second  # the same message after a turn of history


def test_chat_streams_to_standard_output(run: Run, tiny: Path, saved: Path) -> None:
    whole = run("chat", saved, "--model", tiny, "--message", "hi", "--max-tokens", 5, "--json").json
    shown = run("chat", saved, "--model", tiny, "--message", "hi", "--max-tokens", 5)
    assert shown.out.splitlines()[-1].startswith("proof: 1 answers; bound tensors 28/28")
    assert whole["turns"][0]["answers"]["tuned"][:3] in shown.out


def test_export_and_import_go_there_and_back(run: Run, saved: Path, tiny: Path, tmp_path: Path) -> None:
    out = run("export", saved, "--to", tmp_path / "adapter", "--model", tiny, "--json").json
    assert out["largest_gap"] < 1e-5 < out["effect"]
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    back = run("import", tmp_path / "adapter", "--model", tiny, "--to", tmp_path / "back", "--json").json
    assert back["methods"] == ["lora"] and back["trainable"] == 2048
    again = run("import", tmp_path / "adapter", "--model", tiny, "--to", tmp_path / "back")
    assert again.code != 0 and "already" in again.err


def test_export_for_vllm_writes_adapters_and_their_command(run: Run, saved: Path, tiny: Path, tmp_path: Path) -> None:
    base = tunesmith.load(tiny, device="cpu")
    second = tunesmith.Delta.create(base, tunesmith.LoRA(rank=20), name="second")
    with torch.no_grad():
        for _, t in second.items():
            t.add_(0.1)
    save(second, tmp_path / "second", base=base)
    both = ["export", saved, tmp_path / "second", "--model", tiny]
    out = run(*both, "--format", "vllm", "--to", tmp_path / "all", "--json").json
    assert [a["largest_gap"] < 1e-4 < a["effect"] for a in out["adapters"]] == [True, True]
    assert out["limits"]["max_lora_rank"] == 32 and f"second={tmp_path / 'all' / 'second'}" in out["command"]
    assert (tmp_path / "all" / "second" / "adapter_config.json").is_file()
    assert run(*both, "--to", tmp_path / "one").code == 2
    assert "unknown format" in run(*both, "--format", "onnx", "--to", tmp_path / "one").err


def test_export_names_what_peft_cannot_hold_and_fits_it(run: Run, tiny: Path, tmp_path: Path) -> None:
    base = tunesmith.load(tiny, device="cpu")
    delta = tunesmith.Delta.create(base, tunesmith.Full(targets="q_proj", bias=False), name="whole")
    with torch.no_grad():
        for _, t in delta.items():
            t.add_(0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0)))
    save(delta, tmp_path / "whole", base=base)
    refused = run("export", tmp_path / "whole", "--to", tmp_path / "a", "--model", tiny)
    assert refused.code != 0 and "full" in refused.err and "--fit-rank" in refused.err
    fitted = run(
        "export", tmp_path / "whole", "--to", tmp_path / "a", "--fit-rank", "4", "--model", tiny, "--json"
    ).json
    assert 0 < fitted["fit_error"] < 1 and fitted["lost"] == []


def test_verify_and_merge_hold_where_auto_is_bf16(
    run: Run, saved: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delta is used in bf16 there; what folding does is proved in fp32, where rounding cannot hide or fake it."""
    from tunesmith.models import precision

    monkeypatch.setattr(precision, "cpu_flags", lambda *a: frozenset({"amx_bf16"}))
    assert tunesmith.load(tiny, device="cpu").dtype == torch.bfloat16
    found = run("merge", saved, "--into", tmp_path / "merged", "--model", tiny, "--json")
    assert found.code == 0, found.err
    assert found.json["gap_to_applied"] < 1e-3
