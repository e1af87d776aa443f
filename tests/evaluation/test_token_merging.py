"""Token merging of the benchmarks: against a loop over tokens, and what must hold whatever is merged."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch

from timm_collapse import CollapseError

FILE = Path(__file__).parents[2] / "benchmarks" / "token_merging.py"
spec = importlib.util.spec_from_file_location("token_merging", FILE)
tome = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tome)


def tiny(**kwargs):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **kwargs}).eval()


def merged_by_loop(x, size, metric, r):
    """One image, token by token: x (N, D), size (N,), metric (N, d)."""
    evens, odds = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    proposals = []
    for i in evens[1:]:  # the class token proposes nothing
        likeness = [float(torch.cosine_similarity(metric[i], metric[j], dim=0)) for j in odds]
        proposals.append((max(likeness), i, odds[likeness.index(max(likeness))]))
    proposals = sorted(proposals, reverse=True)[: min(r, (len(x) - 1) // 2)]
    groups = {j: [j] for j in odds}
    for _, i, j in proposals:
        groups[j].append(i)
    gone = {i for _, i, _ in proposals}
    groups = [[i] for i in evens if i not in gone] + [groups[j] for j in odds]
    tokens = torch.stack([sum(x[i] * size[i] for i in group) / sum(size[i] for i in group) for group in groups])
    return tokens, torch.stack([sum(size[i] for i in group) for group in groups])


@pytest.mark.parametrize("tokens", [2, 3, 8, 17])
@pytest.mark.parametrize("r", [0, 1, 3, 8, 99])
def test_merging_equals_a_loop_over_tokens(tokens, r):
    x, size, metric = torch.randn(3, tokens, 6), torch.randint(1, 5, (3, tokens, 1)).float(), torch.randn(3, tokens, 4)
    found, sizes = tome.merge_tokens(x, size, tome.match_tokens(metric, r))
    for i in range(3):
        expected, expected_sizes = merged_by_loop(x[i], size[i, :, 0], metric[i], r)
        torch.testing.assert_close(found[i], expected)
        torch.testing.assert_close(sizes[i, :, 0], expected_sizes)
    assert found.shape[1] == tokens - min(r, (tokens - 1) // 2)
    torch.testing.assert_close(found[:, 0], x[:, 0])  # the class token stays first, and alone
    assert torch.equal(sizes[:, 0], size[:, 0])


def test_equal_tokens_merge_first_and_means_are_weighted():
    metric = torch.eye(6)[None]
    metric[0, 4] = 3 * metric[0, 3]  # the same direction: the only pair that is alike
    x = torch.arange(6.0).view(1, 6, 1)
    size = torch.tensor([1.0, 1, 1, 3, 1, 1]).view(1, 6, 1)
    found, sizes = tome.merge_tokens(x, size, tome.match_tokens(metric, 1))
    assert found.flatten().tolist() == [0, 2, 1, (3 * 3 + 4) / 4, 5] and sizes.flatten().tolist() == [1, 1, 1, 4, 1]


def test_without_merges_it_is_the_plain_model():
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tome.TokenMerging(model, 0)(images), model(images))
    model = tiny(qk_norm=True, init_values=0.3)
    torch.testing.assert_close(tome.TokenMerging(model, [0, 0, 0])(images), model(images))


def test_attention_to_a_token_of_size_s_is_attention_to_s_tokens():
    attention, x = tiny().blocks[0].attn, torch.randn(1, 4, 32)
    size = torch.tensor([1.0, 1, 3, 2]).view(1, 4, 1)
    repeated = x.repeat_interleave(size.flatten().long(), dim=1)
    found, keys = tome.attend(attention, x, size)
    expected, _ = tome.attend(attention, repeated, None)
    torch.testing.assert_close(found, expected[:, [0, 1, 2, 5]])
    assert keys.shape == (1, 4, 16)


def test_tokens_fall_by_r_a_block_and_stand_for_all_patches():
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    x, size = tome.TokenMerging(model, [3, 0, 5])(images), tome.TokenMerging(model, [3, 0, 5]).tokens(images)[1]
    assert x.shape == (2, 10) and size.shape == (2, 17 - 8, 1) and size.sum(1).flatten().tolist() == [17, 17]
    assert tome.TokenMerging(model, 99).tokens(images)[0].shape[1] == 3  # 17, 9, 5, 3
    weights = {id(p) for p in model.parameters()}
    assert {id(p) for p in tome.TokenMerging(model, 2).parameters()} == weights


def test_a_token_merged_with_its_like_changes_nothing():
    """All patches alike and no positions: whatever is merged, the class token sees the same."""
    model = tiny()
    model.pos_embed.data.zero_()
    images = torch.randn(1, 3, 8, 8).repeat(1, 1, 4, 4)
    torch.testing.assert_close(tome.TokenMerging(model, 4)(images), model(images), rtol=1e-4, atol=1e-5)


def test_the_schedule_of_a_target_cost():
    def cost(schedule):  # tokens after each of three blocks, of 17
        tokens, total = 17, 0
        for r in schedule:
            tokens -= min(r, (tokens - 1) // 2)
            total += tokens
        return total

    assert tome.schedule_for_macs(cost, cost([0, 0, 0]), 3, 17) == [0, 0, 0]
    assert tome.schedule_for_macs(cost, cost([3, 2, 2]), 3, 17) == [3, 2, 2]
    assert cost(tome.schedule_for_macs(cost, 0, 3, 17)) == 8 + 4 + 2 + 3  # the least: 9, 5, 3 tokens
    assert tome.schedule_for_macs(cost, 1000, 3, 17) == [0, 0, 0]
    for target in range(17, 52):
        best = min(abs(cost([m // 3 + (i < m % 3) for i in range(3)]) - target) for m in range(25))
        assert abs(cost(tome.schedule_for_macs(cost, target, 3, 17)) - target) == best


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tome.TokenMerging(torch.nn.Linear(2, 2), 1), "class token"),
        (lambda: tome.TokenMerging(tiny(global_pool="avg", class_token=False), 1), "class token"),
        (lambda: tome.TokenMerging(tiny(), [1, 2]), "3 numbers"),
        (lambda: tome.TokenMerging(tiny(), -1), "at least 0"),
    ],
)
def test_refused(call, message):
    with pytest.raises(CollapseError, match=message):
        call()
