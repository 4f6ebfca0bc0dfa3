"""foreword beside PEFT 0.21 with the same keys and values: equal where PEFT is right; where it is wrong or fails, its
own result is shown and foreword's is checked against a hand computation.

There are two: the base reading real tokens whose keys and values are the prefix (`in_context`), and an attention
function written here that puts the prefix before the keys (`by_hand`). Neither uses foreword's attention.
"""

from copy import deepcopy
from dataclasses import replace

import pytest

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to compare with (pip install peft)")

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PrefixTuningConfig, get_peft_model  # noqa: E402
from torch.nn.functional import pad  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import eager_mask  # noqa: E402

from foreword.forms import Finished, PrefixConfig  # noqa: E402
from foreword.kv import KVPrefix, SiteKV  # noqa: E402
from foreword.model import PrefixModel  # noqa: E402
from foreword.sites import capture  # noqa: E402

transformers.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore")
CONTEXT = torch.tensor([[1, 7, 9, 23]])
P = CONTEXT.shape[1]
SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.15}
TOLERANCE = 1e-5
TOKENS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
RIGHT = (torch.arange(7) < torch.tensor([[4], [7], [5]])).long()
LEFT = RIGHT.flip(1)


def llama(**settings):
    config = transformers.LlamaConfig(
        **SPECIAL, **SIZES, num_hidden_layers=3, num_key_value_heads=2, max_position_embeddings=64, **settings
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    config = transformers.GPT2Config(**SPECIAL, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.15)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def mistral(window):
    config = transformers.MistralConfig(
        **SPECIAL, **SIZES, num_hidden_layers=2, num_key_value_heads=2, sliding_window=window
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, decoder_start_token_id=0
    )
    config.dropout_rate = 0.0
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


def bart():
    layers = {f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.15, **layers
    )
    config.dropout = 0.0
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).eval()


CAUSAL = pytest.mark.parametrize("make", [llama, gpt2])


def theirs_on(base, task="CAUSAL_LM", length=P, **settings):
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=length, **settings)
    return get_peft_model(deepcopy(base), config).eval()


def ours_on(base, kv):
    model = PrefixModel(deepcopy(base))
    put(model, "p", kv)
    return model


def put(model, name, kv):
    """A finished prefix in the bank."""
    positions = "after" if model.can_move_positions else "kept"
    model.forms[name] = Finished(kv)
    model.configs[name] = PrefixConfig(length=kv.length, positions=positions)
    model.headers[name] = {"prefix": {"parameters": kv.numel()}}
    model.active = name


def text_kv(base, ids=CONTEXT):
    """The keys and values of real tokens."""
    probe = PrefixModel(deepcopy(base))
    return capture(probe.base, probe.sites, ids).kv


def kv_of(theirs, names):
    """The prefix that a PEFT model really puts into its cache."""
    layers = theirs.get_prompt(1).layers
    sites = (SiteKV(layer.keys.detach(), layer.values.detach()) for layer in layers)
    return KVPrefix(dict(zip(names, sites, strict=True)))


def twins(base, task="CAUSAL_LM"):
    """foreword and PEFT on copies of one base, both with the keys and values of CONTEXT."""
    kv, theirs = text_kv(base), theirs_on(base, task)
    flat = torch.stack([tensor[0] for site in kv.sites.values() for tensor in site])  # [2 L, H_kv, P, d_k]
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(flat.permute(2, 0, 1, 3).flatten(1))
    read = kv_of(theirs, kv.sites)
    assert all(torch.equal(a, b) for n in kv.sites for a, b in zip(kv.sites[n], read.sites[n], strict=True))
    return ours_on(base, read), theirs


def in_context(base, ids, mask=None, context=CONTEXT):
    """Logits of `ids` behind the real tokens `context`."""
    context = context.expand(len(ids), -1)
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([torch.ones_like(context), mask], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = base(input_ids=torch.cat([context, ids], 1), attention_mask=mask, position_ids=positions)
    return output.logits[:, context.shape[1] :]


def generated_in_context(base, ids, **settings):
    context = CONTEXT.expand(len(ids), -1)
    joined = torch.cat([context, ids], 1)
    output = base.generate(input_ids=joined, attention_mask=torch.ones_like(joined), **settings)
    return output[:, context.shape[1] :]


def by_hand(base, kv, **inputs):
    """The base's output, its attention replaced by concatenate, mask, softmax."""
    base = deepcopy(base)
    sites = {id(base.get_submodule(name)): site for name, site in kv.sites.items()}

    def attention(module, query, key, value, mask, scaling=None, position_bias=None, **rest):
        site, rows = sites[id(module)], len(key)
        key = torch.cat([site.keys.expand(rows, -1, -1, -1), key], 2)
        value = torch.cat([site.values.expand(rows, -1, -1, -1), value], 2)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        for extra in (mask, position_bias):
            if extra is not None:
                scores = scores + pad(extra, (kv.length, 0))
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", attention)
    AttentionMaskInterface.register("by_hand", eager_mask)
    base.set_attn_implementation("by_hand")
    return base(**inputs)


def difference(a, b, where=None):
    a, b = (a, b) if where is None else (a[where.bool()], b[where.bool()])
    return float((a - b).detach().abs().max())


def assert_equal(a, b, where=None):
    found = difference(a, b, where)
    print(f"largest difference {found:.1e}")
    assert found < TOLERANCE


@torch.no_grad()
def logits(model, ids=TOKENS, **inputs):
    return model(input_ids=ids, **inputs).logits


# ---- where PEFT is right: the same numbers


@CAUSAL
def test_a_random_prefix_gives_pefts_logits(make):
    base = make()
    torch.manual_seed(3)
    theirs = theirs_on(base)
    ours = ours_on(base, kv_of(theirs, text_kv(base).sites))
    assert_equal(logits(ours), logits(theirs))
    assert difference(logits(ours), logits(base)) > 0.1


@CAUSAL
def test_right_padding_gives_pefts_logits(make):
    base = make()
    ours, theirs = twins(base)
    found = logits(ours, attention_mask=RIGHT)
    assert_equal(found, logits(theirs, attention_mask=RIGHT), RIGHT)
    assert_equal(found, in_context(base, TOKENS, RIGHT), RIGHT)


@CAUSAL
def test_left_padding_with_position_ids_gives_pefts_logits(make):
    base = make()
    ours, theirs = twins(base)
    inputs = {"attention_mask": LEFT, "position_ids": (LEFT.cumsum(-1) - 1).clamp(min=0)}
    found = logits(ours, **inputs)
    assert_equal(found, logits(theirs, **inputs), LEFT)
    assert_equal(found, in_context(base, TOKENS, LEFT), LEFT)


@CAUSAL
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("mask", [torch.ones_like(TOKENS), LEFT], ids=["no-padding", "left-padding"])
def test_greedy_and_beam_generate_give_pefts_tokens(make, settings, mask):
    base = make()
    ours, theirs = twins(base)
    inputs = {"input_ids": TOKENS, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **settings}
    found = ours.generate(**inputs)
    assert torch.equal(found, theirs.generate(**inputs))
    assert not torch.equal(found, base.generate(**inputs))


@CAUSAL
def test_one_training_step_gives_pefts_gradient(make):
    base = make()
    ours, theirs = twins(base)
    kv = ours.kv("p")
    leaves = [tensor.requires_grad_() for site in kv.sites.values() for tensor in site]
    inputs = {"input_ids": TOKENS, "attention_mask": RIGHT, "labels": TOKENS.masked_fill(RIGHT == 0, -100)}
    ours(**inputs).loss.backward()
    theirs.train()(**inputs).loss.backward()
    flat = torch.stack([leaf.grad[0] for leaf in leaves]).permute(2, 0, 1, 3).flatten(1)
    assert_equal(flat, theirs.prompt_encoder["default"].embedding.weight.grad)


BERT_TASKS = [
    ("SEQ_CLS", transformers.BertForSequenceClassification, {"labels": torch.tensor([0, 1, 1])}),
    ("TOKEN_CLS", transformers.BertForTokenClassification, {"labels": TOKENS % 2}),
    (
        "QUESTION_ANS",
        transformers.BertForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([2, 3, 4])},
    ),
]


@pytest.mark.parametrize(("task", "kind", "labels"), BERT_TASKS, ids=[task for task, *_ in BERT_TASKS])
def test_bert_gives_pefts_outputs(task, kind, labels):
    torch.manual_seed(0)
    base = kind(transformers.BertConfig(vocab_size=64, num_hidden_layers=2, **SIZES)).eval()
    ours, theirs = twins(base, task)
    with torch.no_grad():
        a, b = (model(input_ids=TOKENS, **labels) for model in (ours, theirs))
        assert_equal(a[1], b[1])
        assert_equal(a.loss, b.loss)
        a, b = (model(input_ids=TOKENS, attention_mask=RIGHT)[0] for model in (ours, theirs))
    assert_equal(a, b, None if task == "SEQ_CLS" else RIGHT)


# ---- where PEFT is wrong or fails


@CAUSAL
def test_left_padding_without_position_ids_is_right_where_peft_is_silently_wrong(make):
    base = make()
    ours, theirs = twins(base)
    right = in_context(base, TOKENS, LEFT)
    assert difference(logits(theirs, attention_mask=LEFT), right, LEFT) > 0.1
    assert_equal(logits(ours, attention_mask=LEFT), right, LEFT)


@CAUSAL
def test_going_on_from_returned_past_key_values_is_right_where_peft_is_silently_wrong(make):
    base = make()
    ours, theirs = twins(base)
    right = in_context(base, TOKENS)[:, 4:]

    @torch.no_grad()
    def in_two_calls(model):
        first = model(input_ids=TOKENS[:, :4], use_cache=True)
        return model(input_ids=TOKENS[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits

    assert difference(in_two_calls(theirs), right) > 0.1
    assert_equal(in_two_calls(ours), right)


@CAUSAL
def test_gradient_checkpointing_gives_the_exact_gradient_where_peft_fails(make):
    base = make()
    checkpointed = deepcopy(base)
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        theirs_on(checkpointed)
    theirs = theirs_on(base).train()
    theirs.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs(input_ids=TOKENS, labels=TOKENS)

    ours = PrefixModel(deepcopy(base))
    form = ours.add("p", length=P, frozen_tokens=0).train()
    ours.gradient_checkpointing_enable()
    ours.train()
    ours(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert ours.base.is_gradient_checkpointing
    found = [p.grad.clone() for p in form.parameters()]
    form.zero_grad()
    positions = torch.arange(P, P + TOKENS.shape[1])[None]
    by_hand(base, form(), input_ids=TOKENS, labels=TOKENS, position_ids=positions, use_cache=False).loss.backward()
    assert_equal(torch.cat([g.flatten() for g in found]), torch.cat([p.grad.flatten() for p in form.parameters()]))


GREEDY = {"max_new_tokens": 12, "do_sample": False}


def test_generate_without_cache_is_right_where_peft_fails_on_llama():
    base = llama()
    ours, theirs = twins(base)
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "use_cache": False, **GREEDY}
    with pytest.raises(RuntimeError):
        theirs.generate(**inputs)
    assert torch.equal(ours.generate(**inputs), generated_in_context(base, TOKENS, **GREEDY))


def test_generate_without_cache_gives_pefts_tokens_on_gpt2():
    base = gpt2()
    ours, theirs = twins(base)
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "use_cache": False, **GREEDY}
    found = ours.generate(**inputs)
    assert torch.equal(found, theirs.generate(**inputs))
    assert torch.equal(found, generated_in_context(base, TOKENS, **GREEDY))


@CAUSAL
def test_a_static_cache_is_right_where_peft_fails(make):
    base = make()
    ours, theirs = twins(base)
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), **GREEDY}
    with pytest.raises(AttributeError, match="max_cache_len"):
        theirs.generate(**inputs, cache_implementation="static")
    found = ours.generate(**inputs, cache_implementation="static")
    assert torch.equal(found, generated_in_context(base, TOKENS, **GREEDY))


@CAUSAL
def test_prompt_lookup_decoding_is_right_where_peft_fails(make):
    base = make()
    ours, theirs = twins(base)
    ids = TOKENS[:1].repeat(1, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    with pytest.raises(RuntimeError):
        theirs.generate(**inputs, prompt_lookup_num_tokens=3)
    found = ours.generate(**inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(found, generated_in_context(base, ids, **GREEDY))


@CAUSAL
@pytest.mark.parametrize("boolean", [False, True], ids=["additive", "boolean"])
def test_4d_masks_are_right_where_peft_refuses_them(make, boolean):
    base = make()
    ours, theirs = twins(base)
    seen = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    seen[:, :, 2:, 1] = False  # token 1 is hidden from all that follow it
    whole = torch.ones(3, 1, P + 7, P + 7, dtype=torch.bool).tril()
    whole[:, :, P:, P:] = seen
    lowest = torch.finfo(torch.float32).min
    mask = seen if boolean else torch.zeros(seen.shape).masked_fill(~seen, lowest)
    with pytest.raises(RuntimeError, match="same number of dimensions"):
        logits(theirs, attention_mask=mask)
    joined = torch.cat([CONTEXT.expand(3, -1), TOKENS], 1)
    right = logits(base, joined, attention_mask=torch.zeros(whole.shape).masked_fill(~whole, lowest))[:, P:]
    assert_equal(logits(ours, attention_mask=mask), right)


def test_a_prefix_stays_visible_in_a_sliding_window_where_pefts_slides_out():
    base = mistral(window=5)
    ours, theirs = twins(base)
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(2))
    bare, slid = logits(base, ids), logits(theirs, ids)
    assert_equal(slid, in_context(base, ids))
    assert_equal(slid[:, -1], bare[:, -1])  # the last token no longer knows of PEFT's prefix
    positions = torch.arange(P, P + 24)[None]
    with torch.no_grad():
        right = by_hand(base, ours.kv("p"), input_ids=ids, position_ids=positions, use_cache=False).logits
    found = logits(ours, ids)
    assert_equal(found, right)
    assert difference(found[:, -1], bare[:, -1]) > 0.1
    ours.configs["p"] = replace(ours.configs["p"], window="slides")
    assert_equal(logits(ours, ids), slid)


@pytest.mark.parametrize("make", [t5, bart])
def test_each_decoder_layer_has_its_own_prefix_where_peft_repeats_half_of_it(make):
    base = make()
    theirs = theirs_on(base, "SEQ_2_SEQ_LM")
    layers = theirs.get_prompt(1).self_attention_cache.layers
    assert torch.equal(layers[0].keys, layers[2].keys) and torch.equal(layers[1].values, layers[3].values)
    labels = TOKENS[:, :5].contiguous()
    inputs = {"input_ids": TOKENS, "decoder_input_ids": labels, "labels": labels}
    theirs(**inputs).loss.backward()
    weight = theirs.prompt_encoder["default"].embedding.weight
    unused = weight.grad.view(P, 2 * 4, 32).abs().sum((0, 2)) == 0
    assert unused.tolist() == [False, False, True, True] * 2

    ours = PrefixModel(deepcopy(base))
    form = ours.add("p", form="direct", length=P)
    kinds = [site.kind for site in ours.sites]
    assert {kind: kinds.count(kind) for kind in kinds} == {"encoder": 4, "decoder": 4, "cross": 4}
    ours(**inputs).loss.backward()
    assert len(list(form.parameters())) == 2 * 12
    assert all(p.grad.abs().sum() > 0 for p in form.parameters())


@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoder_and_cross_sites_read_their_prefixes_as_by_hand(make):
    base = make()
    torch.manual_seed(5)
    kv = KVPrefix({n: SiteKV(*(torch.randn_like(t) for t in s)) for n, s in text_kv(base).sites.items()})
    ours = ours_on(base, kv)
    inputs = {"input_ids": TOKENS, "attention_mask": RIGHT, "decoder_input_ids": TOKENS[:, :5]}
    with torch.no_grad():
        found = ours(**inputs).logits
        assert_equal(found, by_hand(base, kv, **inputs).logits)
    assert difference(found, logits(base, **{k: v for k, v in inputs.items() if k != "input_ids"})) > 0.01


def test_t5_with_another_head_size_is_right_where_peft_fails():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        theirs_on(base, "SEQ_2_SEQ_LM")(**inputs)
    kv = text_kv(base)
    with torch.no_grad():
        assert_equal(ours_on(base, kv)(**inputs).logits, by_hand(base, kv, **inputs).logits)


@CAUSAL
def test_each_row_reads_the_prefix_it_names_where_peft_gives_all_the_active_one(make):
    base = make()
    theirs = theirs_on(base)
    theirs.add_adapter("second", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    theirs.eval()
    ignored = logits(theirs, adapter_names=["default", "second", "default"])
    assert torch.equal(ignored, logits(theirs))
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), **GREEDY}
    with pytest.raises(ValueError, match="adapter_names"):
        theirs.generate(**inputs, adapter_names=["default", "second", "default"])

    other = torch.tensor([[1, 40, 41, 42, 43, 44]])
    ours = ours_on(base, text_kv(base))
    put(ours, "longer", text_kv(base, other))
    rows = ["p", "longer", None]
    right = [
        in_context(base, TOKENS[:1]),
        in_context(base, TOKENS[1:2], context=other),
        logits(base, TOKENS[2:]),
    ]
    assert_equal(logits(ours, prefix=rows), torch.cat(right))
    alone = [ours.generate(input_ids=TOKENS[i : i + 1], prefix=rows[i], **GREEDY) for i in range(3)]
    for found, expected in zip(ours.generate(**inputs, prefix=rows), alone, strict=True):
        assert torch.equal(found[: expected.shape[1]], expected[0])


@CAUSAL
def test_a_loaded_prefix_trains_on_where_peft_refuses(make, tmp_path):
    base = make()
    ours, theirs = twins(base)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "theirs", is_trainable=True)
    ours.save_pretrained(tmp_path / "ours")
    again = PrefixModel(deepcopy(base))
    form = again.load(tmp_path / "ours", trainable=True)
    assert_equal(logits(again), logits(ours))
    before = again(input_ids=TOKENS, labels=TOKENS).loss
    before.backward()
    torch.optim.SGD(form.parameters(), lr=0.01).step()
    assert again(input_ids=TOKENS, labels=TOKENS).loss < before


def test_a_prefix_works_on_a_base_with_lora_where_peft_cannot_combine_them():
    base = llama()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        theirs_on(base).add_adapter("lora", lora)
    tuned = get_peft_model(deepcopy(base), lora).eval().base_model.model
    found = logits(ours_on(tuned, text_kv(tuned)))
    assert_equal(found, in_context(tuned, TOKENS))
    assert difference(found, in_context(base, TOKENS)) > 0.1


def distilbert(task):
    kind = {
        "SEQ_CLS": transformers.DistilBertForSequenceClassification,
        "TOKEN_CLS": transformers.DistilBertForTokenClassification,
        "QUESTION_ANS": transformers.DistilBertForQuestionAnswering,
    }[task]
    config = transformers.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, initializer_range=0.15
    )
    return kind(config)


def modernbert(task):
    kind = {
        "SEQ_CLS": transformers.ModernBertForSequenceClassification,
        "TOKEN_CLS": transformers.ModernBertForTokenClassification,
        "QUESTION_ANS": transformers.ModernBertForQuestionAnswering,
    }[task]
    return kind(transformers.ModernBertConfig(**SPECIAL, **SIZES, num_hidden_layers=2, cls_token_id=1, sep_token_id=2))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize(
    ("make", "failure"), [(distilbert, "specify `token_dim`"), (modernbert, "does not support past key values")]
)
def test_bert_families_are_right_where_peft_fails(make, failure, task):
    torch.manual_seed(0)
    base = make(task).eval()
    inputs = {"input_ids": TOKENS, "attention_mask": RIGHT}
    with pytest.raises(ValueError, match=failure):
        theirs_on(base, task)(**inputs)
    kv = text_kv(base)
    ours = ours_on(base, kv)
    placed = {"position_ids": torch.arange(P, P + 7)[None]} if ours.can_move_positions else {}
    with torch.no_grad():
        found, right = ours(**inputs)[0], by_hand(base, kv, **inputs, **placed)[0]
        real = None if task == "SEQ_CLS" else RIGHT
        assert_equal(found, right, real)
        assert difference(found, base(**inputs)[0], real) > 1e-3


def test_the_bare_base_is_bit_identical_to_never_having_been_wrapped():
    base = llama()
    ours, _ = twins(base)
    assert torch.equal(logits(ours, prefix=None, attention_mask=LEFT), logits(base, attention_mask=LEFT))
