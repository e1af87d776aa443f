import timm
import torch
from PIL import Image

import timm_collapse  # noqa: F401
from timm_collapse.models.transformer import Transformer, border_distances, gather_tokens, scatter_tokens

SMALL = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "decoder_dim": 32, "decoder_depth": 1}


def test_transformer_on_a_subset_equals_masked_attention_over_all():
    """Kept tokens carry their own positions: the same as attending over the whole grid with the others masked out."""
    model = Transformer(32, 2).eval()
    x = torch.randn(2, 12, 32)
    index = torch.tensor([[0, 3, 5, 11], [1, 2, 7, 8]])
    part = model(gather_tokens(x, index), (3, 4), index)
    mask = torch.zeros(2, 1, 1, 12, dtype=torch.bool).scatter(3, index[:, None, None], True)
    full, rope = x, model.positions((3, 4))
    for block in model.blocks:
        full = block(full, rope=rope, attn_mask=mask)
    assert torch.allclose(gather_tokens(model.norm(full), index), part, atol=1e-5)


def test_scatter_inverts_gather():
    x, index = torch.randn(2, 3, 5), torch.tensor([[4, 0, 2], [1, 5, 3]])
    full = scatter_tokens(x, index, torch.zeros(2, 6, 5))
    assert torch.equal(gather_tokens(full, index), x) and (full != 0).any(-1).sum() == 6


def test_border_distances_of_a_corner():
    assert torch.allclose(border_distances((3, 4))[0], torch.tensor([1.0, 1 / 3, 1.0, 0.25]))


def test_hidden_tokens_do_not_leak():
    model = timm.create_model("collapse_reconstructor_tiny", **SMALL).eval()
    tokens, visible = torch.randn(1, 16, 48), torch.tensor([[0, 5, 9]])
    changed = tokens.clone()
    changed[:, 7] += 10.0
    a, b = (model.reconstruct(t, visible, (4, 4)).tokens for t in (tokens, changed))
    assert torch.equal(a, b)
    changed[:, 5] += 1.0
    assert not torch.allclose(a, model.reconstruct(changed, visible, (4, 4)).tokens)


def test_errors_are_zero_where_visible_and_l1_elsewhere():
    model = timm.create_model("collapse_reconstructor_tiny", **SMALL).eval()
    tokens, visible = torch.randn(2, 16, 48), torch.tensor([[0, 5], [3, 4]])
    errors = model.errors(tokens, visible, (4, 4))
    assert (errors == 0).nonzero().tolist() == [[0, 0], [0, 5], [1, 3], [1, 4]]
    prediction = model.reconstruct(tokens, visible, (4, 4)).tokens
    assert torch.allclose(errors[1, 9], (prediction - tokens)[1, 9].abs().mean())


def test_no_visible_patch_and_other_grids_work():
    model = timm.create_model("collapse_reconstructor_tiny", **SMALL).eval()
    tokens = torch.randn(2, 15, 48)
    empty = torch.empty(2, 0, dtype=torch.long)
    assert torch.isfinite(model.reconstruct(tokens, empty, (3, 5)).tokens).all()


def test_training_lowers_the_error_of_hidden_patches():
    model = timm.create_model("collapse_reconstructor_tiny", **SMALL)
    images = torch.randn(8, 3, 1, 1).expand(8, 3, 16, 16)  # one colour an image: any visible patch tells all
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        out = model(images, torch.rand(8, 16), 4)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["l1"].item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_bundled_judge_of_photos_knows_more_the_more_it_sees():
    from sklearn.datasets import load_sample_image

    from timm_collapse.data import eval_transform

    judge = timm.create_model("collapse_reconstructor_tiny_224", pretrained=True).eval()
    transform = eval_transform(224, judge.pretrained_cfg["mean"], judge.pretrained_cfg["std"])
    tokens = judge.tokenizer(transform(Image.fromarray(load_sample_image("china.jpg"))).unsqueeze(0))
    order = torch.randperm(196).unsqueeze(0)
    errors = [judge.errors(tokens, order[:, :k], (14, 14)).sum().item() / (196 - k) for k in (0, 43, 98)]
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.1 * errors[2]
