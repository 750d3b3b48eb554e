"""ALFWorld's text games (Shridhar et al. 2020), alfworld 0.4: stock TextWorld with four patches."""

import collections
import functools
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

from common import Environment, InputError, task_type


def start_game(path: Path):
    """TextWorld's environment of a game file."""
    try:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

        patch_textworld()
    except ImportError as e:
        raise InputError(
            f"this environment needs the package alfworld ({e}): pip install -r "
            f"{Path(__file__).with_name('requirements.txt')}"
        ) from None
    infos = textworld.EnvInfos(won=True, admissible_commands=True)
    return textworld.start(str(path), infos, wrappers=[AlfredDemangler(), AlfredInfos])


@functools.cache
def patch_textworld() -> None:
    """Patch TextWorld for Python 3.13, where expressions in its texts do not see their variables
    (PEP 667), and for speed. What the agent is told does not change:

    - a game is translated once, not four times per episode;
    - the second translation, for the planner expert, is skipped;
    - grammar rules and conditions are parsed once, not at every derivation;
    - grammar contexts are copied one level deep, because nobody changes the entities in them.

    The caches are bounded, so that a worker's memory does not grow with the games it has played.
    The translations of the last 32 games are kept: a worker plays the rollouts of one game after
    another, so it works on few at once. 4,096 parsed texts are kept of each kind: they are short,
    and games share most of them."""
    import fast_downward
    from textworld.envs.pddl import textgen
    from textworld.logic import Rule

    load_lib = fast_downward.load_lib
    translate = functools.lru_cache(32)(fast_downward.pddl2sas)
    parse_once = functools.lru_cache(4096)

    def load_lib_without_replan():
        lib = load_lib()
        lib.load_sas_replan = lambda sas: None
        return lib

    def translate_once(domain, problem, verbose=False, optimize=False):
        if optimize:  # for the planner expert
            return None, ""
        return translate(domain, problem)

    def copy_context(context: dict) -> dict:
        variables = dict(context["variables"])
        mapping = dict(context["mapping"])
        return {**context, "variables": variables, "mapping": mapping}

    def derive_value(symbol, context=None):
        context = context or symbol.context
        names = {"context": context, **context["variables"]}
        return [textgen.TerminalSymbol(eval(symbol.expression, vars(textgen), names))]

    textgen.EvalSymbol.derive = derive_value
    fast_downward.load_lib = load_lib_without_replan
    fast_downward.pddl2sas = translate_once
    textgen._parse_and_convert = parse_once(textgen._parse_and_convert)
    Rule.parse_conjunctive_query = parse_once(Rule.parse_conjunctive_query)
    textgen.copy_context = copy_context


# The verbs of actions that handle a thing. Before those of SEARCHED the expert had to find it.
HANDLE = ("take", "put", "heat", "cool", "clean", "toggle")
SEARCHED = ("take", "toggle")
ORDINALS = {1: "first", 2: "second"}


class ALFWorld(Environment):
    """Reward: 1 when the task is done, else 0. Actions are understood in the words of all versions
    of the games: `put X in/on Y` and `move X to Y`, `toggle X` and `use X`."""

    shares_tasks = True
    FAILED = ("Nothing happens",)
    VARIABLES = ("ALFWORLD_DATA",)
    SECONDS = {"expert": 0.6, "reset": 0.03, "step": 0.005}
    FOLDER = "json_2.1.1"
    SPLITS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
    MAX_STEPS = {
        "pick_and_place_simple": 30,
        "look_at_obj_in_light": 30,
        "pick_clean_then_place_in_recep": 30,
        "pick_heat_then_place_in_recep": 30,
        "pick_cool_then_place_in_recep": 30,
        "pick_two_obj_and_place": 30,
    }
    VERBS = {
        "go", "take", "put", "open", "close", "toggle", "clean", "heat", "cool", "examine", "look",
        "find", "locate", "search", "check", "choose", "repeat",
    }  # fmt: skip
    PUT = re.compile(r"(?:put|move|place) (.+?) (?:in/on|into|onto|in|on|to) (.+)")
    TOGGLE = re.compile(r"(?:use|toggle|turn on) (\S+ \d+)\b.*")

    def __init__(self, sessions: int = 8):
        self.env = None
        self.path = None

    @classmethod
    @functools.cache
    def games(cls) -> dict[str, dict[str, Path]]:
        """{split: {task 'TYPE/TRIAL': the game's folder}}. Raises `InputError` if there are
        none."""
        data = Path(os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser()
        found = {split: {} for split in cls.SPLITS}
        for split, folder in cls.SPLITS.items():
            for kind in sorted((data / cls.FOLDER / folder).glob("*-*")):
                name = kind.name.split("-")[0]
                if name in cls.MAX_STEPS and not re.search("movable|Sliced", kind.name):
                    for trial in sorted(kind.glob("trial_*")):
                        found[split][f"{name}/{trial.name}"] = trial
        if not any(found.values()):
            others = sorted(p.name for p in data.glob("json_*") if p.name != cls.FOLDER)
            only = f" ({data} has {', '.join(others)} only)" if others else ""
            raise InputError(
                f"no ALFWorld games in {data / cls.FOLDER}{only}: fetch them with "
                f"`make data`, or set ALFWORLD_DATA to the folder of {cls.FOLDER}"
            )
        return found

    def columns(self, split: str) -> list[list[str]]:
        """The games 'TYPE/TRIAL' of each type in a seeded order. Games that are incomplete or not
        known to be solvable are named on stderr and left out."""
        columns = {kind: [] for kind in self.MAX_STEPS}
        left_out = []
        for task, folder in self.games()[split].items():
            reason = self._unfit(folder)
            if reason is None:
                columns[task_type(task)].append(task)
            else:
                left_out.append(f"{folder}: {reason}")
        for line in left_out[:5]:
            print(f"left out: {line}", file=sys.stderr, flush=True)
        if len(left_out) > 5:
            print(f"left out: {len(left_out) - 5} more games", file=sys.stderr, flush=True)
        for kind, column in columns.items():
            random.Random(f"{kind} {split}").shuffle(column)
        return list(columns.values())

    @staticmethod
    def _unfit(folder: Path) -> str | None:
        """Why a game cannot be played, or None, without parsing its 80 KB."""
        if not (folder / "traj_data.json").exists():
            return "no traj_data.json"
        try:
            content = (folder / "game.tw-pddl").read_bytes()
        except OSError as e:
            return f"game.tw-pddl: {e.strerror}"
        if not content.rstrip().endswith(b"}"):
            return "game.tw-pddl is incomplete"
        solvable = re.search(rb'"solvable"\s*:\s*true', content)
        return None if solvable else "not known to be solvable"

    @classmethod
    def check(cls, task: str) -> None:
        cls._game_folder(task)

    @classmethod
    def _game_folder(cls, task: str) -> Path:
        for games in cls.games().values():
            if task in games:
                return games[task]
        raise InputError(
            f"unknown ALFWorld task {task!r}: it must be TYPE/TRIAL, a trial "
            f"folder of the games, with TYPE one of {', '.join(cls.MAX_STEPS)}"
        )

    def reset(self, task: str) -> str:
        """Start `task`; the instruction u: the room and the task, without the game's banner."""
        path = self._game_folder(task) / "game.tw-pddl"
        try:
            if self.env is None:
                self.env = start_game(path)
            elif path != self.path:
                self.env.load(str(path))
            self.state = self.env.reset()
        except InputError:
            raise
        except (Exception, SystemExit) as e:
            self.env = None
            raise InputError(
                f"{path} cannot be played ({type(e).__name__}: {e}): fetch the games "
                "again (make data)"
            ) from None
        self.task = task
        self.path = path
        return self.state.feedback.split("\n\n", 1)[1]

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success)."""
        known = self.state.admissible_commands
        command = next((c for c in self.meanings(action) if c in known), None)
        observation = "Nothing happens."
        if command is not None:
            self.state, _, _ = self.env.step(command)
            observation = re.sub(r"^You arrive at .*?\. ", "", self.state.feedback)
        won = self.state.won
        return observation, float(won), won, won

    @classmethod
    def meanings(cls, action: str) -> list[str]:
        """The commands that an action can mean, in the words of any version of the games. Capitals,
        quotes and a trailing dot are ignored."""
        action = " ".join(action.strip(" \t\"'`.").lower().split())
        match = cls.PUT.fullmatch(action)
        if match:
            x, y = match.groups()
            return [f"move {x} to {y}", f"put {x} in/on {y}", f"put {x} in {y}", f"put {x} on {y}"]
        match = cls.TOGGLE.fullmatch(action)
        if match:
            return [f"use {match[1]}", f"toggle {match[1]}"]
        return [action]

    def expert(self, task: str) -> dict | None:
        """{"instruction", "steps": [[action, observation], ...], "reward", "by"}: the trajectory of
        alfworld's hand-coded expert, which searches as a person would ("search"); if it does not
        succeed within the step limit, of the game's own walkthrough; None if that fails too.
        Actions are in the words of the prompt."""
        u = self.reset(task)
        steps = self._replay(self._search())
        by = "search"
        if not steps:
            self.reset(task)
            steps = self._replay(self._walkthrough())
            by = "walkthrough"
        if not steps:
            return None
        return {"instruction": u, "steps": steps, "reward": 1.0, "by": by}

    def _walkthrough(self) -> list[str]:
        return json.loads(self.path.read_bytes()).get("walkthrough") or []

    def _replay(self, actions) -> list | None:
        """[[action, observation], ...] until the task is done; None if that exceeds the step limit.
        Looking around is left out: it changes nothing, and the prompt's actions do not have it."""
        steps = []
        for action in itertools.islice(actions, self.max_steps(self.task)):
            observation, _, _, success = self.step(action)
            if action.split()[0] not in ("look", "examine", "inventory", "help"):
                steps.append([self.spoken(action), observation])
            if success:
                return steps
        return None

    @staticmethod
    def spoken(command: str) -> str:
        """A command in the words of the prompt's action list (paper figure 11)."""
        command = re.sub(r"^move (.+?) to (.+)", r"put \1 in/on \2", command)
        return re.sub(r"^use ", "toggle ", command)

    def _search(self):
        """The actions of alfworld's hand-coded expert, one at a time: each depends on what was
        seen. They end when the expert gives up."""
        random.seed(self.path.parent.name)  # the expert draws between equal choices
        self.env.request_infos.facts = True
        try:
            self.state = self.env.reset()
            yield from self._expert_actions()
        finally:
            self.env.request_infos.facts = False

    def _expert_actions(self):
        """What the expert does in the game as it is now."""
        from alfworld.agents.expert import HandCodedTWAgent

        last = "look"
        try:
            expert = HandCodedTWAgent(max_steps=200)
            expert.reset(str(self.path))
            expert.observe(self.state.feedback)
            while True:
                facts = sorted(self.state["facts"], key=lambda f: (f.name, f.names))
                seen = {
                    "feedback": self.state.feedback,
                    "facts": facts,
                    "admissible_commands": self.state.admissible_commands,
                }
                action = expert.act(seen, 0, False, last)
                if action not in self.state.admissible_commands:
                    action = "look"
                yield action
                # it waits for "put", the word of older games, to know that its hands are empty
                last = re.sub(r"^move (.+?) to ", r"put \1 in/on ", action)
        except Exception:
            # The expert gives up with HandCodedAgentTimeout or HandCodedAgentFailed, and in rooms
            # that it was not written for with whatever error its code runs into. In all cases the
            # walkthrough is tried instead; if the game itself is broken, that fails visibly.
            return

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: expert steps -> plan steps. Instance numbers, looking around and
        closing doors are left out."""
        plan = []
        places = []  # where the expert went since it last handled a thing
        opened = False  # whether it opened the last of them
        taken = collections.Counter()  # how often it took each kind of thing
        needs_two = " two " in u.rsplit("Your task is to:", 1)[-1]
        for action, _ in steps:
            verb, *words = re.sub(r" \d+\b", "", action).split()
            if verb == "go":
                places.append(words[-1])
                opened = False
            elif verb == "open":
                opened = True
            elif verb in HANDLE:
                thing = words[0]
                if verb == "take":
                    taken[thing] += 1
                name = thing
                if needs_two and taken[thing]:
                    name = f"{ORDINALS.get(taken[thing], 'next')} {thing}"
                plan += way_to(name, places, opened, searched=verb in SEARCHED)
                plan.append(handling(verb, name, words))
                places = []
        return plan


def handling(verb: str, name: str, words: list[str]) -> str:
    """How a plan says what is done to a thing: "take the mug", "put the first mug in/on the shelf".
    `words`: of the action, after the verb."""
    if verb in SEARCHED:
        return f"{verb} the {name}"
    preposition = " ".join(words[1:-1])
    place = words[-1]
    return f"{verb} the {name} {preposition} the {place}"


def way_to(thing: str, places: list[str], opened: bool, searched: bool) -> list[str]:
    """The plan steps for the expert's way along `places` to the last one. A thing that had to be
    found is searched for in all kinds of places where the expert looked ("go to where the mug may
    be, such as the shelf or the desk"): nobody could know the last one before."""
    if not places:
        return []
    if searched:
        kinds = " or ".join(f"the {place}" for place in dict.fromkeys(places))
        return [f"go to where the {thing} may be, such as {kinds}"]
    way = [f"go to the {places[-1]}"]
    if opened:
        way.append(f"open the {places[-1]}")
    return way
