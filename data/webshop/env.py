"""WebShop's text mode (Yao et al. 2022)."""

import functools
import hashlib
import math
import re

from common import Environment, InputError, digest, interleaved, task_type

from .shop import Shop


@functools.cache
def part_of_speech_tagger():
    """spaCy's small English model, or None where it is not installed."""
    from importlib.util import find_spec

    if not find_spec("en_core_web_sm"):
        return None  # spaCy itself comes with alfworld, and takes 150 MB
    import spacy

    return spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])


class WebShop(Environment):
    """WebShop's text mode (Yao et al. 2022); all workers of a machine share one `Shop`.

    Reward in [0, 1], for what is bought: (attributes + options + price that are right) / (attributes + options + 1),
    times how far it is the right type of product. Success: reward 1."""

    MAX_STEPS, FAILED = {"goal": 15}, ("That is not possible here",)
    VERBS = set("search click choose check compare find look read open select repeat go buy".split())
    SPLITS = {"train": (1500, 1624), "seen": (0, 200)}  # first goal, number of goals (paper appendix A); there is no unseen test
    PAGES = ("description", "features", "reviews", "attributes")

    def __init__(self, sessions: int = 8):
        self.shop = Shop.open()

    @classmethod
    def prepare(cls) -> None:
        """Build the index where there is none, with a bar, before workers start and wait for it."""
        Shop.open()

    @classmethod
    def version(cls) -> str:
        """A digest of the goals, the lengths of the products' lines, and how nouns are found."""
        from importlib.util import find_spec

        shop = Shop.open()
        return digest(*(hashlib.sha256(a.tobytes()).hexdigest() for a in (shop.goals, shop.offsets)), bool(find_spec("en_core_web_sm")))

    # -- the protocol ------------------------------------------------------------------------------

    def columns(self, split: str) -> list[list[str]]:
        """The one type's tasks 'goal/NUMBER', numbered in the benchmark's order, which is shuffled: test are the first 200
        goals, train the first 1,624 from goal 1,500 on. A catalogue with fewer goals than that gives the goals of a
        quarter of its products to the test, those of the others to train; each product's first goals come first."""
        first, count = self.SPLITS[split]
        if len(self.shop.goals) >= sum(self.SPLITS["train"]):
            return [[f"goal/{i}" for i in range(first, first + count)]]
        by_product: dict[int, list[int]] = {}
        for i, product in enumerate(self.shop.goals["product"].tolist()):
            by_product.setdefault(product, []).append(i)
        quarter = len(by_product) // 4
        goals = list(by_product.values())
        return [[f"goal/{i}" for i in interleaved(goals[:quarter] if split == "seen" else goals[quarter:])[:count]]]

    @classmethod
    def check(cls, task: str) -> None:
        number = task.rsplit("/", 1)[-1]
        if task_type(task) not in cls.MAX_STEPS or not number.isdigit() or int(number) >= len(Shop.open().goals):
            raise InputError(f"unknown WebShop task {task!r}: it must be goal/NUMBER with NUMBER below {len(Shop.open().goals)}")

    def reset(self, task: str) -> str:
        """Start `task` at the search page; the instruction u."""
        self.check(task)
        self.goal = self.shop.goal(int(task.rsplit("/", 1)[1]))
        self.show("search")
        self.hits, self.keywords, self.number = [], "", 1
        return self.goal["text"]

    def show(self, page: str, product: int | None = None) -> None:
        self.page, self.item, self.options = page, product, {}

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success)."""
        match = re.fullmatch(r"(search|click)\s*\[(.*)\]", action.strip(), re.I | re.S)
        verb, what = (match[1].lower(), " ".join(match[2].lower().split())) if match else ("", "")
        told = ""
        if verb == "search" and what and self.page == "search":
            self.hits, self.keywords, self.number = self.shop.search(what), what, 1
            self.show("results")
        elif verb != "click" or what not in self.clickable():
            return f"That is not possible here, nothing happens.\n{self.available()}", 0.0, False, False
        elif what == "buy now":
            reward = self.reward()
            return f"You have bought {self.shop.product(self.item)['asin']}.", reward, True, reward == 1.0
        elif what == "back to search":
            self.show("search")
        elif what in ("next >", "< prev") and self.page == "results":
            self.number += 1 if what == "next >" else -1
        elif what == "< prev":
            if self.page == "item":
                self.show("results")
            else:
                self.page = "item"
        elif self.page == "results":
            self.show("item", next(i for i in self.listed() if self.shop.product(i)["asin"].lower() == what))
        elif what in self.PAGES:
            self.page = what
        else:
            name = [k for k, values in self.shop.product(self.item)["options"].items() if what in values][-1]
            self.options[name] = what
            told = f"You have clicked {what}.\n"
        return f"{told}{self.available()}\n{self.text()}", 0.0, False, False

    def listed(self) -> list[int]:
        """The products on this page of the results, 10 a page."""
        return self.hits[10 * self.number - 10 : 10 * self.number]

    def buttons(self) -> list[str]:
        """The buttons that lead away from this page, which is not the search page."""
        results = self.page == "results"
        return ["Back to Search", *["< Prev"] * (not results or self.number > 1),
                *["Next >"] * (results and 10 * self.number < len(self.hits))]

    def clickable(self) -> list[str]:
        """What can be clicked on this page, in lower case."""
        if self.page == "search":
            return []
        buttons = [b.lower() for b in self.buttons()]
        if self.page == "results":
            return [*buttons, *(self.shop.product(i)["asin"].lower() for i in self.listed())]
        if self.page in self.PAGES:
            return buttons
        options = [v for values in self.shop.product(self.item)["options"].values() for v in values]
        return list(dict.fromkeys([*buttons, *options, *self.PAGES, "buy now"]))

    def available(self) -> str:
        return "Available actions: " + (", ".join(f"click[{c}]" for c in self.clickable()) or "search[keywords]")

    def text(self) -> str:
        """The page in the benchmark's text mode: its visible texts with [SEP] between them."""
        parts = ["Instruction:", self.goal["text"]]
        product = self.shop.product(self.item) if self.item is not None else None
        if self.page == "search":
            parts = ["WebShop", *parts, "Search"]
        elif self.page == "results":
            back, *turn = self.buttons()
            parts += [back, f"Page {self.number} (Total results: {len(self.hits)})", *turn]
            for p in map(self.shop.product, self.listed()):
                parts += [p["asin"], p["name"], self.price_tag(p)]
        elif self.page == "item":
            parts += self.buttons()
            for option, values in product["options"].items():
                parts += [option, *values]
            parts += [product["name"], f"Price: {self.price_tag(product)}", f"Rating: {product['rating']}", "Description", "Features",
                      "Reviews", "Attributes", "Buy Now"]
        else:
            shown = {"description": [product["description"]], "features": product["features"] or ["No Features"],
                     "reviews": ["No reviews found"],
                     "attributes": [*product["attributes"], product["category"], product["query"], product["product_category"]]}
            parts += [*self.buttons(), *filter(None, shown[self.page])]
        return " [SEP] ".join(parts)

    @staticmethod
    def price_tag(product: dict) -> str:
        return " to ".join(f"${p}" for p in product["prices"])

    # -- reward ------------------------------------------------------------------------------------

    def reward(self) -> float:
        """The benchmark's reward for buying the product of this page with the options chosen."""
        bought, wanted, goal = self.shop.product(self.item), self.shop.product(self.goal["product"]), self.goal
        right = (sum(self.has_attribute(bought, a) for a in goal["attributes"])
                 + self.matching_options(list(self.options.values()), goal["options"]) + (bought["price"] <= goal["ceiling"]))
        return right / (len(goal["attributes"]) + len(goal["options"]) + 1) * self.type_reward(bought, wanted)

    @staticmethod
    def has_attribute(product: dict, attribute: str) -> bool:
        from thefuzz import fuzz

        return any(fuzz.token_set_ratio(a, attribute) > 85 for a in product["attributes"]) or any(
            attribute in text.lower() for text in (product["name"], " ".join(product["features"]), product["description"]))

    @classmethod
    def matching_options(cls, chosen: list[str], wanted: list[str]) -> int:
        """How many of the wanted options are among the chosen ones."""
        from thefuzz import fuzz

        chosen = [cls.basic_colour(o) for o in chosen]
        return sum(any(fuzz.token_set_ratio(o, cls.basic_colour(w)) > 85 for o in chosen) for w in wanted)

    @classmethod
    def basic_colour(cls, option: str) -> str:
        """An option that holds a colour's name by the first of `COLOURS` in it, 'light heather grey' as 'grey'; others as they are."""
        return next((c for c in cls.COLOURS if c in option), option)

    # the benchmark's names, in its order
    COLOURS = ("alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo caramel "
               "champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal dark denim "
               "eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki "
               "lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard "
               "natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell silver "
               "skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine yellow").split()

    @classmethod
    def type_reward(cls, bought: dict, wanted: dict) -> float:
        """How far what was bought is the right type of product: 1, 0.5, 0.1 or 0."""
        nouns = cls.nouns(wanted["name"])
        share = len(set(nouns) & set(cls.nouns(bought["name"]))) / len(nouns) if nouns else 0.2
        if share == 0:
            return 0.0
        if share < 0.1:
            return 0.1

        def categories(product):
            return {c.strip() for c in product["product_category"].split("\u203a")}

        same = bought["query"] == wanted["query"] or len(categories(bought) & categories(wanted)) >= 2 or share > 0.2
        return 1.0 if same else 0.5

    @staticmethod
    @functools.lru_cache(4096)
    def nouns(title: str) -> list[str]:
        """The nouns of a title, in lower case: by spaCy where en_core_web_sm is installed, else all words of three
        letters and more but the most common words that are none."""
        if tagger := part_of_speech_tagger():
            return [t.text.lower() for t in tagger(title) if t.pos_ in ("NOUN", "PROPN")]
        return [w for w in re.findall(r"[^\W\d_]{3,}", title.lower()) if w not in WebShop.NO_NOUNS]

    NO_NOUNS = set("the and for with from this that these those your our their its are was has have not all any each every more most other "
                   "some such than too very can will just only own same both into over under out off per via non new great good best "
                   "perfect small medium large big long short high low soft hard light dark heavy easy fast free full easily made "
                   "adjustable portable comfortable durable elegant casual vintage modern classic natural organic pure fresh white "
                   "black red blue green pink grey gray brown yellow purple orange".split())

    # -- the expert --------------------------------------------------------------------------------

    def expert(self, task: str) -> dict | None:
        """{"instruction", "steps": [[action, observation], ...], "reward", "by"}: search the product's kind and the wanted
        attributes (or else the instruction's own words), open the goal's product on whichever page lists it, choose the
        options, buy. None where no search lists it, where it earns less than 0.8, or it takes too many steps."""
        u = self.reset(task)
        target, goal = self.shop.product(self.goal["product"]), self.goal
        for by, keywords in (("attributes", " ".join([target["query"], *goal["attributes"]])),
                             ("instruction", re.sub(r", and price lower.*|[\[\]]", "", u))):
            self.reset(task)
            hits = self.shop.search(keywords.lower())
            if goal["product"] not in hits:
                continue
            fits = {v: (v in goal["options"], self.matching_options([v], goal["options"]))
                    for values in target["options"].values() for v in values}
            best = [max(values, key=fits.get) for values in target["options"].values()]
            chosen = [v for v in best if fits[v][1]]
            actions = [f"search[{keywords.lower()}]", *["click[next >]"] * (hits.index(goal["product"]) // 10),
                       f"click[{target['asin'].lower()}]", *(f"click[{v}]" for v in chosen), "click[buy now]"]
            steps, reward = [], 0.0
            for action in actions[: self.max_steps(task)]:
                observation, reward, done, _ = self.step(action)
                steps.append([action, observation])
            if reward >= 0.8:
                return {"instruction": u, "steps": steps, "reward": reward, "by": by}
        return None

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: expert actions -> plan steps, without what holds for this one product only."""
        actions = [a for a, _ in steps]
        chosen = [o.split("\n")[0] for _, o in steps if o.startswith("You have clicked")]
        plan = ["search for the kind of product together with the attributes that the task asks for"]
        if "click[next >]" in actions:
            plan.append("click through the pages of results until a product fits all of them")
        price = " and whose price is below the limit" if "price lower" in u else ""
        plan.append(f"click the product whose title has the attributes{price}")
        if chosen:
            plan.append("choose the option that the task names" if len(chosen) == 1 else "choose each of the options that the task names")
        return [*plan, "buy it"]
