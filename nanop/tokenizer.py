"""
Tokenizers, chosen by name: 'byte', 'char' or any encoding of tiktoken.

Each has encode(text) -> array of ids, token_bytes(id) -> UTF-8 bytes, vocab_size, and end_of_text (an id or None).
"""
import numpy as np

from nanop.errors import UserError, explained, import_optional

SHOWN = 100  # characters of a vocabulary in an error


class ByteTokenizer:
    """The UTF-8 bytes of the text."""
    name, vocab_size, end_of_text = 'byte', 256, None

    def encode(self, text):
        return np.frombuffer(text.encode(errors='replace'), dtype=np.uint8)

    def token_bytes(self, token):
        return bytes([token])


class CharTokenizer:
    """The characters of the text; ids are positions in `chars`, a sorted string."""
    name, end_of_text = 'char', None

    def __init__(self, chars):
        self.chars, self.vocab_size = chars, len(chars)
        self.codes = np.array([ord(char) for char in chars], dtype=np.uint32)

    @classmethod
    def of(cls, text):
        """The tokenizer for the characters that occur in `text`, any iterable of characters."""
        return cls(''.join(sorted(set(text))))

    def encode(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', errors='surrogatepass'), dtype=np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        unknown = codes[self.codes[ids] != codes]
        if len(unknown):
            shown = f"{self.chars[:SHOWN]!r}{' and so on' if self.vocab_size > SHOWN else ''}"
            raise UserError(f'character {chr(unknown[0])!r} is not among the {self.vocab_size:,} in the vocabulary, '
                            f'{shown}: leave it out')
        return ids

    def token_bytes(self, token):
        return self.chars[token].encode(errors='replace')


class TiktokenTokenizer:
    """An encoding of tiktoken, such as GPT-2's. Text that looks like a special token is encoded as plain text."""

    def __init__(self, name):
        tiktoken = import_optional('tiktoken', f"tokenizer {name!r}")
        known = tiktoken.list_encoding_names()
        if name not in known:
            raise UserError(f"tokenizer={name!r} is not allowed: use one of byte, char, {', '.join(known)}")
        with explained(Exception, f"tokenizer {name!r} could not be downloaded",  # whatever the network library raises
                       'go online once, or set TIKTOKEN_CACHE_DIR to a folder that holds it'):
            self.name, self.encoding = name, tiktoken.get_encoding(name)
        self.vocab_size, self.end_of_text = self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text):
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half of a surrogate pair; this slower call replaces it
            return np.array(self.encoding.encode_ordinary(text), dtype=np.uint32)

    def token_bytes(self, token):
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # some encodings do not use all ids
            return b''


def get_tokenizer(name, chars=None):
    """The tokenizer called `name`; 'char' needs its `chars`."""
    if name == 'byte':
        return ByteTokenizer()
    if name != 'char':
        return TiktokenTokenizer(name)
    if not (chars and isinstance(chars, str)):
        raise UserError("tokenizer='char' needs the characters of the text, which are not known here: use byte or an "
                        'encoding of tiktoken, or prepare your own text with data/text/prepare.py')
    return CharTokenizer(chars)


def prompt_ids(tokenizer, text=''):
    """Ids of a prompt. An empty one starts a new text: end of text, else a line break, else the first character."""
    if text:
        return tokenizer.encode(text).tolist()
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    return tokenizer.encode('\n' if '\n' in getattr(tokenizer, 'chars', '\n') else tokenizer.chars[0]).tolist()
