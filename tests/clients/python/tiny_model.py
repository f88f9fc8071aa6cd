"""A chat model of random weights, with its tokenizer, for `transformers serve`. The argument is its folder."""

from __future__ import annotations

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = ["The river began in the mountains, where the snow is old.", "Tell me about rivers.", "user assistant system"]
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"

folder = sys.argv[1]
raw = Tokenizer(models.BPE())
raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
raw.decoder = decoders.ByteLevel()
special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
raw.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
tokenizer.chat_template = TEMPLATE
tokenizer.save_pretrained(folder)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(
    vocab_size=len(tokenizer),
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=0,
    **sizes,
)
torch.manual_seed(1)
model = LlamaForCausalLM(config)
model.generation_config.do_sample = False
model.generation_config.eos_token_id = None  # random weights would end an answer anywhere
model.save_pretrained(folder)
