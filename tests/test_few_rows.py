"""Products of few rows against float64, where they are taken and where not, and a generation that runs through them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path

import pytest
import torch
from torch import nn

from foreword import PrefixConfig, PrefixModel, few_rows, load_base
from foreword.few_rows import FEW, TRIALS, few_row_products


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "_trials", {})


def clock(monkeypatch: pytest.MonkeyPatch, own: float, other: float) -> None:
    """Let every trial of a layer's own way take `own` seconds and of the other `other`."""
    now, took = [0.0], cycle([own, other])
    calls = count()

    def read() -> float:
        if next(calls) % 2:  # the end of a trial
            now[0] += next(took)
        return now[0]

    monkeypatch.setattr(few_rows, "perf_counter", read)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("other", [0.1, 10.0], ids=["transposed", "own"])
def test_the_product_equals_float64_for_every_number_of_rows(
    bias: bool, dtype: torch.dtype, other: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, 1.0, other)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 80, bias=bias)).to(dtype)
    for rows in range(1, 70):
        for shape in [(rows, 48), (rows, 1, 48), (1, rows, 48)]:
            x = torch.randn(shape, dtype=dtype)
            lies_otherwise = torch.randn(48, rows, dtype=dtype).t().view(shape)
            for given in (x, lies_otherwise):
                for _ in range(4):
                    with torch.no_grad(), few_row_products(base):
                        made = base(given)
                    truth = given.double() @ base[0].weight.double().T + (base[0].bias.double() if bias else 0.0)
                    assert made.shape == truth.shape
                    assert (made.double() - truth).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * truth.norm()
        assert made.is_contiguous() == (other > 1 or rows not in FEW), "the transposed product is not copied"


@pytest.mark.parametrize(
    ("other", "stays"), [(0.5, True), (0.95, False), (2.0, False)], ids=["faster", "hardly faster", "slower"]
)
def test_the_faster_way_stays_for_its_number_of_rows(
    other: float, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, 1.0, other)
    base = nn.Sequential(nn.Linear(8, 12))
    with torch.no_grad(), few_row_products(base):
        tried = [base(torch.randn(4, 8)).is_contiguous() for _ in range(2 * TRIALS)]
        then = {base(torch.randn(4, 8)).is_contiguous() for _ in range(5)}
        assert tried == [True, False] * TRIALS, "both in turn"
        assert then == {not stays}
        assert base(torch.randn(5, 8)).is_contiguous(), "another number of rows is tried by itself"


def test_where_a_gradient_is_asked_for_the_layer_is_its_own() -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    with few_row_products(base):
        made = base(torch.randn(4, 8))
    assert made.is_contiguous() and made.requires_grad


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(8, 8, device="meta"), nn.Bilinear(8, 8, 8)],
    ids=["another device", "another kind"],
)
def test_other_layers_are_left_alone(layer: nn.Module) -> None:
    with few_row_products(nn.Sequential(layer)):
        assert "forward" not in vars(layer)


def test_a_forward_that_somebody_else_has_taken_stays_theirs() -> None:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x + 1  # type: ignore[method-assign]
    with few_row_products(nn.Sequential(layer)):
        assert torch.equal(layer(torch.ones(4, 8)), torch.full((4, 8), 2.0))
    assert "forward" in vars(layer)


def test_one_thread_computes_as_the_base_does() -> None:
    torch.set_num_threads(1)
    layer = nn.Linear(8, 8)
    with few_row_products(layer):
        assert "forward" not in vars(layer)


def test_an_error_leaves_the_base_as_it_was() -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ZeroDivisionError), few_row_products(base):
        assert "forward" in vars(base[0])
        raise ZeroDivisionError
    assert "forward" not in vars(base[0])


def test_a_generation_goes_through_them_and_makes_the_same_tokens(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PrefixModel(*load_base(str(tiny_llama), torch.float32))
    model.add("p", PrefixConfig(length=5))
    inputs = {"input_ids": torch.randint(5, 100, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    taken: list[bool] = []
    layer = model.base.get_output_embeddings()
    layer.register_forward_hook(lambda module, args, output: taken.append(not output.is_contiguous()))
    clock(monkeypatch, 1.0, 0.1)
    made = model.generate(**inputs, **settings, prefix="p")
    assert taken[-2:] == [True, True]
    taken.clear()
    model.generate(**inputs, **settings, prefix=None)
    assert not any(taken), "without a prefix all is as the base computes it, bit for bit"
    taken.clear()
    monkeypatch.setattr(few_rows, "FEW", range(0))
    own = model.generate(**inputs, **settings, prefix="p")
    assert not any(taken)
    assert torch.equal(made.sequences, own.sequences)
    for a, b in zip(made.logits, own.logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
