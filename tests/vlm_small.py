"""Small vision-language models of random weights, each with its real processor, made offline."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

SPECIAL = [
    "<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<video>", "<start>", "<end>", "<fake_token_around_image>",
    "<end_of_utterance>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>", "\n",
]  # fmt: skip
WORDS = "what is on the photo and behind it a cat dog house tree red blue two three yes no".split()
VOCABULARY = {word: i for i, word in enumerate(SPECIAL + WORDS)}
IMAGE = VOCABULARY["<image>"]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": 8, "max_position_embeddings": 512}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VOCABULARY["<video>"],
               "vision_start_token_id": VOCABULARY["<start>"], "vision_end_token_id": VOCABULARY["<end>"]}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:], padding_side="left",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>", "vision_bos_token": "<start>",
                              "vision_eos_token": "<end>", "fake_image_token": "<fake_token_around_image>",
                              "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
                              "start_image_token": "<start>", "end_image_token": "<end>",
                              "context_image_token": "<image>"},
    )  # fmt: skip
    return made


def llava(tower: str, layer: int | list[int] = -2, strategy: str = "full"):
    """One token a patch of a CLIP or SigLIP tower; with the strategy "default" without the first one."""
    clip = tower == "clip"
    vision = (CLIPVisionConfig if clip else SiglipVisionConfig)(**TOWER, image_size=32, patch_size=8)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE,
                    vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    )  # fmt: skip
    if clip:
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        images = SiglipImageProcessor(size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(), patch_size=8, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
    )  # fmt: skip
    return model, processor


def paligemma():
    text = {**TEXT, "model_type": "gemma"}
    model = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(vision_config={**TOWER, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8,
                                       "vision_use_head": False},
                        text_config=text, image_token_id=IMAGE, projection_dim=32)
    )  # fmt: skip
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    return model, PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer())


def qwen2():
    """Cells of 2 x 2 patches."""
    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 1, "depth": 3, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
    config = Qwen2VLConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": {**ROPE, "type": "default"}}, **QWEN_TOKENS
    )
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    return Qwen2VLForConditionalGeneration(config), Qwen2VLProcessor(images, tokenizer(), videos)


def qwen2_5():
    """Cells of 2 x 2 patches, windows of 2 x 2 cells in the first blocks."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "window_size": 16,
              "fullatt_block_indexes": [2], "in_channels": 3}  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": {**ROPE, "type": "default"}}, **QWEN_TOKENS
    )
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2_5_VLProcessor(images, tokenizer(), videos)


def qwen3():
    """Cells of 2 x 2 patches, positions interpolated; features of two blocks go to the language model's first ones."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "in_channels": 3}  # fmt: skip
    config = Qwen3VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        **QWEN_TOKENS,
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096, **half)
    videos = Qwen3VLVideoProcessor(patch_size=4, merge_size=2)
    return Qwen3VLForConditionalGeneration(config), Qwen3VLProcessor(images, tokenizer(), videos)


def idefics3():
    """Cells of 2 x 2 patches, shuffled into one token; a photo is cut into tiles and shown whole as well."""
    config = Idefics3Config(
        vision_config={**TOWER, "image_size": 32, "patch_size": 4}, text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE, scale_factor=2,
    )  # fmt: skip
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return Idefics3ForConditionalGeneration(config), Idefics3Processor(images, tokenizer(), image_seq_len=16)


def smolvlm():
    """As Idefics3, with a processor of its own."""
    config = SmolVLMConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 4}, text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE, scale_factor=2,
    )  # fmt: skip
    images = SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # writes numbers as words, for videos alone
    return SmolVLMForConditionalGeneration(config), SmolVLMProcessor(
        images, tokenizer(), SmolVLMVideoProcessor(), image_seq_len=16
    )


def internvl():
    """A class token, cells of 2 x 2 patches shuffled into one token; a photo is cut into tiles and shown whole."""
    config = InternVLConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 4, "layer_scale_init_value": 1.0},
        text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE,
    )  # fmt: skip
    images = GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
        max_patches=3,
    )  # fmt: skip
    processor = InternVLProcessor(images, tokenizer(), InternVLVideoProcessor(), image_seq_length=16)
    return InternVLForConditionalGeneration(config), processor


FAMILIES = {
    "llava_clip": lambda: llava("clip", strategy="default"),
    "llava_siglip": lambda: llava("siglip"),
    "paligemma": paligemma,
    "qwen2": qwen2,
    "qwen2_5": qwen2_5,
    "qwen3": qwen3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
}
VARIANTS = {
    "llava_class_token": lambda: llava("clip", layer=[-2, -1]),
}
PROMPTS = dict.fromkeys(("qwen2", "qwen2_5", "qwen3"), "<start> <image> <end>")
SIZES = [(40, 56), (32, 32), (48, 24)]  # of the photos
SHUFFLED = ("idefics3", "smolvlm", "internvl")  # cells of 2 x 2 patches on a grid of 8 x 8


def build(name: str):
    """A model in eval mode and its processor."""
    torch.manual_seed(0)
    model, processor = (FAMILIES | VARIANTS)[name]()
    for parameter in model.parameters():  # random weights of the usual size make all answers alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval(), processor


def photos(count):
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 255, (*SIZES[i], 3), dtype=np.uint8)) for i in range(count)]


def prompt(name, images, text):
    return " ".join([PROMPTS.get(name, "<image>")] * images + [text])


def inputs_of(name, processor, batch=False):
    """One photo and a question; or two prompts, of two photos and of one, padded on the left."""
    if name == "paligemma":
        given = {"images": photos(2), "text": ["<image> what is on the photo", "<image> a cat"]}
        if not batch:
            given = {key: value[:1] for key, value in given.items()}
        inputs = processor(**given, return_tensors="pt", padding=True)
        inputs.pop("labels", None)
        return inputs
    texts = [prompt(name, 1, "what is on the photo")]
    images = [photos(1)]
    if batch:
        texts = [prompt(name, 2, "is the cat behind the dog"), prompt(name, 1, "what is it")]
        images = [photos(3)[:2], photos(3)[2:]]
    return processor(images=images, text=texts, return_tensors="pt", padding=True)
