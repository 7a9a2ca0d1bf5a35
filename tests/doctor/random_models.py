"""Random models whose faults the recordings need: one that speaks two languages, a sharp one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.tiny import EOS, tiny_config, tiny_tokenizer

CHINESE = "他有三个鸡蛋和两个苹果，买了四个梨，吃了一个，还剩几个？小明说：一共八个。"
ENGLISH = "he has eggs and pears, buys some, eats one, how many are left now? so it is eight. zebra quiz"


def _tokenizer(corpus: list[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def save_random(kind: str, folder: Path) -> Path:
    """tiny, bilingual or sharp; two layers of 32."""
    bilingual = [*(letter * 2 for letter in CHINESE), CHINESE, *([ENGLISH] * 4)]
    tokenizer = _tokenizer(bilingual, 460) if kind == "bilingual" else tiny_tokenizer()
    torch.manual_seed(sum(map(ord, kind)))
    config = tiny_config("qwen3", len(tokenizer))
    config.max_position_embeddings = 2048
    config.tie_word_embeddings = kind in ("tiny", "sharp")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    spread = {"tiny": 6.0, "sharp": 80.0}.get(kind, 3.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
