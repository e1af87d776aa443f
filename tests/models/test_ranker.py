import pytest
import timm
import torch

import timm_collapse  # noqa: F401
from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.evaluation import count_launches, count_macs
from timm_collapse.hub.save import save_model
from timm_collapse.lessons.imitation import Imitation, inherit
from timm_collapse.lessons.pixels import Lesson
from timm_collapse.models import unpatchify
from timm_collapse.models.ranker import Ranker
from timm_collapse.order import expected_errors, parallel_picks, single_errors
from timm_collapse.order.spread import bayer_ranks

SMALL = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1, "rank": 8, "phases": (0.0, 0.25, 0.5)}


def ranker(**kwargs) -> Ranker:
    return timm.create_model("collapse_ranker_tiny", **{**SMALL, **kwargs}).eval()


@pytest.mark.parametrize("cell", [1, 2])
def test_scores_are_a_permutation_and_upto_agrees_with_the_whole(cell):
    model, images = ranker(cell=cell), torch.randn(3, 3, 16, 16)
    whole = model.rank(images)
    assert torch.equal(whole.sort(1).values, (torch.arange(1, 17) / 16).expand(3, -1))
    for upto in (1, 4, 7, 16):
        part = model.rank(images, upto=upto)
        assert torch.equal(part.sort(1).values, whole.sort(1).values)
        assert torch.equal(part.topk(upto).indices, whole.topk(upto).indices)


def test_upto_saves_the_later_phases():
    model, images = ranker(), torch.randn(1, 3, 16, 16)
    passes = []
    model.trunk.norm.register_forward_hook(lambda *_: passes.append(1))
    for upto, expected in ((4, 1), (5, 2), (9, 3), (16, 3)):
        passes.clear()
        model.rank(images, upto=upto)
        assert len(passes) == expected


@pytest.mark.parametrize("phases, later", [((0.0, 0.25, 0.5), [8]), ((0.0, 0.2), [])])
def test_the_first_patches_by_a_spread_and_the_others_as_where_these_are_visible(phases, later):
    model, images = ranker(spread_first=0.33, phases=phases), torch.randn(3, 3, 16, 16)
    torch.nn.init.normal_(model.visible_token)
    first = bayer_ranks((4, 4)).argsort()[:5].expand(3, -1)
    assert model.starts() == [5, *later] and model.starts(spread=False)[0] == 0
    passes = []
    model.trunk.norm.register_forward_hook(lambda *_: passes.append(1))
    found = model.rank(images).argsort(1, descending=True)
    assert torch.equal(found[:, :5], first) and len(passes) == len(model.starts())
    visible = torch.zeros(3, 16, dtype=torch.bool).scatter(1, first, True)
    until = (later or [16])[0]
    assert torch.equal(found[:, 5:until], model.picks(model.static(images), visible)[0][:, : until - 5])
    for upto in (1, 5, 6, 16):
        part = model.rank(images, upto=upto)
        assert torch.equal(part.topk(upto).indices, found[:, :upto])
        assert torch.equal(part.sort(1).values, model.rank(images).sort(1).values)
    passes.clear()
    model.rank(images, upto=5)
    assert not passes
    weights = torch.rand(3, 16)
    assert torch.equal(model.rank(images, weights=weights), ranker_like(model, 0.0).rank(images, weights=weights))
    with pytest.raises(CollapseError, match="spread_first must be in \\[0, 1\\), got 1"):
        ranker(spread_first=1)


def ranker_like(model: Ranker, spread_first: float) -> Ranker:
    other = ranker(phases=model.phases, spread_first=spread_first)
    other.load_state_dict(model.state_dict())
    return other


def test_what_a_ranker_is_given_instead_of_its_own_stays_with_its_orders(tmp_path):
    save_model(ranker(), tmp_path)
    orderer, images = (
        CollapseOrder.from_pretrained(str(tmp_path), phases=(0.0, 0.4), spread_first=0.2),
        torch.rand(2, 3, 16, 16),
    )
    assert orderer.model.starts() == [3, 6] and torch.equal(orderer(images).scores, orderer.model.rank(images))
    assert orderer.describe((4, 4)) == "phases (0.0, 0.4) spread_first 0.2"
    assert CollapseOrder.from_pretrained(str(tmp_path)).describe((4, 4)) == ""
    orderer.model.to("meta")
    assert orderer(images).scores.shape == (2, 16) and orderer.model.starts() == [3, 6]
    with pytest.raises(CollapseError, match="phases"):
        CollapseOrder.from_pretrained("comae_tiny", phases=(0.0, 0.4))


@pytest.mark.parametrize("cell", [1, 2])
def test_static_blocks_run_once_and_do_not_see_what_is_visible(cell):
    model, images = ranker(depth=3, static_depth=2, cell=cell), torch.randn(1, 3, 16, 16)
    calls = []
    for i, block in enumerate(model.trunk.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    model.rank(images)
    assert calls == [0, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="static_depth"):
        ranker(static_depth=1)


def test_any_image_size_is_resized_and_other_phases_can_be_asked_for():
    model = ranker()
    assert model.rank(torch.randn(2, 3, 40, 24)).shape == (2, 16)
    two, three = (model.rank(torch.ones(1, 3, 16, 16), phases=p) for p in ((0.0, 0.5), (0.0, 0.25, 0.5)))
    assert torch.equal(two.topk(4).indices, three.topk(4).indices)
    for call in (lambda: ranker(phases=(0.1, 0.5)), lambda: model.rank(torch.ones(1, 3, 16, 16), phases=(0.5,))):
        with pytest.raises(CollapseError, match="phases must ascend"):
            call()


@pytest.mark.parametrize("cell", [1, 2])
def test_the_network_is_told_which_patches_are_visible_and_where(cell):
    """Its factors are those of each patch's own cell: moving one visible patch changes what is predicted."""
    model, static = ranker(cell=cell), torch.randn(1, 16 // cell**2, 32)
    none = torch.zeros(1, 16, dtype=torch.bool)
    torch.nn.init.normal_(model.visible_token)
    assert all(torch.equal(a, b) for a, b in zip(model.factors(static), model.factors(static, none)))
    one, other = (none.clone().scatter(1, torch.tensor([[n]]), True) for n in (0, 1))
    assert not torch.allclose(model.factors(static, one)[1], model.factors(static, other)[1])
    torch.nn.init.zeros_(model.visible_token)  # now only the factor model knows: as a set revealed later
    (g, d), (given, same) = model.factors(static), model.factors(static, one)
    assert torch.equal(d, same)
    later = expected_errors(g, d, one.unsqueeze(1))
    assert torch.allclose(later, expected_errors(given, d, none.unsqueeze(1)) * ~one, atol=1e-6)


def test_a_cell_predicts_its_own_patches():
    """Patch n of the grid is at row n // 4: cell 1 of 2 x 2 holds the patches 2, 3, 6 and 7."""
    model = ranker(cell=2, depth=1)
    noise = torch.arange(16.0).view(1, 4, 4)  # [cell, place in the cell]
    model.head.forward = lambda x: torch.cat([torch.zeros(1, 4, 4, 8), noise.unsqueeze(-1)], -1).flatten(2)
    found = model.factors(torch.randn(1, 4, 32))[1].view(4, 4)
    assert found[:2, 2:].flatten().allclose(torch.nn.functional.softplus(noise[0, 1]) + 1e-4)
    told = []
    model.trunk.blocks[0].register_forward_pre_hook(lambda _, args: told.append(args[0]))
    torch.nn.init.ones_(model.visible_token)
    model.factors(torch.zeros(1, 4, 32), torch.zeros(1, 16, dtype=torch.bool).scatter(1, torch.tensor([[6, 7]]), True))
    assert told[0][0].mean(-1).tolist() == [0, 2, 0, 0]


def test_tiny_grids_and_bfloat16_work():
    scores = ranker(img_size=8, phases=(0.0, 0.06, 0.3)).rank(torch.randn(2, 3, 8, 8))
    assert torch.equal(scores.sort(1).values, torch.tensor([[0.25, 0.5, 0.75, 1.0]] * 2))
    assert ranker().bfloat16().rank(torch.randn(2, 3, 16, 16).bfloat16()).shape == (2, 16)
    for kwargs, message in (
        ({"in_chans": 1}, "in_chans"),
        ({"img_size": (16, 8)}, "square"),
        ({"img_size": 18}, "multiple"),
        ({"img_size": 20, "cell": 2}, "multiple"),
    ):
        with pytest.raises(CollapseError, match=message):
            ranker(**kwargs)


@pytest.mark.parametrize("cell", [1, 2])
def test_an_image_is_ordered_alike_alone_and_in_a_batch(cell):
    model, images = ranker(cell=cell), torch.randn(4, 3, 16, 16)
    whole = model.rank(images)
    assert all(torch.equal(model.rank(images[i : i + 1])[0], whole[i]) for i in range(4))


class Fixed:
    """The part of a Run that a lesson needs."""

    def rand(self, batch, *shape):
        return torch.rand(batch, *shape)

    def uniform(self):
        return float(torch.rand(()))

    def randint(self, low, high):
        return int(torch.randint(low, high, ()))


@pytest.mark.parametrize("own", [False, True])
def test_lesson_sets_are_nested_and_errors_belong_to_them(own):
    environment = timm.create_model(
        "collapse_reconstructor_tiny", img_size=16, patch_size=4, dim=32, depth=1, decoder_dim=32, decoder_depth=1
    )
    lesson, images, starts = Lesson(environment, num_sets=3), torch.randn(2, 3, 16, 16), set()
    for _ in range(8):
        visible, revealed, errors = lesson(images, Fixed(), ranker() if own else None)
        starts.add(int(visible[0].sum()))
        assert torch.equal(revealed[:, 0], visible) and (revealed & visible[:, None]).sum() == visible.sum() * 4
        assert ((errors == 0) == revealed).all()
        assert (revealed[:, 1].sum(-1) == visible.sum(-1) + 1).all()
        assert (revealed.sum(-1) < 16).all()
    assert len(starts) > 2
    tokens = environment.tokenizer(images)
    index = revealed[:, 2].float().topk(int(revealed[0, 2].sum())).indices.sort(1).values
    assert torch.allclose(errors[:, 2], environment.errors(tokens, index, (4, 4)), atol=1e-5)


def test_own_sets_of_a_lesson_are_what_the_ranker_picks_in_use():
    """With its own kernel and rounds: here neighbours exclude each other, and shares are worked out once."""
    policy = ranker(neighbours=0.95, rounds=1, phases=(0.0,))
    torch.nn.init.normal_(policy.loadings.weight, std=0.3)
    environment = timm.create_model(
        "collapse_reconstructor_tiny", img_size=16, patch_size=4, dim=32, depth=1, decoder_dim=32, decoder_depth=1
    )
    lesson, images, checked, differing = Lesson(environment, num_sets=4), torch.randn(6, 3, 16, 16), 0, 0
    for _ in range(12):
        visible, revealed, _ = lesson(images, Fixed(), policy)
        if visible.any():  # the network is told of them, and the order goes on from there
            continue
        for chosen in (revealed[:, 2], revealed[:, 4]):
            count, checked = int(chosen[0].sum()), checked + 1
            assert torch.equal(chosen, policy.rank(images).argsort(1).argsort(1) >= 16 - count)
            other = parallel_picks(*policy.factors(policy.static(images)))[0][:, :count]
            differing += not torch.equal(chosen, torch.zeros_like(chosen).scatter(1, other, True))
    assert checked > 3 and differing > 1


@pytest.mark.parametrize("cell", [1, 2])
def test_it_learns_which_patches_matter(cell):
    """Errors made by a known rule: in each image one bright patch, anywhere, explains half of all the others."""
    model = ranker(phases=(0.0,), cell=cell).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def bright(batch):
        where = torch.randint(0, 16, (batch,))
        tokens = torch.zeros(batch, 16, 48)
        tokens[torch.arange(batch), where] = 2.0
        return unpatchify(tokens, (4, 4), 4), where

    for _ in range(200):
        images, where = bright(32)
        visible = torch.zeros(32, 16, dtype=torch.bool)
        revealed = torch.rand(32, 4, 16) < torch.rand(32, 4, 1) * 0.5
        revealed[:, 0] = False
        known = revealed.gather(2, where.view(-1, 1, 1).expand(-1, 4, 1))
        errors = torch.where(known, 0.3, 0.6).expand(-1, -1, 16) * ~revealed
        out = model(images, visible, revealed, errors)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    images, where = bright(16)
    assert (model.eval().rank(images).argmax(1) == where).float().mean() > 0.9


@pytest.mark.parametrize("name, gmacs, launches", [("tiny", 0.1, 180), ("nano", 0.04, 80), ("cells", 0.06, 60)])
def test_cost_at_224_px_is_within_the_budget(name, gmacs, launches):
    """Of the first 22%; on a GPU the launches count, not the multiply-accumulates."""
    model = timm.create_model(f"collapse_ranker_{name}_224").eval()
    assert gmacs / 2 < count_macs(lambda: model.rank(torch.randn(1, 3, 224, 224), upto=44)) / 1e9 <= gmacs
    images = torch.randn(8, 3, 224, 224)
    assert launches / 2 < count_launches(lambda: model.rank(images, upto=43)) <= launches


@pytest.mark.parametrize("cell, spread_first", [(1, 0.0), (2, 0.2)])
def test_ranker_compiles_as_a_whole_and_orders_as_before(cell, spread_first):
    model, images = ranker(cell=cell, spread_first=spread_first), torch.randn(2, 3, 20, 20)
    compiled = torch.compile(model.rank, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images), model.rank(images)) and torch.equal(compiled(images, 5), model.rank(images, 5))


# -- imitation of a trained ranker
# -------------------------------------------------------------------------------------------------------


def test_a_ranker_that_expects_the_same_has_nothing_to_learn():
    teacher, images = ranker(), torch.randn(4, 3, 16, 16)
    lesson = Imitation(teacher)
    for own in (False, True):
        visible, revealed, errors = lesson(images, Fixed(), teacher, own)
        assert revealed is None and errors.shape == (4, 17, 16)
        assert torch.equal(errors, single_errors(*teacher.factors(teacher.static(images), visible)))
        assert all(value < 1e-6 for value in teacher(images, visible, revealed, errors).values())
        assert ranker(depth=2)(images, visible, revealed, errors)["loss"] > 0.1


def test_visible_sets_have_the_sizes_of_the_phases():
    sizes = {0: (0, 0), 0.25: (3, 5), 0.5: (6, 10)}
    lesson, seen = Imitation(ranker()), set()
    for _ in range(10):
        visible, _, _ = lesson(torch.randn(8, 3, 16, 16), Fixed(), ranker(), True)
        for count in visible.sum(1).tolist():
            seen |= {phase for phase, (least, most) in sizes.items() if least <= count <= most}
            assert any(least <= count <= most for least, most in sizes.values())
    assert seen == set(sizes)


def test_losses_ignore_what_is_visible_and_weigh_images_alike():
    model, images = ranker(), torch.randn(2, 3, 16, 16)
    visible = torch.zeros(2, 16, dtype=torch.bool)
    visible[:, :4] = True
    errors = single_errors(*model.factors(model.static(images), visible)).detach()
    errors[:, :, :4] = 99
    errors[:, 1:5] = 99
    assert model(images, visible, None, errors)["loss"] < 1e-6
    wrong = errors.clone()
    wrong[:, 0, 4:] *= 1.5
    half = torch.stack([wrong[0], errors[1]])
    both, one = (model(images, visible, None, e)["map"] for e in (wrong, half))
    assert 0 < one < both


def test_a_ranker_of_cells_starts_as_its_teacher_on_a_smaller_image():
    teacher, learner = ranker(depth=2), ranker(depth=2, cell=2, img_size=32, patch_size=8)
    coarse = Ranker(img_size=8, patch_size=4, dim=32, depth=2, rank=8)
    coarse.load_state_dict(teacher.state_dict())
    for module in (teacher, coarse):  # without content in queries and keys, attention knows positions alone
        for block in module.trunk.blocks:
            block.attn.qkv.weight.data[:64] = 0
    images = torch.randn(4, 3, 32, 32)
    inherit(learner, teacher, images)
    small = torch.nn.functional.avg_pool2d(images, 4)
    (g, d), (coarse_g, coarse_d) = (m.factors(m.static(x)) for m, x in ((learner, images), (coarse, small)))
    parents = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    assert torch.allclose(d, coarse_d[:, parents], atol=1e-5)
    assert torch.allclose(g @ g.mT, (coarse_g @ coarse_g.mT)[:, parents][:, :, parents], atol=1e-5)


def test_a_ranker_cannot_start_from_one_of_another_shape():
    for learner, teacher in (
        ({}, {}),
        ({"cell": 2, "dim": 64}, {}),
        ({"cell": 2, "rank": 16}, {}),
        ({"cell": 2}, {"cell": 2}),
    ):
        with pytest.raises(CollapseError, match="teacher.*cannot start"):
            inherit(ranker(**learner), ranker(**teacher), torch.randn(2, 3, 16, 16))


# -- CollapseOrder
# -------------------------------------------------------------------------------------------------------


def comae():
    return timm.create_model("comae_tiny", img_size=16, patch_size=4, dim=32, depth=1, decoder_dim=32, decoder_depth=1)


@pytest.mark.parametrize("make", [ranker, comae])
def test_orderer_resamples_to_any_grid_and_is_frozen(make):
    orderer = CollapseOrder(make())
    images = torch.randn(2, 3, 20, 20)
    assert orderer(images).grid == (4, 4)
    fine = orderer(images, grid=(9, 7), upto=10)
    assert fine.grid == (9, 7) and torch.equal(fine.ranks.sort(1).values, torch.arange(63).expand(2, -1))
    assert not any(p.requires_grad for p in orderer.parameters()) and not orderer.model.training


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("grid", [(4, 4), (16, 16), (9, 14), (16, 2)])
def test_first_places_are_the_same_when_only_they_are_asked_for(grid, spread):
    orderer, images = CollapseOrder(ranker(), spread=spread), torch.randn(2, 3, 16, 16)
    whole = orderer(images, grid=grid)
    for upto in (1, 5, grid[0] * grid[1] // 2):
        assert torch.equal(orderer(images, grid=grid, upto=upto).keep(upto), whole.keep(upto))
    spreading = grid[0] > 4 or grid[1] > 4
    assert torch.equal(whole.ranks, CollapseOrder(orderer.model, spread=0.0)(images, grid=grid).ranks) is (
        not spreading or not spread
    )


def test_orderer_errors_name_what_was_given():
    orderer = CollapseOrder(ranker())
    images = torch.randn(2, 3, 16, 16)
    cases = [
        (lambda: orderer(images[0]), "images"),
        (lambda: orderer(images.round().long()), "images"),
        (lambda: orderer(torch.full((1, 3, 16, 16), float("nan"))), "images"),
        (lambda: orderer(images, grid=(0, 4)), "grid"),
        (lambda: orderer(images, upto=17), r"upto.*\[1, 16\].*17"),
        (lambda: CollapseOrder.baseline("randm"), "randm.*random"),
        (lambda: CollapseOrder.baseline("halton")(images), "grid"),
        (lambda: CollapseOrder(torch.nn.Linear(2, 2)), "Linear"),
        (lambda: CollapseOrder(ranker(), spread=2), "spread.*2"),
        (lambda: CollapseOrder.baseline("bayer").graph(images), "graph: only a CoMAE or a ranker.*'bayer'"),
        (lambda: CollapseOrder.from_pretrained("nothing_like_this"), "nothing_like_this"),
        (lambda: orderer(images).keep(0.0), "keep"),
        (lambda: orderer(images).keep(1.5), "keep"),
    ]
    for call, message in cases:
        with pytest.raises(CollapseError, match=message):
            call()


def test_random_baseline_is_seeded():
    images = torch.zeros(2, 3, 8, 8)
    first, second = (CollapseOrder.baseline("random", seed=3) for _ in range(2))
    assert torch.equal(first(images, (4, 4)).ranks, second(images, (4, 4)).ranks)
    assert not torch.equal(first(images, (4, 4)).ranks, first(images, (4, 4)).ranks[[1, 0]])


@torch.no_grad()
def test_without_factors_the_order_is_that_of_the_deviations():
    torch.manual_seed(0)
    plain = Ranker(img_size=32, patch_size=8, dim=32, depth=1, rank=0, phases=(0.0,), neighbours=0.0)
    images, weights = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    deviation = plain.factors(plain.static(images))[1].sqrt()
    assert torch.equal(plain.rank(images).argsort(1, descending=True), deviation.argsort(1, descending=True))
    weighted = plain.rank(images, weights=weights).argsort(1, descending=True)
    assert torch.equal(weighted, (deviation * weights).argsort(1, descending=True))
    static, visible = plain.static(images), torch.rand(3, 16) < 0.3
    loadings, noise = plain.factors(static, visible)
    for mask, w in ((None, None), (visible, None), (visible, weights)):
        known = noise if mask is not None else plain.factors(static)[1]
        slow = torch.cat(parallel_picks(loadings, known, mask, weights=w), 1)
        for candidates in (None, 6):
            picks = plain.picks(static, mask, w, candidates)
            assert picks[0].shape[1] == (candidates or 16)
            hidden = 16 if mask is None else int((~mask).sum(1).min())
            assert torch.equal(torch.cat(picks, 1)[:, :hidden], slow[:, :hidden])


@torch.no_grad()
def test_places_that_come_by_a_spread_need_no_network(monkeypatch):
    ranker, images = (
        Ranker(img_size=32, patch_size=8, dim=32, depth=1, rank=4, spread_first=0.5),
        torch.rand(2, 3, 32, 32),
    )
    expected = ranker.rank(images, upto=9).argsort(1, descending=True)[:, :8]
    monkeypatch.setattr(Ranker, "static", None)
    for upto in (1, 8):
        assert torch.equal(ranker.rank(images, upto=upto).argsort(1, descending=True)[:, :8], expected)


def test_a_negative_rank_is_refused():
    with pytest.raises(CollapseError, match="rank must be at least 0, got -1"):
        Ranker(rank=-1)
