"""Edges between two SAEs: predicted by the gradient, measured by ablation, and drawn without letting text act."""

import xml.etree.ElementTree as ET

import pytest
import torch

from sae_lens_maira.attribution.attribute import encode_with_report
from sae_lens_maira.attribution.edges import Edge, Node, SentenceGraph, sentence_graph
from sae_lens_maira.attribution.entries import active_entries
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.errors import HookError
from sae_lens_maira.interface import load_sae

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def text_sae():
    return load_sae("phantom-text")


@pytest.fixture(scope="module")
def graph(hooked, study, text_sae):
    return sentence_graph(
        hooked, study, load_sae("phantom-image"), text_sae, 0, "teacher", n_image=4, n_text=3
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
    for node in graph.text:
        # The target's positions: those where it is active, as many as the node says, if it is active nowhere else.
        places = acts[0][:, node.latent] > 0
        if int(places.sum()) != node.positions:
            continue
        before, after = (float(a[places, node.latent].sum()) for a in acts)
        assert node.activation == pytest.approx(before, rel=1e-3)
        (edge,) = (e for e in graph.edges if (e.source, e.target) == (source, node.latent))
        assert edge.measured == pytest.approx(1 - after / before, abs=1e-3)


def test_kept_edges_passed_their_check(graph):
    assert len(graph.edges) == len(graph.image) * len(graph.text)
    for edge in graph.edges:
        passed = abs(edge.measured) >= max(0.05, 2 * edge.random) and edge.measured * edge.predicted > 0
        assert edge.kept == passed


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
