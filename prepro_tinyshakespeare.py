"""Turn a text into files of tokens: tinyshakespeare by default, any UTF-8 file with --text.

    python prepro_tinyshakespeare.py                       # data/tinyshakespeare_byte_*.bin
    python prepro_tinyshakespeare.py --tokenizer gpt2      # data/tinyshakespeare_gpt2_*.bin
    python prepro_tinyshakespeare.py --text my_novel.txt   # data/my_novel_byte_*.bin

A token file is llm.c's: 256 little-endian int32 (magic, version, number of tokens, zeros), then the
tokens as little-endian uint16. The tokenizers and the reader of such files live here too: this file
is the whole way from a text to batches of tokens, and from tokens back to text.
"""
import argparse
import contextlib
import glob
import hashlib
import importlib
import os
import queue
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
DATA = Path("data")
TEXT_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
            "data/tinyshakespeare/input.txt")
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MERGES_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SECONDS_TO_ANSWER = 8


class Refused(ValueError):
    """Something a person gave cannot be used: the message says what, where, and the way out."""


# ------------------------------------------------------------------------------------ tokenizers

class ByteTokenizer:
    """GPT-2's tokenizer before any merge: the 256 bytes of UTF-8, and <|endoftext|>.

    >>> ByteTokenizer().encode("Oh!<|endoftext|>")
    [79, 104, 33, 256]
    """
    name, n_vocab, eot_token = "byte", 257, 256

    def encode(self, text):
        """str -> list of ids; a literal <|endoftext|> becomes the one token."""
        first, *rest = text.split("<|endoftext|>")
        ids = list(first.encode("utf-8"))
        for part in rest:
            ids.append(self.eot_token)
            ids.extend(part.encode("utf-8"))
        return ids

    def decode_bytes(self, ids):
        """Ids -> bytes; a token may hold only a part of a character."""
        return b"".join(b"<|endoftext|>" if i == self.eot_token else bytes((i,)) for i in ids)

    def decode(self, ids):
        """Ids -> str; bytes that are no UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class GPT2Tokenizer(ByteTokenizer):
    """The same with GPT-2's 50,000 merges (Radford et al. 2019, section 2.2), by tiktoken."""
    name, n_vocab, eot_token = "gpt2", 50257, 50256

    def __init__(self):
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken"))
        try:
            self.bpe = importlib.import_module("tiktoken").get_encoding("gpt2")
        except ImportError:
            raise Refused("GPT-2's tokens need the package tiktoken: pip install tiktoken "
                          "(or train on bytes: --tokenizer byte)") from None
        except Exception as error:  # whatever tiktoken's downloader raises: no network, a bad proxy
            raise Refused(
                f"GPT-2's merges could not be fetched: {reason(error)}; tiktoken wants vocab.bpe and "
                f"encoder.json of {MERGES_URL} in {os.environ['TIKTOKEN_CACHE_DIR']}; set "
                "TIKTOKEN_CACHE_DIR to a folder that has them, or use --tokenizer byte") from None

    def encode(self, text):
        """str -> list of ids; a literal <|endoftext|> becomes the one token."""
        return self.bpe.encode(text, allowed_special={"<|endoftext|>"})

    def decode_bytes(self, ids):
        """Ids -> bytes; a token may hold only a part of a character."""
        return self.bpe.decode_bytes([int(i) for i in ids])


TOKENIZERS = {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer}


# ------------------------------------------------------------------- files: whole, or not at all

@contextlib.contextmanager
def written_whole(path):
    """Open a binary file that appears under `path` only when the block ends without an error.

    The bytes go into a file beside it, reach the disk, and take the name in one step; a failure
    leaves whatever stood at `path` before. Raises OSError as the system does.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_tokens(path, tokens):
    """Write ids as a token file (llm.c's format, see the top)."""
    tokens = np.asarray(tokens)
    assert tokens.min() >= 0 and tokens.max() < 2**16, "a token file holds uint16"
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with written_whole(path) as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())


def map_tokens(path):
    """A token file as an array of its ids, left on disk. Raises Refused if it is not one."""
    remake = "make it again with python prepro_tinyshakespeare.py"
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
        if len(header) < HEADER_INTS:
            raise Refused(f"{path}: too short for a token file's header; {remake}")
        if header[0] != MAGIC:
            raise Refused(f"{path}: not a token file (magic {header[0]}, not {MAGIC}); {remake}")
        if header[1] != VERSION:
            raise Refused(f"{path}: version {header[1]}, where only {VERSION} is known; {remake}")
        count, held = int(header[2]), (os.path.getsize(path) - 4 * HEADER_INTS) / 2
        if count < 2 or count != held:
            raise Refused(f"{path}: its header says {count} tokens, it holds {held:g}; {remake}")
        return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(count,))
    except OSError as error:
        raise Refused(f"{path}: {reason(error)}; give a readable token file") from None


class Tokens:
    """The tokens of one file or a glob of shards, left on disk, checked against V as they are read.

    Raises Refused for a missing file, one that holds no tokens, and an id of vocab_size or above.
    """

    def __init__(self, pattern, vocab_size):
        self.vocab_size, self.paths = vocab_size, sorted(glob.glob(str(pattern)))
        if not self.paths:
            raise Refused(f"{pattern}: no such file; run python prepro_tinyshakespeare.py first")
        self.shards = [map_tokens(path) for path in self.paths]

    def __len__(self):
        return sum(map(len, self.shards))

    def _read(self, shard, start, stop):
        ids = self.shards[shard][start:stop].astype(np.int64)
        if ids.max() >= self.vocab_size:
            at = int(np.argmax(ids >= self.vocab_size))
            raise Refused(f"{self.paths[shard]}: id {ids[at]} at token {start + at} is outside the "
                          f"vocabulary of {self.vocab_size}; give the --tokenizer it was made with")
        return ids

    def batch(self, rng, B, T):
        """B windows, every place equally likely -> ids (B,T), targets (B,T)."""
        places = np.cumsum([max(0, len(tokens) - T) for tokens in self.shards])
        if places[-1] == 0:
            raise Refused(f"{self.paths[0]}: has no {T + 1} tokens in a row; lower --seq_len {T}")
        windows = []
        for place in rng.integers(places[-1], size=B).tolist():
            shard = int(np.searchsorted(places, place, side="right"))
            start = place - (int(places[shard - 1]) if shard else 0)
            windows.append(self._read(shard, start, start + T + 1))
        windows = np.stack(windows)
        return windows[:, :-1], windows[:, 1:]

    def once(self, B, T):
        """Every token predicted once, in order: yields (ids, targets) of at most (B,T)."""
        for shard, tokens in enumerate(self.shards):
            last = len(tokens) - 1
            whole = last - last % T  # the rest is shorter than T and comes by itself
            for start, stop, t in [*((i, min(i + B * T, whole), T) for i in range(0, whole, B * T)),
                                   (whole, last, last - whole)]:
                if start < stop:
                    ids = self._read(shard, start, stop + 1)
                    yield ids[:-1].reshape(-1, t), ids[1:].reshape(-1, t)


def reason(error):
    """The innermost words of an exception, on one line."""
    causes = True
    while causes:
        causes = [cause for cause in (*error.args, getattr(error, "reason", None))
                  if isinstance(cause, Exception)]
        error = causes[0] if causes else error
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())


def answer(url):
    """Open a URL, or raise OSError after SECONDS_TO_ANSWER, looking the name up included (which no
    socket time-out covers, hence the thread)."""
    box = queue.SimpleQueue()

    def ask():
        try:
            box.put(urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER))
        except Exception as error:
            box.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = box.get(timeout=SECONDS_TO_ANSWER)
    except queue.Empty:
        raise OSError(f"no answer within {SECONDS_TO_ANSWER} s") from None
    if isinstance(response, Exception):
        raise OSError(reason(response))
    return response


def download(url, path, sha256):
    """Fetch `url` into `path`, with progress. Raises Refused: which address, why, what then."""
    by_hand = f"download it by hand and put it at {path}"
    try:
        with answer(url) as response, written_whole(path) as file:
            size = int(response.headers.get("Content-Length") or 0)
            digest, done, shown = hashlib.sha256(), 0, time.monotonic()
            while block := response.read(1 << 16):
                file.write(block)
                digest.update(block)
                done += len(block)
                if time.monotonic() - shown > 1:
                    shown = time.monotonic()
                    print(f"{path}: {done / 1e6:.1f} of {size / 1e6:.1f} MB", file=sys.stderr)
            if digest.hexdigest() != sha256:
                raise Refused(f"{url} gave {done} bytes with sha256 {digest.hexdigest()} where "
                              f"{sha256} was expected; {by_hand}")
    except OSError as error:
        raise Refused(f"{url} could not be fetched: {reason(error)}; {by_hand}") from None


# ---------------------------------------------------------------------------- text -> token files

def read_text(path):
    """The text of a UTF-8 file. Raises Refused if it is missing, empty, or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise Refused(f"{path}: not UTF-8 (byte {error.start} is 0x{byte:02x}); "
                      "save it as UTF-8 first") from None
    except OSError as error:
        raise Refused(f"{path}: {reason(error)}; give an existing text file") from None
    if not text:
        raise Refused(f"{path}: the file is empty; give one with some text")
    return text


def tokenize(text, tokenizer):
    """Text -> (train ids, val ids).

    Bytes are split as nanoGPT's shakespeare_char: the first 90% of the characters train, the rest
    validates. GPT-2 tokens are split as in llm.c: every section up to a blank line follows an
    <|endoftext|> and is encoded by itself; the first 32,768 tokens validate (or a tenth, if less).
    """
    if tokenizer.name == "byte":
        cut = int(len(text) * 0.9)
        return [np.array(tokenizer.encode(part), np.uint16) for part in (text[:cut], text[cut:])]
    tokens, shown, sections = [], time.monotonic(), text.split("\n\n")
    for i, section in enumerate(sections, 1):
        tokens.append(tokenizer.eot_token)
        tokens.extend(tokenizer.encode(section + "\n\n" * (i < len(sections))))
        if time.monotonic() - shown > 2:
            shown = time.monotonic()
            print(f"tokenizing: {i / len(sections):.0%}", file=sys.stderr)
    tokens = np.array(tokens, np.uint16)
    cut = min(32768, len(tokens) // 10)
    return tokens[cut:], tokens[:cut]


def token_files(name, tokenizer_name):
    """(train path, val path) of a prepared text."""
    return tuple(DATA / f"{name}_{tokenizer_name}_{split}.bin" for split in ("train", "val"))


def prepare(text, name, tokenizer_name):
    """Tokenize a text, write its two token files, say so, and return their paths."""
    paths = token_files(name, tokenizer_name)
    for path, ids in zip(paths, tokenize(text, TOKENIZERS[tokenizer_name]())):
        if len(ids) < 2:
            raise Refused(f"{name}: {len(text)} characters are too few to split; give a longer text")
        write_tokens(path, ids)
        print(f"wrote {path}: {len(ids):,} {tokenizer_name} tokens")
    return paths


def tinyshakespeare():
    """The text of tinyshakespeare, from data/ or char-rnn's repository (1,115,394 bytes)."""
    path = DATA / "tinyshakespeare.txt"
    if not path.exists():
        download(TEXT_URL, path, TEXT_SHA256)
    return read_text(path)


def tinyshakespeare_or_else():
    """(text, name): tinyshakespeare, or without a network the text that every CPython carries."""
    try:
        return tinyshakespeare(), "tinyshakespeare"
    except Refused as error:
        print(f"{error}; for now, training on Python's language reference (pydoc_data.topics)")
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics.values()), "pydoc"


def find_tokens(name, tokenizer_name):
    """(train path, val path) of a text. Tinyshakespeare's, or a stand-in's, are made if missing."""
    paths = token_files(name, tokenizer_name)
    if all(path.exists() for path in paths):
        return paths
    if name != "tinyshakespeare":
        raise Refused(f"{paths[0]}: no such file; make it with python prepro_tinyshakespeare.py "
                      f"--text {name}.txt --tokenizer {tokenizer_name}")
    return prepare(*tinyshakespeare_or_else(), tokenizer_name)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Turn a text into files of tokens in data/.")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="byte",
                        help="bytes, or GPT-2's 50,257 tokens (default: byte)")
    parser.add_argument("--text", metavar="FILE",
                        help="a UTF-8 text file (default: tinyshakespeare, fetched when missing)")
    args = parser.parse_args()
    try:
        if args.text is None:
            prepare(tinyshakespeare(), "tinyshakespeare", args.tokenizer)
        else:
            prepare(read_text(args.text), Path(args.text).stem, args.tokenizer)
    except (Refused, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
