"""WebShop: goals and splits, malformed data, the expert on real products, and the stages."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, check_run, script_env, stage
from test_webshop import (  # noqa: F401  the fixtures are used by name
    DESK,
    DESK_OPTIONS,
    ENV,
    PRODUCTS,
    SHARED,
    SHOP,
    TABLE,
    WebShop,
    env,
    goal,
    needs_shared,
    no_cached_shop,
    options,
    product,
    use,
    use_data,
)

import common
from common import InputError
from data.tools.tasks import addresses

# ---- goals, splits, data ------------------------------------------------------------------------


def goals_of(env: WebShop) -> list[dict]:
    return [env.shop.goal(number) for number in range(len(env.shop.goals))]


def test_goals_are_in_the_benchmarks_order(env):
    """Every option combination is a goal; a ceiling is one of the next four tens above the price;
    the order is Python's shuffle with seed 233."""
    shop = env.shop
    goals = goals_of(env)
    wanted = [
        (DESK, ["dark oak", "40 inch"]),
        (DESK, ["dark oak", "60 inch"]),
        (DESK, ["white | grey", "40 inch"]),
        (DESK, ["white | grey", "60 inch"]),
        (TABLE, []),
    ]
    random.Random(233).shuffle(wanted)
    assert [(shop.product(g["product"])["asin"], g["options"]) for g in goals] == wanted
    for g in goals:
        price = shop.product(g["product"])["price"]
        above = [t for t in range(10, 1000, 10) if t > price]
        assert g["ceiling"] in above[1:4]
        assert g["text"].endswith(f", and price lower than {g['ceiling']:.2f} dollars")
    assert 5 <= shop.product(1)["price"] <= 35
    assert ENV.price_tag(shop.product(1)) == "$5.0 to $35.0"
    assert shop.product(2)["price"] == 100.0, "the benchmark's default price"


def test_splits_of_a_small_catalogue(env):
    tasks = env.tasks("train") + env.tasks("seen")
    assert sorted(tasks) == [f"goal/{i}" for i in range(5)]
    assert list(addresses("webshop")) == list(WebShop.SPLITS) == ["train", "seen"]
    with pytest.raises(InputError, match="unseen"):
        env.tasks("unseen")
    for task in ("goal/5", "goal/x", "goal/²", "desk/1", "goal/-1", "1"):
        with pytest.raises(InputError, match="goal/NUMBER with NUMBER below 5"):
            env.reset(task)


def test_splits_and_goals_of_people(tmp_path, monkeypatch):
    human = {}
    for i in range(350):
        human[f"B{i:09}"] = [goal(f"Find me desk {i}.", "wood", instruction_options=["red"])] * 10
    human["B000000000"][3] = goal("nothing to look for", instruction_options=[])
    products = [product(asin, "Desk") for asin in human]
    env = use(tmp_path / "many", monkeypatch, products, {}, human=human)
    assert len(env.shop.goals) == 3499, "an instruction without attributes is no goal"
    assert env.tasks("seen") == [f"goal/{i}" for i in range(200)]
    assert env.tasks("train") == [f"goal/{i}" for i in range(1500, 1500 + 1624)]
    assert env.shop.goal(7)["options"] == ["red"]
    monkeypatch.setenv("WEBSHOP_GOALS", "attributes")
    with pytest.raises(InputError, match=r"items_ins_v2\.json has no goal for the products in"):
        use(tmp_path / "many", monkeypatch, None, None)
    monkeypatch.delenv("WEBSHOP_GOALS")
    others = {"B999999999": human[DESK]}
    with pytest.raises(InputError, match="has no goal .*WEBSHOP_GOALS=attributes"):
        use(tmp_path / "other", monkeypatch, products[:1], {}, human=others)


def test_odd_goals_of_people(tmp_path, monkeypatch):
    entries = [
        "not an object",
        goal("Find it") | {"instruction_attributes": "wood"},
        {"instruction_attributes": ["wood"]},
        goal("Find me a desk.", "w", instruction_options=None),
    ]
    env = use(tmp_path / "odd", monkeypatch, PRODUCTS, {}, human={DESK: None, TABLE: entries})
    goals = goals_of(env)
    assert sorted(g["text"].split(",")[0] for g in goals) == ["", "Find me a desk"]
    assert all(g["options"] == [] for g in goals)


def test_a_run_folder_holds_one_catalogue(tmp_path, monkeypatch, env):
    for _ in range(2):
        common.check_data("webshop", tmp_path / "run")
    use(tmp_path / "other", monkeypatch, PRODUCTS[:-1])
    with pytest.raises(InputError, match="webshop data"):
        common.check_data("webshop", tmp_path / "run")


def test_json_is_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(SHOP, "CHUNK", 50)  # elements are shorter and longer than a chunk
    rows = [{"a": i, "b": ["x" * (i % 97), 1.5, None, "é\U0001f600"]} for i in range(300)]
    path = tmp_path / "rows.json"
    by_number = {str(i): row for i, row in enumerate(rows)}
    for value in (rows, by_number, [], [12345] * 99, ["\ud83d"]):
        ascii_only = value == ["\ud83d"]  # half a character, which no file can hold
        for text in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=ascii_only)):
            path.write_text(f"\ufeff {text}", encoding="utf-8")
            if isinstance(value, dict):
                assert list(SHOP.read_json_items(path)) == list(value.items())
            else:
                assert list(SHOP.read_json(path, "[")) == value
    assert math.isnan(next(SHOP.read_json(write(path, "[NaN]"), "[")))


def test_incomplete_json(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(SHOP, "CHUNK", 50)
    whole = json.dumps([{"a": i, "b": "x" * i} for i in range(50)])
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        with pytest.raises(InputError, match=r"rows\.json"):
            list(SHOP.read_json(write(path, whole[:cut]), "["))
    monkeypatch.setattr(SHOP, "LONGEST", 1000)  # an error is not searched for to the end
    with pytest.raises(InputError, match=r"rows\.json is not complete JSON at '{\"a\" 1}"):
        list(SHOP.read_json(write(path, whole[:-1] + ', {"a" 1}, ' + whole[1:]), "["))


def write(path, text: str):
    path.write_text(text)
    return path


HALF_OPTIONS = {
    "Color": None,
    "Fit": [],
    "Size": [{"value": "s"}, {"image": "x"}, {"value": None}, {"value": "  "}, "m"],
}
SPARSE = {
    "small_description": "one text",
    "product_category": None,
    "query": None,
    "category": 7,
    "average_rating": float("nan"),
}
ODD = [
    product("B000000001", "Desk", pricing=None, images=[]),
    product("B000000002", "Lamp", pricing="about twelve"),
    product("B000000001", "Desk again"),
    product("nan", "No number"),
    product("B0000000012345", "Long number"),
    product("B000000003", ""),
    "not a product",
    {"asin": "B000000004"},
    product("B000000005", "Odd \ud83d text \x00 \u202e end", full_description=None),
    product("B000000006", "Half options", customization_options=HALF_OPTIONS),
    product("B000000007", "Sparse", **SPARSE),
    {"asin": "B000000008", "name": "Bare"},
]


def test_malformed_products(tmp_path, monkeypatch, capfd):
    attributes = {p["asin"]: goal("Find it", "x") for p in ODD if isinstance(p, dict)}
    attributes["B000000008"] = ["not", "an", "object"]
    env = use(tmp_path / "data", monkeypatch, ODD, attributes)
    said = capfd.readouterr().err
    assert "items_shuffle.json: 6 products left out: " in said
    assert "1 duplicate asin" in said and "1 not an object" in said
    usable = [env.shop.product(i) for i in range(len(env.shop.offsets) - 1)]
    assert [p["asin"] for p in usable] == [f"B00000000{i}" for i in (1, 2, 5, 6, 7, 8)]
    no_price, words_as_price, _, half_options, sparse, _ = usable
    assert no_price["price"] == words_as_price["price"] == 100.0
    assert half_options["options"] == {"size": ["s"]}
    assert sparse["features"] == ["one text"]
    for i in range(len(env.shop.goals)):
        env.reset(f"goal/{i}")
        env.item = env.goal["product"]
        for env.page in ("item", *WebShop.SUBPAGES):
            (env.text() + env.available()).encode()
        env.page = "item"
        assert 0 <= env.step("click[buy now]")[1] <= 1


@pytest.mark.parametrize(
    "products, attributes, message",
    [
        (None, None, "no items_shuffle"),
        ("[]", None, "items_ins_v2.json is missing"),
        ("[]", "{}", "no usable product"),
        ('[{"asin": ', "{}", "items_shuffle.json is not complete"),
        ("[]", "[]", "items_ins_v2.json must be a JSON object"),
        ("hello", "{}", "must be a JSON list"),
    ],
)
def test_bad_data_is_named(tmp_path, monkeypatch, products, attributes, message):
    with pytest.raises(InputError, match=message):
        use(tmp_path, monkeypatch, products, attributes)
    left = {p.suffix for p in (tmp_path / "cache").glob("mpo/webshop-*")}
    assert left <= {".lock", ".tmp"}, "a failed build is never used"


def test_bad_variables_are_named(monkeypatch, env):
    monkeypatch.setenv("WEBSHOP_GOALS", "human")
    with pytest.raises(InputError, match="WEBSHOP_GOALS=human"):
        SHOP.data_files()
    monkeypatch.delenv("WEBSHOP_DATA")
    with pytest.raises(InputError, match="WEBSHOP_DATA is not set"):
        SHOP.data_files()


def test_what_a_kill_left_of_a_build_is_removed(tmp_path, monkeypatch):
    folder = tmp_path / "webshop-x"
    for name in ("webshop-x.tmp", "webshop-x.node-1.tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(SHOP, "build", lambda _, temporary: (temporary / "built").touch())
    SHOP.build_once({}, folder, locked=True)
    assert [p.name for p in tmp_path.iterdir()] == ["webshop-x"]
    assert (folder / "built").exists()


@pytest.mark.parametrize("name", ["ENOSYS", "EOPNOTSUPP", "ENOLCK", "EINVAL"])
def test_a_cache_that_cannot_be_locked(tmp_path, monkeypatch, capsys, name):
    """Another process builds it at the same time and is first: its files are used."""
    use(tmp_path / "data", monkeypatch)
    [built] = [p for p in (tmp_path / "data/cache/mpo").iterdir() if p.is_dir()]
    shutil.rmtree(built)

    def fail(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    def build(files, temporary):
        real_build(files, temporary)
        shutil.copytree(temporary, built)
        (built / "first").touch()

    real_build = SHOP.build
    monkeypatch.setattr(common.fcntl, "flock", fail)
    monkeypatch.setattr(SHOP, "build", build)
    ENV.open_shop.cache_clear()
    assert len(ENV.open_shop().goals) == 5
    assert (built / "first").exists()
    assert sorted(p.suffix for p in built.parent.iterdir()) == ["", ".lock"]
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.slow
def test_the_index_is_built_once_by_processes_that_start_together(tmp_path, monkeypatch):
    use(tmp_path / "data", monkeypatch)
    cache = tmp_path / "other"
    code = "import common; print(len(common.environment('webshop')().shop.goals))"
    variables = script_env(WEBSHOP_DATA=str(tmp_path / "data"), XDG_CACHE_HOME=str(cache))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = []
    for _ in range(3):
        command = [sys.executable, "-c", code]
        running.append(subprocess.Popen(command, cwd=ROOT, env=variables, **pipes))
    said = [process.communicate() for process in running]
    assert [out for out, _ in said] == ["5\n"] * 3, said
    assert sum("WebShop's products" in err for _, err in said) == 1
    assert [p.suffix for p in sorted((cache / "mpo").iterdir())] == ["", ".lock"]


# ---- the benchmark's own products ---------------------------------------------------------------


@pytest.fixture
def hundred(tmp_path, monkeypatch) -> WebShop:
    return use_data(SHARED, tmp_path / "cache", monkeypatch)


@needs_shared
def test_the_expert_buys_what_is_wanted(hundred):
    one_each = {}  # {product: one of its tasks}
    for task in hundred.tasks("seen") + hundred.tasks("train"):
        hundred.reset(task)
        one_each.setdefault(hundred.goal["product"], task)
    assert len(one_each) == 44
    for task in one_each.values():
        e = hundred.expert(task)
        assert e["reward"] == 1.0 and e["by"] == "attributes"
        assert e["steps"][-1][0] == "click[buy now]"
        hundred.reset(task)
        for action, observation in e["steps"]:
            assert hundred.step(action)[0] == observation
            assert not hundred.failed(observation) and "click[attributes]" not in observation
            assert "Rating: N.A." in observation or "Rating: " not in observation
        plan = common.number_steps(hundred.abstract(e["instruction"], e["steps"]))
        assert stage("01_seed_plans").check_plan(plan, WebShop.VERBS) is None


@needs_shared
@pytest.mark.slow
def test_random_episodes(hundred):
    """200 episodes of a random agent: rewards are in [0, 1], available actions are valid."""
    draw = random.Random(0)
    bought = 0
    odd = ["", "click[b000]", "search[\u2603 \ud83d]", "click[[]]", "SEARCH[a [b] c]", "buy now"]
    for _ in range(200):
        words = hundred.reset(f"goal/{draw.randrange(len(hundred.shop.goals))}").split()
        for _ in range(15):
            clickable = hundred.clickable()
            valid = draw.random() < 0.9
            if not valid:
                action = draw.choice(odd)
            elif clickable:
                action = f"click[{draw.choice(clickable)}]"
            else:
                action = f"search[{' '.join(draw.sample(words, 3))}]"
            observation, reward, done, success = hundred.step(action)
            assert 0 <= reward <= 1 and success == (reward == 1 and done) and observation
            assert not (valid and hundred.failed(observation))
            if done:
                bought += 1
                break
    assert bought > 20


@needs_shared
@pytest.mark.slow
def test_stages(tmp_path, chat_server):
    """Stages 1, 3 and 5 from the command line, with a scripted planner and agent."""
    out = tmp_path / "run"
    env = {"WEBSHOP_DATA": str(SHARED), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    lists = tmp_path / "lists"  # flat, and without one of unseen tasks
    lists.mkdir()
    (lists / "train_indices.json").write_text(json.dumps(list(range(100, 140))))
    (lists / "test_indices.json").write_text(json.dumps([7, 5, 3, 1]))
    flags = ["--env", "webshop", "--out", out, "--tasks", lists, "--workers", 2]
    check_run("01_seed_plans.py", *flags, "--teacher", "rules", "--limit", 6, env=env)
    experts = {r["instruction"]: r for r in common.read_rows(out / "trajectories.jsonl")}
    plans = {r["task"]: r["plan"] for r in common.read_rows(out / "seed_plans.jsonl")}
    assert len(experts) == len(plans) == 6 and all(e["reward"] == 1 for e in experts.values())

    def reply(messages, body):
        first = messages[0]["content"]
        e = experts[max(experts, key=first.rfind)]
        plan = plans[e["task"]]
        number = len(messages) // 2
        if "<meta_plan>" in first:  # the planner
            return common.plan_reply(plan if body["seed"] % 2 else "Step 1: buy at once")
        if plan not in first:  # without the good plan the agent fails
            return "Action: click[nothing]" if number else "Action: search[desk]"
        return f"Thought: the plan says so.\nAction: {e['steps'][number][0]}"

    url = chat_server(reply).url
    urls = ["--planner_url", url, "--agent_url", url]
    check_run("03_sample_score.py", *flags, *urls, "--m", 6, "--n", 1, "--limit", 6, env=env)
    pairs = common.read_rows(out / "pairs.jsonl")
    assert {(p["q_chosen"], p["q_rejected"]) for p in pairs} == {(1.0, 0.0)}
    check_run("05_eval.py", *flags, "--agents", url, "--plans", "none", "--limit", 3, env=env)
    [result] = json.loads((out / "results.json").read_text())["results"]
    assert (result["split"], result["tasks"]) == ("seen", 3), "the paper has one test split"
    assert "unseen" not in (out / "results.md").read_text(), "nor an empty column"
    played = {row["task"] for row in common.read_rows(out / "eval" / "rollouts.jsonl")}
    assert played == {"goal/7", "goal/5", "goal/3"}
    assert result["ends"] == {"steps": 3}
