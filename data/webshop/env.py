"""WebShop's text mode (Yao et al. 2022): search, result pages, product pages, and the reward."""

import functools
import hashlib
import re
from importlib.util import find_spec

from thefuzz import fuzz

from common import Environment, InputError, fingerprint, interleaved, task_type

from .shop import WORDS, open_shop

NOT_NOUNS = set(WORDS["not_nouns"])
HAS_SPACY_MODEL = find_spec("en_core_web_sm") is not None


class WebShop(Environment):
    """One session; all sessions of a process share one `Shop`.

    The reward is in [0, 1] and comes with the purchase; success is a reward of 1."""

    MAX_STEPS = {"goal": 10}
    FAILED = ("That is not possible here",)
    VERBS = {
        "search", "click", "choose", "check", "compare", "find", "look", "read", "open", "select",
        "repeat", "go", "buy",
    }  # fmt: skip
    # first goal, number of goals (paper, appendix A); the paper has no unseen split
    SPLITS = {"train": (1500, 1624), "seen": (0, 200)}
    VARIABLES = ("WEBSHOP_DATA", "WEBSHOP_GOALS", "XDG_CACHE_HOME")
    SECONDS = {"expert": 0.002, "reset": 0.00015, "step": 0.0025}  # step: of 1,180,000 products
    SUBPAGES = ("description", "features", "reviews")

    def __init__(self, sessions: int = 8):
        self.shop = open_shop()

    @classmethod
    def prepare(cls) -> None:
        """Build the index in this process, with a progress bar, before workers start."""
        open_shop()

    @classmethod
    def version(cls) -> str:
        """A fingerprint of the goals, the lengths of the stored products, and how nouns are
        found."""
        shop = open_shop()
        goals = hashlib.sha256(shop.goals.tobytes()).hexdigest()
        offsets = hashlib.sha256(shop.offsets.tobytes()).hexdigest()
        return fingerprint(goals, offsets, HAS_SPACY_MODEL)

    @classmethod
    def note(cls) -> str:
        if HAS_SPACY_MODEL:
            return ""
        return "Nouns of titles were found without spaCy's tagger, which is not installed."

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
        products = list(by_product.values())
        quarter = len(products) // 4
        chosen = products[:quarter] if split == "seen" else products[quarter:]
        return [[f"goal/{i}" for i in interleaved(chosen)[:count]]]

    @classmethod
    def check(cls, task: str) -> None:
        number = task.rsplit("/", 1)[-1]
        count = len(open_shop().goals)
        if task_type(task) not in cls.MAX_STEPS or not number.isdecimal() or int(number) >= count:
            raise InputError(
                f"unknown WebShop task {task!r}: it must be goal/NUMBER with NUMBER below {count}"
            )

    # ---- episode --------------------------------------------------------------------------------

    def reset(self, task: str) -> str:
        """Start `task` at the search page. Returns the instruction u."""
        self.check(task)
        self.goal = self.shop.goal(int(task.rsplit("/", 1)[1]))
        self.hits = []  # the products that the last search found
        self.results_page = 1  # the number of the page of results
        self.show("search")
        return self.goal["text"]

    def show(self, page: str, item: int | None = None) -> None:
        """Go to the page "search", "results" or "item", with no option chosen."""
        self.page = page
        self.item = item
        self.options = {}

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward, done, success). An invalid action leaves the page unchanged and
        returns an error message with the available actions."""
        match = re.fullmatch(r"(search|click)\s*\[(.*)\]", action.strip(), re.I | re.S)
        verb, value = match.groups() if match else ("", "")
        verb = verb.lower()
        value = " ".join(value.lower().split())
        confirmation = ""
        if verb == "search" and value:
            self.hits = self.shop.search(value)
            self.results_page = 1
            self.show("results")
        elif verb != "click" or value not in self.clickable():
            error = "That is not possible here, nothing happens."
            return f"{error}\n{self.available()}", 0.0, False, False
        elif value == "buy now":
            return self._buy()
        else:
            confirmation = self._click(value)
        return f"{confirmation}{self.available()}\n{self.text()}", 0.0, False, False

    def _buy(self) -> tuple[str, float, bool, bool]:
        bought = self.shop.product(self.item)
        goal_product = self.shop.product(self.goal["product"])
        earned = reward(bought, list(self.options.values()), goal_product, self.goal)
        return f"You have bought {bought['asin']}.", earned, True, earned == 1.0

    def _click(self, value: str) -> str:
        """Go to another page or choose an option; returns what confirms the choice, or ""."""
        if value == "back to search":
            self.show("search")
        elif self.page == "results":
            self._click_in_results(value)
        elif self.page == "item":
            return self._click_in_item(value)
        else:  # a subpage, whose only other button is "< prev"
            self.page = "item"
        return ""

    def _click_in_results(self, value: str) -> None:
        if value == "next >":
            self.results_page += 1
        elif value == "< prev":
            self.results_page -= 1
        else:
            self.show("item", next(i for i in self.listed() if self.code(i) == value))

    def _click_in_item(self, value: str) -> str:
        if value == "< prev":
            self.show("results")
            return ""
        if value in self.SUBPAGES:
            self.page = value
            return ""
        options = self.shop.product(self.item)["options"]
        names = [name for name, values in options.items() if value in values]
        self.options[names[-1]] = value
        return f"You have clicked {value}.\n"

    def listed(self) -> list[int]:
        """The products on this page of results, ten per page."""
        return self.hits[10 * self.results_page - 10 : 10 * self.results_page]

    def code(self, product: int) -> str:
        return self.shop.product(product)["asin"].lower()

    def buttons(self) -> list[str]:
        """The navigation buttons of a page other than the search page."""
        buttons = ["Back to Search"]
        if self.page != "results" or self.results_page > 1:
            buttons.append("< Prev")
        if self.page == "results" and 10 * self.results_page < len(self.hits):
            buttons.append("Next >")
        return buttons

    def clickable(self) -> list[str]:
        """The values that can be clicked on this page, in lower case."""
        if self.page == "search":
            return []
        values = [button.lower() for button in self.buttons()]
        if self.page == "results":
            values += [self.code(product) for product in self.listed()]
        elif self.page == "item":
            for choices in self.shop.product(self.item)["options"].values():
                values += choices
            values += [*self.SUBPAGES, "buy now"]
            values = list(dict.fromkeys(values))
        return values

    def available(self) -> str:
        """The actions of this page. A search is possible on every page, as in the benchmark."""
        actions = ["search[keywords]"]
        actions += [f"click[{value}]" for value in self.clickable()]
        return f"Available actions: {', '.join(actions)}"

    def text(self) -> str:
        """The page in the benchmark's text mode: its visible texts, joined by [SEP]."""
        instruction = ["Instruction:", self.goal["text"]]
        if self.page == "search":
            parts = ["WebShop", *instruction, "Search"]
        elif self.page == "results":
            parts = instruction + self._results()
        elif self.page == "item":
            parts = instruction + self.buttons() + self._item()
        else:
            parts = instruction + self.buttons() + self._subpage()
        return " [SEP] ".join(parts)

    def _results(self) -> list[str]:
        back, *turn = self.buttons()
        parts = [back, f"Page {self.results_page} (Total results: {len(self.hits)})", *turn]
        for i in self.listed():
            product = self.shop.product(i)
            parts += [product["asin"], product["name"], price_tag(product)]
        return parts

    def _item(self) -> list[str]:
        product = self.shop.product(self.item)
        parts = []
        for option, values in product["options"].items():
            parts += [option, *values]
        parts += [
            product["name"],
            f"Price: {price_tag(product)}",
            "Rating: N.A.",  # as in the benchmark, if it has no file of reviews
        ]
        return [*parts, "Description", "Features", "Reviews", "Buy Now"]

    def _subpage(self) -> list[str]:
        product = self.shop.product(self.item)
        if self.page == "description":
            parts = [product["description"]]
        elif self.page == "features":
            parts = product["features"] or ["No Features"]
        else:
            parts = ["No reviews found"]
        return [part for part in parts if part]

    # ---- expert ---------------------------------------------------------------------------------

    def expert(self, task: str) -> dict | None:
        """{"instruction", "steps": [[action, observation], ...], "reward", "by"}: search for the
        product's query and the goal's attributes ("by": "attributes"), or else for the words of the
        instruction; open the goal's product on the page that lists it, choose its options, buy.
        None if no search lists the product or the reward is below 0.8 within the step limit."""
        u = self.reset(task)
        goal_product = self.shop.product(self.goal["product"])
        searches = {
            "attributes": " ".join([goal_product["query"], *self.goal["attributes"]]).lower(),
            "instruction": re.sub(r", and price lower.*|[\[\]]", "", u).lower(),
        }
        for by, keywords in searches.items():
            actions = self._purchase(keywords)
            if actions is None:
                continue
            self.reset(task)
            steps = []
            earned = 0.0
            for action in actions[: self.max_steps(task)]:
                observation, earned, _, _ = self.step(action)
                steps.append([action, observation])
            if earned >= 0.8:
                return {"instruction": u, "steps": steps, "reward": earned, "by": by}
        return None

    def _purchase(self, keywords: str) -> list[str] | None:
        """The actions that buy the goal's product by a search, or None if that does not list it."""
        hits = self.shop.search(keywords)
        if self.goal["product"] not in hits:
            return None
        pages = hits.index(self.goal["product"]) // 10
        product = self.shop.product(self.goal["product"])
        actions = [f"search[{keywords}]"]
        actions += ["click[next >]"] * pages
        actions.append(f"click[{product['asin'].lower()}]")
        for value in matching_values(product["options"], self.goal["options"]):
            actions.append(f"click[{value}]")
        actions.append("click[buy now]")
        return actions

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
        chosen = [o for _, o in steps if o.startswith("You have clicked")]
        if len(chosen) == 1:
            plan.append("choose the option that the task names")
        elif chosen:
            plan.append("choose each of the options that the task names")
        plan.append("buy it")
        return plan


def price_tag(product: dict) -> str:
    return " to ".join(f"${price}" for price in product["prices"])


def matching_values(options: dict[str, list[str]], wanted: list[str]) -> list[str]:
    """Of each option of a product the value that matches one of the `wanted` values, if any does;
    equal texts come before similar ones."""
    found = []
    for values in options.values():
        best = max(values, key=lambda value: (value in wanted, matching_options([value], wanted)))
        if matching_options([best], wanted):
            found.append(best)
    return found


# ---- the benchmark's reward ---------------------------------------------------------------------


def reward(bought: dict, chosen: list[str], goal_product: dict, goal: dict) -> float:
    """In [0, 1]: matched (attributes + options + price) / (attributes + options + 1), times the
    type reward. `bought` and `goal_product` are products, `chosen` the options of `bought`."""
    matched = matching_options(chosen, goal["options"])
    for attribute in goal["attributes"]:
        if has_attribute(bought, attribute):
            matched += 1
    if bought["price"] <= goal["ceiling"]:
        matched += 1
    possible = len(goal["attributes"]) + len(goal["options"]) + 1
    return matched / possible * type_reward(bought, goal_product)


def similar(a: str, b: str) -> bool:
    return fuzz.token_set_ratio(a, b) > 85


def has_attribute(product: dict, attribute: str) -> bool:
    if any(similar(known, attribute) for known in product["attributes"]):
        return True
    texts = [product["name"], " ".join(product["features"]), product["description"]]
    return any(attribute in text.lower() for text in texts)


def matching_options(chosen: list[str], wanted: list[str]) -> int:
    """How many of the wanted options the chosen ones match."""
    colours = [basic_colour(option) for option in chosen]
    matching = 0
    for option in wanted:
        wanted_colour = basic_colour(option)
        if any(similar(colour, wanted_colour) for colour in colours):
            matching += 1
    return matching


def basic_colour(option: str) -> str:
    """The first of the benchmark's colour names that `option` contains ('light heather grey' gives
    'grey'), or `option` itself."""
    for colour in WORDS["colours"]:
        if colour in option:
            return colour
    return option


def type_reward(bought: dict, goal_product: dict) -> float:
    """1, 0.5, 0.1 or 0: how well the type of the product matches."""
    goal_nouns = nouns(goal_product["name"])
    shared = len(set(goal_nouns) & set(nouns(bought["name"])))
    share = shared / len(goal_nouns) if goal_nouns else 0.2
    if share == 0:
        return 0.0
    if share < 0.1:
        return 0.1
    same = (
        bought["query"] == goal_product["query"]
        or share > 0.2
        or len(categories(bought) & categories(goal_product)) >= 2
    )
    return 1.0 if same else 0.5


def categories(product: dict) -> set[str]:
    return {category.strip() for category in product["product_category"].split("\u203a")}


@functools.lru_cache(4096)
def nouns(title: str) -> list[str]:
    """The nouns of a title in lower case: by spaCy where en_core_web_sm is installed, else all
    words of three or more letters that are not in `NOT_NOUNS`."""
    if HAS_SPACY_MODEL:
        return [token.text.lower() for token in tagger()(title) if token.pos_ in ("NOUN", "PROPN")]
    words = re.findall(r"[^\W\d_]{3,}", title.lower())
    return [word for word in words if word not in NOT_NOUNS]


@functools.cache
def tagger():
    import spacy  # takes 150 MB, so only where its model is used

    return spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])
