"""Small tokenizers and a conversation, for tests."""

import tokenizers

from minilora.formats.tokenizer import ByteTokenizer, HFTokenizer

SPECIAL = ["<|end|>", "<|user|>", "<|bot|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "\nSo <b>long</b>"},
]


def library_bpe():
    """A byte-level BPE like GPT-2's, trained on a few words."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(["the cat sat on the mat; the capital of France is Paris 2024 naïve ☃"] * 20, trainer)
    return library


def library_wordpiece():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "eat", "##ing", "food", "."]
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    library.normalizer = tokenizers.normalizers.BertNormalizer()
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    library.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    library.add_special_tokens(words[:4])
    return library


BYTES, BPE = ByteTokenizer(), HFTokenizer(library_bpe(), eos_id=0, chat_template=CHATML)
