"""The trained layer over hidden states: measured, it is still a plain linear layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foreword.tasks.head import LEAST, Head

HIDDEN = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 90, 1, 1e-4, 3]) + 40


def drawn() -> Head:
    head = Head(6, 3)
    for p in head.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    return head


def test_what_it_reads_has_no_mean_and_a_length_of_about_one() -> None:
    head = Head(6, 6)
    head.measure(HIDDEN)
    nn.init.eye_(head.weight)
    with torch.no_grad():
        read = head(HIDDEN)
    assert torch.allclose(read.mean(0), torch.zeros(6), atol=1e-5)
    spread = read.std(0, correction=0) * 6**0.5
    least = LEAST * HIDDEN.std(0, correction=0).mean()  # a coordinate that hardly moves is not blown up
    assert torch.allclose(spread, HIDDEN.std(0, correction=0) / HIDDEN.std(0, correction=0).clamp(min=least), atol=1e-5)
    assert spread[2] == pytest.approx(float(spread.max())) and spread[4] < 0.01


def test_the_plain_layer_is_the_same_and_comes_back() -> None:
    head, again = drawn(), Head(6, 3)
    head.measure(HIDDEN)
    with torch.no_grad():
        plain = head.plain()
        expected = nn.functional.linear(HIDDEN.double(), plain["weight"].double(), plain["bias"].double())
        assert (head(HIDDEN).double() - expected).abs().max() < 1e-4
        again.measure(HIDDEN)
        again.load_plain(**plain)
        assert (again(HIDDEN).double() - expected).abs().max() < 1e-4
        head.become_plain()
        assert torch.equal(head(HIDDEN), again(HIDDEN))
        assert all(torch.equal(made.plain()[name], tensor) for made in (head, again) for name, tensor in plain.items())


def test_rows_that_are_all_alike_measure_nothing() -> None:
    head = drawn()
    head.measure(HIDDEN[:1])
    assert torch.equal(head.plain()["weight"], head.weight) and torch.equal(head.plain()["bias"], head.bias)


def test_half_precision_is_read_in_float32() -> None:
    assert drawn()(HIDDEN.bfloat16()).dtype == torch.float32
