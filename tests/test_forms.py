"""Forms: their starts and settings, their parameters, and what PrefixModel says of wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.families import LENGTH, add, base, text
from torch import Tensor

from foreword.errors import InputError
from foreword.forms import PrefixConfig, chosen_sites, opening_ids, start_ids
from foreword.model import PrefixModel
from foreword.sites import capture, find_sites


class Letters:
    """A toy tokenizer: a letter a token, with a beginning-of-sequence token where `opens`."""

    all_special_ids = (0, 1, 2)

    def __init__(self, opens: bool = True) -> None:
        self.opens = opens

    def __call__(self, words: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(letter) - ord("a") + 10 for letter in words if letter.isalpha()]
        return {"input_ids": [1, *ids] if self.opens and add_special_tokens else ids}


def ids_of(tokenizer: Any = None, **settings: Any) -> list[int]:
    made = start_ids(PrefixConfig(**settings), base("llama"), tokenizer, torch.Generator().manual_seed(0))
    assert made.shape[0] == 1
    return made[0].tolist()


def model_with(tokenizer: Any = None, **settings: Any) -> PrefixModel:
    model = PrefixModel(base("llama"), tokenizer)
    model.add("p", **settings)
    return model


def test_an_instruction_gives_its_own_length() -> None:
    assert ids_of(Letters(), instruction="abc") == [1, 10, 11, 12]
    assert ids_of(Letters(opens=False), instruction="abc") == [10, 11, 12]
    assert model_with(Letters(), instruction="abc").configs["p"].length == 4


def test_a_length_equal_to_the_instruction_keeps_it_whole() -> None:
    assert ids_of(Letters(), instruction="abc", length=4) == [1, 10, 11, 12]


def test_a_shorter_length_keeps_the_first_token_and_the_end() -> None:
    assert ids_of(Letters(), instruction="abcdef", length=4) == [1, 13, 14, 15]
    assert ids_of(Letters(opens=False), instruction="abcdef", length=3) == [10, 14, 15]
    assert ids_of(Letters(), instruction="abcdef", length=1) == [1]


def test_a_longer_length_repeats_the_instruction_after_one_opening() -> None:
    assert ids_of(Letters(), instruction="ab", length=8) == [1, 10, 11, 10, 11, 10, 11, 10]
    assert ids_of(Letters(opens=False), instruction="a", length=3) == [10, 10, 10]


def test_an_instruction_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="the instruction has no tokens; write at least one word"):
        ids_of(Letters(), instruction="...")


def test_an_instruction_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match=r"a start from an instruction needs .*a tokenizer"):
        ids_of(instruction="abc")
    with pytest.raises(InputError, match="a start from an instruction needs the instruction's text"):
        ids_of(Letters(), start="instruction")


@pytest.mark.parametrize("settings", [{"length": 64}, {"length": 64, "instruction": "abc"}])
def test_a_length_beyond_the_positions_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"a prefix of 64 tokens leaves no room in the model's 64 positions"):
        ids_of(Letters(), **settings)


def test_an_instruction_beyond_the_positions_is_refused() -> None:
    with pytest.raises(InputError, match="an instruction of 71 tokens leaves no room"):
        ids_of(Letters(), instruction="abcdefg" * 10)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"form": "soft"}, "form 'soft' is unknown; choose one of direct, projected, mlp"),
        ({"start": "zero"}, "start 'zero' is unknown; choose instruction, vocabulary or random"),
        ({"length": 0}, "the prefix length must be at least 1, not 0"),
        ({"length": -3}, "the prefix length must be at least 1, not -3"),
    ],
)
def test_wrong_settings_say_so(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        PrefixConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"window": "x"}, {"positions": "x"}, {"frozen_tokens": -1}, {"frozen_layers": -1}, {"form": "mlp", "mlp_size": 0}],
)
def test_settings_outside_their_range_say_so(settings: dict[str, Any]) -> None:
    name = list(settings)[-1].replace("_", ".")
    with pytest.raises(InputError, match=f"(?s).*{name}.*"):
        PrefixConfig(**settings)


@pytest.mark.parametrize("layers", [(), (2,), (-1,), (0, 5)])
def test_layers_that_are_not_there_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="are not all among the base's 2"):
        chosen_sites(PrefixConfig(layers=layers), find_sites(base("llama")))


def test_frozen_layers_must_leave_one_to_train() -> None:
    with pytest.raises(InputError, match="frozen_layers=2 leaves none of the prefix's layers to train"):
        PrefixModel(base("llama")).add("p", length=3, frozen_layers=2)


def test_layers_are_counted_per_kind_of_site() -> None:
    chosen = chosen_sites(PrefixConfig(layers=(1,)), find_sites(base("bart")))
    assert [site.kind for site in chosen] == ["encoder", "decoder", "cross"]


def test_a_vocabulary_start_draws_ordinary_tokens_after_the_opening() -> None:
    ids = ids_of(Letters(), length=40)
    assert ids[0] == 1
    assert not set(ids[1:]) & {0, 1, 2}
    assert len(ids_of()) == 16
    assert opening_ids(Letters()) == [1]
    assert opening_ids(Letters(opens=False)) == []


@pytest.mark.parametrize("start", ["vocabulary", "random"])
@pytest.mark.parametrize("form", ["direct", "projected", "mlp"])
def test_the_seed_alone_decides_the_start(start: Any, form: Any) -> None:
    """Whatever torch's own generator has drawn before; and making a prefix does not disturb that generator."""
    states = []
    for seed in (3, 3, 4):
        torch.rand(seed)
        before = torch.get_rng_state()
        states.append(model_with(form=form, start=start, length=LENGTH, seed=seed).forms["p"].state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-2), x.std(-2, correction=0)


def test_a_random_start_has_the_mean_and_deviation_of_each_channel() -> None:
    length = 60
    model = model_with(start="random", length=length, seed=1)
    ids = torch.tensor([ids_of(length=length, seed=1)])
    ids = start_ids(PrefixConfig(length=length), base("llama"), None, torch.Generator().manual_seed(1))
    read = capture(model.base, model.sites, ids).kv
    made = model.kv("p").detach()
    for name, expected in read.sites.items():
        for found, truth in zip(made.sites[name], expected, strict=True):
            assert torch.equal(found[:, :, :1], truth[:, :, :1]), "the sink stays as read"
            assert not torch.equal(found[:, :, 1:], truth[:, :, 1:])
            (mean, deviation), (true_mean, true_deviation) = statistics(found), statistics(truth)
            error = true_deviation / length**0.5  # of a mean of 60 draws
            assert bool(((mean - true_mean).abs() < 5 * error).all())
            assert bool(((deviation / true_deviation - 1).abs() < 0.5).all())


def test_frozen_tokens_stay_and_never_take_the_whole_prefix() -> None:
    for form in ("direct", "mlp"):
        model = PrefixModel(base("llama"))
        add(model, "moved", form, frozen_tokens=2)
        add(model, "start", form, frozen_tokens=2, moved=False)
        site = model.sites[0].name
        moved, start = (model.kv(name).sites[site].keys for name in ("moved", "start"))
        assert torch.equal(moved[:, :, :2], start[:, :, :2])
        assert bool((moved[:, :, 2:] != start[:, :, 2:]).all())
        add(model, "one", form, length=1)
        assert model.count("one") > 0


@pytest.mark.parametrize("name", ["", "-a", "a b", "a.b", "a/b", "x" * 65, "ä"])
def test_names_that_cannot_be_files_or_modules_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a prefix; use letters, digits, - and _, at most 64"):
        PrefixModel(base("llama")).add(name, length=2)


@pytest.mark.parametrize("name", ["a", "0", "news-2_b", "x" * 64, "train", "half", "keys", "type"])
def test_names_of_letters_digits_and_dashes_are_taken(name: str) -> None:
    model = PrefixModel(base("llama"))
    model.add(name, length=2)
    assert model.active == name
    assert model.count(name) > 0
    assert list(model.forms) == [name]
    model.remove(name)
    assert not list(model.forms)


def test_a_name_is_taken_once_and_free_again_after_removal() -> None:
    model = model_with(length=2)
    with pytest.raises(InputError, match="a prefix named 'p' is there already"):
        model.add("p", length=2)
    model.remove("p")
    assert model.active is None
    assert model.count() == 0
    model.add("p", length=3)
    assert model.text_limit() == 64 - 3


def test_unknown_names_list_those_that_are_loaded() -> None:
    model = model_with(length=2)
    for act in (model.activate, model.remove, model.kv, model.count, lambda n: model(text(), prefix=n)):
        with pytest.raises(InputError, match="there is no prefix named 'q'; loaded are: p"):
            act("q")
    with pytest.raises(InputError, match="loaded are: none"):
        PrefixModel(base("llama")).activate("q")


def test_rows_and_names_must_agree() -> None:
    model = model_with(length=2)
    model.add("q", length=3)
    with pytest.raises(InputError, match="the batch has 3 rows, but prefixes were named for 2"):
        model(text(3), prefix=["p", "q"])


def test_prefixes_that_cannot_share_a_batch_are_refused() -> None:
    model = model_with(length=2)
    model.add("kept", length=2, positions="kept")
    model.add("layer0", length=2, layers=(0,))
    with pytest.raises(InputError, match="differ in `positions` or `window` cannot be mixed"):
        model(text(2), prefix=["p", "kept"])
    with pytest.raises(InputError, match=r"enter different (layers|sites)"):
        model(text(2), prefix=["p", "layer0"])


def test_positions_that_cannot_move_say_so() -> None:
    model = PrefixModel(base("t5"))
    with pytest.raises(InputError, match="T5ForConditionalGeneration cannot move its positions"):
        model.add("p", positions="after")
    with pytest.raises(InputError, match="can slide out of the window only where text comes after it"):
        model.add("p", window="slides")
    assert model.active is None


def test_nothing_active_is_the_base_and_saves_nothing(tmp_path: Path) -> None:
    model, ids = PrefixModel(base("llama")), text()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.base(ids).logits)
    with pytest.raises(InputError, match="there is no active prefix to save"):
        model.save_pretrained(tmp_path / "saved")


def test_a_state_dict_holds_no_base() -> None:
    model = model_with(length=2)
    assert set(model.state_dict()) == {f"forms.p.{key}" for key in model.forms["p"].state_dict()}
