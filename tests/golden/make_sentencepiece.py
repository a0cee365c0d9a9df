"""Write sentencepiece.json: a small SentencePiece BPE as Llama 2 and Mistral have, as llama.cpp's converter keeps it, and its own ids.

python -m tests.golden.make_sentencepiece     (needs sentencepiece)
"""

import io
import json
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
TEXT = [
    "the cat sat on the mat",
    "a naïve café",
    "def f(x):\n    return x + 1",
    "SELECT name FROM people WHERE age > 30;",
    "one  two   three",
]
OPTIONS = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True}
OPTIONS |= {"split_digits": True, "allow_whitespace_only_pieces": True, "character_coverage": 0.99, "minloglevel": 2}


def main() -> None:
    model, rng = io.BytesIO(), random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_writer=model, vocab_size=330, model_type="bpe", **OPTIONS
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = library.get_piece_size()
    kinds = ((library.is_unknown, 2), (library.is_control, 3), (library.is_byte, 6))
    letters = "the catsnmoï☃日\n\t  (),.:1234" + "▁"
    texts = [*TEXT, "", " ", "  a", " a", "the cat", *("".join(rng.choice(letters) for _ in range(rng.randrange(40))) for _ in range(60))]
    found = {
        "tokens": [library.id_to_piece(i) for i in range(count)],
        "scores": [library.get_score(i) for i in range(count)],
        "token_type": [next((kind for test, kind in kinds if test(i)), 1) for i in range(count)],
        "ids": {text: library.encode(text) for text in texts},
    }
    (HERE / "sentencepiece.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
