"""The table of architectures. A new architecture is one file in this folder and one line here."""

from typing import Any, NamedTuple

from minilora.models.bert import BertConfig, DistilBertConfig
from minilora.models.classifier import BertClassifier
from minilora.models.gpt2 import GPT2, GPT2Config
from minilora.models.llama import Llama
from minilora.models.llama_config import VARIANTS, LlamaConfig
from minilora.models.modernbert import ModernBertConfig


class Architecture(NamedTuple):
    """What reading and writing the checkpoints of an architecture takes."""

    config: type[Any]
    model: type[Any]
    architectures: tuple[str, ...]  # classes of transformers whose checkpoints fit; the first is the one that is written
    prefix: str = ""  # what that class puts before the names of the bare model
    embedding: str = ""  # the table that a tied head shares
    ignored: str = ""  # regular expression: buffers, and heads for other tasks
    fresh: tuple[str, ...] = ()  # modules that a bare model may lack; they are then drawn at random


def _encoder(config: type[Any], kind: str, prefix: str, heads: str, *fresh: str, more: tuple[str, ...] = ()) -> Architecture:
    """An encoder with a classifier. heads: the first part of the names of layers that classification does not read."""
    classes = (f"{kind}ForSequenceClassification", f"{kind}Model", f"{kind}ForMaskedLM", *more)
    ignored = rf"({prefix}\.)?embeddings\.position_ids|({heads})\..*"
    return Architecture(config, BertClassifier, classes, f"{prefix}.", "", ignored, fresh)


_ROBERTA = "roberta", r"lm_head|(roberta\.)?pooler", "classifier.dense", "classifier.out_proj"
_GPT2 = ("GPT2LMHeadModel", "GPT2Model"), "transformer.", "transformer.wte.weight", r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
_LLAMA = "model.", "model.embed_tokens.weight", r".*rotary_emb\.inv_freq"

ARCHITECTURES = {  # model_type in config.json: its architecture
    "gpt2": Architecture(GPT2Config, GPT2, *_GPT2),
    "bert": _encoder(BertConfig, "Bert", "bert", "cls", "bert.pooler.dense", "classifier", more=("BertForPreTraining",)),
    "roberta": _encoder(BertConfig, "Roberta", *_ROBERTA),
    "xlm-roberta": _encoder(BertConfig, "XLMRoberta", *_ROBERTA),
    "distilbert": _encoder(DistilBertConfig, "DistilBert", "distilbert", "vocab_[a-z_]+", "pre_classifier", "classifier"),
    "modernbert": _encoder(ModernBertConfig, "ModernBert", "model", "decoder", "head.dense", "head.norm", "classifier"),
    **{
        name: Architecture(LlamaConfig, Llama, (f"{x.classes}ForCausalLM", f"{x.classes}{'Text' * x.gemma}Model"), *_LLAMA)
        for name, x in VARIANTS.items()
    },
}
