"""Graphs of a CoMAE and of a ranker: what they say, that they share the ways to rank, and what a CoMAE's costs."""

import pytest
import timm
import torch

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.hub.files import SETTINGS_FILE
from timm_collapse.hub.save import save_orderer
from timm_collapse.models.offsets import others
from timm_collapse.order import RANKINGS, neighbour_kernel, rank_graph

SMALL = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1}


def comae(**kwargs):
    model = timm.create_model("comae_tiny", **SMALL, decoder_dim=32, decoder_depth=1, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def averaging():
    """A CoMAE whose decoder averages the patches around the target, and smooth images that this is good for."""
    model = comae(skip=1, scale=True)
    with torch.no_grad():
        for parameter in (*model.decoder["head"].parameters(), model.decoder["skip"].bias):
            parameter.zero_()
        model.decoder["skip"].weight.copy_(torch.eye(48).repeat(1, 8) / 4)
    return model, 3 * torch.nn.functional.interpolate(torch.randn(3, 3, 2, 2), (16, 16), mode="bilinear")


def test_evidence_shares_what_is_told_by_what_the_error_owes_to_each(monkeypatch):
    """A decoder that adds up its weights times known values: its slopes and errors are known."""
    model, values = comae(), torch.linspace(-0.2, 1.0, 15)

    def decode(tokens, targets, weights, noise):
        return (weights * values).sum(-1, keepdim=True).expand(-1, -1, tokens.shape[-1])

    monkeypatch.setattr(model, "decode", decode)
    images = torch.full((1, 3, 16, 16), 9.0)  # farther away than all of them together
    graph, unknown = model.evidence(images)
    weights = model.weights(model.tokenizer(images), torch.arange(16)[None])[0]
    owed = (weights * values).clamp_min(0)
    told = 9 / (9 - (weights * values).sum(1))
    expected = 1 - told[:, None] ** (-2 * owed / owed.sum(1, keepdim=True))
    rows = graph[0].gather(1, others(torch.arange(16)[None], 16)[0])
    torch.testing.assert_close(rows, expected.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(unknown, torch.full((1, 16), 9.0))
    assert (rows[:, 0] == 0).all() and graph.diagonal(dim1=1, dim2=2).abs().max() == 0


def test_a_decoder_that_is_told_nothing_depends_on_nothing(monkeypatch):
    model = comae()
    monkeypatch.setattr(
        model, "decode", lambda tokens, targets, weights, noise: 0 * weights[..., :1].expand(-1, -1, 48)
    )
    graph, unknown = model.evidence(torch.randn(2, 3, 16, 16))
    assert graph.abs().max() == 0 and unknown.min() > 0


def test_evidence_in_chunks_under_inference_and_beside_other_images_is_the_same():
    model, images = averaging()
    graph, unknown = model.evidence(images)
    assert 0 < graph.max() < 1 and graph.min() == 0 and not graph.requires_grad
    with torch.inference_mode():
        inside = model.evidence(images.clone(), max_tokens=100)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.evidence(images)
    for again in (inside, cast, [torch.cat(parts) for parts in zip(*map(model.evidence, images.split(1)))]):
        torch.testing.assert_close(again[0], graph, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(again[1], unknown, atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(CollapseError, match="expected 16 x 16, got .*32"):
        model.evidence(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("beta", ["even", "errors", "scale"])
@pytest.mark.parametrize("evidence", ["errors", "weights"])
def test_the_orderer_ranks_what_it_says(evidence, beta, ranking):
    model, images = averaging()
    orderer = CollapseOrder(model, ranking, evidence=evidence, beta=beta)
    errors, nothing = model.evidence(images)
    graph = errors if evidence == "errors" else model.dependency(images)
    unknown = {"even": torch.ones(3, 16), "errors": nothing, "scale": model.expected(images)}[beta]
    assert beta == "even" or unknown.std() > 0
    assert torch.equal(orderer.graph(images), graph) and torch.equal(orderer.dependencies(images)[1], unknown)
    expected = rank_graph(graph, ranking, personalization=unknown)
    assert torch.equal(orderer(images).indices, expected.argsort(dim=1, descending=True, stable=True))
    weights = torch.rand(3, 16)
    weighted = rank_graph(graph, ranking, personalization=unknown * weights / weights.amax(1, keepdim=True))
    assert torch.equal(orderer(images, weights=weights).indices, weighted.argsort(dim=1, descending=True, stable=True))


def test_the_defaults_are_coverage_of_the_errors_and_the_published_rule_where_it_is_refined():
    model = comae()
    plain, refined = CollapseOrder(model), CollapseOrder(model, refine=0.2)
    assert (plain.ranking, plain.evidence, plain.beta) == ("coverage", "errors", "even")
    assert (refined.ranking, refined.evidence, refined.beta) == ("pagerank", "weights", "even")
    assert plain.describe((4, 4)) == "coverage 0.85 of errors" and refined.describe((4, 4)) == "pagerank 0.85"
    assert CollapseOrder(model, beta="errors").describe((4, 4)) == "coverage 0.85 of errors, beta of errors"
    with pytest.raises(CollapseError, match="evidence: must be one of errors, weights, got 'both'"):
        CollapseOrder(model, evidence="both")
    with pytest.raises(CollapseError, match="beta: must be one of even, errors, scale, got 'odd'"):
        CollapseOrder(model, beta="odd")
    for call in (lambda: CollapseOrder(model, beta="scale"), lambda: model.expected(torch.zeros(1, 3, 16, 16))):
        with pytest.raises(CollapseError, match="scale"):
            call()


def test_the_expected_scale_in_chunks_is_the_same():
    model, images = averaging()
    assert torch.allclose(model.expected(images), model.expected(images, max_tokens=100), atol=1e-5)


def test_settings_come_back_and_older_ones_rank_as_published(tmp_path):
    orderer = CollapseOrder(comae(), "in_degree", beta="errors")
    save_orderer(orderer, tmp_path)
    again = CollapseOrder.from_pretrained(str(tmp_path))
    assert (again.ranking, again.evidence, again.beta) == ("in_degree", "errors", "errors")
    (tmp_path / SETTINGS_FILE).write_text('{"ranking": "pagerank", "damping": 0.85}')
    again = CollapseOrder.from_pretrained(str(tmp_path))
    assert (again.ranking, again.evidence, again.beta) == ("pagerank", "weights", "even")


@pytest.mark.parametrize("cell, neighbours", [(1, 0.0), (2, 0.0), (1, 0.3)])
def test_the_graph_of_a_ranker_is_the_squared_correlation_of_its_factor_model(cell, neighbours):
    model = timm.create_model("collapse_ranker_tiny", **SMALL, rank=8, cell=cell, neighbours=neighbours).eval()
    images = torch.randn(2, 3, 16, 16)
    orderer = CollapseOrder(model)
    with torch.no_grad():
        loadings, noise = model.factors(model.static(images))
    covariance = loadings @ loadings.mT + torch.diag_embed(noise)
    variance = covariance.diagonal(dim1=1, dim2=2)
    expected = covariance**2 / variance[:, :, None] / variance[:, None]
    expected = 1 - (1 - expected) * (1 - neighbour_kernel((4, 4), neighbours))  # what neighbours share anyway
    expected.diagonal(dim1=1, dim2=2).zero_()
    torch.testing.assert_close(orderer.graph(images), expected)
    torch.testing.assert_close(model.evidence(images)[1], variance.sqrt())
