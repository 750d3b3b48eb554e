"""WebShop's products, goals and search index.

`open_shop` builds the files below once from the benchmark's own files, in the cache folder. All
workers of a machine memory-map them: a worker's memory does not grow with the catalogue.

products.jsonl   one product per line; products.npy: the byte offset of each line
goals.npy        goals in the benchmark's order: product, instruction, option combination, ceiling
bm25/            BM25 weights (bm25s) of each word
words.npy        sorted 64-bit digests of the words; word_ids.npy: their ids in bm25/
"""

import array
import collections
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
from bm25s.tokenization import Tokenizer
from tqdm import tqdm

from common import InputError, fingerprint

VERSION = 3  # of the cached files: a change of their content or format needs another number
RESULTS = 50  # per search
WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
WORD, STOP_WORDS, STEMMER = r"\w+", set(WORDS["stop_words"]), Stemmer.Stemmer("porter")


@functools.cache
def open_shop() -> "Shop":
    """The shop of $WEBSHOP_DATA. The first call builds it in ~/.cache/mpo ($XDG_CACHE_HOME): for
    1.18 million products that takes minutes and 5 GB of memory."""
    files = data_files()
    stats = [
        (kind, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for kind, path in files.items()
    ]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mpo"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"webshop-{fingerprint(VERSION, stats)}"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes wait while one builds
        if not folder.exists():
            temporary = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            build(files, temporary)
            temporary.rename(folder)
    return Shop(folder)


def data_files() -> dict[str, Path]:
    """The paths of "products", "attributes" and, if its goals are used, "human". Raises
    `InputError` that names the missing file or the wrong variable."""
    value = os.environ.get("WEBSHOP_DATA")
    if not value:
        raise InputError(
            "WEBSHOP_DATA is not set: it must name the folder that has "
            "items_shuffle*.json and items_ins_v2*.json"
        )
    where = Path(value).expanduser()
    catalogues = [where] if where.is_file() else list(where.glob("items_shuffle*.json"))
    if not catalogues:
        raise InputError(
            f"no items_shuffle*.json in {where}: WEBSHOP_DATA must name the folder "
            "that has WebShop's data files, or one items_shuffle file"
        )
    # items_shuffle.json has all products, items_shuffle_1000.json a thousand: use the largest
    products = max(catalogues, key=lambda path: path.stat().st_size)
    suffix = products.stem.removeprefix("items_shuffle")
    attributes = products.with_name(f"items_ins_v2{suffix}.json")
    if not attributes.exists():
        raise InputError(f"{attributes} is missing: it has the attributes of {products.name}")
    files = {"products": products, "attributes": attributes}
    human = products.with_name("items_human_ins.json")
    goals = os.environ.get("WEBSHOP_GOALS") or ("human" if human.exists() else "attributes")
    if goals not in ("human", "attributes") or (goals == "human" and not human.exists()):
        raise InputError(f"WEBSHOP_GOALS={goals} must be attributes, or human if {human} exists")
    return files | {"human": human} if goals == "human" else files


# ---- building -----------------------------------------------------------------------------------

CHUNK, LONGEST = 1 << 22, 1 << 26  # characters of one read, and of the longest element of a file


def read_json(path: Path, bracket: str):
    """Yield the elements of a JSON list (`bracket` "["), or the keys and values of a JSON object
    ("{") in turn, without holding the file in memory. Unlike ijson, this reads NaN and lone
    surrogates, which Python's `json` writes. Raises `InputError` if the JSON is not complete."""
    decoder, separator, at = json.JSONDecoder(), re.compile(r"[\s,:]*"), 1
    with path.open(encoding="utf-8-sig", errors="replace") as f:
        text = f.read(CHUNK).lstrip()
        if not text.startswith(bracket):
            raise InputError(f"{path} must be a JSON {'list' if bracket == '[' else 'object'}")
        while True:
            at = separator.match(text, at).end()
            if text.startswith(("]", "}"), at):
                return
            with contextlib.suppress(ValueError):
                element, end = decoder.raw_decode(text, at)
                if end < len(text):  # a number at the end may continue in the next chunk
                    yield element
                    at = end
                    continue
            more = f.read(CHUNK) if len(text) - at < LONGEST else ""
            if not more:
                raise InputError(
                    f"{path} is not complete JSON at {text[at : at + 40]!r}: download it again"
                )
            text, at = text[at:] + more, 0


def read_json_items(path: Path):
    """The (key, value) pairs of a JSON object, one at a time."""
    elements = read_json(path, "{")
    return zip(elements, elements, strict=False)


def clean_text(value) -> str:
    """Any value as one line of valid Unicode; "" for None and NaN."""
    if value is None or value != value:
        return ""
    if isinstance(value, list):
        return " ".join(map(clean_text, value))
    line = " ".join(str(value).split())
    return line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clean_product(row: dict) -> dict:
    """The fields of a raw product that the pages and the reward need, by the benchmark's rules.
    Raises `ValueError` with the reason if the product is unusable."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    asin, name = clean_text(row.get("asin")), clean_text(row.get("name"))
    if not asin or asin == "nan" or len(asin) > 10:
        raise ValueError("asin missing or longer than 10 characters")
    if not name:
        raise ValueError("no name")
    prices = []
    for part in clean_text(row.get("pricing")).split("$")[1:]:
        with contextlib.suppress(ValueError):
            prices.append(float(re.sub(r"[^\d.]", "", part)))
    options, raw_options = {}, row.get("customization_options")
    for option, choices in raw_options.items() if isinstance(raw_options, dict) else ():
        choices = choices if isinstance(choices, list) else []
        values = [
            clean_text(c["value"]).replace("/", " | ").lower()
            for c in choices
            if isinstance(c, dict) and c.get("value")
        ]
        values = [" ".join(v.split()) for v in values if v]
        if values:
            options[clean_text(option).lower()] = list(dict.fromkeys(values))
    bullets = row.get("small_description")
    bullets = bullets if isinstance(bullets, list) else [bullets]
    return {
        "asin": asin,
        "name": name,
        "description": clean_text(row.get("full_description")),
        "features": list(filter(None, map(clean_text, bullets))),
        "prices": prices[:2] or [100.0],  # the benchmark's default price
        "options": options,
        "rating": clean_text(row.get("average_rating")) or "N.A.",
        "query": clean_text(row.get("query")).lower(),
        "category": clean_text(row.get("category")),
        "product_category": clean_text(row.get("product_category")),
    }


def instructions(entries: list, human: bool) -> list[dict]:
    """The usable instructions of a product. Those of the attribute file name no options: "options"
    is None, and every combination of the product's options becomes a goal."""
    return [
        {
            "text": clean_text(e.get("instruction")),
            "attributes": list(map(clean_text, e["instruction_attributes"])),
            "options": e.get("instruction_options") or [] if human else None,
        }
        for e in entries
        if isinstance(e, dict)
        and e.get("instruction_attributes")
        and isinstance(e["instruction_attributes"], list)
    ]


def build(files: dict[str, Path], folder: Path) -> None:
    """Write the shop's files to `folder`: one pass over the products, then goals and index."""
    attributes = {asin: json.dumps(v) for asin, v in read_json_items(files["attributes"])}
    human = dict(read_json_items(files["human"])) if "human" in files else None
    draw = random.Random(42)
    tokenizer = Tokenizer(splitter=WORD, stopwords=STOP_WORDS, stemmer=STEMMER)
    documents, offsets, prices = [], array.array("q", [0]), array.array("d")
    seen, wants, left_out = set(), [], collections.Counter()
    with (folder / "products.jsonl").open("wb") as f:
        for row in tqdm(read_json(files["products"], "["), "WebShop's products", unit=" products"):
            try:
                p = clean_product(row)
                if p["asin"] in seen:
                    raise ValueError("duplicate asin")
            except ValueError as e:
                left_out[str(e)] += 1
                continue
            seen.add(p["asin"])
            known = json.loads(attributes.get(p["asin"], "{}"))
            known = known if isinstance(known, dict) else {}
            p["attributes"] = list(map(clean_text, known.get("attributes") or ()))
            entries = [known] if known.get("instruction") else []
            if human is not None:
                entries = human.get(p["asin"]) or []
            p["wants"] = instructions(entries, human is not None)
            # the benchmark draws a price in the range in every process; here it is drawn once
            p["price"] = p["prices"][0] if len(p["prices"]) == 1 else draw.uniform(*p["prices"])
            combinations = 1 if human is not None else math.prod(map(len, p["options"].values()))
            wants += [(len(prices), want, combinations) for want in range(len(p["wants"]))]
            prices.append(p["price"])
            f.write(json.dumps(p).encode() + b"\n")
            offsets.append(f.tell())
            options = ", and ".join(f"{k}: {', '.join(v)}" for k, v in p["options"].items())
            text = " ".join([p["name"], p["description"], *p["features"][:1], options])
            [ids] = tokenizer.streaming_tokenize([text], allow_empty=False)
            documents.append(array.array("i", ids))  # 4 bytes per word, a list takes 8
    if not prices:
        raise InputError(
            f"{files['products']} has no usable product"
            + "".join(f"; {n} left out: {why}" for why, n in left_out.items())
        )
    if left_out:
        print(
            f"{files['products'].name}: {left_out.total()} products left out: "
            + ", ".join(f"{n} {why}" for why, n in left_out.most_common()),
            file=sys.stderr,
        )
    if not wants:
        hint = "" if human is None else "; WEBSHOP_GOALS=attributes uses the attribute file's goals"
        raise InputError(
            f"{files.get('human', files['attributes'])} has no goal for the products "
            f"in {files['products'].name}{hint}"
        )
    np.save(folder / "products.npy", np.array(offsets))
    np.save(folder / "goals.npy", ordered_goals(wants, prices, draw))
    save_index(documents, tokenizer.stem_to_sid, folder)


def ordered_goals(wants: list[tuple], prices, draw: random.Random) -> np.ndarray:
    """The goals of `wants`, rows of (product, instruction, number of option combinations): one per
    combination, in the order of the benchmark's shuffle. Each instruction has one price ceiling,
    drawn as the benchmark does: the larger of two of the next four multiples of 10."""
    ceilings = []
    for product, _, _ in wants:
        above = [10.0 * i for i in range(1, 100) if 10.0 * i > prices[product]][:4]
        ceilings.append(max(draw.sample(above, 2)) if len(above) >= 2 else math.inf)
    wants = np.array(wants, dtype=np.int64)
    counts = wants[:, 2]
    order = array.array("q", range(counts.sum()))
    random.Random(233).shuffle(order)
    order = np.array(order)
    which = np.repeat(np.arange(len(wants)), counts)[order]
    combination = order - (counts.cumsum() - counts)[which]
    return np.rec.fromarrays(
        [wants[which, 0], wants[which, 1], combination, np.array(ceilings)[which]],
        dtype=[("product", "i4"), ("want", "i4"), ("combination", "i4"), ("ceiling", "f8")],
    )


def save_index(documents: list, vocabulary: dict[str, int], folder: Path) -> None:
    """Write the BM25 index of `documents`, lists of word ids, with the benchmark's k1 and b. Words
    are stored as digests in a memory-mapped file: bm25s would load all words into every worker."""
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index((documents, vocabulary), show_progress=len(documents) > 20_000)
    index.vocab_dict = {}
    index.save(folder / "bm25", show_progress=False)
    keys = np.array(list(map(word_key, vocabulary)), dtype=np.uint64)
    order = np.argsort(keys)
    np.save(folder / "words.npy", keys[order])
    np.save(folder / "word_ids.npy", order.astype(np.int32))


def word_key(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


# ---- use ----------------------------------------------------------------------------------------


class Shop:
    """A built shop: products, goals and search."""

    def __init__(self, folder: Path):
        self.offsets, self.goals, self.words, self.word_ids = (
            np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("products", "goals", "words", "word_ids")
        )
        self.file = (folder / "products.jsonl").open("rb")
        self.bm25 = bm25s.BM25.load(folder / "bm25", mmap=True, load_vocab=False)
        self.product = functools.lru_cache(512)(self._product)

    def _product(self, i: int) -> dict:
        start, stop = self.offsets[i : i + 2].tolist()
        return json.loads(os.pread(self.file.fileno(), stop - start, start))

    def goal(self, number: int) -> dict:
        """What to buy: {"product", "text", "attributes", "options", "ceiling"}."""
        i, want, combination, ceiling = self.goals[number].item()
        product = self.product(i)
        wanted, text = product["wants"][want], product["wants"][want]["text"].strip(".")
        options = wanted["options"]
        if options is None:
            chosen = {}
            for name in sorted(product["options"], reverse=True):
                combination, k = divmod(combination, len(product["options"][name]))
                chosen[name] = product["options"][name][k]
            options = dict(sorted(chosen.items()))
            if options:
                text += " with " + ", and ".join(f"{k}: {v}" for k, v in options.items())
        options = list(options.values() if isinstance(options, dict) else options)
        if ceiling < math.inf:
            text += f", and price lower than {ceiling:.2f} dollars"
        return {
            "product": i,
            "text": text,
            "attributes": wanted["attributes"],
            "options": [clean_text(o).lower() for o in options],
            "ceiling": ceiling,
        }

    def search(self, keywords: str) -> list[int]:
        """At most `RESULTS` products, best first; equal scores in the catalogue's order."""
        words = [w for w in re.findall(WORD, keywords.lower()) if w not in STOP_WORDS]
        keys = np.array([word_key(STEMMER.stemWord(w)) for w in words], dtype=np.uint64)
        at = np.searchsorted(self.words, keys).clip(max=len(self.words) - 1)
        ids = self.word_ids[at[self.words[at] == keys]].tolist()
        if not ids:
            return []
        scores = self.bm25.get_scores_from_ids(ids)
        last = max(0, len(scores) - RESULTS)
        threshold = np.partition(scores, last)[last]  # a full sort of a million scores takes longer
        best = np.flatnonzero((scores >= threshold) & (scores > 0))
        return best[np.lexsort((best, -scores[best]))][:RESULTS].tolist()
