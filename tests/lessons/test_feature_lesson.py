import math

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_collapse import CollapseError, Order, Ranker
from timm_collapse.collapse.remainder import Plan
from timm_collapse.lessons import features
from timm_collapse.lessons.features import FeatureLesson
from timm_collapse.order import parallel_picks

SHAPE = {"embed_dim": 24, "depth": 2, "num_heads": 2}


class Draws:
    """The random numbers that a `Run` gives."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, *shape):
        return torch.rand(*shape, generator=self.generator)

    def randint(self, low, high):
        return int(torch.randint(low, high, (), generator=self.generator))

    def uniform(self):
        return float(torch.rand((), generator=self.generator))


def small_ranker(**kwargs) -> Ranker:
    torch.manual_seed(1)
    return Ranker(img_size=32, patch_size=8, dim=32, depth=1, rank=4, phases=(0.0, 0.3), **kwargs)


@pytest.mark.parametrize("remainder", ["none", "fused", "coarse"])
@pytest.mark.parametrize("policy", [False, True])
def test_sets_and_errors(remainder, policy):
    vit = timm.create_model("cvit_tiny_patch4_32", patch_size=8, num_classes=5, **SHAPE)
    torch.nn.init.normal_(vit.head.weight)  # timm's is 0: all outputs would be equal
    lesson, images = FeatureLesson(vit, num_sets=4, remainders=(remainder,)), torch.randn(3, 3, 32, 32)
    sizes = set()
    for seed in range(8):
        visible, revealed, errors = lesson(images, Draws(seed), small_ranker() if policy else None, images)
        assert visible.shape == (3, 16) and revealed.shape == (3, 4, 16) and errors.shape == (3, 4)
        assert (revealed.bool() | ~visible.unsqueeze(1)).all()  # every set holds the visible one
        size = revealed.sum(-1).unique()
        assert len(size) == 1  # all sets are of one size
        sizes.add(int(size))
        whole = timm_output(vit, images, 1.0).log_softmax(-1)
        for i in range(4):
            seen = timm_output(vit, images, vit.keep, Order(revealed[:, i].float(), (4, 4))).log_softmax(-1)
            slow = (whole.exp() * (whole - seen)).sum(-1)
            assert torch.allclose(errors[:, i].square(), slow, atol=1e-5)
    assert len(sizes) > 2


@torch.no_grad()
def timm_output(vit, images, keep, order=None):
    before, vit.keep = vit.keep, keep
    output = vit(images, order=order)
    vit.keep = before
    return output


def test_without_a_classifier_features_are_compared():
    vit = timm.create_model("cvit_tiny_patch4_32", patch_size=8, num_classes=0, **SHAPE)
    images = torch.randn(2, 3, 32, 32)
    _, revealed, errors = FeatureLesson(vit, num_sets=2)(images, Draws(), None, images)
    whole = timm_output(vit, images, 1.0)
    seen = timm_output(vit, images, vit.keep, Order(revealed[:, 1].float(), (4, 4)))
    assert torch.allclose(errors[:, 1], (1 - F.cosine_similarity(seen, whole)).sqrt(), atol=1e-3)


def test_split_learns_which_cells_are_small():
    """A set is that of the patches in small cells, and the error is that of the ViT which sees them so."""
    vit = timm.create_model("cvit_tiny_patch4_32", num_classes=5, area_bias=0.5, **SHAPE)
    torch.nn.init.normal_(vit.head.weight)
    lesson, images = FeatureLesson(vit, num_sets=3, remainders=("split",)), torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    policy, budgets = Ranker(img_size=32, patch_size=4, dim=32, depth=1, rank=4), set()
    for seed in range(6):
        visible, revealed, errors = lesson(images, Draws(seed), policy if seed % 2 else None, images)
        plan = vit.plan(vit.keep, (8, 8))
        budgets.add(vit.keep)
        assert not visible.any() and 16 <= vit.keep <= 0.6 * 64
        share = plan.splits[0] / (plan.shapes[1][0] * plan.shapes[1][1])
        assert (revealed.mean(-1) - share).abs().max() < 1e-5  # all sets are of one size, by area
        whole = timm_output(vit, images, 1.0).log_softmax(-1)
        for i in range(3):
            seen = timm_output(vit, images, vit.keep, Order(revealed[:, i].float(), (8, 8))).log_softmax(-1)
            slow = (whole.exp() * (whole - seen)).sum(-1)
            if plan.shapes[0] == (8, 8):  # else the patches on the border of two cells hide which it was
                assert torch.allclose(errors[:, i].square(), slow, atol=1e-5)
    assert len(budgets) > 3


class OnePatchMatters:
    """Stands for a ViT whose output is known exactly where the brightest patch is among the visible ones."""

    num_classes, remainder = 2, "none"

    def __init__(self):
        self.keep = 1.0

    def eval(self):
        return self

    def requires_grad_(self, flag):
        return self

    def parameters(self):
        return iter([torch.zeros(())])

    def modules(self):
        return iter(())

    def image_grid(self, images):
        return (4, 4)

    def plan(self, budget, grid):
        return Plan(budget, grid, (8, 8))

    def __call__(self, images, order=None):
        brightest = F.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1).argmax(1, keepdim=True)
        known = torch.ones(len(images)) if order is None else order.mask(self.keep).gather(1, brightest)[:, 0].float()
        return torch.stack([3.0 * known, torch.zeros(len(images))], 1)


def test_ranker_learns_the_patch_that_decides():
    torch.manual_seed(0)
    ranker, lesson, draws = small_ranker(), FeatureLesson(OnePatchMatters(), num_sets=6), Draws(3)
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=3e-3)

    def images(batch):
        flat = 0.3 * torch.randn(batch, 3, 32, 32)
        place = torch.randint(0, 16, (batch,))
        for i, n in enumerate(place.tolist()):
            flat[i, :, 8 * (n // 4) : 8 * (n // 4) + 8, 8 * (n % 4) : 8 * (n % 4) + 8] += 1.5
        return flat, place

    def found():
        batch, place = images(200)
        return (ranker.rank(batch).argmax(1) == place).float().mean().item()

    before = found()
    for step in range(160):
        batch, _ = images(32)
        out = ranker(batch, *lesson(batch, draws, ranker if step > 20 and step % 2 else None, batch))
        optimizer.zero_grad()
        out["loss"].backward()
        torch.nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)  # as in training
        optimizer.step()
    assert before < 0.4 and found() > 0.9, (before, found())


def test_own_sets_go_on_as_the_ranker_picks_in_use(monkeypatch):
    """With its own kernel and rounds, where some patches are visible."""
    monkeypatch.setattr(features, "jitter_order", lambda order, *_: order)
    policy, images = small_ranker(neighbours=0.95, rounds=1), torch.randn(4, 3, 32, 32)
    torch.nn.init.normal_(policy.loadings.weight, std=0.3)
    lesson, differing = FeatureLesson(OnePatchMatters(), num_sets=2), 0
    for seed in range(40):
        visible, revealed, _ = lesson(images, Draws(seed), policy, images)
        if not visible.any():
            continue
        factors = policy.factors(policy.static(images), visible)
        count = int((revealed[0, 1].bool() & ~visible[0]).sum())
        for kwargs, own in (({"rounds": 1, "kernel": policy.kernel}, True), ({}, False)):
            picked = parallel_picks(*factors, visible, **kwargs)[0][:, :count]
            same = torch.equal(revealed[:, 1].bool(), visible.scatter(1, picked, True))
            assert same or not own
            differing += not same
    assert differing > 1


def test_set_losses_are_shares_of_the_variance_among_sets():
    ranker = small_ranker()
    images, visible = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    revealed = torch.rand(2, 5, 16).argsort(-1) < 4
    with torch.no_grad():
        from timm_collapse.order import expected_errors

        predicted = expected_errors(*ranker.factors(ranker.static(images), visible), revealed).mean(-1)
    right = ranker(images, visible, revealed, predicted)
    assert right["unexplained"] < 1e-6 and right["level"] < 1e-6
    shifted = ranker(images, visible, revealed, predicted + 0.5)
    assert shifted["unexplained"] < 1e-5 and math.isclose(shifted["level"].item(), 0.25, rel_tol=1e-4)
    flat = ranker(images, visible, revealed, 1000 * torch.randn(2, 5))
    assert math.isclose(flat["unexplained"].item(), 1.0, rel_tol=1e-2)  # a prediction that knows nothing


def test_one_set_is_refused():
    with pytest.raises(CollapseError, match="sets: must be at least 2"):
        FeatureLesson(OnePatchMatters(), num_sets=1)


@pytest.mark.parametrize("remainder", ["mixed", "zoom"])
def test_cells_of_many_sizes_are_refused(remainder):
    with pytest.raises(CollapseError, match=f"none, fused, coarse and split, got none, {remainder}"):
        FeatureLesson(OnePatchMatters(), remainders=("none", remainder))
