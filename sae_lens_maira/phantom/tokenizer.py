"""The phantom's tokenizer: a small BPE in the manner of Vicuna's, with MAIRA-2's 207 added tokens after it.

Ids 0, 1, 2 are `<unk>` (also the padding), `<s>` and `</s>`; 256 byte pieces follow, then the learned pieces,
then `<obj>` ... `<lat_image>` in MAIRA-2's order. Words carry a leading `▁`, punctuation is split off, and an
unseen character falls back to bytes, so no text is refused.
"""

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sae_lens_maira.maira2 import ADDED_TOKENS

_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{i:02X}>" for i in range(256))


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Learn the phantom's tokenizer from texts.

    Args:
        texts: Prompts and reports, one string each. Added tokens inside them are ignored.
        vocab_size: Most pieces before the 207 added tokens; a small corpus gives fewer.

    Returns:
        A fast tokenizer with `bos_token` prepended and `<unk>` as padding.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Punctuation is split off before training: "effusion" must be one piece wherever it occurs.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[.,:;()/_]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*_SPECIAL, *_BYTES], show_progress=False
    )
    # A placeholder inside a prompt must not be learned as a word: it would shadow the added token.
    added = re.compile("|".join(re.escape(token) for token in ADDED_TOKENS))
    tokenizer.train_from_iterator((added.sub(" ", text) for text in texts), trainer=trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
