"""The step benchmark: both sides compute the same objective, and memory is what a step adds."""

import dataclasses

import pytest
import tiny_run
import torch

from mdm.benchmarks import train_step
from mdm.benchmarks.train_step import SIDES, StepSettings, make_setting, mdm_loss, twin_loss


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    model = tiny_run.ar_folder(tmp_path_factory.mktemp("model") / "ar")
    return StepSettings(model, None, rows=2, length=48, repeats=2, checkpointing=True, seed=0)


def test_both_sides_have_the_same_loss_and_gradient(settings, monkeypatch):
    """With all tokens kept the sparse targets are whole, so only rounding can differ."""
    whole = dataclasses.replace(train_step.TARGET, top_k=10**6)
    monkeypatch.setattr(train_step, "TARGET", whole)
    setting = make_setting(settings)
    # Exact, to compare: the benchmark itself runs in bf16.
    exact = dataclasses.replace(setting.teacher, model=setting.teacher.model.float())
    setting = dataclasses.replace(setting, teacher=exact)
    # The twin lets the mask token be predicted; give it the logit that ours has.
    with torch.no_grad():
        setting.denoiser.model.get_output_embeddings().weight[setting.denoiser.mask_id] = 0
    gradients = []
    for side in (mdm_loss, twin_loss):
        setting.denoiser.zero_grad()
        loss = side(setting)
        loss.backward()
        gradients.append((loss.item(), setting.denoiser.model.model.norm.weight.grad.clone()))
    # One id of 260 more in the twin's softmax.
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=0.01)
    cosine = torch.cosine_similarity(gradients[0][1], gradients[1][1], dim=0)
    assert cosine > 0.99


def test_the_record_and_the_card(settings, tmp_path):
    record = train_step.compare(settings, tmp_path / "records.jsonl")
    results = record["results"]
    assert results["n"] == 2
    for side in SIDES:
        assert results[side]["activation_bytes"] >= 0
        assert len(results[side]["seconds_all"]) == 2
    card = train_step.describe(record)
    assert "mdm / twin: memory" in card
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 1
