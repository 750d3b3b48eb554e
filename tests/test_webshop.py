"""WebShop: its data read as a stream, bad products, pages, the reward rule by rule, the expert, and rollouts of a scripted agent."""

import asyncio
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, check_run, run_script, script_env

import common
from common import EnvPool, InputError, Model, Prompts, RolloutConfig, Shop, WebShop, rollouts

pytest.importorskip("bm25s")
SHARED = ROOT.parent / "shared" / "webshop"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no WebShop products in {SHARED}")


def product(asin: str, name: str, **fields) -> dict:
    """A product in the benchmark's raw format."""
    return {"asin": asin, "name": name, "full_description": "", "pricing": "$20.0", "images": ["x.jpg"], "product_category": "A › B › C",
            "average_rating": "", "small_description": [], "customization_options": "", "category": "garden", "query": "desks", **fields}


def options(**values) -> dict:
    return {k: [{"value": v, "image": None} for v in vs] for k, vs in values.items()}


PRODUCTS = [
    product("B000000001", "Oak Writing Desk", small_description=["Solid wood", "Easy assembly"], full_description="For the home office.",
            customization_options=options(Color=["Dark Oak", "White / Grey"], Size=["40 inch", "60 inch"])),
    product("B000000002", "Folding Table", query="tables", product_category="A › X", pricing="$5.0 to $35.0"),
    product("B000000003", "Garden Chair Cushion", query="cushions", product_category="Q › R", pricing=""),
    *[product(f"B0000001{i:02}", f"Pine Shelf number{i}", query="shelves", product_category="S › T") for i in range(25)],
]
ATTRIBUTES = {
    "B000000001": {"attributes": ["solid wood", "easy assemble"], "instruction": "Find me a desk of solid wood.",
                   "instruction_attributes": ["solid wood"]},
    "B000000002": {"attributes": ["steel frame"], "instruction": "Find me a table", "instruction_attributes": ["steel frame"]},
    "B000000003": {"attributes": []},
}


def use(folder: Path, monkeypatch, products=PRODUCTS, attributes=ATTRIBUTES, human=None) -> WebShop:
    """A shop of these products, in files of the benchmark's names."""
    folder.mkdir(exist_ok=True)
    for name, value in (("items_shuffle.json", products), ("items_ins_v2.json", attributes), ("items_human_ins.json", human)):
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    monkeypatch.setenv("WEBSHOP_DATA", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    Shop.open.cache_clear()
    return WebShop()


@pytest.fixture
def shop(tmp_path, monkeypatch) -> WebShop:
    yield use(tmp_path / "data", monkeypatch)
    Shop.open.cache_clear()


def begin(env: WebShop, asin: str, ceiling: float | None = None, **goal) -> str:
    """Start the first goal of a product, changed as asked."""
    number = next(i for i in range(len(env.shop.goals)) if env.shop.product(env.shop.goal(i)["product"])["asin"] == asin)
    u = env.reset(f"goal/{number}")
    env.goal.update(goal, **({"ceiling": ceiling} if ceiling else {}))
    return u


def buy(env: WebShop, asin: str, *chosen: str) -> float:
    env.step("search[desk table cushion pine oak]")
    while f"click[{asin.lower()}]" not in env.available():
        assert not env.failed(env.step("click[next >]")[0])
    for what in (asin, *chosen, "Buy Now"):
        observation, reward, done, success = env.step(f"click[{what}]")
        assert not env.failed(observation), observation
    assert done and success == (reward == 1.0)
    return reward


# ---- reward ----------------------------------------------------------------------------------------


def test_reward_of_the_right_purchase(shop):
    for options, chosen in ((["dark oak", "40 inch"], ["dark oak", "40 inch"]), ([], []), (["60 inch"], ["60 INCH"])):
        begin(shop, "B000000001", options=options)
        assert buy(shop, "B000000001", *chosen) == 1.0


@pytest.mark.parametrize("change, chosen, expected", [
    ({"attributes": ["solid wood", "led light"]}, [], 2 / 3),  # one of two attributes, and the price
    ({"attributes": ["easy assembly"]}, [], 1),  # "easy assemble" is near enough: token_set_ratio above 85
    ({"attributes": ["home office"]}, [], 1),  # not an attribute, but in the description
    ({"attributes": ["oak writing"]}, [], 1),  # in the title, whatever its capitals
    ({"attributes": ["bamboo"]}, [], 1 / 2),
    ({"ceiling": 10.0}, [], 1 / 2),  # 20 dollars are too much
    ({"ceiling": 20.0}, [], 1),
    ({"options": ["dark oak", "40 inch"]}, ["dark oak"], 3 / 4),
    ({"options": ["dark oak", "40 inch"]}, ["dark oak", "60 inch", "40 inch"], 1),  # the later choice of a size counts
    ({"options": ["dark oak", "40 inch"]}, ["white | grey", "60 inch"], 3 / 4),  # 60 inch is near enough to 40 inch
    ({"options": ["light grey"]}, ["white | grey"], 1),  # both are some grey
    ({"options": ["snow white"]}, ["white | grey"], 2 / 3),  # the first of several basic colours, in the order of the alphabet
    ({"options": ["lightgrey"]}, ["white | grey"], 1),  # a colour is found inside a word
    ({"options": ["dark heather walnut"]}, ["dark oak"], 1),  # "dark" is one of the benchmark's colours
])
def test_reward_rule_by_rule(shop, change, chosen, expected):
    begin(shop, "B000000001", **{"options": [], **change})
    assert buy(shop, "B000000001", *chosen) == pytest.approx(expected)


@pytest.mark.parametrize("bought, wanted, expected", [
    ({"name": "Oak Desk"}, {"name": "Oak Desk"}, 1.0),
    ({"name": "Oak Desk", "query": "q2", "product_category": "Z"}, {"name": "Pine Desk Chair Table Lamp Shelf"}, 0.5),
    ({"name": "Oak Desk", "query": "q2", "product_category": "Z"}, {"name": "Pine Desk Chair Table"}, 1.0),  # 1 of 4: above 0.2
    ({"name": "Oak Desk", "product_category": "Z"}, {"name": "Pine Desk Chair Table Lamp Shelf"}, 1.0),  # the same query
    ({"name": "Oak Desk", "query": "q2"}, {"name": "Pine Desk Chair Table Lamp Shelf"}, 1.0),  # two categories
    ({"name": "Oak Desk"}, {"name": "Desk " + " ".join("abcdefghijk"[i] * 4 for i in range(11))}, 0.1),  # 1 of 12 nouns
    ({"name": "Oak Desk"}, {"name": "Garden Cushion"}, 0.0),
    ({"name": "Oak Desk", "query": "q2", "product_category": "Z"}, {"name": "12 x 4"}, 0.5),  # no noun: 0.2 is assumed
])
def test_type_reward(bought, wanted, expected, monkeypatch):
    monkeypatch.setattr(common, "part_of_speech_tagger", lambda: None)
    WebShop.nouns.cache_clear()
    base = {"query": "q", "product_category": "A › B"}
    assert WebShop.type_reward({**base, **bought}, {**base, **wanted}) == expected


def test_nouns_by_spacy_where_it_is_installed(monkeypatch):
    from types import SimpleNamespace

    tags = {"Oak": "PROPN", "folds": "VERB", "desk": "NOUN"}
    monkeypatch.setattr(common, "part_of_speech_tagger", lambda: lambda title: [
        SimpleNamespace(text=w, pos_=tags[w]) for w in title.split()])
    WebShop.nouns.cache_clear()
    assert WebShop.nouns("Oak folds desk") == ["oak", "desk"]
    WebShop.nouns.cache_clear()


def test_rewards_are_shares_and_the_goal_itself_earns_1(tmp_path, monkeypatch):
    """Random catalogues: every purchase earns between 0 and 1, and buying the goal with its options below the ceiling 1."""
    draw, words = random.Random(0), "oak pine desk lamp shelf table chair rug soft warm steel glass wool mat bed sofa".split()

    def some(n):
        return " ".join(draw.sample(words, n))

    products = [product(f"B{i:09}", some(5), query=some(1), small_description=[some(4)], pricing=f"${draw.randint(1, 1200)}.0",
                        customization_options=options(color=draw.sample([f"red {i}", f"blue {i}", "snow", "black and white"], 2),
                                                      size=["s", "m"][: draw.randint(1, 2)])) for i in range(40)]
    attributes = {p["asin"]: {"attributes": [some(2), some(1)]} for p in products}
    for known in attributes.values():
        known.update(instruction="Find me something.", instruction_attributes=known["attributes"][: draw.randint(1, 2)])
    env = use(tmp_path / "data", monkeypatch, products, attributes)
    for i in range(len(env.shop.goals)):
        env.reset(f"goal/{i}")
        env.item, env.page = env.goal["product"], "item"
        bought = env.shop.product(env.item)
        env.options = dict(zip(sorted(bought["options"]), env.goal["options"], strict=True))
        assert bought["price"] <= env.goal["ceiling"] and env.reward() == 1.0
        for _ in range(10):
            env.item = draw.randrange(len(products))
            env.options = {k: draw.choice(v) for k, v in env.shop.product(env.item)["options"].items() if draw.random() < 0.7}
            assert 0.0 <= env.reward() <= 1.0


# ---- pages -----------------------------------------------------------------------------------------


def test_pages(shop):
    u = begin(shop, "B000000001")
    assert u.startswith("Find me a desk of solid wood with color: ") and ", and price lower than " in u and u.endswith("0.00 dollars")
    assert shop.available() == "Available actions: search[keywords]"
    text = shop.step("Search[ Pine  shelf ]")[0]
    available, page = text.split("\n")
    assert available.startswith("Available actions: click[back to search], click[next >], click[b0000001")
    assert page.startswith(f"Instruction: [SEP] {u} [SEP] Back to Search [SEP] Page 1 (Total results: 25) [SEP] Next > [SEP] B0000001")
    assert text.count("$20.0") == 10 and "< Prev" not in text
    second = shop.step("click[Next >]")[0]
    assert "Page 2" in second and "< Prev [SEP] Next >" in second
    assert "Next >" not in shop.step("click[next >]")[0]
    assert shop.step("click[< prev]")[0] == second
    shop.step("click[back to search]")
    shop.step("search[oak desk]")
    item = shop.step("click[b000000001]")[0]
    for part in ("color [SEP] dark oak [SEP] white | grey [SEP] size [SEP] 40 inch [SEP] 60 inch [SEP] Oak Writing Desk [SEP] Price: $20.0 "
                 "[SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Attributes [SEP] Buy Now", "click[white | grey]"):
        assert part in item
    assert shop.step("click[60 inch]")[0].startswith("You have clicked 60 inch.\n")
    for page, said in (("description", "For the home office."), ("features", "Solid wood [SEP] Easy assembly"),
                       ("reviews", "No reviews found"), ("attributes", "solid wood [SEP] easy assemble [SEP] garden [SEP] desks")):
        assert said in shop.step(f"click[{page}]")[0]
        assert shop.step("click[< Prev]")[0] == item and shop.options == {"size": "60 inch"}, "what was chosen stays chosen"
    shop.step("click[< prev]")
    assert shop.page == "results" and not shop.options


@pytest.mark.parametrize("action", ["click[buy now]", "search[]", "search[ ]", "click[]", "buy", "", "click[b000000001]", "[",
                                    "click[search]", "search", "think[desk]", "click[\u2603]"])
def test_what_is_not_possible_changes_nothing(shop, action):
    begin(shop, "B000000001")
    before = (shop.page, shop.item, shop.hits)
    observation, reward, done, success = shop.step(action)
    assert shop.failed(observation) and "search[keywords]" in observation and (reward, done, success) == (0.0, False, False)
    assert (shop.page, shop.item, shop.hits) == before
    shop.step("search[desk]")
    assert shop.failed(shop.step("search[table]")[0]), "there is no search box on the page of results"


def test_search_ranks_as_bm25_does(shop):
    """The index by hand: BM25 of Lucene with k1 0.9 and b 0.4 over title, description, first feature and options."""
    found = [shop.shop.product(i)["asin"] for i in shop.shop.search("solid wooden DESKS for the oak")]
    assert found == ["B000000001"], "stems match, common words do not count"
    texts = [f"{p['name']} {p['full_description']} {' '.join(p['small_description'][:1])}".lower() for p in PRODUCTS]
    stems = [[shop.shop.stem(w) for w in t.split() if w not in Shop.STOP] for t in texts]
    stems[0] = [shop.shop.stem(w) for w in "oak writing desk home office solid wood color dark oak white grey size 40 inch 60 inch".split()]
    mean = sum(map(len, stems)) / len(stems)

    def score(words):
        total = 0.0
        for q in ("tabl", "fold", "number3", "pine"):
            df = sum(q in s for s in stems)
            tf = words.count(q)
            total += math.log(1 + (len(stems) - df + 0.5) / (df + 0.5)) * tf / (tf + 0.9 * (0.6 + 0.4 * len(words) / mean)) if df else 0
        return total

    ours = shop.shop.search("tables fold number3 pine")
    best = sorted((i for i in range(len(stems)) if score(stems[i])), key=lambda i: (-round(score(stems[i]), 5), i))
    assert ours == best and len(ours) == 26
    assert shop.shop.search("zzzz") == [] and "Total results: 0" in (begin(shop, "B000000001"), shop.step("search[zzzz]"))[1][0]


# ---- goals and data --------------------------------------------------------------------------------


def test_goals_in_the_benchmarks_order(shop):
    """Every combination of options is a goal; a price ceiling is one of the next four tens above the price; the order is
    Python's shuffle with seed 233."""
    goals = [shop.shop.goal(i) for i in range(len(shop.shop.goals))]
    wanted = [("B000000001", ["dark oak", "40 inch"]), ("B000000001", ["dark oak", "60 inch"]), ("B000000001", ["white | grey", "40 inch"]),
              ("B000000001", ["white | grey", "60 inch"]), ("B000000002", [])]
    random.Random(233).shuffle(wanted)
    assert [(shop.shop.product(g["product"])["asin"], g["options"]) for g in goals] == wanted
    for g in goals:
        price = shop.shop.product(g["product"])["price"]
        above = [t for t in range(10, 1000, 10) if t > price]
        assert g["ceiling"] in above[1:4] and g["text"].endswith(f", and price lower than {g['ceiling']:.2f} dollars")
    assert 5 <= shop.shop.product(1)["price"] <= 35 and shop.price_tag(shop.shop.product(1)) == "$5.0 to $35.0"
    assert shop.shop.product(2)["price"] == 100.0, "the benchmark's price of what has none"


def test_splits(tmp_path, monkeypatch, shop):
    train, seen = shop.tasks("train"), shop.tasks("seen")
    assert len(train) + len(seen) == 5 and not set(train) & set(seen)
    with pytest.raises(InputError, match="unknown split 'unseen': one of train, seen"):
        shop.tasks("unseen")
    many = {f"B{i:09}": [{"instruction": f"Find me desk {i}.", "instruction_attributes": ["wood"], "instruction_options": ["red"]}] * 10
            for i in range(350)}
    many["B000000000"][3] = {"instruction": "nothing to look for", "instruction_attributes": [], "instruction_options": []}
    env = use(tmp_path / "many", monkeypatch, [product(a, "Desk") for a in many], {}, human=many)
    assert len(env.shop.goals) == 3499, "people's instructions are the goals where their file is there; one without attributes is none"
    assert env.tasks("seen") == [f"goal/{i}" for i in range(200)]
    assert env.tasks("train") == [f"goal/{i}" for i in range(1500, 1500 + 1624)]
    assert env.shop.goal(7)["options"] == ["red"]
    monkeypatch.setenv("WEBSHOP_GOALS", "attributes")
    Shop.open.cache_clear()
    with pytest.raises(InputError, match=r"items_ins_v2\.json has no goal for the products in items_shuffle\.json$"):
        WebShop()
    monkeypatch.delenv("WEBSHOP_GOALS")
    with pytest.raises(InputError, match="has no goal .*WEBSHOP_GOALS=attributes"):
        use(tmp_path / "other", monkeypatch, [product("B000000001", "Desk")], {}, human={"B999999999": many["B000000001"]})


def test_malformed_instructions_of_people(tmp_path, monkeypatch):
    human = {"B000000001": None, "B000000002": [
        "not an object", {"instruction": "Find it", "instruction_attributes": "wood"}, {"instruction_attributes": ["wood"]},
        {"instruction": "Find me a desk.", "instruction_attributes": ["wood"], "instruction_options": None}]}
    products = [product(a, "Desk", customization_options={"color": [{"value": "red"}]}) for a in human]
    env = use(tmp_path / "data", monkeypatch, products, {}, human=human)
    goals = [env.shop.goal(i) for i in range(len(env.shop.goals))]
    assert sorted(g["text"].split(",")[0] for g in goals) == ["", "Find me a desk"] and all(g["options"] == [] for g in goals)


def test_equal_products_are_listed_in_the_catalogues_order(tmp_path, monkeypatch):
    env = use(tmp_path / "data", monkeypatch, [product(f"B{i:09}", "Oak desk" if i % 3 else "Oak desk, oak top") for i in range(900)],
              {"B000000001": {"instruction": "Find it", "instruction_attributes": ["x"]}})
    alike = [i for i in range(900) if i % 3]
    assert env.shop.search("desk") == alike[:50] and env.shop.search("oak desk")[:50] != alike[:50]


def test_a_run_folder_is_of_one_catalogue(tmp_path, monkeypatch, shop):
    common.check_data("webshop", tmp_path / "run")
    common.check_data("webshop", tmp_path / "run")
    use(tmp_path / "other", monkeypatch, PRODUCTS[:-1])
    with pytest.raises(InputError, match="rows of other webshop data.*another run folder"):
        common.check_data("webshop", tmp_path / "run")


def test_a_stream_is_read_as_json_is(tmp_path, monkeypatch):
    rows = [{"a": i, "b": ["x" * (i % 977), 1.5, None, "é\U0001f600"]} for i in range(20_000)]  # 10 MB: several chunks
    path = tmp_path / "rows.json"
    for value, expected in ((rows, rows), ({str(i): r for i, r in enumerate(rows)}, [(str(i), r) for i, r in enumerate(rows)]), ([], []),
                            ([12345] * 10, [12345] * 10)):
        for indent in (None, 1):
            path.write_text(json.dumps(value, indent=indent, ensure_ascii=indent is None), encoding="utf-8")
            assert list(Shop.stream(path, "{" if isinstance(value, dict) else "[")) == expected
    whole = json.dumps(rows[:50])
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_text(whole[:cut])
        with pytest.raises(InputError, match=r"rows\.json"):
            list(Shop.stream(path, "["))
    monkeypatch.setattr(Shop, "LONGEST", 1 << 20)
    path.write_text(json.dumps(rows[:100])[:-1] + ', {"a" 1}, ' + json.dumps(rows * 3)[1:])  # 30 MB after the fault
    with pytest.raises(InputError, match=r"rows\.json is not whole JSON"):
        list(Shop.stream(path, "["))


def test_malformed_products(tmp_path, monkeypatch, capfd):
    odd = [
        product("B000000001", "Desk", pricing=None, images=[]), product("B000000002", "Lamp", pricing="about twelve"),
        product("B000000001", "Desk again"), product("nan", "No number"), product("B0000000012345", "Long number"),
        product("B000000003", ""), "not a product", {"asin": "B000000004"},
        product("B000000005", "Odd \ud83d text \x00 \u202e end", full_description=None),
        product("B000000006", "Half options", customization_options={
            "Color": None, "Size": [{"value": "s"}, {"image": "x"}, {"value": None}, {"value": "  "}, "m"], "Fit": []}),
        product("B000000007", "Sparse", small_description="one text", product_category=None, query=None, category=7,
                average_rating=float("nan")),
        {"asin": "B000000008", "name": "Bare"},
    ]
    attributes = {p["asin"]: {"instruction": "Find it", "instruction_attributes": ["x"]} for p in odd if isinstance(p, dict)}
    env = use(tmp_path / "data", monkeypatch, odd, {**attributes, "B000000008": ["not", "an", "object"]})
    said = capfd.readouterr().err
    assert "items_shuffle.json: 6 products left out: " in said and "1 asin for the second time" in said and "1 not an object" in said
    sold = {p["asin"]: p for p in map(env.shop.product, range(len(env.shop.offsets) - 1))}
    assert list(sold) == ["B000000001", "B000000002", "B000000005", "B000000006", "B000000007", "B000000008"]
    assert sold["B000000001"]["price"] == sold["B000000002"]["price"] == 100.0
    assert sold["B000000006"]["options"] == {"size": ["s"]}
    assert sold["B000000007"]["features"] == ["one text"] and sold["B000000007"]["rating"] == "N.A."
    for i in range(len(env.shop.goals)):
        env.reset(f"goal/{i}")
        env.item, env.page = env.goal["product"], "item"
        for page in ("item", *WebShop.PAGES):
            env.page = page
            (env.text() + env.available()).encode()
        assert 0 <= env.reward() <= 1


@pytest.mark.parametrize("files, says", [
    ({}, "no items_shuffle"), ({"items_shuffle.json": "[]"}, "items_ins_v2.json is missing"),
    ({"items_shuffle.json": "[]", "items_ins_v2.json": "{}"}, "no product that can be sold"),
    ({"items_shuffle.json": "[{\"asin\": ", "items_ins_v2.json": "{}"}, "items_shuffle.json is not whole"),
    ({"items_shuffle.json": "[]", "items_ins_v2.json": "[]"}, "items_ins_v2.json must be a JSON object"),
    ({"items_shuffle.json": "hello", "items_ins_v2.json": "{}"}, "must be a JSON list")])
def test_bad_data_is_named(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    env = {"WEBSHOP_DATA": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = run_script("01_seed_plans.py", "--env", "webshop", "--out", tmp_path / "run", "--teacher", "rules", env=env)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr, result.stderr
    made = {p.suffix for p in (tmp_path / "cache").glob("mpo/webshop-*")}
    assert made <= {".lock", ".tmp"}, "nothing half made is left to be used"


def test_no_data(tmp_path, monkeypatch):
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    with pytest.raises(InputError, match="set WEBSHOP_DATA"):
        Shop.files()


def test_unknown_tasks(shop):
    for task in ("goal/5", "goal/x", "desk/1", "goal/-1", "1"):
        with pytest.raises(InputError, match="goal/NUMBER with NUMBER below 5"):
            shop.reset(task)


def test_the_index_is_built_once_by_processes_that_start_together(tmp_path, monkeypatch):
    use(tmp_path / "data", monkeypatch)
    cache = tmp_path / "other"
    code = "import common; print(len(common.WebShop().shop.goals))"
    env = script_env(WEBSHOP_DATA=str(tmp_path / "data"), XDG_CACHE_HOME=str(cache))
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for _ in range(3)]
    said = [p.communicate() for p in running]
    assert [out for out, _ in said] == ["5\n"] * 3, said
    assert sum("WebShop's products" in err for _, err in said) == 1
    assert [p.suffix for p in sorted((cache / "mpo").iterdir())] == ["", ".lock"]


# ---- the benchmark's own products ------------------------------------------------------------------


@pytest.fixture
def hundred(tmp_path, monkeypatch):
    monkeypatch.setenv("WEBSHOP_DATA", str(SHARED))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Shop.open.cache_clear()
    yield WebShop()
    Shop.open.cache_clear()


@needs_shared
def test_the_expert_buys_what_is_asked_for(hundred):
    tasks = [*hundred.tasks("seen"), *hundred.tasks("train")]
    one_each = {}
    for task in tasks:
        one_each.setdefault(hundred.shop.goal(int(task.split("/")[1]))["product"], task)
    assert len(one_each) == 44
    for task in one_each.values():
        e = hundred.expert(task)
        assert e["reward"] == 1.0 and e["by"] == "attributes" and e["steps"][-1][0] == "click[buy now]"
        hundred.reset(task)
        assert [hundred.step(action)[0] for action, _ in e["steps"]] == [o for _, o in e["steps"]], "played again it is the same"
        plan = common.number_steps(hundred.abstract(e["instruction"], e["steps"]))
        assert common.check_plan(plan, WebShop.VERBS) is None


@needs_shared
def test_random_episodes(hundred):
    """200 episodes of a random agent: no exception, rewards within [0, 1], and what is listed as available is possible."""
    draw, tasks = random.Random(0), [f"goal/{i}" for i in range(len(hundred.shop.goals))]
    bought = 0
    for _ in range(200):
        u, done = hundred.reset(draw.choice(tasks)), False
        for _ in range(15):
            what = hundred.clickable()
            listed = draw.random() < 0.9
            action = f"click[{draw.choice(what)}]" if what and listed else f"search[{' '.join(draw.sample(u.split(), 3))}]" if listed else (
                draw.choice(["", "click[b000]", "search[\u2603 \ud83d]", "click[[]]", "SEARCH[a [b] c]", "buy now", "click[< prev]"]))
            observation, reward, done, success = hundred.step(action)
            assert 0 <= reward <= 1 and success == (reward == 1 and done) and observation
            assert not (listed and hundred.failed(observation))
            if done:
                bought += 1
                break
    assert bought > 20


@needs_shared
def test_stages(tmp_path, chat_server):
    """Stages 1, 3 and 5 from the command line, with a scripted planner and agent."""
    out, env = tmp_path / "run", {"WEBSHOP_DATA": str(SHARED), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    flags = ["--env", "webshop", "--out", out, "--workers", 2]
    said = check_run("01_seed_plans.py", *flags, "--teacher", "rules", "--limit", 6, env=env)
    assert "expert: 6 of 6 tasks solved" in said and "goal 6 of 6 (attributes 6)" in said and "6 kept, 0 rejected" in said
    gold = {r["instruction"]: r for r in common.read_rows(out / "trajectories.jsonl")}
    good = {r["task"]: r["plan"] for r in common.read_rows(out / "seed_plans.jsonl")}

    def reply(messages, body):
        first = messages[0]["content"]
        e = gold.get(max(gold, key=first.rfind)) if any(u in first for u in gold) else None
        if "<meta_plan>" in first:
            return common.plan_reply(good[e["task"]] if body["seed"] % 2 else "Step 1: buy at once")
        if not e or good[e["task"]] not in first:
            return ["Action: search[desk]", "Action: click[nothing]"][min(1, len(messages) // 2)]
        return f"Thought: so be it.\nAction: {e['steps'][len(messages) // 2][0]}"

    server = chat_server(reply)
    urls = ["--planner_url", server.url, "--agent_url", server.url]
    check_run("03_sample_score.py", *flags, *urls, "--m", 6, "--n", 1, "--limit", 6, env=env)
    pairs = common.read_rows(out / "pairs.jsonl")
    assert pairs and all((p["q_chosen"], p["q_rejected"]) == (1.0, 0.0) for p in pairs)
    check_run("05_eval.py", *flags, "--agents", server.url, "--plans", "none", "--limit", 3, env=env)
    [result] = json.loads((out / "results.json").read_text())["results"]
    assert result["split"] == "seen" and result["tasks"] == 3 and result["ends"] == {"errors": 3}, "the paper has one test split"


@needs_shared
def test_rollouts(hundred, chat_server):
    """The expert's actions through the project's own rollouts, two workers on one index."""
    tasks = hundred.tasks("seen")[:6]
    experts = {e["instruction"]: e for e in map(hundred.expert, tasks)}
    server, rows = chat_server(lambda messages, body: "Action: " + next(
        e for u, e in experts.items() if u in messages[0]["content"].split("---")[1])["steps"][len(messages) // 2][0]), []

    async def main():
        async with EnvPool("webshop", 2) as pool:
            c = RolloutConfig(Prompts("webshop"), 0.0, 64, 0, 0)
            jobs = [{"task": t, "plan": None, "rollout": i} for t in tasks for i in range(2)]
            return await rollouts(jobs, Model(None, server.url), pool, "webshop", c, 12, rows.append)

    assert asyncio.run(main()) == 0
    assert len(rows) == 12 and all(r["end"] == "success" and r["reward"] == 1.0 for r in rows)
