"""Edges between two SAEs: predicted by the gradient, measured by ablation, and drawn without letting text act."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

from sae_lens_maira.attribution.attribute import attribute
from sae_lens_maira.attribution.edges import Edge, Node, SentenceGraph, is_kept, sentence_graph
from sae_lens_maira.attribution.entries import Entries, active_entries
from sae_lens_maira.attribution.inputs import encode_with_report
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.errors import ConfigError, HookError, SAEError
from sae_lens_maira.interface import load_sae

pytestmark = pytest.mark.compat
LEAST = 0.01


@pytest.fixture(scope="module")
def text_sae():
    return load_sae("phantom-text")


@pytest.fixture(scope="module")
def graph(hooked, study, text_sae):
    """With a low least share, so that some of the few edges are kept and some are not."""
    image_sae = load_sae("phantom-image")
    return sentence_graph(
        hooked, study, image_sae, text_sae, 0, "teacher", n_image=4, n_text=3, least_share=LEAST
    )


def test_the_stream_at_a_later_block_is_the_models(hooked, study):
    """Run from one hook point to a later one, the stream equals that of the whole model; an earlier one is refused."""
    run = ResidualRun(hooked, encode_with_report(hooked, study, "teacher"), "blocks.3.hook_resid_post")
    later = "blocks.6.hook_resid_post"
    _, cache = hooked.run_with_cache(run.encoding, names_filter=[later])
    torch.testing.assert_close(run.stream(run.hidden[None], later), cache[later], rtol=1e-4, atol=1e-4)
    with pytest.raises(HookError, match="above"):
        run.stream(run.hidden[None], "blocks.3.hook_resid_post")


def test_an_edge_is_what_ablating_its_source_takes(hooked, study, text_sae, graph):
    """Every measured edge of one source, recomputed with hooks in whole forward passes."""
    image_sae = load_sae("phantom-image")
    encoding = encode_with_report(hooked, study, "teacher")
    run = ResidualRun(hooked, encoding, graph.image_hook)
    entries, _ = active_entries(image_sae, run.hidden, (run.encoding.view[0] >= 0).nonzero()[:, 0])
    source = graph.image[0].latent
    delta = entries.delta((entries.latent == source).nonzero()[:, 0])
    assert graph.image[0].positions == int((entries.latent == source).sum())
    acts = []
    for edit in (0 * delta, -delta):
        with hooked.hooks(fwd_hooks=[(graph.image_hook, lambda value, hook, e=edit: value + e)]):
            _, cache = hooked.run_with_cache(run.encoding, names_filter=[graph.text_hook])
        acts.append(text_sae.encode(cache[graph.text_hook][0]))
    item = attribute(
        hooked, study, text_sae, 0, "teacher", graph.text_hook, "generated_only", check=False
    ).sentences[0]
    assert graph.text
    for node in graph.text:
        # The target's positions: those at which the sentence's attribution to it is positive.
        places = item.position[(item.latent == node.latent) & (item.value > 0)]
        assert len(places) == node.positions
        before, after = (float(a[places, node.latent].sum()) for a in acts)
        assert node.activation == pytest.approx(before, rel=1e-3)
        (edge,) = (e for e in graph.edges if (e.source, e.target) == (source, node.latent))
        assert edge.measured == pytest.approx(1 - after / before, abs=1e-3)


@pytest.mark.parametrize(
    ("predicted", "measured", "random", "kept"),
    [
        (0.10, 0.20, 0.09, True),
        (-0.10, -0.20, 0.09, True),
        (0.10, 0.20, 0.11, False),  # less than twice the random effect
        (0.10, 0.04, 0.00, False),  # less than the least share
        (-0.10, 0.20, 0.00, False),  # against the prediction
        (0.00, 0.20, 0.00, False),  # not predicted
    ],
)
def test_an_edge_is_kept_by_hand(predicted, measured, random, kept):
    assert is_kept(predicted, measured, random) is kept


def test_every_edge_is_measured_and_some_are_not_kept(graph):
    """Edges are marked by the rule; of this sentence's some pass and some do not."""
    assert len(graph.edges) == len(graph.image) * len(graph.text)
    assert all(e.kept == is_kept(e.predicted, e.measured, e.random, LEAST) for e in graph.edges)
    assert {edge.kept for edge in graph.edges} == {True, False}


def test_random_entries_have_the_norm_and_no_edge_passes_without_a_control(hooked, study, text_sae):
    """Random entries have the norm; a group of all is its own control; entries that write nothing are refused."""
    entries = Entries(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.ones(3), torch.eye(2), 4)
    generator = torch.Generator().manual_seed(0)
    whole = entries.delta(torch.arange(3))
    assert entries.random_delta(2, torch.tensor(5.0), generator).norm() == pytest.approx(5.0)
    torch.testing.assert_close(entries.random_delta(3, whole.norm(), generator), whole)
    with pytest.raises(SAEError, match="write nothing"):
        replace(entries, decoder=torch.zeros(2, 2)).random_delta(2, torch.tensor(5.0), generator)
    with pytest.raises(ConfigError, match="at least 1"):
        sentence_graph(hooked, study, text_sae, text_sae, draws=0)


def test_the_drawing_is_a_document_of_text_and_lines():
    """Names and sentences are escaped; only edges that were kept are drawn; nothing refers to anything outside."""
    hostile = '<script>alert(1)</script>&"'
    node = Node(5, hostile, 3, 1.0, 0.5, 0.0)
    edges = (Edge(5, 5, 0.5, 0.4, 0.0, True), Edge(5, 5, 0.5, 0.01, 0.0, False))
    text = SentenceGraph(hostile, -3.0, "a", "b", (node,), (node,), edges).svg()
    root = ET.fromstring(text)
    tags = [element.tag.split("}")[1] for element in root.iter()]
    assert set(tags) == {"svg", "title", "style", "text", "path", "rect", "g"}
    assert tags.count("path") == 2
    assert "1 of 2 measured edges" in text
    assert "href" not in text
    assert "url(" not in text
