"""A language model with random weights, of any size: no hub is needed to time an engine.

    python benchmarks/random_model.py OUT [--hidden 64] [--layers 2] [--context 4096] [--seed 0]
        [--dtype float32] [--bert] [--no-template]

The default has 131,000 parameters and is made in seconds. ``--hidden 2048 --layers 24 --dtype bfloat16``
gives about 1.3 billion, ``--hidden 4096 --layers 32`` about 6.5 billion. Answers are nonsense that depends on
the prompt; the tokenizer is byte-level, so that any text is read.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Classify the review as positive or negative.",
    'Answer with JSON: {"label": "positive", "score": 0.5, "name": "Ann", "age": 7}',
    "Polars runs a large language model over each row of a column.",
    'true false null 0 1 2 3 4 5 6 7 8 9 [ ] { } : , " user assistant system',
]


def tokenizer(out: Path, *, bert: bool, template: bool) -> Any:
    """Byte-level BPE of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"] if bert else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bert:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "model_max_length": 512}
    else:
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    if template and not bert:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(out)
    return fast


def causal(words: Any, given: argparse.Namespace) -> Any:
    """A Llama with 32 to 128 numbers a head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, given.hidden // (128 if given.hidden >= 1_024 else 32))
    config = LlamaConfig(
        vocab_size=(len(words) + 63) // 64 * 64,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * (3 if given.hidden >= 1_024 else 2),
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=given.context,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )
    config.initializer_range = 0.2 if given.hidden < 1_024 else 0.02  # answers must depend on the prompt
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = words.eos_token_id
    return model


def encoder(words: Any, given: argparse.Namespace, out: Path) -> Any:
    """A BERT that averages its tokens, in the layout of sentence-transformers."""
    from transformers import BertConfig, BertModel

    pooling = {"word_embedding_dimension": given.hidden, "pooling_mode_mean_tokens": True}
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (out / "1_Pooling").mkdir(exist_ok=True)
    (out / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "pooling_mode_cls_token": False}))
    (out / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(parts)
            ]
        )
    )
    (out / "sentence_bert_config.json").write_text('{"max_seq_length": 512, "do_lower_case": false}')
    return BertModel(
        BertConfig(
            vocab_size=(len(words) + 63) // 64 * 64,
            hidden_size=given.hidden,
            num_hidden_layers=given.layers,
            num_attention_heads=max(1, given.hidden // 32),
            intermediate_size=given.hidden * 2,
            max_position_embeddings=512,
        )
    )


def main() -> None:
    """Make it."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=4_096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bert", action="store_true", help="an encoder for embeddings")
    parser.add_argument("--no-template", action="store_true", help="no chat template")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(given.seed)
    torch.set_default_dtype(getattr(torch, given.dtype))
    words = tokenizer(given.out, bert=given.bert, template=not given.no_template)
    model = encoder(words, given, given.out) if given.bert else causal(words, given)
    model.save_pretrained(given.out)
    print(f"{given.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
