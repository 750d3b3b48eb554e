"""WebShop: the reward rule by rule, pages and search."""

import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_examples import examples_of, turns

import common

pytest.importorskip("bm25s")
WebShop = common.environment("webshop")
ENV = sys.modules["data.webshop.env"]
SHOP = sys.modules["data.webshop.shop"]
SHARED = ROOT.parent / "shared" / "webshop"  # 100 of the benchmark's products
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no WebShop products in {SHARED}")


def product(asin: str, name: str, **fields) -> dict:
    """A product in the benchmark's raw format."""
    return {
        "asin": asin,
        "name": name,
        "full_description": "",
        "pricing": "$20.0",
        "images": ["x.jpg"],
        "product_category": "A › B › C",
        "average_rating": "",
        "small_description": [],
        "customization_options": "",
        "category": "garden",
        "query": "desks",
        **fields,
    }


def options(**values) -> dict:
    """Options of a product: options(Color=["Red", "Blue"])."""
    found = {}
    for name, choices in values.items():
        found[name] = [{"value": value, "image": None} for value in choices]
    return found


def goal(text: str, *attributes: str, **fields) -> dict:
    return {"instruction": text, "instruction_attributes": list(attributes), **fields}


DESK, TABLE, CUSHION = "B000000001", "B000000002", "B000000003"
DESK_OPTIONS = options(Color=["Dark Oak", "White / Grey"], Size=["40 inch", "60 inch"])
PRODUCTS = [
    product(
        DESK,
        "Oak Writing Desk",
        small_description=["Solid wood", "Easy assembly"],
        full_description="For the home office.",
        customization_options=DESK_OPTIONS,
    ),
    product(
        TABLE, "Folding Table", query="tables", product_category="A › X", pricing="$5.0 to $35.0"
    ),
    product(
        CUSHION, "Garden Chair Cushion", query="cushions", product_category="Q › R", pricing=""
    ),
]
for i in range(25):
    shelf = {"query": "shelves", "product_category": "S › T"}
    PRODUCTS.append(product(f"B0000001{i:02}", f"Pine Shelf number{i}", **shelf))
ATTRIBUTES = {
    DESK: goal(
        "Find me a desk of solid wood.", "solid wood", attributes=["solid wood", "easy assemble"]
    ),
    TABLE: goal("Find me a table", "steel frame", attributes=["steel frame"]),
    CUSHION: {"attributes": []},
}


def use(folder, monkeypatch, products=PRODUCTS, attributes=ATTRIBUTES, human=None) -> WebShop:
    """A session in a shop built from these contents (None: no such file) of the data files."""
    folder.mkdir(exist_ok=True)
    contents = {
        "items_shuffle.json": products,
        "items_ins_v2.json": attributes,
        "items_human_ins.json": human,
    }
    for name, value in contents.items():
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return use_data(folder, folder / "cache", monkeypatch)


def use_data(folder, cache, monkeypatch) -> WebShop:
    monkeypatch.setenv("WEBSHOP_DATA", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    ENV.open_shop.cache_clear()
    return WebShop()


@pytest.fixture(autouse=True)
def no_cached_shop(monkeypatch):
    monkeypatch.delenv("WEBSHOP_GOALS", raising=False)
    yield
    ENV.open_shop.cache_clear()


@pytest.fixture
def env(tmp_path, monkeypatch) -> WebShop:
    return use(tmp_path / "data", monkeypatch)


def begin(env: WebShop, asin: str, **changes) -> str:
    """Start the first goal of a product, changed as given."""
    for number in range(len(env.shop.goals)):
        if env.shop.product(env.shop.goal(number)["product"])["asin"] == asin:
            u = env.reset(f"goal/{number}")
            env.goal.update(changes)
            return u
    raise ValueError(asin)


# ---- the reward ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, chosen, expected",
    [
        ({}, [], 1),
        ({"options": ["dark oak", "40 inch"]}, ["dark oak", "40 INCH"], 1),
        # one of two attributes, the price
        ({"attributes": ["solid wood", "led light"]}, [], 2 / 3),
        ({"attributes": ["easy assembly"]}, [], 1),  # similar to "easy assemble"
        ({"attributes": ["home office"]}, [], 1),  # in the description
        ({"attributes": ["oak writing"]}, [], 1),  # in the title, whatever its capitals
        ({"attributes": ["bamboo"]}, [], 1 / 2),
        ({"ceiling": 10.0}, [], 1 / 2),  # the price is 20
        ({"ceiling": 20.0}, [], 1),
        ({"options": ["dark oak", "40 inch"]}, ["dark oak"], 3 / 4),
        # the last choice of an option counts
        ({"options": ["dark oak", "40 inch"]}, ["dark oak", "60 inch", "40 inch"], 1),
        # "60 inch" is similar to "40 inch"
        ({"options": ["dark oak", "40 inch"]}, ["white | grey", "60 inch"], 3 / 4),
        ({"options": ["light grey"]}, ["white | grey"], 1),  # both are some grey
        ({"options": ["heather walnut"]}, ["white | grey"], 2 / 3),
        ({"options": ["snow white"]}, ["white | grey"], 2 / 3),  # "grey" comes first
        ({"options": ["slategrey"]}, ["white | grey"], 1),  # a colour inside a word
        ({"options": ["dark heather walnut"]}, ["dark oak"], 1),  # "dark" is one of the colours
    ],
)
def test_reward_rule_by_rule(env, change, chosen, expected):
    begin(env, DESK, **{"options": [], **change})
    env.step("search[oak desk]")
    for value in (DESK, *chosen, "Buy Now"):
        observation, reward, done, success = env.step(f"click[{value}]")
        assert not env.failed(observation), observation
    assert reward == pytest.approx(expected)
    assert done and success == (reward == 1.0) and observation == f"You have bought {DESK}."


SIX = "Pine Desk Chair Table Lamp Shelf"
OTHER = {"query": "q2", "product_category": "Z"}


@pytest.mark.parametrize(
    "bought, wanted, expected",
    [
        ({}, "Oak Desk", 1.0),
        (OTHER, SIX, 0.5),  # 1 of 6 nouns, not above 0.2
        (OTHER, "Pine Desk Chair Table", 1.0),  # 1 of 4 nouns
        ({"product_category": "Z"}, SIX, 1.0),  # the same query
        ({"query": "q2"}, SIX, 1.0),  # two categories in common
        ({"query": "q2", "product_category": "B › Z"}, SIX, 0.5),  # one category
        ({}, "Desk " + " ".join(c * 4 for c in "abcdefghijk"), 0.1),  # 1 of 12 nouns
        ({}, "Garden Cushion", 0.0),
        (OTHER, "12 x 4", 0.5),  # no noun: a share of 0.2
    ],
)
def test_type_reward(bought, wanted, expected, monkeypatch):
    monkeypatch.setattr(ENV, "HAS_SPACY_MODEL", False)
    ENV.nouns.cache_clear()
    base = {"name": "Oak Desk", "query": "q", "product_category": "A › B"}
    assert ENV.type_reward(base | bought, base | {"name": wanted}) == expected


def test_nouns_are_spacys_if_its_model_is_installed(monkeypatch):
    tags = {"Oak": "PROPN", "folds": "VERB", "desk": "NOUN"}
    monkeypatch.setattr(ENV, "HAS_SPACY_MODEL", True)

    def tag(title):
        return [SimpleNamespace(text=word, pos_=tags[word]) for word in title.split()]

    monkeypatch.setattr(ENV, "tagger", lambda: tag)
    ENV.nouns.cache_clear()
    assert ENV.nouns("Oak folds desk") == ["oak", "desk"]
    ENV.nouns.cache_clear()


def test_rewards_are_in_range_and_the_goal_itself_earns_1(tmp_path, monkeypatch):
    """Random catalogues: every purchase earns 0 to 1, the goal's product with its options 1."""
    draw = random.Random(0)
    nouns = ["oak", "pine", "desk", "lamp", "shelf", "table", "chair", "rug", "steel", "glass"]

    def some(n):
        return " ".join(draw.sample(nouns, n))

    products = []
    for i in range(40):
        colours = draw.sample([f"red {i}", f"blue {i}", "snow", "black and white"], 2)
        fields = {
            "query": some(1),
            "small_description": [some(4)],
            "pricing": f"${draw.randint(1, 1200)}.0",
            "customization_options": options(color=colours, size=["s", "m"][: draw.randint(1, 2)]),
        }
        products.append(product(f"B{i:09}", some(5), **fields))
    attributes = {}
    for p in products:
        known = [some(2), some(1)]
        wanted = known[: draw.randint(1, 2)]
        attributes[p["asin"]] = goal("Find it.", *wanted, attributes=known)
    env = use(tmp_path / "data", monkeypatch, products, attributes)
    for i in range(len(env.shop.goals)):
        g = env.shop.goal(i)
        wanted = env.shop.product(g["product"])
        assert wanted["price"] <= g["ceiling"]
        assert ENV.reward(wanted, g["options"], wanted, g) == 1.0
        for _ in range(10):
            bought = env.shop.product(draw.randrange(len(products)))
            chosen = [draw.choice(v) for v in bought["options"].values() if draw.random() < 0.7]
            assert 0.0 <= ENV.reward(bought, chosen, wanted, g) <= 1.0


# ---- pages and search ---------------------------------------------------------------------------


def test_pages(env):
    u = begin(env, DESK)
    assert u.startswith("Find me a desk of solid wood with color: ")
    assert ", and price lower than " in u and u.endswith("0.00 dollars")
    assert env.available() == "Available actions: search[keywords]"
    text = env.step("Search[ Pine  shelf ]")[0]
    available, page = text.split("\n")
    assert available.startswith(
        "Available actions: search[keywords], click[back to search], click[next >], click[b0000001"
    )
    assert page.startswith(
        f"Instruction: [SEP] {u} [SEP] Back to Search [SEP] Page 1 "
        "(Total results: 25) [SEP] Next > [SEP] B0000001"
    )
    assert text.count("$20.0") == 10 and "< Prev" not in text
    second = env.step("click[Next >]")[0]
    assert "Page 2" in second and "< Prev [SEP] Next >" in second
    assert "Next >" not in env.step("click[next >]")[0]
    assert env.step("click[< prev]")[0] == second
    env.step("click[back to search]")
    env.step("search[oak desk]")
    item = env.step("click[b000000001]")[0]
    assert (
        "color [SEP] dark oak [SEP] white | grey [SEP] size [SEP] 40 inch [SEP] 60 inch [SEP] "
        "Oak Writing Desk [SEP] Price: $20.0 [SEP] Rating: N.A. [SEP] Description [SEP] "
        "Features [SEP] Reviews [SEP] Buy Now"
    ) in item
    assert "click[white | grey]" in item
    assert env.step("click[60 inch]")[0].startswith("You have clicked 60 inch.\n")
    for page, shown in (
        ("description", "For the home office."),
        ("reviews", "No reviews found"),
        ("features", "Solid wood [SEP] Easy assembly"),
    ):
        assert shown in env.step(f"click[{page}]")[0]
        assert env.step("click[< Prev]")[0] == item
        assert env.options == {"size": "60 inch"}, "a chosen option stays chosen"
    env.step("click[< prev]")
    assert env.page == "results" and not env.options


def test_a_search_is_possible_on_every_page(env):
    """It forgets the product and the options that were chosen, as a new search in a shop does."""
    for before in (
        [],
        ["search[pine shelf]", "click[next >]"],
        ["search[oak desk]", "click[b000000001]", "click[60 inch]"],
        ["search[oak desk]", "click[b000000001]", "click[reviews]"],
    ):
        begin(env, DESK)
        said = env.available()
        for action in before:
            said = env.step(action)[0]
        assert "Available actions: search[keywords]" in said
        observation, reward, done, _ = env.step("search[folding table]")
        assert "Page 1 (Total results: 1)" in observation and TABLE in observation
        assert (env.page, env.item, env.options, reward, done) == ("results", None, {}, 0.0, False)


def test_no_page_shows_the_labels_that_the_reward_matches(env):
    """The benchmark has a page of them, which its text mode does not offer."""
    begin(env, DESK)
    env.step("search[oak desk]")
    said = [env.step("click[b000000001]")[0]]
    assert env.failed(env.step("click[attributes]")[0]) and env.page == "item"
    for page in WebShop.SUBPAGES:
        said += [env.step(f"click[{page}]")[0], env.step("click[< prev]")[0]]
    for text in said:
        assert "ttributes" not in text and "easy assemble" not in text


def test_invalid_actions_leave_the_page_unchanged(env):
    begin(env, DESK)
    empty = ["", "[", "search", "search[]", "search[ ]", "click[]"]
    elsewhere = ["click[buy now]", "buy", "click[b000000001]", "click[search]", "click[\u2603]"]
    for action in [*empty, *elsewhere, "think[desk]"]:
        before = (env.page, env.item, env.hits)
        observation, reward, done, success = env.step(action)
        assert env.failed(observation) and "search[keywords]" in observation
        assert (reward, done, success) == (0.0, False, False)
        assert (env.page, env.item, env.hits) == before


def test_search_ranks_by_bm25(env):
    """Lucene's BM25 with k1 0.9 and b 0.4 over title, description, first feature and options."""
    shop, stem = env.shop, SHOP.STEMMER.stemWord
    assert shop.search("solid wooden DESKS for the oak") == [0], "stems match, stop words do not"
    texts = [
        "oak writing desk home office solid wood color dark oak white grey size 40 inch 60 inch"
    ]
    for p in PRODUCTS[1:]:
        texts.append(f"{p['name']} {p['full_description']}".lower())
    stems = []
    for text in texts:
        stems.append([stem(word) for word in text.split()])
    mean = common.mean(map(len, stems))

    def score(words):
        total = 0.0
        for q in ("tabl", "fold", "number3", "pine"):
            df = sum(q in s for s in stems)
            tf = words.count(q)
            idf = math.log(1 + (len(stems) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 0.9 * (0.6 + 0.4 * len(words) / mean))
        return total

    scores = list(map(score, stems))
    best = sorted((i for i in range(len(stems)) if scores[i]), key=lambda i: (-scores[i], i))
    assert shop.search("tables fold number3 pine") == best and len(best) == 26
    begin(env, DESK)
    assert shop.search("zzzz") == [] and "Total results: 0" in env.step("search[zzzz]")[0]


def test_the_example_is_what_the_shop_says(tmp_path, monkeypatch):
    """The shop of data/webshop/example answers the actions of the example as the example says."""
    env = use_data(common.DATA / "webshop" / "example", tmp_path / "cache", monkeypatch)
    wanted, found = turns(examples_of("webshop")["goal"])
    for task in env.tasks("train") + env.tasks("seen"):
        if f"Task: {env.reset(task)}" == wanted:
            break
    for _, action, observation in found:
        said, _, _, success = env.step(action)
        assert said == observation
    assert success


def test_equal_products_are_listed_in_the_catalogues_order(tmp_path, monkeypatch):
    names = ["Oak desk" if i % 3 else "Oak desk, oak top" for i in range(900)]
    products = [product(f"B{i:09}", name) for i, name in enumerate(names)]
    env = use(tmp_path / "data", monkeypatch, products, {DESK: goal("Find it", "x")})
    assert env.shop.search("desk") == [i for i in range(900) if i % 3][:50]
    assert env.shop.search("oak")[0] == 0
