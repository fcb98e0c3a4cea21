"""Turn a text into files of tokens: tinyshakespeare by default, any UTF-8 file with --text.

    python prepro_tinyshakespeare.py                       # data/tinyshakespeare_byte_*.bin
    python prepro_tinyshakespeare.py --tokenizer gpt2      # data/tinyshakespeare_gpt2_*.bin
    python prepro_tinyshakespeare.py --text my_novel.txt   # data/my_novel_byte_*.bin

A token file is llm.c's: 256 little-endian int32 (magic, version, number of tokens, zeros), then the
tokens as little-endian uint16. All else that train_gpt2.py reads from outside or leaves behind is
here too, so that it need not speak of files: tokenizers, batches of tokens, downloads, GPT-2's
weights as Hugging Face stores them, the checkpoints of a run, its log, and its command line.
"""
import argparse
import contextlib
import csv
import glob
import hashlib
import importlib
import itertools
import json
import math
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
DATA = Path("data")
TEXT_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
            "data/tinyshakespeare/input.txt")
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MODEL_URL = "https://huggingface.co/openai-community/{}/resolve/main/{}"
MERGES_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SECONDS_TO_ANSWER = 8


class Refused(Exception):
    """Something a person gave cannot be used: the message says what, where, and the way out."""


def refuse(name, message):
    """Ends the program `name` over what a person can mend: one line, exit status 2."""
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def program(name, main):
    """Runs main() as a program: mistakes that a person can mend get one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a text may hold characters that a terminal does not
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except Refused as error:
        refuse(name, error)
    except OSError as error:
        refuse(name, f"{error.filename or 'a file'}: {reason(error)}; check the path, its rights "
                     "and the space left; what was saved before stands")
    except (MemoryError, OverflowError, ValueError) as error:
        if isinstance(error, ValueError) and "allowed dimension" not in str(error):
            raise
        refuse(name, f"not enough memory: {reason(error)}; lower the model's or the batch's sizes")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def usable_cpus():
    """The number of processors for this process: its share, when torchrun started several."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return max(1, len(allowed) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def note_signals():
    """A list that gets the number of the first SIGINT or SIGTERM; a second one ends the program."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        os.write(2, b"\nstopping after this step; once more to stop at once\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def duration(seconds):
    """Seconds as people write them: 8s, 1m43s, 2h05m."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
    return f"{minutes // 60}h{minutes % 60:02}m"


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
                f"GPT-2's merges could not be fetched: {reason(error)}; tiktoken wants vocab.bpe "
                f"and encoder.json of {MERGES_URL} in {os.environ['TIKTOKEN_CACHE_DIR']}; set "
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


def answer(url, headers):
    """Open a URL, or raise OSError after SECONDS_TO_ANSWER, looking the name up included (which no
    socket time-out covers, hence the thread)."""
    box = queue.SimpleQueue()

    def ask():
        try:
            request = urllib.request.Request(url, headers=headers)
            box.put(urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER))
        except Exception as error:
            box.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = box.get(timeout=SECONDS_TO_ANSWER)
    except queue.Empty:
        raise OSError(f"no answer within {SECONDS_TO_ANSWER} s") from None
    if isinstance(response, Exception):
        raise response if isinstance(response, OSError) else OSError(reason(response))
    return response


def download(url, path, by_hand, sha256=None):
    """Fetch `url` into `path`, with progress, going on where an earlier attempt stopped.

    What has come lies in PATH.part, and takes its name when whole. Raises Refused: which address,
    why, and what to do by hand.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        with answer(url, {"Range": f"bytes={have}-"} if have else {}) as response:
            if response.status != 206:
                have = 0  # the whole file comes, whatever was asked for
            size = have + int(response.headers.get("Content-Length") or 0)
            first, start, shown = have, time.monotonic(), time.monotonic()
            with open(part, "r+b" if have else "wb") as file:
                file.seek(have)
                while block := response.read(1 << 16):
                    file.write(block)
                    have += len(block)
                    if time.monotonic() - shown > 1:
                        shown = time.monotonic()
                        speed = (have - first) / (shown - start)
                        print(f"{path}: {have / 1e6:.1f} of {size / 1e6:.1f} MB, {speed / 1e6:.1f} "
                              f"MB/s, {duration((size - have) / speed)} left", file=sys.stderr)
            if have < size:
                raise OSError(f"the connection ended after {have:,} of {size:,} bytes")
    except OSError as error:
        if getattr(error, "code", None) == 416:  # it has no more than PATH.part already holds
            part.unlink()
            return download(url, path, by_hand, sha256)
        kept = f" ({have:,} bytes are kept, the same command goes on from there)" if have else ""
        raise Refused(f"{url} could not be fetched: {reason(error)}{kept}; {by_hand}") from None
    if sha256 and (found := hashlib.sha256(part.read_bytes()).hexdigest()) != sha256:
        part.unlink()
        raise Refused(f"{url} gave {have} bytes with sha256 {found} where {sha256} was expected; "
                      f"{by_hand}")
    os.replace(part, path)


# ------------------------------------------------------------------------- weights in safetensors
# Such a file is 8 bytes with the length of a JSON text, that text, and then the numbers. The text
# says of every tensor its dtype, its shape, and from which to which of those bytes it lies.

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
            "BOOL": 1}
FLOATS = ("F64", "F32", "F16", "BF16")


def write_tensors(path, tensors):
    """Write {name: float array} as a safetensors file; returns its CRC-32."""
    index, stop, crc = {"__metadata__": {"format": "pt"}}, 0, 0
    for name, x in tensors.items():
        start, stop = stop, stop + x.nbytes
        index[name] = {"dtype": f"F{8 * x.itemsize}", "shape": x.shape,
                       "data_offsets": (start, stop)}
    header = json.dumps(index).encode()
    header += b" " * (-len(header) % 8)
    with written_whole(path) as file:
        little_endian = (x.astype(x.dtype.newbyteorder("<"), copy=False) for x in tensors.values())
        for piece in itertools.chain([len(header).to_bytes(8, "little"), header], little_endian):
            file.write(piece)
            crc = zlib.crc32(piece, crc)
    return crc


def read_index(path):
    """The index of a safetensors file as {name: (dtype, shape, place in the file)}.

    Every number is checked before it is used: the tensors have to tile the file, without a gap.
    """
    def check(good, what):
        if not good:
            raise Refused(f"{path}: not a safetensors file, or a damaged one ({what}); fetch or "
                          "save it again")
    with open(path, "rb") as file:
        size, length = os.path.getsize(path) - 8, int.from_bytes(file.read(8), "little")
        check(2 <= length <= min(size, 100 << 20), f"a header of {length} bytes in {size}")
        try:
            index = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError):
            check(False, "its header is not JSON")
    check(isinstance(index, dict), "its header is not an object")
    index.pop("__metadata__", None)
    found, tiles = {}, [(0, 0)]
    for name, entry in index.items():
        check(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
              f"{name!r} is not a tensor")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        check(isinstance(dtype, str) and dtype in ITEMSIZE, f"{name!r} has dtype {dtype!r}")
        check(all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)
                  for x in (shape, offsets)) and len(offsets) == 2,
              f"{name!r} has the shape {shape} at {offsets}")
        start, stop = offsets
        check(stop - start == math.prod(shape) * ITEMSIZE[dtype],
              f"{name!r} of shape {shape} in {dtype} cannot lie at {offsets}")
        found[name] = dtype, tuple(shape), 8 + length + start
        tiles.append((start, stop))
    tiles = sorted(tiles) + [(size - length, size - length)]
    check(all(before[1] == after[0] for before, after in zip(tiles, tiles[1:])),
          f"its tensors do not fill its {size - length} bytes")
    return found


def read_tensor(out, file, dtype, place):
    """Read one tensor into an array. In the array's own dtype it comes straight from the file."""
    file.seek(place)
    if dtype == f"F{8 * out.itemsize}" and sys.byteorder == "little" and out.flags.c_contiguous:
        read = file.readinto(out.reshape(-1).view(np.uint8))
        assert read == out.nbytes, "the index was checked against the file's size"
    elif dtype == "BF16":  # the upper half of a float32
        raw = np.fromfile(file, "<u2", out.size)
        out[...] = (raw.astype(np.uint32) << 16).view(np.float32).reshape(out.shape)
    else:
        out[...] = np.fromfile(file, f"<f{ITEMSIZE[dtype]}", out.size).reshape(out.shape)


def read_weights(path, params):
    """Fill {name: array} from a safetensors file of a GPT-2, whoever wrote it.

    Names may begin with `transformer.`; a stored head has to be wte; masks that old files carry are
    passed over. Raises Refused for any other tensor, a missing one, and a wrong shape.
    """
    index = {}
    for stored, entry in read_index(path).items():
        name = stored.removeprefix("transformer.")
        if name in index:
            raise Refused(f"{path}: has {name} twice, with and without `transformer.`; keep one")
        if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            index[name] = entry
    head = index.pop("lm_head.weight", None)
    for name in [*(params.keys() - index.keys()), *(index.keys() - params.keys())]:
        raise Refused(f"{path}: {'has no' if name in params else 'has an unknown'} tensor {name}, "
                      "so it is not the GPT-2 of its config.json; use files that belong together")
    with open(path, "rb") as file:
        for name, (dtype, shape, place) in index.items():
            if shape != params[name].shape or dtype not in FLOATS:
                raise Refused(f"{path}: {name} is {dtype} {shape} where floats of shape "
                              f"{params[name].shape} belong; use the config.json it came with")
            read_tensor(params[name], file, dtype, place)
        if head:
            wte = params["wte.weight"]
            untied = head[1] != wte.shape or head[0] not in FLOATS
            if not untied:
                stored = np.empty_like(wte)
                read_tensor(stored, file, head[0], head[2])
                untied = not (stored == wte).all()
            if untied:
                raise Refused(f"{path}: lm_head.weight is not wte.weight; GPT-2 ties them, and so "
                              "does this program; use a checkpoint with a tied head")


def read_json(path):
    """A JSON object from a file. Raises Refused if that is not what it holds."""
    try:
        found = json.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise Refused(f"{path}: {reason(error)}; give a folder with config.json and "
                      "model.safetensors") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(f"{path}: not a JSON object, or a damaged one; fetch or save it again")
    return found


SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
ONLY = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True}


def read_config(folder):
    """The five sizes in Hugging Face's config.json. Raises Refused for what is no plain GPT-2."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    for name in SIZES:
        if type(found.get(name)) is not int or not 0 < found[name] < 2**31:
            raise Refused(f"{path}: {name} is {found.get(name)!r}, not a whole number above 0; "
                          "use a GPT-2's config.json")
    for name, only in (ONLY | {"n_inner": 4 * found["n_embd"]}).items():
        if found.get(name) not in (only, None if name == "n_inner" else only) and name in found:
            raise Refused(f"{path}: {name} is {found[name]!r}; this program is GPT-2 as it was "
                          f"published, with {only!r} only")
    return {name: found[name] for name in SIZES}


def write_model(folder, sizes, params):
    """Write config.json and model.safetensors for transformers' GPT2LMHeadModel; CRC-32 of each."""
    config = {"architectures": ["GPT2LMHeadModel"], **ONLY, **sizes, "n_ctx": sizes["n_positions"],
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
              "bos_token_id": sizes["vocab_size"] - 1, "eos_token_id": sizes["vocab_size"] - 1}
    text = json.dumps(config, indent=2).encode()
    with written_whole(Path(folder) / "config.json") as file:
        file.write(text)
    return {"config.json": zlib.crc32(text),
            "model.safetensors": write_tensors(
                Path(folder) / "model.safetensors",
                {f"transformer.{name}": param for name, param in params.items()})}


def find_model(name, published):
    """The folder of a model: one of GPT-2's `published` names (data/NAME, fetched when missing), a
    folder with config.json and model.safetensors, or the folder of a run (its last checkpoint)."""
    folder = DATA / name if name in published else Path(name)
    files = [folder / "config.json", folder / "model.safetensors"]
    if name in published:
        urls = [MODEL_URL.format(name, file.name) for file in files]
        for url, file in zip(urls, files):
            if not file.exists():
                download(url, file, f"download {urls[0]} and {urls[1]} by hand into {folder}")
    elif not files[0].exists():
        folder = (checkpoints(folder) or [folder])[-1]
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise Refused(f"{folder}: has no {file}; give a folder with a model, or one of "
                          f"{', '.join(published)}")
    return folder


# ------------------------------------------------------------------------------ a run's own folder
# OUT/log.csv, and checkpoints OUT/step_000250: a model as above with optimizer.safetensors beside
# it, and trainer.json, which has the rest of the run's state and the CRC-32 of all four files.

def checkpoints(out):
    """The checkpoints in a run's folder, from the first to the last."""
    return sorted(Path(out).glob("step_" + "[0-9]" * 6))


def fsync_folder(folder):
    """Have the system put a folder's entries on the disk, where it lets a program ask for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def save_checkpoint(out, sizes, params, moments, state):
    """Write OUT/step_STEP, whole or not at all, and leave the one before it; returns its path."""
    folder = Path(out) / f"step_{state['step']:06}"
    beside = folder.with_name(folder.name + ".tmp")
    clear_unfinished(out)
    if folder.exists():
        return folder
    try:
        crc = write_model(beside, sizes, params)
        crc["optimizer.safetensors"] = write_tensors(beside / "optimizer.safetensors", moments)
        text = json.dumps({"crc32": crc, **state})
        with written_whole(beside / "trainer.json") as file:
            file.write(json.dumps({"crc32": zlib.crc32(text.encode()), "content": text}).encode())
        fsync_folder(beside)
        os.replace(beside, folder)
        fsync_folder(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def clear_unfinished(out):
    """Remove what a killed run was just writing."""
    for left in Path(out).glob("step_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def read_trainer(folder, verify=False):
    """A checkpoint's trainer.json. With verify, raises Refused for any file that is damaged."""
    folder = Path(folder)
    others = [str(other) for other in checkpoints(folder.parent) if other < folder]
    way_out = f"remove {folder} and " + (f"go on from {others[-1]}" if others else "start again")

    def check(good, name):
        if not good:
            raise Refused(f"{folder / name}: damaged, its checksum is not the one it was saved "
                          f"with; {way_out}")
    written = read_json(folder / "trainer.json")
    text = written.get("content")
    check(isinstance(text, str) and zlib.crc32(text.encode()) == written.get("crc32"),
          "trainer.json")
    state = json.loads(text)
    for name, crc in state.pop("crc32").items() if verify else ():
        found = 0
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                found = zlib.crc32(block, found)
        check(found == crc, name)
    return state


def read_state(folder, steps, asked):
    """The state of a run at a checkpoint, which has to be intact and to go with what is asked."""
    saved = read_trainer(folder, verify=True)
    for name, thing in ("tokens", "tokens to train and validate on"), ("batch", "sequences a step"):
        if saved[name] != asked[name]:
            raise Refused(f"--resume: the run had {saved[name]} {thing}, not {asked[name]}; give "
                          "it the same data, and --batch_size times processes")
    if steps <= saved["step"]:
        raise Refused(f"--steps {steps}: the run has made {saved['step']} already; give more")
    return saved


def read_moments(folder, m, v, first):
    """Fill AdamW's moments m and v, the stretch from element `first` on, from a checkpoint."""
    path = Path(folder) / "optimizer.safetensors"
    index = read_index(path)
    with open(path, "rb") as file:
        for name, out in ("m", m), ("v", v):
            dtype, _, place = index[name]
            read_tensor(out, file, dtype, place + first * ITEMSIZE[dtype])


def put_aside(out):
    """Rename the folder of an earlier run to OUT.1, OUT.2, ..., and say so."""
    out = Path(out)
    if not (out / "log.csv").exists() and not checkpoints(out):
        return
    for other in out.iterdir():
        if other.name != "log.csv" and not re.fullmatch(r"step_\d{6}(\.tmp)?", other.name):
            raise Refused(f"{out}: holds an earlier run and {other.name}, which is not a run's; "
                          "move either, or give another --out")
    number = next(n for n in itertools.count(1) if not Path(f"{out}.{n}").exists())
    os.replace(out, f"{out}.{number}")
    print(f"{out} holds an earlier run: it is {out}.{number} from now on")


class Log:
    """The lines of a run, on the screen and in OUT/log.csv, which goes on after step `begin`."""
    COLUMNS = "step loss val_loss norm lr ms tokens_per_second".split()

    def __init__(self, out, begin, steps, tokens, flops):
        self.steps, self.tokens, self.flops, self.times, self.row = steps, tokens, flops, [], {}
        path, rows = Path(out) / "log.csv", []
        if not steps:  # there is nothing to tell that would be worth a file
            self.file = open(os.devnull, "w", encoding="utf-8")
            return
        if begin and path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
        lines = [self.COLUMNS, *([row[column] or "" for column in self.COLUMNS] for row in rows
                                 if int(row["step"]) <= begin)]
        with written_whole(path) as file:
            file.write("".join(",".join(line) + "\n" for line in lines).encode())
        self.file = open(path, "a", encoding="utf-8", newline="\n")

    def step(self, step, loss, norm, lr, seconds, network, shown):
        """Counts a step that took so many seconds, some of them on the network, and may show it."""
        self.times.append(seconds)
        if shown:
            each, self.times = sum(self.times) / len(self.times), []  # since the last line
            speed = self.tokens / each
            self.row |= dict(step=step, loss=f"{loss:.6f}", norm=f"{norm:.6f}", lr=f"{lr:.6e}",
                             ms=f"{1e3 * each:.2f}", tokens_per_second=f"{speed:.0f}")
            print(f"step {step:{len(str(self.steps))}}/{self.steps} | loss {loss:.4f} | "
                  f"norm {norm:.2f} | lr {lr:.2e} | {1e3 * each:3.0f} ms | {speed:5.0f} tok/s | "
                  f"{self.flops / each / 1e9:3.0f} GFLOP/s | "
                  f"eta {duration(each * (self.steps - step))}"
                  + f" | network {1e3 * network:.0f} ms" * (network > 0), flush=True)

    def validation(self, step, loss):
        """Shows the loss on the validation file."""
        self.row |= dict(step=step, val_loss=f"{loss:.6f}")
        print(f"step {step:{len(str(self.steps))}} | val loss {loss:.4f}", flush=True)

    def write(self):
        """Writes what was shown of this step."""
        if self.row:
            self.file.write(",".join(str(self.row.get(name, "")) for name in self.COLUMNS) + "\n")
            self.file.flush()
            self.row = {}


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
            raise Refused(f"{name}: {len(text)} characters are too few to split; give more text")
        write_tokens(path, ids)
        print(f"wrote {path}: {len(ids):,} {tokenizer_name} tokens")
    return paths


def tinyshakespeare():
    """The text of tinyshakespeare, from data/ or char-rnn's repository (1,115,394 bytes)."""
    path = DATA / "tinyshakespeare.txt"
    if not path.exists():
        download(TEXT_URL, path, f"download it by hand and put it at {path}", TEXT_SHA256)
    return read_text(path)


def tinyshakespeare_or_else():
    """(text, name): tinyshakespeare, or without a network the text that every CPython carries."""
    try:
        return tinyshakespeare(), "tinyshakespeare"
    except Refused as error:
        print(f"{error}; for now, training on Python's language reference (pydoc_data.topics)")
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics.values()), "pydoc"


def find_tokens(name, tokenizer_name, train_bin=None, val_bin=None):
    """(train path, val path): those given, or a text's. Tinyshakespeare's are made if missing, or
    those of a stand-in for it."""
    if train_bin or val_bin:
        if not (train_bin and val_bin):
            raise Refused("--train_bin and --val_bin belong together; give both, or neither")
        return train_bin, val_bin
    paths = token_files(name, tokenizer_name)
    if all(path.exists() for path in paths):
        return paths
    if name != "tinyshakespeare":
        raise Refused(f"{paths[0]}: no such file; make it with python prepro_tinyshakespeare.py "
                      f"--text {name}.txt --tokenizer {tokenizer_name}")
    return prepare(*tinyshakespeare_or_else(), tokenizer_name)


# ------------------------------------------------------------------ the command line of train_gpt2

def number(kind, low, high=math.inf):
    """A reader of numbers from low to high, for argparse."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(
                f"{text} is not a {'whole ' * (kind is int)}number of at least {low}"
                + f" and at most {high}" * (high < math.inf))
        return value
    return read


def some_text(text):
    """A reader of texts that are not empty, for argparse."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give some text, or leave it out")
    return text


COUNT, WHOLE = number(int, 1), number(int, 0)
REAL, SHARE = number(float, 0), number(float, 0, 1)
FLAGS = {  # group: (name, what it is, default, help); a default of None is the model's or no limit
    "data": [
        ("data", str, "tinyshakespeare", "train on data/NAME_TOKENIZER_{train,val}.bin"),
        ("train_bin", str, None, "train on these token files instead (a path or a glob)"),
        ("val_bin", str, None, "and validate on these"),
        ("tokenizer", TOKENIZERS, None, "bytes, or GPT-2's 50,257 tokens"),
        ("out", str, "out", "folder for log.csv and checkpoints"),
        ("save_every", COUNT, 250, "steps between checkpoints"),
        ("resume", bool, False, "go on from the last checkpoint in --out, with its options")],
    "model": [
        ("model", {}, "baby", "a shape and how to train it; the flags below override"),
        ("init_from", str, "scratch", "gpt2, gpt2-medium, gpt2-large, gpt2-xl: OpenAI's weights; "
         "or a folder with config.json and model.safetensors, or an earlier run's"),
        ("n_layer", COUNT, None, "L, blocks"), ("n_head", COUNT, None, "H, attention heads"),
        ("n_embd", COUNT, None, "C, channels"), ("n_positions", COUNT, None, "longest context"),
        ("vocab_size", COUNT, None, "V, if not the tokenizer's")],
    "optimisation": [
        ("steps", WHOLE, None, "0 only validates and samples"),
        ("batch_size", COUNT, None, "B, sequences in a micro-batch"),
        ("seq_len", COUNT, None, "T, tokens in a sequence; 64, or a shorter context"),
        ("grad_accum", COUNT, 1, "micro-batches in a step"),
        ("lr", REAL, None, "highest learning rate"),
        ("min_lr", REAL, None, "learning rate at the end"),
        ("warmup", WHOLE, 100, "steps up to the highest"),
        ("beta1", SHARE, 0.9, "AdamW's memory for the gradient"),
        ("beta2", SHARE, None, "and for its square"),
        ("weight_decay", REAL, 0.1, "pull of matrices to 0, in units of lr"),
        ("grad_clip", REAL, 1.0, "longest gradient let through; 0: any"),
        ("seed", WHOLE, 1337, "for weights, batches and samples"),
        ("threads", COUNT, None, "if not one per CPU; results do not depend on it")],
    "evaluation": [
        ("log_every", COUNT, None, "steps between lines"),
        ("eval_every", COUNT, 250, "steps between validations, each of the whole file"),
        ("sample_every", COUNT, 1000, "steps between samples")],
    "sampling": [
        ("prompt", some_text, None, "what to go on from, if not a new line or <|endoftext|>; "
         "with --init_from and without --steps, only that is done"),
        ("prompt_file", read_text, None, "the same from a file"),
        ("num_samples", COUNT, None, "so many texts, and then nothing else either"),
        ("max_new_tokens", WHOLE, 500, "length"),
        ("temperature", REAL, 0.8, "below 1 the likelier are preferred; 0 takes the likeliest"),
        ("top_k", COUNT, None, "draw from the k likeliest tokens"),
        ("top_p", SHARE, None, "draw from the likeliest that reach this probability")]}
FREE = {"steps", "batch_size", "threads", "out", "log_every", "eval_every", "sample_every",
        "save_every", *(name for name, *_ in FLAGS["sampling"])}  # may change when a run goes on


def parse_arguments(models, fine_tuning, argv=None):
    """train_gpt2.py's command line as a namespace.

    Defaults are those of its --model; or what --init_from or --resume finds, and then any other
    value for those is refused, unless it is of an option that is FREE to change in a run.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train GPT-2 in NumPy; without arguments a small one on Shakespeare, as bytes.",
        epilog="These are the defaults of the --model given; other models have others.")
    for title, group in FLAGS.items():
        add = parser.add_argument_group(title).add_argument
        for name, kind, default, text in group:
            limits = {"type": kind, "metavar": "X"}
            if kind is bool:
                limits = {"action": "store_true"}
            elif isinstance(kind, dict):
                limits = {"choices": kind or models}
            add(f"--{name}", default=default, help=text, **limits)
    parser.error = lambda message: refuse("train_gpt2.py", f"{message} (see --help)")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in ("model", "baby"), ("init_from", "scratch"), ("out", "out"):
        first.add_argument(f"--{name}", nargs="?", default=default)
    first.add_argument("--resume", action="store_true")
    first, _ = first.parse_known_args(argv)
    found, defaults, helped = {}, {}, not {"-h", "--help"}.isdisjoint(argv)
    if first.resume and not helped:
        saved = checkpoints(first.out)
        if not saved:
            raise Refused(f"--resume: {first.out} has no checkpoint; leave --resume out, or give "
                          "the run's --out")
        found = read_trainer(saved[-1])["args"]
        del found["folder"], found["only_sample"], found["resume"]
        defaults = found | {"folder": str(saved[-1]), "threads": None}
    elif first.init_from not in (None, "scratch") and not helped:
        folder = find_model(first.init_from, [name for name in models if name != "baby"])
        found, tokenizer = read_config(folder), None
        if (folder / "trainer.json").exists():
            tokenizer = read_trainer(folder)["args"]["tokenizer"]
        for name, known in TOKENIZERS.items():
            tokenizer = tokenizer or (name if known.n_vocab == found["vocab_size"] else None)
        defaults = fine_tuning | found | {"folder": str(folder), "tokenizer": tokenizer}
    parser.set_defaults(**{"folder": None, **models.get(first.model, models["baby"]), **defaults})
    args = parser.parse_args(argv)
    args.prompt = args.prompt_file or args.prompt
    for name in found.keys() - FREE:
        if getattr(args, name, found[name]) != found[name]:
            raise Refused(f"--{name} {getattr(args, name)} would change what --"
                          f"{'resume' if args.resume else 'init_from'} goes on from, which has "
                          f"{found[name]}; leave it out")
    args.seq_len = args.seq_len or min(64, args.n_positions)
    if args.seq_len > args.n_positions:
        raise Refused(f"--seq_len {args.seq_len} is longer than the context, --n_positions "
                      f"{args.n_positions}; lower the one or raise the other")
    if args.tokenizer is None:
        raise Refused(f"{args.folder}: no tokenizer here has {args.vocab_size} tokens; give its "
                      "--tokenizer")
    args.only_sample = bool(args.init_from != "scratch" and (args.prompt or args.num_samples)
                            and not any(a.split("=")[0] in ("--steps", "--resume") for a in argv))
    return args


# ----------------------------------------------------------------------------- and of this program

def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Turn a text into files of tokens in data/.")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="byte",
                        help="bytes, or GPT-2's 50,257 tokens (default: byte)")
    parser.add_argument("--text", metavar="FILE",
                        help="a UTF-8 text file (default: tinyshakespeare, fetched when missing)")
    args = parser.parse_args()
    if args.text is None:
        prepare(tinyshakespeare(), "tinyshakespeare", args.tokenizer)
    else:
        prepare(read_text(args.text), Path(args.text).stem, args.tokenizer)


if __name__ == "__main__":
    program("prepro_tinyshakespeare.py", main)
