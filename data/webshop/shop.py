"""WebShop's products, goals and search index."""

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

from common import InputError, digest


class Shop:
    """WebShop's products, goals and search index, made once from the benchmark's files and then memory mapped: all
    workers of a machine share one copy of them, and a worker's own memory does not grow with the catalogue.

    products.jsonl    a product a line; products.npy where each line begins
    goals.npy         goals in the benchmark's order: product, its instruction, combination of options, price ceiling
    bm25/             BM25 weights (bm25s); words.npy digests of the words they are for, sorted, and their numbers"""

    RESULTS, VERSION, LONGEST = 50, 2, 1 << 26  # LONGEST: characters of one element of a data file; more of it is broken
    WORD = re.compile(r"\w+")
    STOP = set("a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
               "to was will with".split())

    def __init__(self, folder: Path):
        import bm25s
        import numpy as np

        self.np = np
        self.offsets, self.goals, self.words, self.word_ids = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("products", "goals", "words", "word_ids"))
        self.file = (folder / "products.jsonl").open("rb")
        self.bm25 = bm25s.BM25.load(folder / "bm25", mmap=True, load_vocab=False)
        self.product = functools.lru_cache(512)(self._product)

    @classmethod
    @functools.cache
    def open(cls) -> "Shop":
        """The shop of $WEBSHOP_DATA: a folder with the benchmark's files, or one items_shuffle file. Built on first use,
        which takes minutes and 5 GB of memory for 1.18 million products, in ~/.cache/mpo (XDG_CACHE_HOME)."""
        try:
            import bm25s  # noqa: F401
            import Stemmer  # noqa: F401
            import thefuzz  # noqa: F401
        except ImportError as e:
            raise InputError(f"WebShop needs {e.name}: pip install bm25s PyStemmer thefuzz") from None
        files = cls.files()
        stats = [(k, str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for k, p in files.items()]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mpo"
        folder = cache / f"webshop-{digest(cls.VERSION, stats)}"
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with (cache / f"{folder.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # workers that start together: one builds, the others wait
                if not folder.exists():
                    temporary = folder.with_name(folder.name + ".tmp")
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir()
                    cls.build(files, temporary)
                    temporary.rename(folder)
        return cls(folder)

    @staticmethod
    def files() -> dict[str, Path]:
        """{"products", "attributes", "human" where it is there: path}."""
        where = os.environ.get("WEBSHOP_DATA")
        if not where:
            raise InputError("WebShop needs its data: set WEBSHOP_DATA to the folder with items_shuffle*.json and items_ins_v2*.json")
        where = Path(where).expanduser()
        found = [where] if where.is_file() else list(where.glob("items_shuffle*.json"))
        if not found:
            raise InputError(f"no items_shuffle*.json in {where} (WEBSHOP_DATA): the folder with WebShop's data files, or one of them")
        # of several catalogues the largest: items_shuffle.json has all products, items_shuffle_1000.json a thousand
        products = max(found, key=lambda p: p.stat().st_size)
        size = products.stem.removeprefix("items_shuffle")
        attributes = products.with_name(f"items_ins_v2{size}.json")
        if not attributes.exists():
            raise InputError(f"{attributes} is missing: the attributes of the products in {products.name}")
        kind, human = os.environ.get("WEBSHOP_GOALS", ""), products.with_name("items_human_ins.json")
        if kind not in ("", "human", "attributes") or (kind == "human" and not human.exists()):
            raise InputError(f"WEBSHOP_GOALS={kind}: must be human, which needs {human}, or attributes")
        return {"products": products, "attributes": attributes, **({"human": human} if human.exists() and kind != "attributes" else {})}

    # -- building ----------------------------------------------------------------------------------

    @staticmethod
    def stream(path: Path, kind: str):
        """The elements of a JSON list ("["), or (key, value) of an object ("{"), without holding the file in memory."""
        decoder, text, at, end = json.JSONDecoder(), "", 0, False
        with path.open(encoding="utf-8", errors="replace") as f:

            def more() -> None:
                nonlocal text, at, end
                chunk = f.read(1 << 22)
                text, at, end = text[at:] + chunk, 0, not chunk

            def skip(characters: str) -> str:
                nonlocal at
                while True:
                    while at < len(text) and text[at] in characters:
                        at += 1
                    if at < len(text) or end:
                        return text[at : at + 1]
                    more()

            def value():
                nonlocal at
                while True:
                    try:
                        found, stop = decoder.raw_decode(text, at)
                        if stop < len(text) or end:  # a number may go on in the next chunk
                            at = stop
                            return found
                    except ValueError as e:
                        if end or len(text) - at > Shop.LONGEST:
                            raise InputError(f"{path} is not whole JSON ({e.msg}): fetch it again") from None
                    more()

            if skip(" \t\r\n\ufeff") != kind:
                raise InputError(f"{path} must be a JSON {'list' if kind == '[' else 'object'}")
            at += 1
            while skip(" \t\r\n,") not in ("]", "}", ""):
                first = value()
                if kind == "{":
                    skip(" \t\r\n:")
                    first = first, value()
                yield first
            if not skip(" \t\r\n,"):
                raise InputError(f"{path} ends in the middle: fetch it again")

    @staticmethod
    def text(value) -> str:
        """Anything as one line of valid text: half of a surrogate pair cannot be written to a file."""
        if value is None or value != value:
            return ""
        if isinstance(value, list):
            return " ".join(map(Shop.text, value))
        value = " ".join(str(value).split())
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    @classmethod
    def cleaned(cls, row: dict) -> dict:
        """A product as the pages and the reward need it, by the benchmark's rules. Raises `ValueError` with the reason
        why it cannot be sold."""
        if not isinstance(row, dict):
            raise ValueError("not an object")
        asin, name = cls.text(row.get("asin")), cls.text(row.get("name"))
        if not asin or asin == "nan" or len(asin) > 10:
            raise ValueError("asin missing or longer than 10 characters")
        if not name:
            raise ValueError("no name")
        prices = []
        for part in cls.text(row.get("pricing")).split("$")[1:]:
            with contextlib.suppress(ValueError):
                prices.append(float(re.sub(r"[^\d.]", "", part)))
        prices = prices[:2] or [100.0]  # the benchmark's price of what has none
        options, offered = {}, row.get("customization_options")
        for option, contents in offered.items() if isinstance(offered, dict) else ():
            contents = contents if isinstance(contents, list) else []
            values = [cls.text(c["value"]) for c in contents if isinstance(c, dict) and c.get("value")]
            values = [" ".join(v.replace("/", " | ").lower().split()) for v in values if v]
            if values:
                options[cls.text(option).lower()] = list(dict.fromkeys(values))
        bullets = row.get("small_description")
        features = [cls.text(b) for b in (bullets if isinstance(bullets, list) else [bullets])]
        return {"asin": asin, "name": name, "description": cls.text(row.get("full_description")), "features": list(filter(None, features)),
                "prices": prices, "options": options, "rating": cls.text(row.get("average_rating")) or "N.A.",
                "query": cls.text(row.get("query")).lower(), "category": cls.text(row.get("category")),
                "product_category": cls.text(row.get("product_category"))}

    @classmethod
    def build(cls, files: dict[str, Path], folder: Path) -> None:
        """Write the shop to `folder`: one pass over the products, then the index."""
        import array

        import bm25s
        import numpy as np
        import Stemmer
        from tqdm import tqdm

        attributes = {asin: json.dumps(v).encode() for asin, v in cls.stream(files["attributes"], "{")}
        human = dict(cls.stream(files["human"], "{")) if "human" in files else None
        draw, stemmer = random.Random(42), Stemmer.Stemmer("porter")
        vocabulary: dict[str, int] = {}
        numbers, documents, offsets, prices = {}, [], array.array("q", [0]), array.array("d")
        seen, wants, left_out = set(), [], collections.Counter()
        with (folder / "products.jsonl").open("wb") as f:
            for row in tqdm(cls.stream(files["products"], "["), desc="WebShop's products", unit=" products"):
                try:
                    p = cls.cleaned(row)
                    if p["asin"] in seen:
                        raise ValueError("asin for the second time")
                except ValueError as e:
                    left_out[str(e)] += 1
                    continue
                seen.add(p["asin"])
                known = json.loads(attributes.get(p["asin"], b"{}"))
                known = known if isinstance(known, dict) else {}
                p["attributes"] = [cls.text(t) for t in known.get("attributes") or ()]
                said = human.get(p["asin"]) or [] if human is not None else [known] if known.get("instruction") else []
                p["wants"] = [{"text": cls.text(w.get("instruction")),
                               "attributes": [cls.text(t) for t in w["instruction_attributes"]],
                               "options": w.get("instruction_options") or [] if human is not None else None}
                              for w in said if isinstance(w, dict) and w.get("instruction_attributes")
                              and isinstance(w["instruction_attributes"], list)]
                # a product with a price range has one price in an episode, drawn here once and for all
                p["price"] = p["prices"][0] if len(p["prices"]) == 1 else draw.uniform(*p["prices"])
                wants += [(len(prices), w, 1 if human is not None else cls.combinations(p)) for w in range(len(p["wants"]))]
                prices.append(p["price"])
                f.write(json.dumps(p).encode() + b"\n")
                offsets.append(f.tell())
                text = " ".join([p["name"], p["description"], *p["features"][:1],
                                 ", and ".join(f"{k}: {', '.join(v)}" for k, v in p["options"].items())]).lower()
                ids = array.array("i")
                for word in cls.WORD.findall(text):
                    number = numbers.get(word)
                    if number is None:
                        number = numbers[word] = (-1 if word in cls.STOP else
                                                  vocabulary.setdefault(stemmer.stemWord(word), len(vocabulary)))
                    if number >= 0:
                        ids.append(number)
                documents.append(ids)
        if not prices:
            raise InputError(f"{files['products']} has no product that can be sold"
                             + "".join(f"; {n} left out: {why}" for why, n in left_out.items()))
        if left_out:
            print(f"{files['products'].name}: {left_out.total()} products left out: "
                  + ", ".join(f"{n} {why}" for why, n in left_out.most_common()), file=sys.stderr, flush=True)
        ceilings = []
        for product, _, _ in wants:
            above = [10.0 * i for i in range(1, 100) if 10.0 * i > prices[product]][:4]
            ceilings.append(max(draw.sample(above, 2)) if len(above) >= 2 else math.inf)
        if not wants:
            raise InputError(f"{files.get('human', files['attributes'])} has no goal for the products in {files['products'].name}"
                             + ("; WEBSHOP_GOALS=attributes takes those of the attribute file" if human is not None else ""))
        wants = np.array(wants, dtype=np.int64).reshape(-1, 3)
        counts = wants[:, 2]
        order = array.array("q", range(counts.sum()))
        random.Random(233).shuffle(order)  # the benchmark's own shuffle
        order = np.array(order)
        which = np.repeat(np.arange(len(wants)), counts)[order]
        goals = np.empty(len(order), dtype=[("product", "i4"), ("want", "i4"), ("combination", "i4"), ("ceiling", "f8")])
        goals["product"], goals["want"], goals["ceiling"] = wants[which, 0], wants[which, 1], np.array(ceilings)[which]
        goals["combination"] = order - (counts.cumsum() - counts)[which]
        np.save(folder / "goals.npy", goals)
        np.save(folder / "products.npy", np.array(offsets))
        index = bm25s.BM25(k1=0.9, b=0.4)  # of the benchmark's search engine
        index.index((documents, vocabulary), show_progress=len(documents) > 20_000)
        index.vocab_dict = {}
        index.save(folder / "bm25", show_progress=False)
        names = np.array([cls.word_key(w) for w in vocabulary], dtype=np.uint64)
        order = np.argsort(names)
        np.save(folder / "words.npy", names[order])
        np.save(folder / "word_ids.npy", order.astype(np.int32))

    @staticmethod
    def combinations(product: dict) -> int:
        return math.prod(len(v) for v in product["options"].values())

    @staticmethod
    def word_key(word: str) -> int:
        return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big")

    # -- use ---------------------------------------------------------------------------------------

    def _product(self, i: int) -> dict:
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        return json.loads(os.pread(self.file.fileno(), stop - start, start))

    def goal(self, number: int) -> dict:
        """{"product", "text", "attributes", "options", "ceiling"} of a goal: what is to be bought, in words and in fact."""
        i, want, combination, ceiling = self.goals[number].item()
        product = self.product(i)
        wanted, text = product["wants"][want], product["wants"][want]["text"].strip(".")
        options = wanted["options"]
        if options is None:  # of the attribute file: one of the combinations of the product's options
            chosen = {}
            for name in sorted(product["options"], reverse=True):
                combination, k = divmod(combination, len(product["options"][name]))
                chosen[name] = product["options"][name][k]
            options = {name: chosen[name] for name in sorted(chosen)}
            text += " with " + ", and ".join(f"{k}: {v}" for k, v in options.items()) if options else ""
        options = list(options.values() if isinstance(options, dict) else options or ())
        text += f", and price lower than {ceiling:.2f} dollars" if ceiling < math.inf else ""
        return {"product": i, "text": text, "attributes": wanted["attributes"], "options": [self.text(o).lower() for o in options],
                "ceiling": ceiling}

    def search(self, keywords: str) -> list[int]:
        """The products that match best, at most 50, the best first; of equal ones the first in the catalogue."""
        ids = []
        for word in self.WORD.findall(keywords.lower()):
            key = self.np.uint64(self.word_key(self.stem(word)))
            at = int(self.np.searchsorted(self.words, key))
            if word not in self.STOP and at < len(self.words) and self.words[at] == key:
                ids.append(int(self.word_ids[at]))
        if not ids:
            return []
        scores = self.bm25.get_scores_from_ids(ids)
        last = max(0, len(scores) - self.RESULTS)
        best = self.np.flatnonzero((scores >= self.np.partition(scores, last)[last]) & (scores > 0))
        return best[self.np.lexsort((best, -scores[best]))][: self.RESULTS].tolist()

    @staticmethod
    @functools.lru_cache(100_000)
    def stem(word: str) -> str:
        import Stemmer

        return Stemmer.Stemmer("porter").stemWord(word)
