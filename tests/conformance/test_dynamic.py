"""Dynamic prefixes: start as the static one, made from the prompt alone, the same however it is fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foreword.errors import InputError
from foreword.forms import DYNAMIC, FORMS
from foreword.model import PrefixModel

from .families import (
    BY_NAME,
    VOCABULARY,
    Family,
    add,
    base,
    inputs,
    off_by,
    padded,
    parameters,
    real,
    text,
    wrapped,
)
from .test_generation import STEPS, generate, prompt, row
from .test_training import gradients_by_checkpointing, loss_of, train

FAMILIES = [BY_NAME[name] for name in ("llama", "gpt2", "bert", "roberta", "bart", "t5")]
GENERATORS = [family for family in FAMILIES if family.kind != "encoder"]
DECODERS = [family for family in FAMILIES if family.kind == "decoder"]
every_dynamic = pytest.mark.parametrize("dynamic", DYNAMIC)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_layer = pytest.mark.parametrize("layer", [0, 1])
LENGTHS = [7, 4, 2]


def moved(name: str, dynamic: str, own: bool = False, form: str = "direct", **settings: Any) -> PrefixModel:
    """A model with one dynamic prefix `p` whose every parameter is away from its start, the generator's far."""
    model = wrapped(name, form, own=own, dynamic=dynamic, **settings)
    spread(model)
    return model


@torch.no_grad()
def spread(model: PrefixModel, name: str = "p") -> None:
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.forms[name].named_parameters():
        if not key.startswith("static."):
            parameter.add_(2 * torch.randn(parameter.shape, generator=generator))


def alone(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One row without its padding."""
    kept = batch["attention_mask"][index].bool()
    one = {k: t[index : index + 1, kept] for k, t in batch.items() if k != "decoder_input_ids"}
    if "decoder_input_ids" in batch:
        one["decoder_input_ids"] = batch["decoder_input_ids"][index : index + 1]
    return one


@every_family
@every_dynamic
@pytest.mark.parametrize("form", FORMS)
def test_it_starts_exactly_as_the_static_prefix(family: Family, dynamic: str, form: str) -> None:
    model = PrefixModel(base(family.name))
    add(model, "static", form, moved=False)
    add(model, "p", form, moved=False, dynamic=dynamic)
    batch = inputs(family, LENGTHS)
    with torch.no_grad():
        assert off_by(model(**batch, prefix="p").logits, model(**batch, prefix="static").logits) < 1e-6


@every_family
@every_dynamic
@every_layer
def test_rows_differ_and_neither_padding_nor_batch_matters(family: Family, dynamic: str, layer: int) -> None:
    """A batch equals its rows one by one, padded on either side, and what a row reads depends on its own text."""
    model = moved(family.name, dynamic, dynamic_layer=layer)
    for side in ["right", "left"] if family.kind == "decoder" else ["right"]:
        batch = inputs(family, LENGTHS, side)
        with torch.no_grad():
            logits = model(**batch).logits
            for index in range(len(LENGTHS)):
                found = logits[index]
                if family.kind != "seq2seq":
                    found = found[batch["attention_mask"][index].bool()]
                assert off_by(found, model(**alone(batch, index)).logits[0]) < 1e-5
    static = model.forms["p"].static
    pooled = torch.randn(2, model.forms["p"].usual.shape[0])
    for name, site in model.forms["p"](pooled).sites.items():
        assert off_by(site.values[0], site.values[1]) > 1e-2, name
        frozen = [x[:, :, :1] for x in static().sites[name]]
        assert all(torch.equal(f.expand(2, -1, -1, -1), x[:, :, :1]) for f, x in zip(frozen, site, strict=True))


@every_family
@every_dynamic
def test_each_parameter_moves_and_the_loss_falls(family: Family, dynamic: str) -> None:
    model = PrefixModel(base(family.name))
    add(model, "p", moved=False, dynamic=dynamic)
    batch = inputs(family, [7, 5, 3])
    with torch.no_grad():
        first = loss_of(model, family, batch)
    before = {name: p.detach().clone() for name, p in parameters(model).items()}
    train(model, family, batch)
    assert not [name for name, p in parameters(model).items() if torch.equal(p, before[name])]
    with torch.no_grad():
        assert loss_of(model, family, batch) < first


@every_family
@every_dynamic
def test_gradient_checkpointing_changes_nothing(family: Family, dynamic: str) -> None:
    model = moved(family.name, dynamic, own=True)
    checkpointed, expected = gradients_by_checkpointing(model, family)
    assert off_by(checkpointed, expected) < 1e-5
    assert model.base.training, "reading the prompt left the base in evaluation mode"


@every_family
@every_dynamic
@pytest.mark.parametrize("form", FORMS)
def test_save_and_load_are_equal(family: Family, dynamic: str, form: str, tmp_path: Path) -> None:
    model, batch = moved(family.name, dynamic, form=form), inputs(family, LENGTHS)
    model.save_pretrained(tmp_path / "saved")
    loaded = PrefixModel(base(family.name))
    loaded.load(tmp_path / "saved", "finished")
    loaded.load(tmp_path / "saved", "p", trainable=True)
    assert loaded.headers["p"]["prefix"]["dynamic"] == dynamic
    assert loaded.count("finished") == model.count("p")
    assert not any(p.requires_grad for p in loaded.forms["finished"].parameters())
    with torch.no_grad():
        expected = model(**batch).logits
        finished = loaded(**batch, prefix="finished").logits
        assert off_by(finished, expected) < 1e-6
        assert torch.equal(loaded(**batch, prefix="p").logits, finished)
        loaded.save_pretrained(tmp_path / "again", "p")
        loaded.load(tmp_path / "again", "again")
        loaded.activate("p")
        assert torch.equal(loaded(**batch, prefix="again").logits, finished)
    train(loaded, family, batch, steps=1)
    with torch.no_grad():
        assert off_by(loaded(**batch, prefix="p").logits, expected) > 1e-4


@every_family
@every_dynamic
def test_mixed_with_static_prefixes_each_row_reads_its_own(family: Family, dynamic: str) -> None:
    """A static prefix, two dynamic ones of different lengths and layers, and none, in one batch."""
    model = moved(family.name, dynamic, dynamic_layer=1)
    add(model, "short", length=2, dynamic="gates", dynamic_layer=0)
    spread(model, "short")
    add(model, "static", length=3)
    names = ["p", "static", None, "short", "p"]
    batch = inputs(family, [6, 7, 4, 5, 3])
    with torch.no_grad():
        mixed = model(**batch, prefix=names).logits
        for index, name in enumerate(names):
            found = mixed[index]
            if family.kind != "seq2seq":
                found = found[batch["attention_mask"][index].bool()]
            assert off_by(found, model(**alone(batch, index), prefix=name).logits[0]) < 1e-5


@torch.no_grad()
def repeated(model: PrefixModel, family: Family, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Greedy decoding by whole forwards, told where the prompt ends."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if family.kind == "seq2seq":
        made = torch.full((len(ids), 1), model.config.decoder_start_token_id)
        for _ in range(STEPS):
            logits = model(**batch, decoder_input_ids=made, use_cache=False, **kwargs).logits
            made = torch.cat([made, logits[:, -1:].argmax(-1)], 1)
        return made[:, -STEPS:]
    asked = mask.clone()
    for _ in range(STEPS):
        logits = model(ids, attention_mask=mask, use_cache=False, prompt_mask=asked, **kwargs).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        asked = torch.cat([asked, torch.zeros_like(asked[:, :1])], 1)
    return ids[:, -STEPS:]


@pytest.mark.parametrize("family", GENERATORS, ids=str)
@every_dynamic
@every_layer
def test_generate_equals_repeated_forward(family: Family, dynamic: str, layer: int) -> None:
    """With a cache, without, with a static one, with beams, prefixes per row, and every row as if it were alone."""
    model = moved(family.name, dynamic, dynamic_layer=layer)
    add(model, "q", length=3)
    batch = prompt(family, LENGTHS)
    expected = repeated(model, family, batch, prefix="p")
    for kwargs in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, batch, prefix="p", **kwargs), expected)
    with torch.no_grad(), model.reading("p"):
        found = model.base.generate(**batch, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(found[:, -STEPS:], expected)
    names = ["p", "q", None]
    beams = generate(model, batch, prefix=names, num_beams=3)
    for index, name in enumerate(names):
        assert torch.equal(generate(model, row(batch, index), prefix="p"), expected[index : index + 1])
        assert torch.equal(beams[index : index + 1], generate(model, row(batch, index), prefix=name, num_beams=3))


@pytest.mark.parametrize("family", DECODERS, ids=str)
@every_dynamic
def test_a_forward_goes_on_from_its_cache(family: Family, dynamic: str) -> None:
    model = moved(family.name, dynamic, dynamic_layer=1)
    ids, mask = padded([7, 5, 7], "left")
    asked = mask.clone()
    asked[:, 4:] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, prompt_mask=asked).logits
        first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        rest = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    found = torch.cat([first.logits, rest.logits], 1)
    assert off_by(found[mask.bool()], whole[mask.bool()]) < 1e-5
    with torch.no_grad():
        bare = model(ids, attention_mask=mask, use_cache=True, prefix=None)
        with pytest.raises(InputError, match=r"goes on from a cache .* call the model on the prompt first"):
            model(ids[:, :1], past_key_values=bare.past_key_values)


def test_a_seq2seq_goes_on_from_its_cache() -> None:
    family = BY_NAME["bart"]
    model, batch = moved("bart", "low_rank"), inputs(family, [7, 5, 3])
    tokens = batch.pop("decoder_input_ids")
    with torch.no_grad():
        whole = model(**batch, decoder_input_ids=tokens).logits
        first = model(**batch, decoder_input_ids=tokens[:, :3], use_cache=True)
        outputs, mask = (first.encoder_last_hidden_state,), batch["attention_mask"]
        again = {"encoder_outputs": outputs, "attention_mask": mask, "decoder_input_ids": tokens[:, 3:]}
        rest = model(**again, past_key_values=first.past_key_values)
        with pytest.raises(InputError, match="encoder outputs that were made without it"):
            model(**again)
    assert off_by(torch.cat([first.logits, rest.logits], 1), whole) < 1e-5


@pytest.mark.parametrize("family", DECODERS, ids=str)
def test_the_answer_does_not_reach_the_prefix(family: Family) -> None:
    """With labels, the prompt is what comes before them; another answer leaves the prompt's logits as they were."""
    model, ids = moved(family.name, "low_rank", dynamic_layer=1), text()
    labels = ids.clone()
    labels[:, :4] = -100
    other = ids.clone()
    other[:, 4:] = (other[:, 4:] + 7) % VOCABULARY
    with torch.no_grad():
        found = model(ids, labels=labels).logits[:, :4]
        assert off_by(model(other, labels=labels).logits[:, :4], found) < 1e-6
        assert off_by(model(ids[:, :4]).logits, found) < 1e-5
        assert off_by(model(ids).logits[:, :4], found) > 1e-3


def test_masks_of_four_dimensions_show_the_prompt_too() -> None:
    family = BY_NAME["llama"]
    model, batch = moved("llama", "low_rank", dynamic_layer=1), inputs(family, LENGTHS)
    seen = batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 7, -1).tril()
    with torch.no_grad():
        expected = real(family, batch, model(**batch).logits)
        for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)):
            found = model(batch["input_ids"], attention_mask=mask).logits
            assert off_by(real(family, batch, found), expected) < 1e-5


def test_embeddings_equal_ids() -> None:
    for layer in (0, 1):
        model, batch = moved("llama", "low_rank", dynamic_layer=layer), prompt(BY_NAME["llama"], [7, 4])
        embeds = model.base.get_input_embeddings()(batch["input_ids"])
        with torch.no_grad():
            found = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
            assert off_by(found, model(**batch).logits) < 1e-5


def test_bad_input_is_said() -> None:
    model = moved("llama", "low_rank")
    with pytest.raises(InputError, match="dynamic 'odd' is unknown; choose one of low_rank, mixture, gates"):
        model.add("a", dynamic="odd")
    with pytest.raises(InputError, match="dynamic_size must be at least 1, not 0"):
        model.add("a", dynamic="mixture", dynamic_size=0)
    with pytest.raises(InputError, match="dynamic_layer must be 0 or more, not -1"):
        model.add("a", dynamic="gates", dynamic_layer=-1)
    with pytest.raises(InputError, match="dynamic_layer 2 is not among the base's 2 layers"):
        model.add("a", dynamic="gates", dynamic_layer=2)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
    with pytest.raises(InputError, match="rows cannot be packed with several texts"):
        model(text(), position_ids=packed)
    with pytest.raises(InputError, match=r"prompt_mask has shape \[3, 2\], the batch \[3, 7\]"):
        model(text(), prompt_mask=torch.ones(3, 2))
    with pytest.raises(InputError, match="the batch has 3 rows, but prefixes were named for 2"):
        model(text(), prefix=["p", "p"])


def test_a_generator_that_does_not_fit_its_header_is_refused(tmp_path: Path) -> None:
    moved("llama", "low_rank").save_pretrained(tmp_path / "saved")
    header = tmp_path / "saved" / "prefix.json"
    header.write_text(header.read_text().replace('"dynamic_size": 4', '"dynamic_size": 5'))
    with pytest.raises(InputError, match="its generator has not the shapes that its header says"):
        PrefixModel(base("llama")).load(tmp_path / "saved")


def test_a_prompt_in_chunks_is_refused() -> None:
    """The first chunk is not the prompt; for a static prefix chunks are as good as the whole."""
    model, batch = moved("llama", "low_rank"), prompt(BY_NAME["llama"], [7, 7])
    add(model, "static")
    whole = generate(model, batch, prefix="static")
    assert torch.equal(generate(model, batch, prefix="static", prefill_chunk_size=3), whole)
    with pytest.raises(InputError, match="prompt in one piece; leave out prefill_chunk_size"):
        generate(model, batch, prefix=["static", "p"], prefill_chunk_size=3)
