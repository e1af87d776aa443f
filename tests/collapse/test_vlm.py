"""Collapsed vision-language models against the stock ones with the dropped patches masked out."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from vlm_small import FAMILIES, IMAGE, SHUFFLED, TOWER, build, inputs_of, photos, prompt

from timm_collapse import CollapseError, CollapseOrder, Order, collapse


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pair(family):
    """Name, stock model, collapsed copy, processor."""
    stock, processor = build(family)
    return family, stock, collapse(copy.deepcopy(stock), "random", keep=0.5), processor


def orders_of(model, inputs):
    """A random order for each image, on its cell grid."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for numbers, _, grid in model._images(inputs):
        for i in numbers:
            made[i] = Order(torch.rand(1, grid[0] * grid[1], generator=generator), grid)
    return [made[i] for i in sorted(made)]


@contextmanager
def masked_tower(stock, name, inputs, seen):
    """Inside, the stock tower's attention sees only the patches of kept cells, `seen`: (cells,) bool of each image."""
    plain, calls = nn.functional.scaled_dot_product_attention, []
    if name.startswith("qwen"):
        chunks = qwen_chunks(stock.model.visual, inputs["image_grid_thw"], torch.cat(seen))

    def attention(query, key, value, attn_mask=None, **kwargs):
        if query.shape[1] != TOWER["num_attention_heads"]:  # the language model's
            return plain(query, key, value, attn_mask=attn_mask, **kwargs)
        if name.startswith("qwen"):
            mask = chunks[len(calls) % len(chunks)].view(1, 1, 1, -1)
            calls.append(1)
        else:
            cells = torch.stack(seen)
            if name in SHUFFLED:
                cells = cells.view(-1, 4, 1, 4, 1).expand(-1, -1, 2, -1, 2).flatten(1)
            mask = nn.functional.pad(cells, (key.shape[2] - cells.shape[1], 0), value=True)[:, None, None]
        assert mask.shape[-1] == key.shape[2]
        return plain(query, key, value, attn_mask=mask.expand(-1, -1, query.shape[2], -1), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        yield
    if name.startswith("qwen"):
        assert calls and len(calls) % len(chunks) == 0


def qwen_chunks(visual, grids, seen):
    """What each call of the tower's attention sees, block by block: windows, or whole images, of patches."""
    from transformers.vision_utils import get_vision_window_index

    rows = seen.repeat_interleave(4)
    images = grids.prod(-1).tolist()
    if not hasattr(visual, "window_size"):
        return list(rows.split(images)) * len(visual.blocks)
    windows, bounds = get_vision_window_index(grids, 2, visual.window_size, visual.patch_size)
    rows = seen[windows].repeat_interleave(4)
    parts = {False: rows.split(bounds.diff().tolist()), True: rows.split(images)}
    return [chunk for i in range(len(visual.blocks)) for chunk in parts[i in visual.fullatt_block_indexes]]


class Reference:
    """The stock model with dropped patches masked: in the tower's attention, and their placeholders in the text."""

    def __init__(self, name, stock, collapsed, inputs, orders):
        self.name, self.stock, self.inputs = name, stock, dict(inputs)
        self.seen = []
        leading = int(name == "llava_class_token")
        for order in orders:
            cells = order.grid[0] * order.grid[1]
            kept = order.keep(collapsed.keep)[0]
            seen = torch.zeros(cells, dtype=torch.bool).index_fill(0, kept, True)
            self.seen.append(nn.functional.pad(seen, (leading, 0), value=True))
        self.stays = inputs["input_ids"] != IMAGE
        self.stays[~self.stays] = torch.cat(self.seen)

    def positions(self, generating):
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        if generating:
            return self.stock._prepare_position_ids_for_generation(ids, dict(self.inputs))
        if self.name.startswith("qwen"):
            names = ("image_grid_thw", "mm_token_type_ids")
            return self.stock.model.get_rope_index(ids, attention_mask=mask, **{k: self.inputs[k] for k in names})[0]
        return torch.arange(ids.shape[1]).expand(ids.shape[0], -1) + (self.name == "paligemma")

    def given(self, generating=False):
        mask = self.inputs["attention_mask"] * self.stays
        return {**self.inputs, "attention_mask": mask, "position_ids": self.positions(generating)}

    @torch.no_grad()
    def forward(self, **kwargs):
        with masked_tower(self.stock, self.name, self.inputs, self.seen):
            return self.stock(**self.given(), **kwargs)

    def generate(self, **kwargs):
        with masked_tower(self.stock, self.name, self.inputs, self.seen):
            return self.stock.generate(**self.given(True), **kwargs)


@torch.no_grad()
def test_all_kept_is_the_stock_model_bit_for_bit(pair):
    name, stock, model, processor = pair
    model.keep = 1
    inputs = inputs_of(name, processor, batch=True)
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    answer = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **answer), stock.generate(**inputs, **answer))


@torch.no_grad()
@pytest.mark.parametrize("batch", [False, True])
def test_logits_are_those_of_the_stock_model_with_masks(pair, batch):
    name, stock, model, processor = pair
    inputs = inputs_of(name, processor, batch)
    orders = orders_of(model, inputs)
    reference = Reference(name, stock, model, inputs, orders)
    expected, got = reference.forward().logits, model(**inputs, order=orders).logits
    assert got.shape == expected.shape
    real = reference.stays & inputs["attention_mask"].bool()
    assert (got - expected)[real].abs().max() < 1e-4 * expected.abs().max()
    assert (got[~reference.stays] == 0).all()
    assert not torch.allclose(stock(**inputs).logits[:, -1], expected[:, -1], atol=1e-3)  # what is dropped counts


@torch.no_grad()
def test_features_of_several_layers_with_the_class_token():
    """LLaVA's strategy "full" on a tower with a class token, which has a placeholder of its own."""
    stock, processor = build("llava_class_token")
    model = collapse(copy.deepcopy(stock), "random", keep=0.5)
    inputs = inputs_of("llava", processor, batch=True)
    orders = orders_of(model, inputs)
    reference = Reference("llava_class_token", stock, model, inputs, orders)
    expected, got = reference.forward().logits, model(**inputs, order=orders).logits
    assert (got - expected)[reference.stays].abs().max() < 1e-4 * expected.abs().max()
    assert int((~reference.stays).sum()) == 3 * 8 and (got[~reference.stays] == 0).all()


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "beams", "static cache", "no cache"],
)
@pytest.mark.parametrize("batch", [False, True])
def test_generate_is_that_of_the_stock_model_with_masks(pair, how, batch):
    name, stock, model, processor = pair
    inputs = inputs_of(name, processor, batch)
    orders = orders_of(model, inputs)
    reference = Reference(name, stock, model, inputs, orders)
    how = {**how, "max_new_tokens": 5, "min_new_tokens": 5, "suppress_tokens": [IMAGE]}
    got = model.generate(**inputs, order=orders, **how)
    assert torch.equal(got, reference.generate(**how))
    assert torch.equal(got[0, : inputs["input_ids"].shape[1]], inputs["input_ids"][0])  # the whole prompt


def words_only(logits):
    return logits.index_fill(-1, torch.tensor([IMAGE]), -torch.inf)


def continued(inputs, ids):
    """Inputs whose texts go on: ids (B, L + more)."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    whole = {
        **inputs,
        "input_ids": ids,
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, more), value=1),
    }
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in whole:
            value = int(key == "token_type_ids")  # PaliGemma's answers see only what is before them
            whole[key] = nn.functional.pad(inputs[key], (0, more), value=value)
    return whole


@torch.no_grad()
def test_going_on_with_a_cache_is_the_whole_text_at_once(pair):
    name, stock, model, processor = pair
    inputs = inputs_of(name, processor)
    orders = orders_of(model, inputs)
    first = model(**inputs, order=orders, use_cache=True)
    steps, ids, cache = [], inputs["input_ids"], first.cache
    token = words_only(first.logits[:, -1:]).argmax(-1)
    for _ in range(3):
        ids = torch.cat([ids, token], 1)
        out = model(input_ids=token, cache=cache, attention_mask=torch.ones_like(ids))
        steps.append(out.logits[:, -1])
        token, cache = words_only(out.logits[:, -1:]).argmax(-1), out.cache
    whole, more = continued(inputs, ids), len(steps)
    expected = Reference(name, stock, model, whole, orders).forward().logits[:, -more:]
    assert (torch.stack(steps, 1) - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_embeddings_instead_of_ids(pair):
    name, stock, model, processor = pair
    inputs = dict(inputs_of(name, processor))
    orders = orders_of(model, inputs)
    expected = model(**inputs, order=orders).logits
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    got = model(inputs_embeds=embeds, **inputs, order=orders)
    how = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
    if name != "paligemma":  # whose stock model generates from ids alone
        answer = model.generate(inputs_embeds=embeds, **inputs, order=orders, **how)
    if name.startswith("qwen"):  # as the stock model: without ids it counts positions as in a text
        assert got.logits.shape == expected.shape and answer.shape == (1, 3)
        return
    assert torch.allclose(got.logits, expected, atol=1e-5)
    if name != "paligemma":
        whole = model.generate(ids, **inputs, order=orders, **how)
        assert torch.equal(answer, whole[:, ids.shape[1] :])


@torch.no_grad()
def test_text_alone_is_left_alone(pair):
    name, stock, model, processor = pair
    inputs = processor.tokenizer(["a red house", "two dogs"], return_tensors="pt", padding=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    how = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **how), stock.generate(**inputs, **how))


@torch.no_grad()
def test_a_prompt_without_a_photo_beside_one_with(pair):
    name, stock, model, processor = pair
    if name == "paligemma":  # whose processor gives every prompt a photo
        return
    texts = [prompt(name, 1, "what is it"), "a red house"]
    nested = [photos(1), []] if name in ("idefics3", "smolvlm") else photos(1)
    both = processor(images=nested, text=texts, return_tensors="pt", padding=True)
    alone = processor(images=[photos(1)], text=texts[:1], return_tensors="pt")
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
    orders = orders_of(model, both)
    answers = model.generate(**both, order=orders, **how)[:, -3:]
    words = {key: both[key][1:] for key in ("input_ids", "attention_mask")}
    assert torch.equal(answers[:1], model.generate(**alone, order=orders, **how)[:, -3:])
    assert torch.equal(answers[1:], stock.generate(**words, **how)[:, -3:])


def test_loss_is_of_the_tokens_that_are_left(pair):
    name, stock, model, processor = pair
    inputs = inputs_of(name, processor)
    orders = orders_of(model, inputs)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    out = model(**inputs, order=orders, labels=labels)
    stays = Reference(name, stock, model, inputs, orders).stays
    logits, targets = out.logits[stays], labels[stays]
    expected = nn.functional.cross_entropy(logits[:-1], targets[1:])
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    out.loss.backward()
    assert not any(name.startswith("orderer") for name, _ in model.named_parameters())


@torch.no_grad()
def test_the_budget_may_change_and_counts_for_each_image(pair):
    name, _, model, processor = pair
    inputs = inputs_of(name, processor, batch=True)
    for keep in (0.25, 3):
        model.keep = keep
        kept = model.compute_kept(inputs)
        assert [len(cells) for cells in kept.cells] == [
            keep if keep == 3 else max(1, round(n / 4)) for n in kept.counts
        ]
        assert torch.isfinite(model(**inputs).logits).all()


@torch.no_grad()
def test_orders_can_be_had_beforehand_with_weights(pair):
    name, stock, _, processor = pair
    inputs = inputs_of(name, processor, batch=True)
    model = collapse(copy.deepcopy(stock), "variance", keep=0.5)
    orders = model.compute_order(inputs)
    assert torch.equal(model(**inputs, order=orders).logits, model(**inputs).logits)
    maps = [torch.arange(4).float().unsqueeze(0).gt(1) for _ in orders]  # the right half
    for order in model.compute_order(inputs, maps):
        h, w = order.grid
        right = order.indices[0, : h * (w // 2)] % w
        assert (right >= w // 2).all()
    alike = model.compute_order(inputs, [torch.full((order.num_patches,), 0.3) for order in orders])
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(alike, orders, strict=True))


@torch.no_grad()
def test_positions_can_close_up(pair):
    name, stock, _, processor = pair
    if name.startswith("qwen"):
        with pytest.raises(CollapseError, match="positions must be 'keep'"):
            collapse(copy.deepcopy(stock), "random", positions="close")
        return
    inputs = inputs_of(name, processor)
    model = collapse(copy.deepcopy(stock), "random", keep=0.5, positions="close")
    orders = orders_of(model, inputs)
    got = model(**inputs, order=orders).logits
    reference = Reference(name, stock, model, inputs, orders)
    closed = reference.stays.long().cumsum(1) - 1 + (name == "paligemma")
    reference.positions = lambda generating: closed
    expected = reference.forward().logits
    assert (got - expected)[reference.stays].abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_clip", "paligemma", "smolvlm", "internvl"])
def test_with_positions_closed_up_generated_ids_are_the_best_in_the_whole_text(pair):
    name, stock, _, processor = pair
    inputs = inputs_of(name, processor, batch=True)
    model = collapse(copy.deepcopy(stock), "random", keep=0.5, positions="close")
    orders = orders_of(model, inputs)
    ids = model.generate(**inputs, order=orders, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, 2])
    best = model(**continued(inputs, ids), order=orders).logits.index_fill(-1, torch.tensor([IMAGE, 2]), -torch.inf)
    assert torch.equal(best[:, -5:-1].argmax(-1), ids[:, -4:])


def test_saved_it_is_the_stock_model(pair, tmp_path):
    name, stock, model, processor = pair
    model.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path)
    assert again.config.architectures == [type(stock).__name__]
    assert set(again.state_dict()) == set(stock.state_dict())
    inputs = inputs_of(name, processor)
    orders = orders_of(model, inputs)
    again = collapse(again.eval(), "random", keep=0.5)
    with torch.no_grad():
        assert torch.equal(again(**inputs, order=orders).logits, model(**inputs, order=orders).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["smolvlm"])  # towers that are collapsed themselves: test_collapse_hf
def test_compiled_prefill(pair):
    name, _, model, processor = pair
    inputs = inputs_of(name, processor)
    expected = model(**inputs, order=orders_of(model, inputs)).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**inputs, order=orders_of(model, inputs)).logits, expected, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llava_clip", "qwen3"])
def test_steps_of_generate_are_compiled_in_one_graph(pair):
    """As transformers does by itself on a GPU, with a static cache."""
    name, _, model, processor = pair
    inputs = inputs_of(name, processor)
    how = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "order": orders_of(model, inputs)}
    config = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    got = model.generate(**inputs, **how, cache_implementation="static", compile_config=config)
    assert hasattr(model, "_compiled_call") and torch.equal(got, model.generate(**inputs, **how))
    torch._dynamo.reset()


@torch.no_grad()
def test_half_precision(pair):
    name, _, model, processor = pair
    inputs = inputs_of(name, processor)
    orders = orders_of(model, inputs)
    expected = model(**inputs, order=orders).logits
    half = model.to(torch.bfloat16)(**inputs, order=orders).logits
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_orderer_sees_the_pixels_of_the_photo(family):
    stock, processor = build(family)
    seen = []

    class Spy(CollapseOrder):
        def forward(self, images, grid=None, **more):
            seen.append((images, grid))
            return super().forward(images, grid, **more)

    grey = Image.fromarray(np.full((32, 32, 3), 128, np.uint8))
    left = np.full((32, 32, 3), 0, np.uint8)
    left[:, :16] = 255
    model = collapse(stock, Spy("raster"), keep=0.5)
    for photo, means in ((grey, (128 / 255, 128 / 255)), (Image.fromarray(left), (1.0, 0.0))):
        seen.clear()
        inputs = processor(images=[photo], text=[prompt(family, 1, "a cat")], return_tensors="pt")
        inputs.pop("labels", None)
        with torch.no_grad():
            model(**inputs)
        images = seen[0][0][-1] * 0.5 + 0.5  # a baseline's normalisation; the last tile is the whole photo
        half = images.shape[-1] // 2
        assert images[..., : half - 4].mean().item() == pytest.approx(means[0], abs=0.02)
        assert images[..., half + 4 :].mean().item() == pytest.approx(means[1], abs=0.02)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, x: setattr(m, "keep", 0), "keep"),
        (
            lambda m, x: m(**x, order=CollapseOrder.baseline("bayer")(torch.zeros(1, 3, 8, 8), (3, 3))),
            "order must be on the cell grid",
        ),
        (
            lambda m, x: m(**x, order=CollapseOrder.baseline("bayer")(torch.zeros(7, 3, 8, 8), (4, 4))),
            "order must be of the",
        ),
        (
            lambda m, x: m(**{**x, "input_ids": x["input_ids"][:, :-8], "attention_mask": None}),
            "input_ids must hold 35 image tokens .*, got 33",
        ),
        (lambda m, x: m(**{**x, "attention_mask": x["attention_mask"][:, 1:]}), "attention_mask must be of shape"),
        (lambda m, x: m(**{**x, "logits_to_keep": torch.tensor([1])}), "logits_to_keep must be an int"),
        (
            lambda m, x: m(**{**x, "image_grid_thw": x["image_grid_thw"] * 2}),
            "image_grid_thw must give the grids of",
        ),
        (lambda m, x: m(**{**x, "image_grid_thw": None}), "image_grid_thw must give .*, got none"),
        (lambda m, x: m(**{**x, "mm_token_type_ids": None}), "mm_token_type_ids must be given"),
        (lambda m, x: m(**x, pixel_values_videos=torch.zeros(16, 96)), "pixel_values_videos must be None"),
        (lambda m, x: m(pixel_values=x["pixel_values"]), "input_ids or inputs_embeds must be given"),
        (lambda m, x: m.compute_order(x, torch.ones(2, 4)), "weights must be of the 1 images"),
        (lambda m, x: m.compute_order(x, torch.ones(1, 5)), r"weights must be of shape \(1, "),
        (lambda m, x: m.compute_order(x, [None]), "weights must be of shape .* got NoneType"),
        (lambda m, x: collapse(m, "random", remainder="coarse"), "remainder must be none"),
        (lambda m, x: collapse(m, "random", positions="all"), "positions must be one of"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    stock, processor = build("qwen3")
    model = collapse(stock, "random", keep=0.5)
    with pytest.raises(CollapseError, match=message):
        change(model, inputs_of("qwen3", processor))
    assert model(**inputs_of("qwen3", processor)).logits.isfinite().all()  # as it was


def test_a_picture_that_was_resized_otherwise_is_refused():
    stock, processor = build("llava_clip")
    model = collapse(stock, "random", keep=0.5)
    inputs = inputs_of("llava_clip", processor)
    with pytest.raises(CollapseError, match="pixel_values must be .* the tower's image_size"):
        model(**{**inputs, "pixel_values": torch.zeros(1, 3, 40, 40)})
    for family, shape, message in (
        ("internvl", (1, 3, 40, 40), "pixel_values must be .* the tower's image_size"),
        ("internvl", (3, 32, 32), r"pixel_values must be a tensor of shape \(B, C, H, W\)"),
        ("smolvlm", (1, 3, 32, 32), r"pixel_values must be a tensor of shape \(B, tiles, C, H, W\)"),
        ("smolvlm", (1, 2, 3, 32, 60), "pixel_values must have sides that are multiples of 8, whole cells"),
        ("smolvlm", (1, 5, 3, 32, 64), r"pixel_attention_mask must be of shape \(1, 5, 32, 64\)"),
        ("smolvlm", (1, 4, 3, 32, 32), "pixel_attention_mask must be of shape"),
    ):
        stock, processor = build(family)
        with pytest.raises(CollapseError, match=message):
            collapse(stock, "random")(**{**inputs_of(family, processor), "pixel_values": torch.ones(shape)})
    strategy = {"vision_feature_select_strategy": "full"}
    stock, processor = build("internvl")
    with pytest.raises(CollapseError, match="vision_feature_select_strategy must be 'default' for InternVL"):
        collapse(stock, "random")(**inputs_of("internvl", processor), **strategy)


def test_photos_in_another_order_than_in_the_text_are_refused():
    stock, processor = build("qwen3")
    inputs = inputs_of("qwen3", processor, batch=True)
    grids = inputs["image_grid_thw"]
    patches = inputs["pixel_values"].split(grids.prod(-1).tolist())
    swapped = {"pixel_values": torch.cat([*patches[1:], patches[0]]), "image_grid_thw": grids.roll(-1, 0)}
    with pytest.raises(CollapseError, match="input_ids must hold the 35 image tokens of image 2 in one piece"):
        collapse(stock, "random", keep=0.5)(**{**inputs, **swapped})


def test_a_second_picture_needs_the_whole_conversation():
    stock, processor = build("llava_clip")
    model = collapse(stock, "random", keep=0.5)
    inputs = inputs_of("llava_clip", processor)
    cache = model(**inputs, use_cache=True).cache
    with pytest.raises(CollapseError, match="cache must be empty"):
        model(**inputs, cache=cache)


def test_other_families_are_refused_with_the_reason():
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config={**TOWER, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
                        text_config={"model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
                                     "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40})
    )  # fmt: skip
    with pytest.raises(CollapseError, match="LlavaNextForConditionalGeneration cannot be collapsed: tiles"):
        collapse(model, "random")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("LlavaOnevisionForConditionalGeneration", "tiles of one picture are cut"),
        ("MllamaForConditionalGeneration", "there are no image tokens to drop"),
        ("Gemma3ForConditionalGeneration", "averages over pools of the whole grid"),
        ("Blip2ForConditionalGeneration", "a fixed number of image tokens"),
    ],
)
def test_the_reason_goes_by_the_family(name, reason):
    stand_in = type(name, (nn.Module,), {"__module__": "transformers.models"})()
    with pytest.raises(CollapseError, match=f"{name} cannot be collapsed: .*{reason}.*; supported .* are Llava"):
        collapse(stand_in, "random")


def test_forward_methods_that_cannot_be_relied_on_are_refused():
    stock, _ = build("llava_clip")

    class Older(type(stock)):
        def forward(self, input_ids=None, pixel_values=None):
            return super().forward(input_ids, pixel_values)

    stock.__class__ = Older
    with pytest.raises(CollapseError, match="takes no encoded images .mm_encoder_outputs.*a newer transformers does"):
        collapse(stock, "random")
    stock.__class__ = Older.__base__
    stock.forward = stock.forward
    with pytest.raises(CollapseError, match="the forward method of LlavaForConditionalGeneration was replaced"):
        collapse(stock, "random")
    with pytest.raises(CollapseError, match="no tokens that stand for several patches"):
        collapse(build("llava_clip")[0], "random", area_bias=0.5)
