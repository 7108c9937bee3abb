"""AdamW's groups, learning-rate schedules and the average of the weights."""

import math

import pytest
import torch
from torch import nn

from mdm.train.optimizer import LR_SCHEDULES, WeightAverage, adamw, lr_factor


def small_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5)
    return model


def set_gradients(model, value):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_adamw_by_definition_with_decay_on_matrices_only():
    model = small_model()
    optimizer = adamw(model, weight_decay=0.1, betas=(0.8, 0.9))
    by_hand = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    first, second = 0.0, 0.0
    for step, gradient in enumerate([0.5, -0.2, 0.1], start=1):
        rate = 0.01 * step
        for group in optimizer.param_groups:
            group["lr"] = rate
        set_gradients(model, gradient)
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        update = first / (1 - 0.8**step) / (math.sqrt(second / (1 - 0.9**step)) + 1e-8)
        for value in by_hand.values():
            value -= rate * (0.1 if value.ndim > 1 else 0.0) * value + rate * update
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), by_hand[name], msg=name)


def test_frozen_parameters_are_left_out():
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert set(WeightAverage(model, 0.9).values) == {"1.weight", "1.bias", "2.weight"}


def factors(schedule, steps=20, warmup_steps=4, decay_fraction=0.5, floor=0.0):
    options = {"steps": steps, "warmup_steps": warmup_steps}
    options |= {"decay_fraction": decay_fraction, "floor": floor}
    return [lr_factor(schedule, step, **options) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_every_schedule_warms_up_and_stays_between_floor_and_one(schedule):
    values = factors(schedule, floor=0.1)
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert all(0.1 <= value <= 1 for value in values[4:])
    assert sorted(values[4:], reverse=True) == values[4:]
    assert values[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_schedules_by_value():
    assert factors("constant")[4:] == [1.0] * 17
    # 16 steps after the warm-up: 8 stable, 8 decaying.
    expected = [1.0] * 9 + [1 - i / 8 for i in range(1, 9)]
    assert factors("wsd")[4:] == pytest.approx(expected)
    assert factors("wsd", decay_fraction=0.0)[4:] == [1.0] * 17
    assert factors("cosine")[12] == pytest.approx(0.5)
    assert factors("wsd", warmup_steps=0)[0] == 1.0
    assert factors("wsd", steps=3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_average_by_hand_with_a_warm_up():
    model = small_model()
    average = WeightAverage(model, 0.3)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1.0
        average.update(model, step)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, value in average.values.items():
        torch.testing.assert_close(value, expected[name])


def test_swapping_twice_changes_nothing():
    model = small_model()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model[0].weight += 1.0
    weight, mean = model[0].weight.detach().clone(), average.values["0.weight"].clone()
    average.swap(model)
    assert torch.equal(model[0].weight, mean)
    assert torch.equal(average.values["0.weight"], weight)
    average.swap(model)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(average.values["0.weight"], mean)
