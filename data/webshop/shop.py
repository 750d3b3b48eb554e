"""WebShop's products, goals and search index.

`open_shop` builds the files below once from the benchmark's own files, in the cache folder. All
workers of a machine memory-map them: a worker's memory does not grow with the catalogue.

products.jsonl   one product per line, "wants": its instructions; products.npy: the byte offset of
                 each line
goals.npy        goals in the benchmark's order: product, number of its instruction ("want"), option
                 combination, price ceiling
bm25/            BM25 weights (bm25s) of each word
words.npy        sorted 64-bit hashes of the words; word_ids.npy: their ids in bm25/
"""

import array
import collections
import contextlib
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

from common import InputError, fingerprint, lock_file

VERSION = 4  # of the cached files: a change of their content or format needs another number
RESULTS = 50  # per search
WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
WORD = r"\w+"
STOP_WORDS = set(WORDS["stop_words"])
STEMMER = Stemmer.Stemmer("porter")


@functools.cache
def open_shop() -> "Shop":
    """The shop of $WEBSHOP_DATA. The first call builds it in ~/.cache/mpo ($XDG_CACHE_HOME): for
    1.18 million products that takes minutes and 5 GB of memory."""
    files = data_files()
    stats = []
    for kind, path in files.items():
        stat = path.stat()
        stats.append((kind, str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mpo"
    folder = cache / f"webshop-{fingerprint(VERSION, stats)}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            locked = lock_file(lock, wait=True)  # the other processes wait while one builds
            build_once(files, folder, locked)
    return Shop(folder)


def build_once(files: dict[str, Path], folder: Path, locked: bool) -> None:
    """Build the shop in `folder`, unless another process did. Processes that cannot lock may build
    it at the same time, each in a folder of its own; the first one's is kept."""
    if folder.exists():
        return
    if locked:
        for left in folder.parent.glob(f"{folder.name}.*tmp"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    build(files, temporary)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)


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
    goals = os.environ.get("WEBSHOP_GOALS")
    if not goals:
        goals = "human" if human.exists() else "attributes"
    if goals not in ("human", "attributes") or (goals == "human" and not human.exists()):
        raise InputError(f"WEBSHOP_GOALS={goals} must be attributes, or human if {human} exists")
    if goals == "human":
        files["human"] = human
    return files


# ---- reading the benchmark's files --------------------------------------------------------------

CHUNK = 1 << 22  # characters of one read
LONGEST = 1 << 26  # characters of the longest element of a file
DECODER = json.JSONDecoder()
SEPARATOR = re.compile(r"[\s,:]*")


def read_json(path: Path, bracket: str):
    """Yield the elements of a JSON list (`bracket` "["), or the keys and values of a JSON object
    ("{") in turn, without holding the file in memory. Unlike ijson, this reads NaN and lone
    surrogates, which Python's `json` writes. Raises `InputError` if the JSON is not complete."""
    with path.open(encoding="utf-8-sig", errors="replace") as f:
        text = f.read(CHUNK).lstrip()
        if not text.startswith(bracket):
            raise InputError(f"{path} must be a JSON {'list' if bracket == '[' else 'object'}")
        at = 1  # where in `text` the next element begins
        while True:
            for element, end in complete_elements(text, at):
                yield element
                at = end
            at = SEPARATOR.match(text, at).end()
            if text.startswith(("]", "}"), at):
                return
            text = refilled(text[at:], f, path)
            at = 0


def complete_elements(text: str, at: int):
    """Yield each element of `text` from `at` on that is complete, and where it ends."""
    while True:
        at = SEPARATOR.match(text, at).end()
        try:
            element, at = DECODER.raw_decode(text, at)
        except ValueError:
            return
        if at == len(text):  # a number at the end may continue in the next chunk
            return
        yield element, at


def refilled(rest: str, f, path: Path) -> str:
    """What is left of the last chunk, with the next one of the file."""
    more = ""
    if len(rest) < LONGEST:
        more = f.read(CHUNK)
    if not more:
        raise InputError(f"{path} is not complete JSON at {rest[:40]!r}: download it again")
    return rest + more


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
    asin = clean_text(row.get("asin"))
    name = clean_text(row.get("name"))
    if not asin or asin == "nan" or len(asin) > 10:
        raise ValueError("asin missing or longer than 10 characters")
    if not name:
        raise ValueError("no name")
    bullets = row.get("small_description")
    if not isinstance(bullets, list):
        bullets = [bullets]
    return {
        "asin": asin,
        "name": name,
        "description": clean_text(row.get("full_description")),
        "features": list(filter(None, map(clean_text, bullets))),
        "prices": clean_prices(row.get("pricing")),
        "options": clean_options(row.get("customization_options")),
        "query": clean_text(row.get("query")).lower(),
        "product_category": clean_text(row.get("product_category")),
    }


def clean_prices(pricing) -> list[float]:
    """The price, or the two ends of a range: "$5.0 to $35.0" -> [5.0, 35.0]."""
    prices = []
    for part in clean_text(pricing).split("$")[1:]:
        with contextlib.suppress(ValueError):
            prices.append(float(re.sub(r"[^\d.]", "", part)))
    return prices[:2] or [100.0]  # the benchmark's default price


def clean_options(raw) -> dict[str, list[str]]:
    """{option: its values} in lower case, without options that have no value."""
    options = {}
    if not isinstance(raw, dict):
        return options
    for option, choices in raw.items():
        values = []
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, dict) and choice.get("value"):
                value = clean_text(choice["value"]).replace("/", " | ").lower()
                values.append(" ".join(value.split()))
        values = [value for value in dict.fromkeys(values) if value]
        if values:
            options[clean_text(option).lower()] = values
    return options


def instructions(entries: list, human: bool) -> list[dict]:
    """The usable instructions of a product. Those of the attribute file name no options: "options"
    is None, and every combination of the product's options becomes a goal."""
    usable = []
    for entry in entries:
        attributes = entry.get("instruction_attributes") if isinstance(entry, dict) else None
        if not attributes or not isinstance(attributes, list):
            continue
        usable.append(
            {
                "text": clean_text(entry.get("instruction")),
                "attributes": list(map(clean_text, attributes)),
                "options": (entry.get("instruction_options") or []) if human else None,
            }
        )
    return usable


def usable_products(path: Path, left_out: collections.Counter):
    """Yield the cleaned products of a file, and count in `left_out` why others are left out."""
    seen = set()
    for row in tqdm(read_json(path, "["), "WebShop's products", unit=" products"):
        try:
            product = clean_product(row)
            if product["asin"] in seen:
                raise ValueError("duplicate asin")
        except ValueError as e:
            left_out[str(e)] += 1
        else:
            seen.add(product["asin"])
            yield product


# ---- building -----------------------------------------------------------------------------------


def build(files: dict[str, Path], folder: Path) -> None:
    """Write the shop's files to `folder`: one pass over the products, then goals and index."""
    # as text, a million small objects take less memory
    attributes = {asin: json.dumps(v) for asin, v in read_json_items(files["attributes"])}
    human = dict(read_json_items(files["human"])) if "human" in files else None
    tokenizer = Tokenizer(splitter=WORD, stopwords=STOP_WORDS, stemmer=STEMMER)
    draw = random.Random(42)
    offsets = array.array("q", [0])
    prices = array.array("d")
    documents = []  # the word ids of each product
    instructed = []  # (product, number of its instruction, number of its option combinations)
    left_out = collections.Counter()
    with (folder / "products.jsonl").open("wb") as f:
        for product in usable_products(files["products"], left_out):
            known = json.loads(attributes.get(product["asin"], "{}"))
            add_instructions(product, known, human)
            product["price"] = drawn_price(product["prices"], draw)
            combinations = 1
            if human is None:
                combinations = math.prod(map(len, product["options"].values()))
            for instruction_number in range(len(product["wants"])):
                instructed.append((len(prices), instruction_number, combinations))
            prices.append(product["price"])
            f.write(json.dumps(product).encode() + b"\n")
            offsets.append(f.tell())
            [ids] = tokenizer.streaming_tokenize([searched_text(product)], allow_empty=False)
            documents.append(array.array("i", ids))  # 4 bytes per word, a list takes 8
    check_catalogue(files, len(prices), len(instructed), left_out)
    np.save(folder / "products.npy", np.array(offsets))
    np.save(folder / "goals.npy", ordered_goals(instructed, prices, draw))
    save_index(documents, tokenizer.stem_to_sid, folder)


def add_instructions(product: dict, known, human: dict | None) -> None:
    """Add "attributes", and the instructions as "wants", to a product. `known`: its entry in the
    attribute file; `human`: people's instructions by product, None if those are not used."""
    if not isinstance(known, dict):
        known = {}
    product["attributes"] = list(map(clean_text, known.get("attributes") or ()))
    if human is not None:
        entries = human.get(product["asin"]) or []
        product["wants"] = instructions(entries, human=True)
    elif known.get("instruction"):
        product["wants"] = instructions([known], human=False)
    else:
        product["wants"] = []


def drawn_price(prices: list[float], draw: random.Random) -> float:
    """The benchmark draws a price in the range in every process; here it is drawn once."""
    if len(prices) == 1:
        return prices[0]
    return draw.uniform(*prices)


def searched_text(product: dict) -> str:
    """What the search reads of a product."""
    options = [f"{name}: {', '.join(values)}" for name, values in product["options"].items()]
    texts = [product["name"], product["description"], *product["features"][:1]]
    return " ".join([*texts, ", and ".join(options)])


def check_catalogue(files: dict[str, Path], products: int, goals: int, left_out) -> None:
    """Say which products were left out; raise `InputError` without a product or a goal."""
    path = files["products"]
    if not products:
        reasons = "".join(f"; {n} left out: {why}" for why, n in left_out.items())
        raise InputError(f"{path} has no usable product{reasons}")
    if left_out:
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.most_common())
        print(f"{path.name}: {left_out.total()} products left out: {reasons}", file=sys.stderr)
    if not goals:
        source = files["attributes"]
        hint = ""
        if "human" in files:
            source = files["human"]
            hint = "; WEBSHOP_GOALS=attributes uses the attribute file's goals"
        raise InputError(f"{source} has no goal for the products in {path.name}{hint}")


def ordered_goals(instructed: list[tuple], prices, draw: random.Random) -> np.ndarray:
    """The goals of rows of (product, number of its instruction, number of its option combinations):
    one per combination, in the order of the benchmark's shuffle. Each instruction has one price
    ceiling, drawn as the benchmark does: the larger of two of the next four multiples of 10."""
    ceilings = []
    for product, _, _ in instructed:
        above = [10.0 * i for i in range(1, 100) if 10.0 * i > prices[product]][:4]
        ceilings.append(max(draw.sample(above, 2)) if len(above) >= 2 else math.inf)
    products, instruction_numbers, counts = np.array(instructed, dtype=np.int64).T
    order = array.array("q", range(counts.sum()))
    random.Random(233).shuffle(order)
    order = np.array(order)
    which = np.repeat(np.arange(len(instructed)), counts)[order]  # the row of each goal
    combination = order - (counts.cumsum() - counts)[which]
    return np.rec.fromarrays(
        [products[which], instruction_numbers[which], combination, np.array(ceilings)[which]],
        dtype=[("product", "i4"), ("want", "i4"), ("combination", "i4"), ("ceiling", "f8")],
    )


def save_index(documents: list, vocabulary: dict[str, int], folder: Path) -> None:
    """Write the BM25 index of `documents`, lists of word ids, with the benchmark's k1 and b. Words
    are stored as hashes in a memory-mapped file: bm25s would load all words into every worker."""
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
        self.offsets = np.load(folder / "products.npy", mmap_mode="r")
        self.goals = np.load(folder / "goals.npy", mmap_mode="r")
        self.words = np.load(folder / "words.npy", mmap_mode="r")
        self.word_ids = np.load(folder / "word_ids.npy", mmap_mode="r")
        self.file = (folder / "products.jsonl").open("rb")
        self.bm25 = bm25s.BM25.load(folder / "bm25", mmap=True, load_vocab=False)
        self.product = functools.lru_cache(512)(self._product)

    def _product(self, i: int) -> dict:
        start, stop = self.offsets[i : i + 2].tolist()
        return json.loads(os.pread(self.file.fileno(), stop - start, start))

    def goal(self, number: int) -> dict:
        """What to buy: {"product", "text", "attributes", "options", "ceiling"}."""
        product_number, instruction_number, combination, ceiling = self.goals[number].item()
        product = self.product(product_number)
        instruction = product["wants"][instruction_number]
        text = instruction["text"].strip(".")
        options = instruction["options"]
        if options is None:
            options = option_combination(product["options"], combination)
            if options:
                text += " with " + ", and ".join(f"{k}: {v}" for k, v in options.items())
        if isinstance(options, dict):
            options = list(options.values())
        if ceiling < math.inf:
            text += f", and price lower than {ceiling:.2f} dollars"
        return {
            "product": product_number,
            "text": text,
            "attributes": instruction["attributes"],
            "options": [clean_text(option).lower() for option in options],
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


def option_combination(options: dict[str, list[str]], number: int) -> dict[str, str]:
    """The combination of this number, {option: value}; the value of the last option, by name,
    changes fastest."""
    chosen = {}
    for name in sorted(options, reverse=True):
        number, which = divmod(number, len(options[name]))
        chosen[name] = options[name][which]
    return dict(sorted(chosen.items()))
