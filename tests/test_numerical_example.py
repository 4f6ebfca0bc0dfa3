"""The tutorial's numerical example, by hand in NumPy, against foreword, against autograd and against its page."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from foreword.attention import ReadPrefix, reference_attention
from foreword.kv import KVPrefix, SiteKV
from foreword.model import PrefixModel
from foreword.split import split_attention

transformers.logging.set_verbosity_error()

PAGE = Path(__file__).parents[1] / "docs" / "numerical-example.md"

X = np.array([[1.0, 0.0, 0.5, -0.5], [0.0, 1.0, -0.5, 0.5], [0.5, 0.5, 1.0, 0.0]])
P = np.array([[0.2, -0.1, 0.4, 0.3], [-0.3, 0.5, 0.1, -0.2]])
W_Q = np.array([[0.5, 0.1, 0.0, -0.2], [0.0, 0.6, 0.2, 0.1], [0.3, 0.0, 0.4, 0.0], [0.1, -0.1, 0.0, 0.7]])
W_K = np.array([[0.4, 0.0, 0.1, 0.2], [0.1, 0.5, 0.0, -0.1], [0.0, 0.2, 0.6, 0.0], [-0.2, 0.0, 0.1, 0.5]])
W_V = np.array([[0.6, -0.1, 0.0, 0.1], [0.0, 0.4, 0.2, 0.0], [0.1, 0.0, 0.5, -0.2], [0.0, 0.3, 0.0, 0.6]])
TARGET = np.eye(3, 4)
RATE = 10.0


def by_hand(prefix):
    """Every step of the forward pass, in NumPy alone."""
    keys, values = np.concatenate([prefix @ W_K, X @ W_K]), np.concatenate([prefix @ W_V, X @ W_V])
    scores = (X @ W_Q) @ keys.T / np.sqrt(4)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights = exponentials / exponentials.sum(axis=1, keepdims=True)
    output = weights @ values
    loss = ((output - TARGET) ** 2).mean()
    return SimpleNamespace(keys=keys, values=values, scores=scores, weights=weights, output=output, loss=loss)


def gradient_by_hand(prefix):
    """dL/dP by the chain rule; the softmax by its Jacobian, row by row."""
    step = by_hand(prefix)
    d_output = 2 * (step.output - TARGET) / step.output.size
    d_weights = d_output @ step.values.T
    jacobians = [np.diag(row) - np.outer(row, row) for row in step.weights]  # [5, 5] each
    d_scores = np.stack([j @ d for j, d in zip(jacobians, d_weights, strict=True)])
    d_keys = d_scores.T @ (X @ W_Q) / np.sqrt(4)
    d_values = step.weights.T @ d_output
    return d_keys[:2] @ W_K.T + d_values[:2] @ W_V.T


def row(matrix):
    """`[n, 4]` as attention takes it: one row, one head."""
    return torch.as_tensor(matrix, dtype=torch.float64)[None, None]


def read(prefix):
    """The prefix as a site reads it."""
    kv = KVPrefix({"site": SiteKV(row(prefix @ W_K), row(prefix @ W_V))})
    return ReadPrefix(kv.sites["site"])


def reference(prefix):
    return reference_attention(row(X @ W_Q), row(X @ W_K), row(X @ W_V), prefix)[0]


def split(prefix):
    return split_attention(row(X @ W_Q), row(X @ W_K), row(X @ W_V), *prefix.kv)


def test_shapes():
    step = by_hand(P)
    assert X.shape == (3, 4) and P.shape == (2, 4)
    assert (P @ W_K).shape == (P @ W_V).shape == (2, 4)
    assert step.keys.shape == step.values.shape == (5, 4)
    assert step.scores.shape == step.weights.shape == (3, 5)
    assert step.output.shape == (3, 4)
    assert gradient_by_hand(P).shape == P.shape
    np.testing.assert_allclose(step.weights.sum(axis=1), 1, atol=1e-15)


@pytest.mark.parametrize("attention", [reference, split])
def test_the_output_is_forewords(attention):
    output = attention(read(P))
    assert output.shape == (1, 1, 3, 4)
    np.testing.assert_allclose(output[0, 0].numpy(), by_hand(P).output, atol=1e-12, rtol=0)


def test_the_weights_are_forewords():
    _, weights = reference_attention(row(X @ W_Q), row(X @ W_K), row(X @ W_V), read(P))
    assert weights.shape == (1, 1, 3, 5)
    np.testing.assert_allclose(weights[0, 0].numpy(), by_hand(P).weights, atol=1e-12, rtol=0)


@pytest.mark.parametrize("attention", [reference, split])
def test_the_gradient_is_autograds_through_forewords_attention(attention):
    prefix = torch.tensor(P, requires_grad=True)
    kv = SiteKV(row(prefix @ torch.tensor(W_K)), row(prefix @ torch.tensor(W_V)))
    loss = ((attention(ReadPrefix(kv))[0, 0] - torch.tensor(TARGET)) ** 2).mean()
    loss.backward()
    assert abs(loss.item() - by_hand(P).loss) < 1e-12
    np.testing.assert_allclose(prefix.grad.numpy(), gradient_by_hand(P), atol=1e-12, rtol=0)


def test_the_gradient_is_the_slope_of_the_loss():
    slopes, h = np.zeros_like(P), 1e-5
    for place in np.ndindex(P.shape):
        nudge = np.zeros_like(P)
        nudge[place] = h
        slopes[place] = (by_hand(P + nudge).loss - by_hand(P - nudge).loss) / (2 * h)
    np.testing.assert_allclose(gradient_by_hand(P), slopes, atol=1e-10, rtol=0)


def test_a_step_against_the_gradient_lowers_the_loss():
    after = P - RATE * gradient_by_hand(P)
    assert by_hand(after).loss < by_hand(P).loss - 1e-3


class NoRotation(nn.Module):
    """Rotary embeddings that rotate nothing, as the example has no positions."""

    def forward(self, x, position_ids):
        shape = (*position_ids.shape, 4)
        return x.new_ones(shape), x.new_zeros(shape)


def one_layer_llama():
    """A Llama whose one attention module is the example's: W_Q, W_K, W_V, no output projection, norm or rotation."""
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=32,
    )
    base = transformers.LlamaForCausalLM(config).double().eval()
    layer = base.model.layers[0]
    layer.input_layernorm, base.model.rotary_emb = nn.Identity(), NoRotation()
    attention = layer.self_attn
    attention.is_causal = False
    for name, matrix in (("q", W_Q), ("k", W_K), ("v", W_V), ("o", np.eye(4))):
        getattr(attention, f"{name}_proj").weight.data = torch.tensor(matrix.T.copy())
    return base


@pytest.mark.parametrize("kernel", ["split", "joined", "reference"])
def test_the_projected_form_in_a_real_attention_module_gives_the_same_numbers(kernel):
    base = one_layer_llama()
    model = PrefixModel(base, kernel=kernel)
    form = model.add("hand", form="projected", length=2).double()
    form.start_0.zero_()  # P^l is then the parameter itself
    form.deviation_0.fill_(1.0)
    form.hidden[0].data = torch.tensor(P)
    site = form().sites[model.sites[0].name]
    np.testing.assert_allclose(site.keys.detach()[0, 0].numpy(), P @ W_K, atol=1e-12, rtol=0)
    np.testing.assert_allclose(site.values.detach()[0, 0].numpy(), P @ W_V, atol=1e-12, rtol=0)

    outputs = []
    base.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    with model.reading():
        base(inputs_embeds=torch.tensor(X)[None])
    output = outputs[-1][0]
    np.testing.assert_allclose(output.detach().numpy(), by_hand(P).output, atol=1e-12, rtol=0)
    ((output - torch.tensor(TARGET)) ** 2).mean().backward()
    np.testing.assert_allclose(form.hidden[0].grad.numpy(), gradient_by_hand(P), atol=1e-12, rtol=0)


def small_llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def small_gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=4, n_positions=32)
    )


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_the_projected_form_trains_layers_times_length_times_d(make):
    model = PrefixModel(make())
    model.add("p", form="projected", length=5)
    assert model.count() == 3 * 5 * 16


def blocks():
    """The page's code and the output that it shows."""
    text = PAGE.read_text(encoding="utf-8")
    return tuple(re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL).group(1) for kind in ("python", "text"))


def run_page():
    printed, names = io.StringIO(), {}
    options = np.get_printoptions()
    try:
        with redirect_stdout(printed):
            exec(blocks()[0], names)
    finally:
        np.set_printoptions(**options)
    return printed.getvalue(), names


def test_the_page_shows_what_its_code_prints():
    assert run_page()[0] == blocks()[1]


def test_the_page_holds_this_example():
    _, page = run_page()
    given = {"X": X, "P": P, "W_Q": W_Q, "W_K": W_K, "W_V": W_V, "target": TARGET, "rate": RATE}
    for name, value in given.items():
        np.testing.assert_array_equal(page[name], value, err_msg=name)
    step, gradient = by_hand(P), gradient_by_hand(P)
    found = {name: page[name] for name in ("scores", "weights", "output", "loss", "d_P", "loss_new")}
    after = by_hand(P - RATE * gradient)
    expected = {**vars(step), "d_P": gradient, "loss_new": after.loss}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-12, rtol=0, err_msg=name)


def test_the_pages_code_needs_numpy_alone():
    assert re.findall(r"^(?:import|from) .*$", blocks()[0], re.MULTILINE) == ["import numpy as np"]
