"""Loss recovered is the formula over real forward passes, at the positions and targets that were requested."""

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lens_maira.errors import HookError, SAEError
from sae_lens_maira.sae import (
    MatryoshkaSAE,
    MatryoshkaSAEConfig,
    SpliceBatch,
    evaluate_splice,
    make_control,
)

pytestmark = pytest.mark.compat

D, VOCABULARY = 12, 30
ROLES = {"IMAGE": {3}, "REPORT": {10}}


@pytest.fixture
def model():
    config = LlamaConfig(
        hidden_size=D, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=VOCABULARY,
        initializer_range=0.5, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


@pytest.fixture
def batches(model):
    """Two batches of unequal length, left-padded, whose targets are what the model itself finds likely."""
    result = []
    for length in (9, 7):
        ids = torch.randint(1, VOCABULARY, (2, length))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        with torch.no_grad():
            likely = model.eval()(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        roles = torch.full((2, length), 3)
        roles[:, 5:] = 10
        labels = torch.full_like(ids, -100)
        labels[:, 5:] = likely[:, 4:-1]
        result.append(SpliceBatch({"input_ids": ids, "attention_mask": mask}, labels, roles))
    return result


@pytest.fixture
def identity():
    """relu(x) - relu(-x) = x: a perfect SAE. Level 0 holds the positive parts only."""
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=D, d_sae=2 * D, matryoshka_widths=[D]))
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    sae.load_state_dict({**sae.state_dict(), "W_dec": both, "W_enc": both.T.contiguous()})
    return sae


def layer(model):
    return model.model.layers[1]


def loss(model, batches, edit=None):
    """Mean cross-entropy over the targets with the layer's output edited, written out by hand."""
    total, n = 0.0, 0
    for batch in batches:

        def hook(_module, _inputs, output, batch=batch):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = edit(hidden, batch) if edit else hidden
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = layer(model).register_forward_hook(hook)
        with torch.no_grad():
            logits = model(**batch.model_inputs).logits
        handle.remove()
        target = batch.labels[:, 1:]
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="none")
        total, n = total + float(ce[target != -100].sum()), n + int((target != -100).sum())
    return total / n


def at(batch, role):
    where = batch.model_inputs["attention_mask"].bool()
    return (where & (batch.roles == role))[..., None] if role else where[..., None]


@pytest.mark.parametrize(("name", "role"), [("all", None), ("IMAGE", 3), ("REPORT", 10)])
def test_every_figure_by_hand(name, role, model, batches, identity):
    result = evaluate_splice(model, layer(model), batches, identity, positions={"all": None, **ROLES})
    record = next(r for r in result.records if r.positions == name and r.level == 0)
    model.eval()
    clean = loss(model, batches)
    ablated = loss(model, batches, lambda h, b: torch.where(at(b, role), 0, h))
    spliced = loss(model, batches, lambda h, b: torch.where(at(b, role), h.relu(), h))
    assert record.ce_clean == pytest.approx(clean, abs=1e-5)
    assert record.ce_ablated == pytest.approx(ablated, abs=1e-5)
    assert record.ce_spliced == pytest.approx(spliced, abs=1e-5)
    assert record.loss_recovered == pytest.approx((ablated - spliced) / (ablated - clean), abs=1e-3)
    assert record.targets == 2 * 4 + 2 * 2
    assert record.replaced == sum(int(at(b, role).sum()) for b in batches)


def test_a_perfect_sae_recovers_everything(model, batches, identity):
    frame = evaluate_splice(
        model, layer(model), batches, identity, positions={"all": None, **ROLES}
    ).to_frame()
    whole = frame[frame["level"] == 1]
    assert whole["loss_recovered"].tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert (frame[frame["level"] == 0]["ce_spliced"] > whole["ce_spliced"].max() + 1e-3).any()


def test_mean_ablation_and_baseline(model, batches, identity):
    rows = torch.randn(200, D)
    result = evaluate_splice(
        model,
        layer(model),
        batches,
        identity,
        baseline=make_control("untrained", identity, rows),
        levels=[-1],
        ablation="mean",
    )
    assert [(r.sae, r.level, r.positions) for r in result.records] == [
        ("trained", 1, "all"),
        ("untrained", 1, "all"),
    ]
    ours, other = result.records
    assert ours.loss_recovered > other.loss_recovered
    own = {
        "all": make_control("untrained", identity, rows),
        "REPORT": make_control("untrained", identity, rows + 9),
    }
    both = evaluate_splice(
        model,
        layer(model),
        batches,
        identity,
        baseline=own,
        levels=[-1],
        positions={"all": None, "REPORT": {10}},
    )
    assert [(r.sae, r.positions) for r in both.records] == [
        ("trained", "all"), ("untrained", "all"), ("trained", "REPORT"), ("untrained", "REPORT"),
    ]  # fmt: skip
    assert both.records[1].ce_spliced == pytest.approx(other.ce_spliced, abs=1e-5)
    zero = evaluate_splice(model, layer(model), batches, identity, levels=[-1]).records[0]
    assert zero.ce_ablated != ours.ce_ablated
    assert zero.ce_clean == ours.ce_clean


def test_model_is_left_as_it_was(model, batches, identity):
    model.train()
    evaluate_splice(model, layer(model), batches, identity)
    assert model.training
    assert not layer(model)._forward_hooks
    wrong = JumpReLUSAE(JumpReLUSAEConfig(d_in=D + 1, d_sae=8))
    with pytest.raises(SAEError, match=f"{D} numbers per position, the SAE d_in={D + 1}"):
        evaluate_splice(model, layer(model), batches, wrong)
    assert model.training
    assert not layer(model)._forward_hooks


def test_tuples_and_bfloat16(model, batches, identity):
    """A module that returns a tuple, a model in bfloat16, batches as plain tuples."""
    half = model.to(torch.bfloat16)
    plain = [(b.model_inputs, b.labels, b.roles) for b in batches]
    record = evaluate_splice(half, layer(half), plain, identity, levels=[-1]).records[0]
    assert record.loss_recovered == pytest.approx(1, abs=1e-3)
    attention = layer(half).self_attn  # returns (output, weights)
    record = evaluate_splice(half, attention, plain, identity, levels=[-1]).records[0]
    assert record.ce_spliced == pytest.approx(record.ce_clean, abs=1e-3)


def test_what_cannot_be_spliced(model, batches, identity):
    with pytest.raises(HookError, match="did not run"):
        evaluate_splice(model, torch.nn.Linear(2, 2), batches, identity)
    with pytest.raises(HookError, match="gave"):
        evaluate_splice(model, model.model.rotary_emb, batches, identity)
    with pytest.raises(SAEError, match="no positions in"):
        evaluate_splice(model, layer(model), batches, identity, positions={"PHRASE": {8}})
    no_targets = [SpliceBatch(b.model_inputs, torch.full_like(b.labels, -100), b.roles) for b in batches]
    with pytest.raises(SAEError, match="0 targets"):
        evaluate_splice(model, layer(model), no_targets, identity)
    no_roles = [SpliceBatch(b.model_inputs, b.labels) for b in batches]
    with pytest.raises(SAEError, match="carries none"):
        evaluate_splice(model, layer(model), no_roles, identity, positions=ROLES)
