"""The tokenizers of nanop/tokenizer.py as a folder of Hugging Face transformers: the same ids and text, or refused."""
import json
from pathlib import Path

import numpy as np

from nanop.errors import UserError, explained, first_line, import_optional
from nanop.tokenizer import get_tokenizer, prompt_ids

ODD_TEXTS = (  # what tokenizers tend to disagree about
    'two  spaces,   three, and a  tab\tbetween;  a trailing one ', '  leading', '\r\nCRLF\r\n\r\n\n \n\n', '',
    '1234567 1,234.5 ½ ² Ⅷ ١٢٣ ', "it's IT'S we'll 'S 'ſ ’s can't've", 'e\u0301 and \u00e9, \u1112\u1161\u11ab, नि, ก็',
    '🙂👩‍👩‍👧🏽🇫🇷\ufe0f zero\u200bwidth \u00a0\u2003\u3000\u0085\u2028spaces \ufeff', '日本語のテキスト。 Привет',
    'שלום مرحبا', '<|endoftext|> <|fim_prefix|> <s></s> [UNK] <unk> <pad> Ġ Ċ Ā',
    '_snake_case camelCase HTTPServer x+=1;//**//',
    '\x00\x01\x07\x1b\x7f\x80\x9f\xa0\xad\xff', '\ud7ff\ue000\uffff\U00010000\U0010ffff')


def byte_symbols():
    """The character by which Hugging Face's byte-level tokenizers write each byte: GPT-2's bytes_to_unicode()."""
    printable = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
    others = (chr(code) for code in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def byte_pairs(ranks):
    """(vocabulary, merges) of tiktoken's {bytes: id}: each pair of tokens that gives a token, likeliest tokens first.

    tiktoken joins any such pair. Where several give one token, the pair of the lower ids comes first, as in
    transformers' own converter; require_same() looks for a text on which that matters.
    """
    symbols = byte_symbols()
    written = {token: ''.join(symbols[byte] for byte in token) for token in ranks}
    pairs = []
    for token, rank in ranks.items():
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs += [(rank, ranks[left], ranks[right], written[left], written[right]) for left, right in halves
                  if left in ranks and right in ranks]
    return {written[token]: rank for token, rank in ranks.items()}, [pair[3:] for pair in sorted(pairs)]


def byte_level(tokenizers, vocabulary, merges, pattern=None):
    """Byte pair encoding of UTF-8 within the matches of `pattern`; without one, of the whole text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=bool(merges)))
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern:
        # tiktoken's regular expressions in the dialect of Hugging Face's: there {1,3}+ would repeat, $ end a line
        pattern = pattern.replace('{1,3}+', '{1,3}').replace(r'\s++$', r'\s++\z')
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
        to_bytes = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    made.pre_tokenizer, made.decoder = to_bytes, tokenizers.decoders.ByteLevel()
    return made


def characters(tokenizers, chars):
    """Every character is a word, and a character that is none is an error, as it is for nanoP."""
    words = tokenizers.models.WordLevel({char: i for i, char in enumerate(chars)}, unk_token='no unknown characters')
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    made.decoder = tokenizers.decoders.Fuse()
    return made


def make(ours):
    """The transformers tokenizer for one of nanoP's. Text that looks like a special token stays plain text."""
    tokenizers = import_optional('tokenizers', 'the export of a tokenizer', 'transformers')
    transformers = import_optional('transformers', 'the export of a tokenizer')
    special = {}
    if ours.name == 'byte':
        made = byte_level(tokenizers, {symbol: byte for byte, symbol in enumerate(byte_symbols())}, [])
    elif ours.name == 'char':
        made = characters(tokenizers, ours.chars)
    else:
        encoding = ours.encoding
        vocabulary, merges = byte_pairs(encoding._mergeable_ranks)
        special = {id: name for name, id in encoding._special_tokens.items()}
        made = byte_level(tokenizers, vocabulary | encoding._special_tokens, merges, encoding._pat_str)
    end = special.get(ours.end_of_text)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=end, eos_token=end, split_special_tokens=True,
        clean_up_tokenization_spaces=False)


class FolderTokenizer:
    """The byte-level tokenizer in a folder of transformers that nanoP did not write. Raises UserError for another."""

    def __init__(self, folder):
        transformers = import_optional('transformers', f"init_from='{folder}'")
        with explained(Exception, f"'{folder}' holds no tokenizer", 'sample from it with transformers'):  # all kinds
            self.made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if type(getattr(getattr(self.made, 'backend_tokenizer', None), 'decoder', None)).__name__ != 'ByteLevel':
            raise UserError(f"the tokenizer in '{folder}' is not of bytes: sample from it with transformers")
        self.name, self.vocab_size, self.end_of_text = str(folder), len(self.made), self.made.eos_token_id
        self.bytes = {symbol: byte for byte, symbol in enumerate(byte_symbols())}

    def encode(self, text):
        return np.array(self.made.encode(text, add_special_tokens=False), dtype=np.uint32)

    def token_bytes(self, token):
        token = self.made.convert_ids_to_tokens(int(token)) if token < self.vocab_size else ''
        plain = set(token) <= set(self.bytes) and token not in self.made.all_special_tokens
        return bytes(self.bytes[symbol] for symbol in token) if plain else token.encode()


def refuse(ours, reason):
    raise UserError(f'transformers cannot hold tokenizer={ours.name!r}, {reason}: leave it out with --tokenizer=False')


def require_same(made, ours, texts):
    """Refuse a transformers tokenizer whose ids or texts are not those of nanoP's, on `texts` and on every id."""
    def text_of(ids):
        return b''.join(map(ours.token_bytes, ids)).decode(errors='replace')
    known = set(getattr(ours, 'chars', ''))
    for text in texts:
        text = ''.join(char for char in text if char in known) if known else text
        ids = ours.encode(text).tolist()
        found = made.encode(text, add_special_tokens=False, verbose=False)  # of its length
        if found != ids:
            at = next((i for i, (one, other) in enumerate(zip(ids, found)) if one != other), min(len(ids), len(found)))
            refuse(ours, f'it reads {text_of(ids[at:at + 9])!r} as {found[at:at + 3]}.., nanoP as {ids[at:at + 3]}..')
        if made.decode(found) != text_of(ids):
            refuse(ours, f'it writes {text_of(ids)!r:.60} as {made.decode(found)!r:.60}')
    for id in range(ours.vocab_size):
        if made.decode([id]) != text_of([id]):
            refuse(ours, f'it writes id {id} as {made.decode([id])!r}, nanoP as {text_of([id])!r}')


def special_ids(ours):
    """The special ids for a model's config. bos begins a text from nothing, as in sample.py; there is no padding."""
    return dict(bos_token_id=prompt_ids(ours)[0], eos_token_id=ours.end_of_text, pad_token_id=None)


def write_tokenizer(folder, meta, block_size, texts=()):
    """Write the tokenizer of a dataset's `meta`, read it back and compare it with nanoP's on odd texts and on `texts`.

    Returns its special_ids(). Raises UserError for one that transformers cannot hold exactly.
    """
    ours = get_tokenizer(meta['tokenizer'], meta.get('chars'))
    try:
        made = make(ours)
    except (UnicodeError, TypeError) as error:  # such as half of a surrogate pair among the characters
        refuse(ours, first_line(error))
    made.model_max_length = block_size
    made.save_pretrained(folder)
    path = Path(folder, 'tokenizer_config.json')
    held = json.loads(path.read_text())  # under the class's name before transformers 5, which reads it, too
    path.write_text(json.dumps({**held, 'tokenizer_class': 'PreTrainedTokenizerFast'}, indent=2))
    require_same(type(made).from_pretrained(folder, local_files_only=True), ours, [*ODD_TEXTS, *texts])
    return special_ids(ours)
