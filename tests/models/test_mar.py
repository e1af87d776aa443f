"""MAR against its reference, its literal form and its own promises: network, training loss, saving, bad input."""

import json
import math
import runpy
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import timm_collapse  # noqa: F401  (registers the models)
from timm_collapse import CollapseError
from timm_collapse.models import MAR
from timm_collapse.models.diffusion_process import NUM_TIMESTEPS
from timm_collapse.order.masking import mask_rate

LITERAL = runpy.run_path(str(Path(__file__).with_name("mar_literal.py")))
SMALL_MAR = runpy.run_path(str(Path(__file__).with_name("mar_small.py")))
SMALL, random_mar = SMALL_MAR["SMALL"], SMALL_MAR["random_mar"]


def relative(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def reference():
    """The model, and the inputs and outputs of the reference implementation."""
    with safe_open(Path(__file__).with_name("mar_reference.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    part = {p: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(p)} for p in ("model", "in", "out")}
    mar = MAR(**config).eval()
    mar.load_state_dict(part["model"], strict=True)
    return mar, part["in"], part["out"]


def positions(mask):
    """(B, k): where each row of a mask with k ones has them."""
    return torch.stack([row.nonzero().flatten() for row in mask])


@torch.no_grad()
def test_every_part_is_the_references(reference):
    mar, given, expected = reference
    tokens = mar.patchify(given["latents"])
    assert torch.equal(tokens, expected["tokens"]) and torch.equal(mar.unpatchify(tokens), given["latents"])
    visible = positions(given["mask"] == 0)
    seen = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
    encoded = mar.forward_encoder(seen, visible, mar.class_condition(given["labels"]))
    assert relative(encoded, expected["encoder"]) < 1e-4
    z = mar.forward_decoder(encoded, visible)
    assert relative(z, expected["z"]) < 1e-4
    target = tokens.flatten(0, 1).repeat(2, 1)
    mse, bound = mar.diffloss(target, z.flatten(0, 1).repeat(2, 1), given["t"], given["noise"])
    assert relative(mse + bound, expected["loss_per_token"]) < 1e-4


@torch.no_grad()
def test_mean_loss_of_a_training_step_is_the_references(reference):
    mar, given, expected = reference
    batch, length = given["mask"].shape
    masked = positions(given["mask"] == 1)
    order = torch.cat([positions(given["mask"] == 0).flip(1), masked], 1)
    t, noise = given["t"].view(2, batch, length), given["noise"].view(2, batch, length, -1)
    index = masked.expand(2, -1, -1)
    noise = noise.gather(2, index[..., None].expand(-1, -1, -1, noise.shape[-1]))
    kept = torch.zeros(batch, dtype=torch.bool)
    out = mar(given["latents"], given["labels"], order, masked.shape[1], kept, t.gather(2, index), noise)
    assert relative(out["loss"], expected["loss"]) < 1e-4
    assert float(out["mse"] + out["bound"]) == pytest.approx(float(out["loss"]), rel=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [
        ("cfg1", {"guidance_scale": 1.0}),
        ("cfg_constant", {"guidance_scale": 2.5, "guidance_schedule": "constant"}),
        ("cfg_linear", {"guidance_scale": 2.5}),
    ],
)
def test_samples_are_the_references(reference, name, options):
    mar, given, expected = reference
    order, start = given["orders"].flip(1), given["start_noise"]
    found = mar.generate(given["labels"], steps=8, temperature=0.0, order=order, noise=start, **options)
    assert relative(found, expected[f"sample_{name}"]) < 1e-4
    found = LITERAL["literal_generate"](
        mar, given["labels"], 8, options["guidance_scale"], options.get("guidance_schedule", "linear"), 0.0, order,
        start, None,
    )  # fmt: skip
    assert relative(found, expected[f"sample_{name}"]) < 1e-4  # so that the literal form is worth comparing with


@pytest.mark.parametrize(
    "size, parameters, tensors", [("base", 207.9, 364), ("large", 478.3, 476), ("huge", 942.4, 604)]
)
def test_published_sizes(size, parameters, tensors):
    for name in (f"mar_{size}", f"cmar_{size}"):
        with torch.device("meta"):
            mar = timm.create_model(name)
        assert round(sum(p.numel() for p in mar.parameters()) / 1e6, 1) == parameters
        assert len(mar.state_dict()) == tensors
        assert (mar.seq_len, mar.token_dim, mar.num_classes, mar.latent_shape) == (256, 16, 1000, (16, 16, 16))


# -- training ----------------------------------------------------------------------------------------------------------


def drawn_step(mar, batch=3, num_masked=11):
    """Arguments of a training step, and the same spread over all tokens; what is not masked gets other noise."""
    count, length = mar.diffusion_batch_mul, mar.seq_len
    latents, labels = torch.randn(batch, *mar.latent_shape), torch.randint(max(1, mar.num_classes), (batch,))
    order = torch.rand(batch, length).argsort(1)
    t = torch.randint(NUM_TIMESTEPS, (count, batch, length))
    t[0, :, ::3] = 0  # its bound is another formula
    noise = torch.randn(count, batch, length, mar.token_dim)
    noise[t == 0] *= 0.3  # else some bins are so improbable that float32 rounds them to 0
    index = order[:, length - num_masked :].expand(count, -1, -1)
    mask = torch.zeros(batch, length).scatter(1, index[0], 1.0)
    drop = torch.arange(batch) == 1
    step = {"order": order, "num_masked": num_masked, "drop_label": drop, "t": t.gather(2, index)}
    step["noise"] = noise.gather(2, index[..., None].expand(-1, -1, -1, mar.token_dim))
    return (latents, labels), step, (mask, drop, t.flatten(), noise.flatten(0, 2))


@pytest.mark.parametrize(
    "changes", [{}, {"class_num": 0}, {"patch_size": 2, "img_size": 16}, {"diffusion_batch_mul": 1}]
)
@pytest.mark.parametrize("num_masked", [1, 11, 16])
def test_loss_and_gradients_are_those_of_the_literal_loss(changes, num_masked):
    mar = random_mar(**changes)
    data, step, spread = drawn_step(mar, num_masked=num_masked)
    loss = mar(*data, **step)["loss"]
    _, expected = LITERAL["literal_loss"](mar, *data, *spread)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, list(mar.parameters()))
    wanted = torch.autograd.grad(expected, list(mar.parameters()))
    largest = max(float(g.abs().max()) for g in wanted)
    for (name, _), a, b in zip(mar.named_parameters(), found, wanted):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6 * largest, name
    if num_masked == 11:
        assert all(g.abs().max() > 0 for g in found)  # every parameter learns


@torch.no_grad()
def test_only_masked_tokens_are_learnt_from_and_not_seen():
    mar = random_mar().train()
    (latents, labels), step, (mask, *_) = drawn_step(mar)
    loss = mar(latents, labels, **step)["loss"]
    calls = []
    mar.diffloss.register_forward_hook(lambda module, args, out: calls.append(args))
    assert torch.equal(mar(latents, labels, **step)["loss"], loss)
    target, z, t, noise = calls[0]
    assert target.shape[:3] == (2, 3, 11)
    tokens = mar.patchify(latents)
    assert torch.equal(target[1, 2], tokens[2, step["order"][2, 5:]])
    changed = tokens + mask[..., None]  # other masked tokens: the conditions do not know
    mar(mar.unpatchify(changed), labels, **step)
    assert torch.equal(calls[1][1], z)
    changed = tokens + (1 - mask[..., None])  # other visible tokens: they do, the targets do not
    mar(mar.unpatchify(changed), labels, **step)
    assert not torch.allclose(calls[2][1], z) and torch.equal(calls[2][0], target)


@torch.no_grad()
def test_dropped_labels_are_replaced_by_the_fake_latent():
    mar = random_mar()
    (latents, labels), step, _ = drawn_step(mar)
    conditions = []
    encoder = mar.forward_encoder
    mar.forward_encoder = lambda tokens, visible, condition: (
        conditions.append(condition) or encoder(tokens, visible, condition)
    )
    mar(latents, labels, **step)
    expected = mar.class_emb(labels)
    assert not torch.equal(expected[1:2], mar.fake_latent)
    expected[1] = mar.fake_latent[0]
    assert torch.equal(conditions[0], expected)
    mar.label_drop_prob, latents = 0.3, torch.randn(400, *mar.latent_shape)
    mar(latents, torch.zeros(400).long())
    share = (conditions[1] == mar.fake_latent).all(1).float().mean()
    assert abs(float(share) - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5  # four standard errors
    mar.label_drop_prob = 0.0
    mar(latents, torch.zeros(400).long())
    assert torch.equal(conditions[2], mar.class_emb.weight[:1].expand(400, -1))


@torch.no_grad()
def test_drawn_training_steps_are_mars():
    mar, shapes = random_mar(), []
    mar.diffloss.register_forward_hook(lambda module, args, out: shapes.append((args[0].shape[2], args[2], args[3])))
    latents, labels = torch.randn(2, *mar.latent_shape), torch.tensor([0, 4])
    for _ in range(60):
        assert mar(latents, labels)["loss"].isfinite()
    counts = [count for count, _, _ in shapes]
    assert min(counts) >= math.ceil(0.7 * 16) and max(counts) == 16 and len(set(counts)) == 5
    times = torch.cat([t.flatten() for _, t, _ in shapes]).double()
    noise = torch.cat([n.flatten() for _, _, n in shapes])
    assert times.min() < 10 and times.max() > 989
    assert abs(float(times.mean()) - 499.5) < 4 * 288.7 / len(times) ** 0.5
    assert abs(float(noise.mean())) < 4 / len(noise) ** 0.5 and abs(float(noise.std()) - 1) < 4 / len(noise) ** 0.5


def test_mask_rate_is_the_truncated_normal():
    from scipy.stats import truncnorm

    u = torch.linspace(0, 0.999, 50).tolist()
    for low in (0.7, 0.5, 0.0):
        law = truncnorm((low - 1) / 0.25, 0, loc=1, scale=0.25)
        assert [mask_rate("truncnorm", x, low) for x in u] == pytest.approx(law.ppf(u).tolist(), abs=1e-6)
    for name in ("truncnorm", "cosine", "uniform"):
        rates = sorted(mask_rate(name, x, 0.6) for x in [*u, 1 - 1e-9])
        assert rates[0] == pytest.approx(0.6, abs=1e-3) and rates[-1] == pytest.approx(1.0, abs=1e-3)
        assert all(0.6 <= rate <= 1 for rate in rates)
    assert mask_rate("cosine", 0.5, 0.0) == pytest.approx(2**-0.5) and mask_rate("uniform", 0.25, 0.6) == 0.9
    for name, low, message in (
        ("normal", 0.7, "mask_ratio: must be truncnorm, cosine or uniform, got 'normal'"),
        ("cosine", 1.0, "mask_ratio_min: must be .*1.0"),
        ("uniform", -0.1, "mask_ratio_min: must be .*-0.1"),
        ("uniform", math.nan, "mask_ratio_min: must be .*nan"),
    ):
        with pytest.raises(CollapseError, match=message):
            mask_rate(name, 0.5, low)


def test_checkpointed_gradients_are_equal_also_with_dropout():
    mar = random_mar(attn_dropout=0.2, proj_dropout=0.2).train()
    data, step, _ = drawn_step(mar)
    found = []
    for enable in (False, True):
        mar.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        found.append(torch.autograd.grad(mar(*data, **step)["loss"], list(mar.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    torch.manual_seed(4)
    other = torch.autograd.grad(mar(*data, **step)["loss"], list(mar.parameters()))
    assert not torch.equal(other[0], found[0][0])  # there was dropout


@torch.no_grad()
def test_conditions_of_wanted_tokens_are_those_of_all():
    mar = random_mar()
    visible, wanted = torch.tensor([[1, 7, 8], [0, 2, 15]]), torch.tensor([[3, 15, 0, 8], [14, 1, 2, 9]])
    encoded = mar.forward_encoder(torch.randn(2, 3, 4), visible, torch.randn(2, 32))
    assert encoded.shape == (2, 6, 32)
    everything = mar.forward_decoder(encoded, visible)
    expected = torch.stack([everything[row, wanted[row]] for row in range(2)])
    assert everything.shape == (2, 16, 48)
    assert relative(mar.forward_decoder(encoded, visible, wanted), expected) < 1e-5
    assert relative(mar.train().forward_decoder(encoded, visible, wanted), expected) < 1e-5


# -- precision ---------------------------------------------------------------------------------------------------------


def steady_mar(**changes) -> MAR:
    """The predicted noise is about the input, as a trained head's is at the noisy end: no sample explodes."""
    mar = random_mar(**changes)
    net = mar.diffloss.net
    with torch.no_grad():
        for layers in (*(block.adaLN_modulation for block in net.res_blocks), net.final_layer.adaLN_modulation):
            layers[1].weight.zero_()
            layers[1].bias.zero_()
        net.input_proj.weight.copy_(torch.eye(40, 4))
        net.input_proj.bias.copy_(torch.tensor([10.0, -10.0]).repeat(20))  # they decide the norm
        net.input_proj.bias[:4] = 0.0
        net.final_layer.linear.weight[:4] = 10 * 0.9**0.5 * torch.eye(4, 40)
        net.final_layer.linear.bias[:4] = 0.0
    return mar


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_half_precision_stays_finite(dtype, factor):
    mar = steady_mar()
    with torch.no_grad():
        for name, parameter in mar.named_parameters():
            if not name.startswith("diffloss"):
                parameter.mul_(factor)
    data, step, _ = drawn_step(mar)
    exact = mar(*data, **step)["loss"].item()
    with torch.autocast("cpu", dtype):
        loss = mar(*data, **step)["loss"]
        latents = mar.generate(data[1], steps=3, guidance_scale=2.0)
    assert loss.dtype == torch.float32 and latents.dtype == torch.float32 and latents.isfinite().all()
    assert loss.item() == pytest.approx(exact, rel=0.02)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in mar.parameters())


@torch.no_grad()
def test_residual_sums_of_the_head_may_leave_the_range_of_fp16():
    mar = steady_mar(diffloss_d=4)
    for block in mar.diffloss.net.res_blocks:
        block.mlp[2].bias[::2] = 30_000.0
        block.adaLN_modulation[1].bias[80:] = 1.0
    data, step, _ = drawn_step(mar)
    sums = []
    block.register_forward_hook(lambda module, args, out: sums.append(float(out.abs().max())))
    with torch.autocast("cpu", torch.float16):
        assert mar(*data, **step)["loss"].isfinite()
    assert max(sums) > 65504


@torch.no_grad()
def test_weights_in_bf16_generate_too():
    mar = steady_mar()
    order, noise = torch.rand(2, 16).argsort(1), torch.randn(2, 16, 4)
    options = dict(steps=4, guidance_scale=2.0, temperature=0.0, order=order, noise=noise)
    exact, rough = mar.generate([0, 3], **options), mar.bfloat16().generate([0, 3], **options)
    assert rough.dtype == torch.float32 and relative(rough, exact) < 0.25


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents": torch.full((2, 4, 4, 4), math.nan)}, "latents: must be finite"),
        ({"latents": torch.full((2, 4, 4, 4), math.inf)}, "latents: must be finite"),
        ({"latents": torch.zeros(2, 4, 4, 4).long()}, "latents: must be finite floating point, got torch.int64"),
        (
            {"latents": torch.zeros(2, 4, 4, 5)},
            r"latents: must be of shape \(B, 4, 4, 4\), got a float32 .*\(2, 4, 4, 5\)",
        ),
        ({"latents": torch.zeros(4, 4, 4)}, "latents: must be of shape"),
        ({"latents": None}, "latents: must be of shape .*NoneType"),
        ({"labels": torch.tensor([0, 5])}, r"labels must be in \[0, 4\], got 5"),
        ({"labels": torch.tensor([-1, 0])}, r"labels must be in \[0, 4\], got -1"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels: must be 2, one a sample, got 3"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels must be a long tensor"),
        ({"labels": torch.tensor([[0, 1]])}, r"labels must be a long tensor of shape \(B,\)"),
        ({"order": torch.arange(15).expand(2, -1)}, r"order: must be of shape \(2, 16\), got a int64 .*\(2, 15\)"),
        ({"order": torch.arange(16)[None]}, r"order: must be of shape \(2, 16\)"),
        ({"num_masked": 0}, r"num_masked: must be in \[1, 16\], got 0"),
        ({"num_masked": 17}, r"num_masked: must be in \[1, 16\], got 17"),
    ],
)
def test_wrong_training_input(changes, message):
    mar = MAR(**SMALL)
    with pytest.raises(CollapseError, match=message):
        mar(**{"latents": torch.zeros(2, 4, 4, 4), "labels": torch.tensor([0, 4]), **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"img_size": 9}, "img_size: must be a multiple of vae_stride [*] patch_size=2, got 9"),
        ({"img_size": 0}, "img_size: must be a multiple"),
        ({"class_num": -1}, "class_num: must be at least 0, got -1"),
        ({"buffer_size": 0}, "buffer_size: must be at least 1, got 0"),
        ({"diffusion_batch_mul": 0}, "diffusion_batch_mul: must be at least 1, got 0"),
    ],
)
def test_wrong_sizes(changes, message):
    with pytest.raises(CollapseError, match=message):
        MAR(**{**SMALL, **changes})


def test_the_loss_of_the_next_tokens_alone():
    """It is the loss of all masked tokens with the later ones left out."""
    mar = random_mar()
    latents, labels = torch.randn(3, 4, 4, 4), torch.tensor([0, 1, 2])
    order = torch.rand(3, 16).argsort(1)
    t, noise = torch.randint(NUM_TIMESTEPS, (2, 3, 10)), torch.randn(2, 3, 10, 4)
    kept = torch.zeros(3, dtype=torch.bool)
    parts = [mar(latents, labels, order, 10, kept, t[..., :k], noise[..., :k, :], k)["loss"] for k in (4, 10)]
    later = order[:, [*range(6), *range(10, 16), *range(6, 10)]]  # the other six come next
    rest = mar(latents, labels, later, 10, kept, t[..., 4:], noise[..., 4:, :], 6)["loss"]
    assert torch.allclose(parts[1], 0.4 * parts[0] + 0.6 * rest, rtol=1e-5)
    with pytest.raises(CollapseError, match=r"num_predicted: must be in \[1, num_masked=10\], got 11"):
        mar(latents, labels, order, 10, num_predicted=11)
