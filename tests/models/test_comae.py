import pytest
import timm
import torch

import timm_collapse  # noqa: F401
from timm_collapse.models import CoMAE
from timm_collapse.models.offsets import neighbourhood, others
from timm_collapse.order import CollapseError

SMALL = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "decoder_dim": 32, "decoder_depth": 1}


def comae(**kwargs) -> CoMAE:
    return timm.create_model("comae_tiny", **{**SMALL, **kwargs}).eval()


@pytest.mark.parametrize("recipe", ["stable", "paper"])
def test_target_patch_leaks_into_neither_half(recipe):
    model = comae(recipe=recipe)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokens, targets = torch.randn(1, 16, 48), torch.tensor([[5]])
    changed = tokens.clone()
    changed[:, 5] += 3.0
    noise = torch.randn(1, 1, 15, 48)
    weights = model.weights(tokens, targets)
    assert torch.equal(weights, model.weights(changed, targets))
    assert torch.equal(model.decode(tokens, targets, weights, noise), model.decode(changed, targets, weights, noise))
    changed[:, 6] += 3.0
    assert not torch.equal(weights, model.weights(changed, targets))
    assert not torch.equal(
        model.decode(tokens, targets, weights, noise), model.decode(changed, targets, weights, noise)
    )


@pytest.mark.parametrize("head", ["linear", "offset", "attention"])
def test_an_excluded_neighbourhood_leaks_into_neither_half(head):
    model = comae(head=head, exclude=1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokens, targets, noise = torch.randn(1, 16, 48), torch.tensor([[5, 0]]), torch.randn(1, 2, 15, 48)
    weights = model.weights(tokens, targets)
    full = torch.zeros(1, 2, 16).scatter(2, others(targets, 16), weights)
    assert (full[0, 0] > 0).nonzero().flatten().tolist() == [3, 7, 11, 12, 13, 14, 15]
    changed = tokens.clone()
    changed[:, [0, 1, 2, 4, 5, 6, 8, 9, 10]] += 3.0
    assert torch.equal(weights[:, :1], model.weights(changed, targets)[:, :1])
    for given in (weights, torch.ones_like(weights)):
        ours, theirs = (model.decode(x, targets, given, noise)[:, 0] for x in (tokens, changed))
        assert torch.equal(ours, theirs)
    changed[:, 7] += 3.0
    assert not torch.equal(weights[:, :1], model.weights(changed, targets)[:, :1])


def test_attention_speaks_from_the_first_step_and_an_even_one_says_nothing():
    model, tokens, targets = comae(head="attention"), torch.randn(2, 16, 48), torch.tensor([[5], [6]])
    position, image = model.logits(tokens, targets)
    assert position.abs().max() == 0 and image.std() > 0.2
    # the mean attention of the heads is a distribution over the 15 others
    assert torch.allclose(image.exp().mean(-1), torch.ones(2, 1), atol=1e-5)
    torch.nn.init.zeros_(model.encoder["key"].weight)
    assert torch.allclose(model.logits(tokens, targets)[1], torch.zeros(2, 1, 15), atol=1e-5)


def test_the_scale_fits_the_error_and_has_no_say_in_the_reconstruction():
    model = comae(scale=True)
    images, targets, noise = torch.randn(2, 3, 16, 16), torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 2, 15, 48)
    out = model(images, targets, noise, train_encoder=False)
    out["loss"].backward()
    plain = comae()
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = plain(images, targets, noise, train_encoder=False)
    expected["loss"].backward()
    assert torch.equal(out["l1"], expected["l1"]) and "nll" not in expected
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(ours[name], grad) for name, grad in grads.items())
    assert {name for name in ours if name not in grads} == {
        f"decoder.scale.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")
    }
    optimizer = torch.optim.Adam(model.decoder["scale"].parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        model(images, targets, noise, train_encoder=False)["loss"].backward()
        optimizer.step()
    tokens = model.tokenizer(images)
    found = model.reconstruct(tokens, targets, model.weights(tokens, targets), noise)
    errors = (found.tokens - tokens.gather(1, targets.unsqueeze(-1).expand(-1, -1, 48))).abs().mean(-1)
    assert torch.allclose(found.log_scale.exp(), errors, rtol=0.1)  # the best scale of a Laplace distribution


def test_weights_are_in_the_unit_interval_for_any_logits():
    model = comae(recipe="paper")
    torch.nn.init.normal_(model.encoder["head"].weight, std=100.0)
    weights = model.weights(torch.randn(2, 16, 48), torch.tensor([[0, 5], [1, 2]]))
    assert weights.shape == (2, 2, 15) and weights.min() >= 0 and weights.max() <= 1 and weights.std() > 0.3


def test_noise_gate_follows_the_paper():
    """A token of weight w enters the decoder as a e + (1 - a) eps with a = exp(-(1 - w)^2 / (2 sigma^2))."""
    model = comae(sigma=0.5, skip=0)
    seen = []
    model.decoder["embed"].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    tokens, noise = torch.randn(1, 16, 48), torch.randn(1, 1, 15, 48)
    weights = torch.rand(1, 1, 15)
    model.decode(tokens, torch.tensor([[3]]), weights, noise)
    rest = tokens[:, [n for n in range(16) if n != 3]]
    a = torch.exp(-((1 - weights[0, 0]) ** 2) / 0.5)[None, :, None]
    assert torch.allclose(seen[0], a * rest + (1 - a) * noise[0], atol=1e-6)


def test_others_skip_the_target():
    assert others(torch.tensor([[0, 2, 15]]), 16)[0, :, :3].tolist() == [[1, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_contrastive_loss_of_equal_and_of_disjoint_masks():
    model, targets = comae(), torch.tensor([[0, 15]])
    equal = torch.zeros(1, 2, 15)
    equal[0, 0, 4] = 1  # position 5 for target 0
    equal[0, 1, 5] = 1  # position 5 for target 15
    assert model.contrastive_loss(equal, targets).item() == pytest.approx(0.6931, abs=1e-3)
    equal[0, 1, 5], equal[0, 1, 9] = 0, 1
    expected = torch.log(1 + torch.exp(torch.tensor(-1.0))).item()  # temperature 1 at the start
    assert model.contrastive_loss(equal, targets).item() == pytest.approx(expected, abs=1e-4)


def test_temperature_has_a_floor():
    model, targets = comae(min_temperature=0.1), torch.tensor([[0, 15]])
    weights = torch.rand(1, 2, 15)
    model.log_temperature.data.fill_(-20.0)
    low = model.contrastive_loss(weights, targets)
    model.log_temperature.data.fill_(torch.log(torch.tensor(0.1)))
    assert torch.allclose(low, model.contrastive_loss(weights, targets), atol=1e-5)


def test_neighbourhood_against_a_slow_reference():
    model = comae(skip=1)
    tokens = torch.randn(1, 16, 48)
    for target in (0, 5, 7, 15):
        targets = torch.tensor([[target]])
        seen = tokens[:, others(targets, model.num_patches)[0, 0]]
        got = neighbourhood(seen, targets, (4, 4), 1).view(8, 48)
        row, col, i = target // 4, target % 4, 0
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy, dx) == (0, 0):
                    continue
                inside = 0 <= row + dy < 4 and 0 <= col + dx < 4
                expected = tokens[0, (row + dy) * 4 + col + dx] if inside else torch.zeros(48)
                assert torch.equal(got[i], expected), (target, dy, dx)
                i += 1


def test_dependency_in_chunks_equals_one_pass_and_rows_are_the_weights():
    model = comae()
    torch.nn.init.normal_(model.encoder["head"].weight)
    images = torch.randn(2, 3, 16, 16)
    whole = model.dependency(images)
    assert torch.allclose(whole, model.dependency(images, max_tokens=100), atol=1e-5)
    row = model.weights(model.tokenizer(images), torch.tensor([[5], [5]]))
    assert torch.allclose(whole[:, 5, [n for n in range(16) if n != 5]], row[:, 0], atol=1e-5)
    assert whole.diagonal(dim1=1, dim2=2).abs().max() == 0


def test_encoder_and_decoder_steps_move_only_their_half():
    model = comae()
    images, targets, noise = torch.randn(2, 3, 16, 16), torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 2, 15, 48)
    model(images, targets, noise, train_encoder=False)["loss"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.parameters())
    model.zero_grad()
    model(images, targets, noise)["loss"].backward()
    assert model.encoder["head"].weight.grad.abs().sum() > 0


def test_the_budget_and_the_recipe_are_arguments():
    paper, stable = comae(recipe="paper"), comae()
    assert (paper.budget, paper.skip, paper.random_share, paper.decoder_first, paper.head_kind) == (
        0,
        0,
        0,
        0,
        "linear",
    )
    assert stable.budget > 0 and comae(budget=0.0).budget == 0 and comae(recipe="paper", skip=2).skip == 2
    with pytest.raises(CollapseError, match="recipe.*'papers'"):
        comae(recipe="papers")
    with pytest.raises(CollapseError, match="sigma"):
        comae(sigma=0.0)
    with pytest.raises(CollapseError, match="expected 16 x 16, got .*32"):
        comae().dependency(torch.zeros(1, 3, 32, 32))


def test_paper_sizes_on_a_vae(tmp_path):
    """Both readings of the paper's widths, on any AutoencoderKL."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        latent_channels=16,
        norm_num_groups=2,
    ).save_pretrained(tmp_path)
    for name, dim, decoder_dim in (
        ("comae_base_kl16_256", 64, 256),
        ("comae_base_kl16_256_wide_encoder", 256, 64),
    ):
        model = timm.create_model(name, vae=str(tmp_path), depth=1, decoder_depth=1)
        assert model.grid == (16, 16) and model.tokenizer.dim == 16 and model.tokenizer.scale == 0.2325
        assert model.encoder["embed"].out_features == dim and model.decoder["embed"].out_features == decoder_dim
    graph = model.eval().dependency(torch.rand(1, 3, 256, 256))
    assert graph.shape == (1, 256, 256) and graph.max() > 0
