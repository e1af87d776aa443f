"""Sampling of MAR against its literal form, its orders, editing, the diffusion head in closed form, and bad input."""

import math
import runpy
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from timm_collapse import ClassOrderBank, CollapseError, GenerationOrder, Order
from timm_collapse.models import MAR
from timm_collapse.models.diffusion import DiffusionHead
from timm_collapse.models.diffusion_process import schedule
from timm_collapse.order import GENERATION_ORDERS, tokens_per_step

LITERAL = runpy.run_path(str(Path(__file__).with_name("mar_literal.py")))
SMALL_MAR = runpy.run_path(str(Path(__file__).with_name("mar_small.py")))


def random_mar(**changes) -> MAR:
    """Bounded: samples of a random head are else so large that small errors would not show."""
    return SMALL_MAR["random_mar"](**{"latent_bound": 3.0, **changes})


@pytest.fixture(scope="module")
def mar():
    torch.manual_seed(1)
    return random_mar()


def seed(number=0):
    return torch.Generator().manual_seed(number)


def relative(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def a_bank(classes=5):
    """The orders of class c begin at token 3 c."""
    indices = torch.stack([torch.arange(16).roll(-3 * label) for label in range(classes)])
    return ClassOrderBank.build([(Order.from_indices(indices, (4, 4)), torch.arange(classes))], classes)


def watched(mar, labels, **options):
    """The latents, the known sets after each iteration (T, B, L), and the latents then."""
    known, latents = [], []

    def callback(step, so_far, mask):
        assert step == len(known)
        known.append(mask.clone())
        latents.append(so_far.clone())

    found = mar.generate(labels, callback=callback, **options)
    assert torch.equal(latents[-1], found)
    return found, torch.stack(known), latents


# -- against the literal form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, batch, steps, scale, schedule, temperature",
    [
        ({}, 1, 1, 1.0, "linear", 1.0),
        ({}, 3, 5, 1.0, "constant", 0.7),
        ({}, 2, 5, 2.5, "linear", 1.0),
        ({}, 4, 5, 2.5, "constant", 0.7),
        ({}, 2, 1, 3.0, "linear", 0.0),
        ({}, 2, 16, 3.0, "linear", 1.0),
        ({}, 1, 16, 0.5, "constant", 0.0),
        ({}, 2, 16, 1.0, "linear", 0.0),
        ({"patch_size": 2, "img_size": 16}, 2, 5, 2.0, "linear", 1.0),
        ({"class_num": 0}, 2, 5, 1.0, "linear", 1.0),
        ({"class_num": 0, "num_sampling_steps": "7"}, 2, 5, 2.0, "linear", 0.7),
        ({"num_sampling_steps": 50}, 2, 3, 2.0, "linear", 1.0),
        ({"latent_bound": 0.0}, 2, 3, 2.0, "linear", 1.0),
        ({"latent_bound": 0.0}, 2, 16, 1.0, "linear", 0.7),
    ],
)
def test_fast_sampling_is_the_literal_one(changes, batch, steps, scale, schedule, temperature):
    torch.manual_seed(
        3
    )  # one case in 60 has a token within rounding errors of the bound, which the noisy end multiplies
    mar = random_mar(**changes)
    labels, order = torch.randint(5, (batch,)), torch.rand(batch, 16).argsort(1)
    noise = torch.randn(batch, 16, mar.token_dim)
    options = dict(steps=steps, guidance_scale=scale, guidance_schedule=schedule, temperature=temperature)
    found = mar.generate(labels, order=order, noise=noise, generator=seed(), **options)
    expected = LITERAL["literal_generate"](
        mar, labels, **options, order_best_first=order, noise=noise, generator=seed()
    )
    assert found.shape == (batch, *mar.latent_shape) and relative(found, expected) < 1e-4


def test_the_seed_decides_everything(mar):
    options = dict(steps=5, guidance_scale=2.0)
    state = torch.get_rng_state()
    first = mar.generate([0, 1], generator=seed(3), **options)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, mar.generate([0, 1], generator=seed(3), **options))
    assert not torch.allclose(first, mar.generate([0, 1], generator=seed(4), **options))
    torch.manual_seed(5)
    other = mar.generate([0, 1], **options)
    torch.manual_seed(5)
    assert torch.equal(other, mar.generate([0, 1], **options)) and not torch.allclose(other, first)


def test_labels_guidance_and_temperature_matter_and_the_mode_stays(mar):
    fixed = dict(steps=4, order="raster", noise=torch.randn(1, 16, 4))
    one = mar.generate([0], guidance_scale=2.0, generator=seed(), **fixed)
    for labels, scale, temperature in (([1], 2.0, 1.0), ([0], 1.0, 1.0), ([0], 2.0, 0.0)):
        options = dict(guidance_scale=scale, temperature=temperature, generator=seed(), **fixed)
        assert not torch.allclose(mar.generate(labels, **options), one)
    dropping = random_mar(attn_dropout=0.5, proj_dropout=0.5).train()
    same = [dropping.generate([0], generator=seed(), **fixed) for _ in range(2)]
    assert torch.equal(*same) and dropping.training and dropping.encoder_blocks[0].training
    assert one.dtype == torch.float32


# -- orders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 6, 16])
def test_known_tokens_are_prefixes_of_the_order(mar, steps):
    order = torch.rand(3, 16).argsort(1)
    _, known, latents = watched(mar, [0, 1, 2], steps=steps, order=order, guidance_scale=2.0)
    done = torch.tensor(tokens_per_step(16, steps)).cumsum(0).tolist()
    for mask, so_far, count in zip(known, latents, done, strict=True):
        assert torch.equal(mask, torch.zeros(3, 16).scatter(1, order[:, :count], 1.0).bool())
        assert torch.equal(mar.patchify(so_far).abs().sum(-1) > 0, mask)  # zeros where nothing is yet
    for earlier, later, mask in zip(latents, latents[1:], known):
        assert torch.equal(mar.patchify(later)[mask], mar.patchify(earlier)[mask])  # what is drawn stays


@pytest.mark.parametrize("name", GENERATION_ORDERS)
def test_every_order_runs(name):
    mar = random_mar()
    mar.bank = a_bank()
    labels = torch.tensor([4, 0])
    _, known, _ = watched(mar, labels, steps=16, order=name, guidance_scale=2.0, generator=seed())
    assert known[-1].all() and torch.equal(known.sum(-1), torch.arange(1, 17)[:, None].expand(-1, 2))
    first = known[0].int().argmax(1).tolist()
    expected = {"raster": [0, 0], "collapse": [12, 0], "collapse_reversed": [11, 15]}
    assert first == expected.get(name, first)


def test_default_order_is_the_banks_or_random():
    mar, labels = random_mar(), torch.tensor([1, 3, 1])
    firsts = [watched(mar, labels, steps=16, generator=seed(i))[1][0].int().argmax(1).tolist() for i in range(6)]
    assert len({tuple(first) for first in firsts}) == 6
    mar.bank = a_bank()
    assert all(watched(mar, labels, steps=16)[1][0].int().argmax(1).tolist() == [3, 9, 3] for _ in range(2))
    options = dict(steps=4, noise=torch.randn(3, 16, 4), temperature=0.0)
    found = mar.generate(labels, **options)
    given = torch.stack([torch.arange(16).roll(-3 * label) for label in (1, 3, 1)])
    mar.bank = None
    ways = (given, Order.from_indices(given, (4, 4)), a_bank(), GenerationOrder(a_bank(), (4, 4), source="mean"))
    assert all(torch.equal(mar.generate(labels, order=order, **options), found) for order in ways)
    one_for_all = mar.generate(labels, order=given[:1], **options)
    assert torch.equal(one_for_all[0], found[0]) and not torch.equal(one_for_all[1], found[1])


@pytest.mark.parametrize("scale", [1.0, 2.5])
@torch.no_grad()
def test_confidence_takes_the_tokens_that_the_label_changes_most(mar, scale):
    labels, fake = torch.tensor([2, 4]), mar.fake_latent.expand(2, -1)
    found, known, latents = watched(mar, labels, steps=5, order="confidence", guidance_scale=scale, generator=seed())
    before, tokens = torch.zeros(2, 16), torch.zeros(2, 16, 4)
    for mask, so_far, count in zip(known, latents, tokens_per_step(16, 5), strict=True):
        conditions = [
            LITERAL["decode"](mar, LITERAL["encode"](mar, tokens, 1 - before, condition), 1 - before)
            for condition in (mar.class_emb(labels), fake)
        ]
        change = (conditions[0] - conditions[1]).square().sum(-1).masked_fill(before.bool(), -1)
        expected = before.scatter(1, change.topk(count).indices, 1.0)
        assert torch.equal(mask.float(), expected)
        before, tokens = expected, mar.patchify(so_far)
    assert found.isfinite().all()


# -- editing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_editing_keeps_what_is_given_and_draws_the_rest_from_it(mar, rows):
    labels, latents = torch.tensor([0, 1, 2]), torch.randn(3, *mar.latent_shape)
    mask = torch.zeros(rows, 16).scatter(1, torch.rand(rows, 16).argsort(1)[:, :6], 1.0).bool()
    regenerate = mask if rows > 1 else mask[0]
    options = dict(steps=4, guidance_scale=2.0, regenerate=regenerate, noise=torch.randn(3, 16, 4), order="halton")
    found, known, _ = watched(mar, labels, latents=latents, generator=seed(), **options)
    mask = mask.expand(3, -1)
    given, made = mar.patchify(latents), mar.patchify(found)
    assert torch.equal(made[~mask], given[~mask]) and (made[mask] != given[mask]).all()
    done = 10 + torch.tensor(tokens_per_step(6, 4)).cumsum(0)
    assert torch.equal(known.sum(-1), done[:, None].expand(-1, 3)) and (known | mask).all()
    rank = GenerationOrder("halton", (4, 4))(labels).ranks
    assert torch.equal(known[0] & mask, rank == rank.masked_fill(~mask, 99).min(1, keepdim=True).values)
    hidden = mar.unpatchify(torch.where(mask[..., None], 7.0, given))  # what is made anew is not looked at
    assert torch.equal(mar.generate(labels, latents=hidden, generator=seed(), **options), found)
    other = mar.unpatchify(given + 1.0)  # what is kept is
    assert not torch.allclose(mar.patchify(mar.generate(labels, latents=other, generator=seed(), **options))[mask],
                              made[mask])  # fmt: skip


def test_editing_everything_is_generating(mar):
    options = dict(steps=5, noise=torch.randn(2, 16, 4), order="raster", guidance_scale=1.5)
    plain = mar.generate([1, 2], generator=seed(), **options)
    everything = torch.ones(16, dtype=torch.bool)
    edited = mar.generate([1, 2], latents=torch.randn(2, *mar.latent_shape), regenerate=everything, generator=seed(),
                          **options)  # fmt: skip
    assert torch.equal(plain, edited)


@pytest.mark.parametrize(
    "diffusion_steps, expected",
    [(None, [4] * 4), (9, [9] * 4), ((20, 5), [20, 15, 10, 5]), ((3, 4), [3, 3, 4, 4]), ((8, 8), [8] * 4)],
)
def test_diffusion_steps_are_annealed(mar, monkeypatch, diffusion_steps, expected):
    taken, sample = [], mar.diffloss.sample
    monkeypatch.setattr(
        mar.diffloss, "sample", lambda z, start, n, *rest: taken.append(n) or sample(z, start, n, *rest)
    )
    assert mar.generate([0], steps=4, diffusion_steps=diffusion_steps, temperature=0.0).isfinite().all()
    assert taken == expected
    mar.generate([0], steps=1, diffusion_steps=(6, 2))
    assert taken[4:] == [6]


# -- the diffusion head ------------------------------------------------------------------------------------------------


class ExactGaussian(torch.nn.Module):
    """What a perfect network says of tokens N(mean, std^2), where the condition is the mean.

    Both the noise that is expected in x_t and the variance of x_{t-1} given x_t are known in closed form; the latter
    lies between the two bounds as long as std is at most 1. So every number of steps gives exact samples.
    """

    def __init__(self, std: float, num_steps: int):
        super().__init__()
        self.std, self.tables, self.project = std, LITERAL["diffusion_tables"](num_steps), torch.nn.Identity()

    def cond_embed(self, z):
        return torch.cat([z, torch.zeros_like(z[:, :1])], 1)

    def time_embed(self, t):
        return torch.cat([torch.zeros(len(t), 2), t[:, None].float()], 1)

    def modulations(self, condition):
        return [condition]

    def from_modulations(self, x, modulations):
        (condition,) = modulations
        mean, t = condition[:, :2].double(), float(condition[0, 2])
        (i,) = (self.tables["timesteps"] == t).nonzero()[0].tolist()
        at = {name: float(table[i]) for name, table in self.tables.items()}
        signal, spread = at["sqrt_bar"], at["sqrt_one_minus_bar"]
        total = signal**2 * self.std**2 + spread**2
        eps = spread * (x.double() - signal * mean) / total
        variance = math.exp(at["log_variance"]) * (i > 0) + at["of_start"] ** 2 * self.std**2 * spread**2 / total
        place = (math.log(variance) - at["log_variance"]) / (at["log_beta"] - at["log_variance"] or 1.0)
        assert i == 0 or -1e-9 < place < 1 + 1e-9
        return torch.cat([eps, torch.full_like(eps, 2 * place - 1)], 1).float()


@pytest.mark.parametrize("num_steps, std", [(2, 0.5), (10, 0.5), (100, 0.5), (10, 1.0), (25, 0.05)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samples_of_a_gaussian_have_its_mean_and_deviation(num_steps, std, scale):
    head = DiffusionHead(2, 2, 8, 1)
    head.net = ExactGaussian(std, num_steps)
    count = 20_000
    mean, other = torch.tensor([0.7, -1.2]), torch.tensor([0.3, 0.1])
    z, z_uncond = mean.expand(count, -1), other.expand(count, -1) if scale != 1 else None
    found = head.sample(z, torch.randn(count, 2, generator=seed()), num_steps, scale, z_uncond, generator=seed(1))
    expected = other + scale * (mean - other)  # the noise is linear in the mean, so guidance extrapolates it
    assert (found.mean(0) - expected).abs().max() < 4 * std / count**0.5 + 2e-3
    assert (found.std(0) / std - 1).abs().max() < 4 / (2 * count) ** 0.5 + 0.01
    assert abs(float(torch.corrcoef(found.T)[0, 1])) < 4 / count**0.5


def test_respaced_steps_are_even_and_the_tables_are_the_textbooks():
    for count in (2, 3, 4, 10, 37, 50, 100, 250, 999, 1000):
        steps = schedule(count).timesteps.tolist()
        exact = [Fraction(999 * i, count - 1) for i in range(count)]
        assert steps[0] == 0 and steps[-1] == 999 and len(set(steps)) == count
        assert all(abs(step - place) <= Fraction(1, 2) for step, place in zip(steps, exact))
        book = LITERAL["diffusion_tables"](count)
        assert steps == book["timesteps"].tolist()
        for row, name in zip(
            schedule(count).tables,
            ("sqrt_bar", "sqrt_one_minus_bar", "of_start", "of_noisy", "log_variance", "log_beta"),
            strict=True,
        ):
            assert torch.allclose(row, torch.from_numpy(book[name]), rtol=1e-6, atol=1e-12)
    for wrong in (0, 1, 1001, -1, 2.5):
        with pytest.raises(CollapseError, match=r"diffusion_steps: must be an int in \[2, 1000\], got"):
            schedule(wrong)


# -- what is refused ---------------------------------------------------------------------------------------------------

LATENTS = torch.zeros(2, 4, 4, 4)
HALF = torch.arange(16) < 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": [0, 5]}, r"labels must be in \[0, 4\], got 5"),
        ({"labels": [-1, 0]}, r"labels must be in \[0, 4\], got -1"),
        ({"labels": []}, "labels must be a long tensor"),
        ({"labels": 3}, r"labels must be a long tensor of shape \(B,\)"),
        ({"order": torch.arange(15).expand(2, -1)}, r"order must be .*shape \(B, 16\).*got a int64 .*\(2, 15\)"),
        ({"order": torch.zeros(2, 16).long()}, "order must be .*each of 0..15 once in every row"),
        ({"order": torch.arange(16).expand(3, -1)}, "order must be one for all or one a label, got 3 for 2"),
        ({"order": "spiral"}, "order must be one of random, .*got 'spiral'"),
        ({"order": "collapse"}, "bank must be a ClassOrderBank for the order 'collapse', got NoneType"),
        ({"order": GenerationOrder("raster", (2, 8))}, r"order: its grid must be the model's \(4, 4\), got \(2, 8\)"),
        ({"order": a_bank(1)}, r"labels must be in \[0, 0\], got 1"),
        ({"steps": 0}, r"steps must be an int in \[1, 16\].*got 0"),
        ({"steps": 17}, r"steps must be an int in \[1, 16\].*got 17"),
        ({"steps": 9, "latents": LATENTS, "regenerate": HALF}, r"steps must be an int in \[1, 8\].*got 9"),
        ({"temperature": -0.1}, "temperature: must be a finite number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature: must be a finite number of at least 0, got nan"),
        ({"guidance_scale": -1.0}, "guidance_scale: must be a finite number of at least 0, got -1.0"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule: must be linear or constant, got 'cosine'"),
        ({"noise": torch.zeros(2, 16, 3)}, r"noise: must be finite and of shape \(2, 16, 4\), got .*\(2, 16, 3\)"),
        ({"noise": torch.full((2, 16, 4), math.nan)}, "noise: must be finite"),
        ({"diffusion_steps": 0}, r"diffusion_steps: must be an int in \[2, 1000\], got 0"),
        ({"diffusion_steps": 1001}, r"diffusion_steps: must be an int in \[2, 1000\], got 1001"),
        ({"diffusion_steps": (20, 0)}, r"diffusion_steps: must be an int in \[2, 1000\], got 0"),
        ({"latents": LATENTS * math.nan, "regenerate": HALF}, "latents: must be finite"),
        ({"latents": LATENTS[:1], "regenerate": HALF}, "latents: must be 2, one a label, got 1"),
        ({"latents": LATENTS[:, :3], "regenerate": HALF}, r"latents: must be of shape \(B, 4, 4, 4\)"),
        ({"latents": LATENTS}, "regenerate: .* need each other, got no mask"),
        ({"regenerate": HALF}, "regenerate: .* need each other, got no latents"),
        ({"latents": LATENTS, "regenerate": HALF.float()}, "regenerate: must be bool of shape"),
        ({"latents": LATENTS, "regenerate": HALF[:15]}, r"regenerate: must be bool of shape \(16,\) or \(2, 16\)"),
        ({"latents": LATENTS, "regenerate": ~HALF & HALF}, "regenerate: every row must hold the same .* got .0"),
        (
            {"latents": LATENTS, "regenerate": torch.stack([HALF, torch.arange(16) < 7])},
            r"regenerate: every row must hold the same number of tokens, at least 1, got \[7, 8\]",
        ),
    ],
)
def test_wrong_arguments(mar, options, message):
    with pytest.raises(CollapseError, match=message):
        mar.generate(**{"labels": [0, 1], "steps": 2, **options})


def test_broken_weights_are_told():
    mar = random_mar()
    with torch.no_grad():
        mar.decoder_norm.weight[0] = math.nan
    with pytest.raises(CollapseError, match="latents: not finite; .*check the checkpoint"):
        mar.generate([0], steps=2)


def test_the_mode_stays_also_when_sampling_is_broken_off(mar):
    def stop(*_):
        raise KeyboardInterrupt

    mar.train()
    try:
        with pytest.raises(KeyboardInterrupt):
            mar.generate([0], steps=2, callback=stop)
        assert mar.training
    finally:
        mar.eval()


def test_a_compiled_sampler_gives_the_same_latents(mar):
    compiled = random_mar()
    compiled.load_state_dict(mar.state_dict())
    options = dict(steps=4, guidance_scale=2.0, order="bayer")
    expected = mar.generate([0, 3], generator=seed(2), **options)
    found = compiled.compile_sampler(backend="aot_eager").generate([0, 3], generator=seed(2), **options)
    assert relative(found, expected) < 1e-5
