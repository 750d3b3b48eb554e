"""WebShop's text mode (Yao et al. 2022): search, result pages, product pages, and the reward."""

import functools
import hashlib
import re
from importlib.util import find_spec

from common import Environment, InputError, fingerprint, interleaved, task_type

try:
    from thefuzz import fuzz

    from .shop import WORDS, open_shop
except ImportError as e:
    raise InputError(
        f"WebShop needs the Python package {e.name}: pip install -r data/webshop/requirements.txt"
    ) from None

NOT_NOUNS = set(WORDS["not_nouns"])
HAS_SPACY_MODEL = find_spec("en_core_web_sm") is not None


class WebShop(Environment):
    """One session; all sessions of a process share one `Shop`.

    The reward is in [0, 1] and comes with the purchase; success is a reward of 1."""

    MAX_STEPS = {"goal": 10}
    FAILED = ("That is not possible here",)
    VERBS = {
        "search",
        "click",
        "choose",
        "check",
        "compare",
        "find",
        "look",
        "read",
        "open",
        "select",
        "repeat",
        "go",
        "buy",
    }
    # first goal, number of goals (paper, appendix A); the paper has no unseen split
    SPLITS = {"train": (1500, 1624), "seen": (0, 200)}
    VARIABLES = ("WEBSHOP_DATA", "WEBSHOP_GOALS", "XDG_CACHE_HOME")
    SECONDS = {"expert": 0.002, "reset": 0.00015, "step": 0.0025}  # step: of 1,180,000 products
    SUBPAGES = ("description", "features", "reviews", "attributes")

    def __init__(self, sessions: int = 8):
        self.shop = open_shop()

    @classmethod
    def prepare(cls) -> None:
        """Build the index in this process, with a progress bar, before workers start."""
        open_shop()

    @classmethod
    def version(cls) -> str:
        """A digest of the goals, the lengths of the stored products, and how nouns are found."""
        arrays = open_shop().goals, open_shop().offsets
        return fingerprint(
            *(hashlib.sha256(a.tobytes()).hexdigest() for a in arrays), HAS_SPACY_MODEL
        )

    @classmethod
    def note(cls) -> str:
        return (
            ""
            if HAS_SPACY_MODEL
            else ("Nouns of titles were found without spaCy's tagger, which is not installed.")
        )

    # ---- tasks ----------------------------------------------------------------------------------

    def columns(self, split: str) -> list[list[str]]:
        """One column, the tasks 'goal/NUMBER' in the benchmark's order. A catalogue with too few
        goals for `SPLITS` uses those of a quarter of its products for the test and the others for
        training; then the first goal of every product comes first, then the second, ..."""
        first, count = self.SPLITS[split]
        if len(self.shop.goals) >= sum(self.SPLITS["train"]):
            return [[f"goal/{i}" for i in range(first, first + count)]]
        by_product: dict[int, list[int]] = {}
        for i, product in enumerate(self.shop.goals["product"].tolist()):
            by_product.setdefault(product, []).append(i)
        goals, quarter = list(by_product.values()), len(by_product) // 4
        goals = goals[:quarter] if split == "seen" else goals[quarter:]
        return [[f"goal/{i}" for i in interleaved(goals)[:count]]]

    @classmethod
    def check(cls, task: str) -> None:
        number, count = task.rsplit("/", 1)[-1], len(open_shop().goals)
        if task_type(task) not in cls.MAX_STEPS or not number.isdecimal() or int(number) >= count:
            raise InputError(
                f"unknown WebShop task {task!r}: it must be goal/NUMBER with NUMBER below {count}"
            )

    # ---- episode --------------------------------------------------------------------------------

    def reset(self, task: str) -> str:
        """Start `task` at the search page. Returns the instruction u."""
        self.check(task)
        self.goal = self.shop.goal(int(task.rsplit("/", 1)[1]))
        self.show("search")
        self.hits, self.number = [], 1
        return self.goal["text"]

    def show(self, page: str, item: int | None = None) -> None:
        """Go to the page "search", "results" or "item", with no option chosen."""
        self.page, self.item, self.options = page, item, {}

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward, done, success). An invalid action leaves the page unchanged and
        returns an error message with the available actions."""
        match = re.fullmatch(r"(search|click)\s*\[(.*)\]", action.strip(), re.I | re.S)
        verb, value = match.groups() if match else ("", "")
        verb, value = verb.lower(), " ".join(value.lower().split())
        confirmed = ""
        if verb == "search" and value and self.page == "search":
            self.hits, self.number = self.shop.search(value), 1
            self.show("results")
        elif verb != "click" or value not in self.clickable():
            error = "That is not possible here, nothing happens."
            return f"{error}\n{self.available()}", 0.0, False, False
        elif value == "buy now":
            bought, wanted = self.shop.product(self.item), self.shop.product(self.goal["product"])
            result = reward(bought, list(self.options.values()), wanted, self.goal)
            return f"You have bought {bought['asin']}.", result, True, result == 1.0
        elif value == "back to search":
            self.show("search")
        elif value in ("next >", "< prev") and self.page == "results":
            self.number += 1 if value == "next >" else -1
        elif value == "< prev" and self.page == "item":
            self.show("results")
        elif value == "< prev":
            self.page = "item"
        elif self.page == "results":
            self.show("item", next(i for i in self.listed() if self.code(i) == value))
        elif value in self.SUBPAGES:
            self.page = value
        else:
            options = self.shop.product(self.item)["options"]
            self.options[[name for name, values in options.items() if value in values][-1]] = value
            confirmed = f"You have clicked {value}.\n"
        return f"{confirmed}{self.available()}\n{self.text()}", 0.0, False, False

    def listed(self) -> list[int]:
        """The products on this page of results, ten per page."""
        return self.hits[10 * self.number - 10 : 10 * self.number]

    def code(self, product: int) -> str:
        return self.shop.product(product)["asin"].lower()

    def buttons(self) -> list[str]:
        """The navigation buttons of a page other than the search page."""
        results = self.page == "results"
        return [
            "Back to Search",
            *["< Prev"] * (not results or self.number > 1),
            *["Next >"] * (results and 10 * self.number < len(self.hits)),
        ]

    def clickable(self) -> list[str]:
        """The values that can be clicked on this page, in lower case."""
        if self.page == "search":
            return []
        buttons = [b.lower() for b in self.buttons()]
        if self.page == "results":
            return [*buttons, *map(self.code, self.listed())]
        if self.page in self.SUBPAGES:
            return buttons
        options = sum(self.shop.product(self.item)["options"].values(), [])
        return list(dict.fromkeys([*buttons, *options, *self.SUBPAGES, "buy now"]))

    def available(self) -> str:
        clicks = ", ".join(f"click[{value}]" for value in self.clickable())
        return f"Available actions: {clicks or 'search[keywords]'}"

    def text(self) -> str:
        """The page in the benchmark's text mode: its visible texts, joined by [SEP]."""
        parts = ["Instruction:", self.goal["text"]]
        product = self.shop.product(self.item) if self.item is not None else None
        if self.page == "search":
            parts = ["WebShop", *parts, "Search"]
        elif self.page == "results":
            back, *turn = self.buttons()
            parts += [back, f"Page {self.number} (Total results: {len(self.hits)})", *turn]
            for p in map(self.shop.product, self.listed()):
                parts += [p["asin"], p["name"], price_tag(p)]
        elif self.page == "item":
            parts += self.buttons()
            for option, values in product["options"].items():
                parts += [option, *values]
            parts += [
                product["name"],
                f"Price: {price_tag(product)}",
                f"Rating: {product['rating']}",
                "Description",
                "Features",
                "Reviews",
                "Attributes",
                "Buy Now",
            ]
        else:
            shown = {
                "description": [product["description"]],
                "features": product["features"] or ["No Features"],
                "reviews": ["No reviews found"],
                "attributes": [
                    *product["attributes"],
                    product["category"],
                    product["query"],
                    product["product_category"],
                ],
            }[self.page]
            parts += [*self.buttons(), *filter(None, shown)]
        return " [SEP] ".join(parts)

    # ---- expert ---------------------------------------------------------------------------------

    def expert(self, task: str) -> dict | None:
        """{"instruction", "steps": [[action, observation], ...], "reward", "by"}: search for the
        product's query and the wanted attributes ("by": "attributes"), or else for the words of the
        instruction; open the goal's product on the page that lists it, choose its options, buy.
        None if no search lists the product or the reward is below 0.8 within the step limit."""
        u, goal = self.reset(task), self.goal
        target = self.shop.product(goal["product"])
        chosen = []
        for values in target["options"].values():
            fits = {
                v: (v in goal["options"], matching_options([v], goal["options"])) for v in values
            }
            best = max(values, key=fits.get)
            chosen += [best] if fits[best][1] else []
        queries = {
            "attributes": " ".join([target["query"], *goal["attributes"]]).lower(),
            "instruction": re.sub(r", and price lower.*|[\[\]]", "", u).lower(),
        }
        for by, keywords in queries.items():
            hits = self.shop.search(keywords)
            if goal["product"] not in hits:
                continue
            actions = [
                f"search[{keywords}]",
                *["click[next >]"] * (hits.index(goal["product"]) // 10),
                *(f"click[{v}]" for v in (target["asin"].lower(), *chosen, "buy now")),
            ]
            self.reset(task)
            steps, earned = [], 0.0
            for action in actions[: self.max_steps(task)]:
                observation, earned, _, _ = self.step(action)
                steps.append([action, observation])
            if earned >= 0.8:
                return {"instruction": u, "steps": steps, "reward": earned, "by": by}
        return None

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: expert actions -> plan steps that fit other products too."""
        plan = [
            "search for the kind of product together with the attributes that the task asks for"
        ]
        if any(action == "click[next >]" for action, _ in steps):
            plan.append("click through the pages of results until a product fits all of them")
        price = " and whose price is below the limit" if "price lower" in u else ""
        plan.append(f"click the product whose title has the attributes{price}")
        chosen = sum(observation.startswith("You have clicked") for _, observation in steps)
        if chosen:
            which = (
                "the option that the task names"
                if chosen == 1
                else ("each of the options that the task names")
            )
            plan.append(f"choose {which}")
        return [*plan, "buy it"]


def price_tag(product: dict) -> str:
    return " to ".join(f"${price}" for price in product["prices"])


# ---- the benchmark's reward ---------------------------------------------------------------------


def reward(bought: dict, chosen: list[str], wanted: dict, goal: dict) -> float:
    """In [0, 1]: matched (attributes + options + price) / (attributes + options + 1), times the
    type reward. `bought` and `wanted` are products, `chosen` the options chosen for `bought`."""
    matched = (
        sum(has_attribute(bought, a) for a in goal["attributes"])
        + matching_options(chosen, goal["options"])
        + (bought["price"] <= goal["ceiling"])
    )
    possible = len(goal["attributes"]) + len(goal["options"]) + 1
    return matched / possible * type_reward(bought, wanted)


def similar(a: str, b: str) -> bool:
    return fuzz.token_set_ratio(a, b) > 85


def has_attribute(product: dict, attribute: str) -> bool:
    texts = product["name"], " ".join(product["features"]), product["description"]
    return any(similar(a, attribute) for a in product["attributes"]) or any(
        attribute in text.lower() for text in texts
    )


def matching_options(chosen: list[str], wanted: list[str]) -> int:
    """How many of the wanted options the chosen ones match."""
    chosen = [basic_colour(o) for o in chosen]
    return sum(any(similar(o, basic_colour(w)) for o in chosen) for w in wanted)


def basic_colour(option: str) -> str:
    """The first of the benchmark's colour names that `option` contains ('light heather grey' gives
    'grey'), or `option` itself."""
    return next((c for c in WORDS["colours"] if c in option), option)


def type_reward(bought: dict, wanted: dict) -> float:
    """1, 0.5, 0.1 or 0: how well the type of the product matches."""
    wanted_nouns = nouns(wanted["name"])
    shared = len(set(wanted_nouns) & set(nouns(bought["name"])))
    share = shared / len(wanted_nouns) if wanted_nouns else 0.2
    if share == 0:
        return 0.0
    if share < 0.1:
        return 0.1
    bought_categories, wanted_categories = (
        {c.strip() for c in p["product_category"].split("\u203a")} for p in (bought, wanted)
    )
    same = (
        bought["query"] == wanted["query"]
        or share > 0.2
        or len(bought_categories & wanted_categories) >= 2
    )
    return 1.0 if same else 0.5


@functools.lru_cache(4096)
def nouns(title: str) -> list[str]:
    """The nouns of a title in lower case: by spaCy where en_core_web_sm is installed, else all
    words of three or more letters that are not in `NOT_NOUNS`."""
    if HAS_SPACY_MODEL:
        return [t.text.lower() for t in tagger()(title) if t.pos_ in ("NOUN", "PROPN")]
    return [w for w in re.findall(r"[^\W\d_]{3,}", title.lower()) if w not in NOT_NOUNS]


@functools.cache
def tagger():
    import spacy  # takes 150 MB, so only where its model is used

    return spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])
