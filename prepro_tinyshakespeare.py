# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24", "tiktoken"]
# ///
"""Fill data/: download tinyshakespeare or GPT-2's weights, and turn a text into token files.

    python prepro_tinyshakespeare.py                       # data/tinyshakespeare_byte_*.bin
    python prepro_tinyshakespeare.py --tokenizer gpt2      # data/tinyshakespeare_gpt2_*.bin
    python prepro_tinyshakespeare.py --text my_novel.txt   # data/my_novel_byte_*.bin

train_gpt2.py calls prepare and download_model when data/ lacks what it needs. The format of token
files is described in data/README.md.
"""
import argparse
import contextlib
import hashlib
import http.client
import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import train_gpt2 as gpt2  # isort: skip # before numpy, whose BLAS it sets to one thread

import numpy as np

TEXT_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
            "data/tinyshakespeare/input.txt")
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MODEL_URL = "https://huggingface.co/openai-community/{}/resolve/main/{}"
TIMEOUT = 8  # seconds without an answer after which a download is given up


def download(url, path, advice):
    """Download a file; it appears at `path` whole or not at all. Raises UserError with advice."""
    def blocks(response):
        size = int(response.headers.get("Content-Length") or 0)
        done = 0
        while block := response.read(1 << 16):
            yield block
            done += len(block)
            gpt2.show_progress(f"{path.name}: {done / 1e6:.1f} of {size / 1e6:.1f} MB")
        gpt2.show_progress("")
        if size and done != size:
            raise OSError(f"the connection ended after {done:,} of {size:,} bytes")

    def look_up_host():
        proxy = urllib.request.getproxies().get(urllib.parse.urlsplit(url).scheme)
        with contextlib.suppress(OSError):  # urlopen will report it
            socket.getaddrinfo(urllib.parse.urlsplit(proxy or url).hostname, None)
    thread = threading.Thread(target=look_up_host, daemon=True)  # in urlopen it has no time-out
    thread.start()
    thread.join(TIMEOUT)
    try:
        if thread.is_alive():
            raise OSError(f"no answer within {TIMEOUT} seconds")
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            gpt2.write_file(path, blocks(response))
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise gpt2.UserError(f"{url} could not be downloaded: {reason}; {advice}") from None


def download_model(name):
    """Download OpenAI's weights of gpt2, gpt2-medium, gpt2-large or gpt2-xl into data/NAME."""
    folder = gpt2.DATA / name
    with gpt2.locked(gpt2.DATA, wait=True):
        for file in "config.json", "model.safetensors":
            if not (folder / file).exists():
                gpt2.say(f"downloading {MODEL_URL.format(name, file)}")
                download(MODEL_URL.format(name, file), folder / file, "or get it with "
                         f"hf download openai-community/{name} --local-dir {folder}")


def tokenize(text, tokenizer):
    """Text -> lists (training ids, validation ids).

    Bytes as for nanoGPT's shakespeare_char: the first 90% of the characters train. GPT-2's tokens
    as in llm.c: an <|endoftext|> stands before every section, and blank lines end sections; the
    first 32,768 tokens validate, or a tenth of all.
    """
    if tokenizer.name == "byte":
        cut = int(len(text) * 0.9)
        return tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
    ids = []
    sections = text.split("\n\n")
    for i, section in enumerate(sections, 1):
        ids.append(tokenizer.eot_token)
        ids.extend(tokenizer.encode(section + ("\n\n" if i < len(sections) else "")))
        if i % 1000 == 0:
            gpt2.show_progress(f"tokenizing: {i / len(sections):.0%}")
    gpt2.show_progress("")
    cut = min(32768, len(ids) // 10)
    return ids[cut:], ids[:cut]


def read_text(path):
    """The text of a UTF-8 file. Raises UserError if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise gpt2.UserError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None


def write_text(text, name, tokenizer_name):
    """Write the token files of a text; returns their paths. Never replaces those of another."""
    parts = tokenize(text, gpt2.Tokenizer(tokenizer_name))
    paths = [gpt2.DATA / f"{name}_{tokenizer_name}_{part}.bin" for part in ("train", "val")]
    for path, ids in zip(paths, parts):
        gpt2.require(len(ids) > 1, f"{name}: {len(text)} characters are too few; give more text")
        gpt2.require(not path.exists() or np.array_equal(np.fromfile(path, "<u2")[512:], ids),
                     f"{path} has the tokens of another text; remove it, or rename this text")
    for path, ids in zip(paths, parts):
        gpt2.write_tokens(path, ids)
        gpt2.say(f"wrote {path}: {len(ids):,} {tokenizer_name} tokens")
    return paths


def tinyshakespeare():
    """The text, from data/ or, if it is missing there, from char-rnn's repository."""
    path = gpt2.DATA / "tinyshakespeare.txt"
    if not path.exists():
        download(TEXT_URL, path, f"download it in another way and save it as {path}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    gpt2.require(sha256 == TEXT_SHA256, f"{path} is another text: its SHA-256 is {sha256}, not "
                 f"{TEXT_SHA256}; remove it, or give a text of your own as --text")
    return read_text(path)


def prepare(tokenizer_name):
    """Make the token files of tinyshakespeare, or of a stand-in if it cannot be downloaded."""
    with gpt2.locked(gpt2.DATA, wait=True):
        name = "tinyshakespeare"
        try:
            text = tinyshakespeare()
        except gpt2.UserError as error:
            gpt2.say(f"{error}; for now, the text is Python's language reference (pydoc_data)")
            from pydoc_data.topics import topics
            name = "pydoc"
            text = "\n\n".join(topics.values())
        return write_text(text, name, tokenizer_name)


def main():
    """The program."""
    parser = argparse.ArgumentParser(description="Turn a text into token files in data/.")
    parser.add_argument("--tokenizer", choices=gpt2.Tokenizer.sizes, default="byte",
                        help="bytes, or GPT-2's 50,257 tokens (default: byte)")
    parser.add_argument("--text", metavar="FILE", type=Path,
                        help="a UTF-8 text file (default: tinyshakespeare, downloaded if missing)")
    args = parser.parse_args()
    with gpt2.locked(gpt2.DATA, wait=True):
        if args.text is None:
            write_text(tinyshakespeare(), "tinyshakespeare", args.tokenizer)
        else:
            name = args.text.stem
            train, val = write_text(read_text(args.text), name, args.tokenizer)
            gpt2.say(f'now run: python train_gpt2.py --train_bin "{train}" --val_bin "{val}" '
                     f'--tokenizer {args.tokenizer} --out "out_{name}"')


if __name__ == "__main__":
    gpt2.run_program(main)
