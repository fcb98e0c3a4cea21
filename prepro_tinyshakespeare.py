"""Fill data/: download tinyshakespeare or GPT-2's weights, and turn a text into token files.

    python prepro_tinyshakespeare.py                       # data/tinyshakespeare_byte_*.bin
    python prepro_tinyshakespeare.py --tokenizer gpt2      # data/tinyshakespeare_gpt2_*.bin
    python prepro_tinyshakespeare.py --text my_novel.txt   # data/my_novel_byte_*.bin

train_gpt2.py calls prepare and download_model when it finds that data/ lacks what it needs. The
format of token files is described in data/README.md.
"""
import argparse
import hashlib
import http.client
import os
import queue
import threading
import time
import urllib.request
from pathlib import Path

from train_gpt2 import (
    DATA,
    Tokenizer,
    UserError,
    require,
    run_program,
    say,
    show_progress,
    write_tokens,
)

TEXT_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
            "data/tinyshakespeare/input.txt")
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MODEL_URL = "https://huggingface.co/openai-community/{}/resolve/main/{}"
TIMEOUT = 8  # seconds without a byte after which a download is given up


def download(url, path, way_out, sha256=None):
    """Download a file, with progress; it appears at `path` whole or not at all.

    Raises UserError if the server is silent for TIMEOUT seconds, if the connection ends early, or
    if the checksum is wrong. `way_out` tells the user what to do instead.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, done, blocks = hashlib.sha256(), 0, queue.Queue(maxsize=64)

    def receive():  # in a thread, because looking up a name can take longer than any time-out
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                blocks.put(int(response.headers.get("Content-Length") or 0))
                while block := response.read(1 << 16):
                    blocks.put(block)
                blocks.put(b"")
        except (OSError, ValueError, http.client.HTTPException) as error:
            blocks.put(error)

    def next_block():
        try:
            block = blocks.get(timeout=TIMEOUT + 1)
        except queue.Empty:
            raise OSError(f"no answer within {TIMEOUT} seconds") from None
        if isinstance(block, Exception):
            raise block
        return block
    threading.Thread(target=receive, daemon=True).start()
    try:
        size, start = next_block(), time.monotonic()
        with open(unfinished, "wb") as file:
            while block := next_block():
                file.write(block)
                digest.update(block)
                done += len(block)
                seconds = max(time.monotonic() - start, 1e-3)
                show_progress(f"{path.name}: {done / 1e6:.1f} of {size / 1e6:.1f} MB, "
                              f"{done / seconds / 1e6:.1f} MB/s")
        show_progress("")
        if size and done != size:
            raise OSError(f"the connection ended after {done:,} of {size:,} bytes")
        if sha256 not in (None, digest.hexdigest()):
            raise OSError(f"the SHA-256 is {digest.hexdigest()}, not {sha256}")
        os.replace(unfinished, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UserError(f"{url} could not be downloaded: {reason}; {way_out}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def download_model(name):
    """Download OpenAI's weights of gpt2, gpt2-medium, gpt2-large or gpt2-xl into data/NAME."""
    for file in "config.json", "model.safetensors":
        if not (DATA / name / file).exists():
            say(f"downloading {MODEL_URL.format(name, file)}")
            download(MODEL_URL.format(name, file), DATA / name / file, "or get it with "
                     f"hf download openai-community/{name} --local-dir {DATA / name}")


def tokenize(text, tokenizer):
    """Text -> lists (training ids, validation ids).

    Bytes are split as for nanoGPT's shakespeare_char: the first 90% of the characters train, the
    rest validates. GPT-2's tokens are split as in llm.c: every section, up to a blank line, follows
    an <|endoftext|> and is encoded on its own; the first 32,768 tokens validate, or a tenth if
    there are few.
    """
    if tokenizer.name == "byte":
        cut = int(len(text) * 0.9)
        return tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
    ids, sections = [], text.split("\n\n")
    for i, section in enumerate(sections, 1):
        ids.append(tokenizer.eot_token)
        ids.extend(tokenizer.encode(section + "\n\n" * (i < len(sections))))
        if i % 1000 == 0:
            show_progress(f"tokenizing: {i / len(sections):.0%}")
    show_progress("")
    cut = min(32768, len(ids) // 10)
    return ids[cut:], ids[:cut]


def read_text(path):
    """The text of a UTF-8 file. Raises UserError if it is empty or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    require(text, f"{path}: the file is empty; give one with text")
    return text


def write_text(text, name, tokenizer_name):
    """Write the token files of a text, say how to use them; returns the two paths."""
    paths = [DATA / f"{name}_{tokenizer_name}_{split}.bin" for split in ("train", "val")]
    for path, ids in zip(paths, tokenize(text, Tokenizer(tokenizer_name))):
        require(len(ids) > 1, f"{name}: {len(text)} characters are too few; give more text")
        write_tokens(path, ids)
        say(f"wrote {path}: {len(ids):,} {tokenizer_name} tokens")
    return paths


def tinyshakespeare():
    """The text of tinyshakespeare, from data/ or, if it is missing, from char-rnn's repository."""
    path = DATA / "tinyshakespeare.txt"
    if not path.exists():
        download(TEXT_URL, path, f"download it in another way and save it as {path}", TEXT_SHA256)
    return read_text(path)


def prepare(tokenizer_name):
    """Make the token files of tinyshakespeare, or of a stand-in if it cannot be downloaded."""
    name = "tinyshakespeare"
    try:
        text = tinyshakespeare()
    except UserError as error:
        from pydoc_data.topics import topics
        say(f"{error}; for now, the text is Python's language reference (pydoc_data.topics)")
        text, name = "\n\n".join(topics.values()), "pydoc"
    return write_text(text, name, tokenizer_name)


def main():
    """The program."""
    parser = argparse.ArgumentParser(description="Turn a text into token files in data/.")
    parser.add_argument("--tokenizer", choices=Tokenizer.sizes, default="byte",
                        help="bytes, or GPT-2's 50,257 tokens (default: byte)")
    parser.add_argument("--text", metavar="FILE",
                        help="a UTF-8 text file (default: tinyshakespeare, downloaded if missing)")
    args = parser.parse_args()
    if args.text is None:
        write_text(tinyshakespeare(), "tinyshakespeare", args.tokenizer)
    else:
        train, val = write_text(read_text(args.text), Path(args.text).stem, args.tokenizer)
        say(f"now run: python train_gpt2.py --train_bin {train} --val_bin {val} "
            f"--tokenizer {args.tokenizer}")


if __name__ == "__main__":
    run_program(main)
