"""Small vision-language models of random weights, each with its real processor, made offline."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
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
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

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
                              "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
    )  # fmt: skip
    return made


def llava(tower: str):
    """One token a patch of a CLIP tower (features of the last but one block, no class token) or a SigLIP one (all)."""
    clip = tower == "clip"
    vision = (CLIPVisionConfig if clip else SiglipVisionConfig)(**TOWER, image_size=32, patch_size=8)
    strategy = "default" if clip else "full"
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE,
                    vision_feature_layer=-2, vision_feature_select_strategy=strategy)
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


FAMILIES = {
    "llava_clip": lambda: llava("clip"),
    "llava_siglip": lambda: llava("siglip"),
    "paligemma": paligemma,
    "qwen2_5": qwen2_5,
    "qwen3": qwen3,
    "idefics3": idefics3,
}
PROMPTS = {"qwen2_5": "<start> <image> <end>", "qwen3": "<start> <image> <end>"}


def build(name: str):
    """A model in eval mode and its processor."""
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    for parameter in model.parameters():  # random weights of the usual size make all answers alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval(), processor
