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


@functools.cache
def textworld():
    """(textworld.start's environment of a game file). TextWorld is patched for speed; what the
    agent is told does not change:

    - a game is translated once per process, not four times per episode;
    - the second translation, for the planner expert, is skipped;
    - grammar rules and conditions are parsed once, not at every derivation;
    - grammar contexts are copied one level deep, because nobody changes the entities in them."""
    try:
        import fast_downward
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
        from textworld.envs.pddl import textgen
        from textworld.logic import Rule
    except ImportError as e:
        raise InputError(
            f"this environment needs the package alfworld ({e}): pip install -r "
            f"{Path(__file__).with_name('requirements.txt')}"
        ) from None
    translate = functools.lru_cache(32)(fast_downward.pddl2sas)
    load_lib, cached = fast_downward.load_lib, functools.lru_cache(4096)

    def load_lib_without_replan():
        lib = load_lib()
        lib.load_sas_replan = lambda sas: None
        return lib

    fast_downward.load_lib = load_lib_without_replan
    fast_downward.pddl2sas = lambda domain, problem, verbose=False, optimize=False: (
        (None, "") if optimize else translate(domain, problem)
    )
    textgen._parse_and_convert = cached(textgen._parse_and_convert)
    Rule.parse_conjunctive_query = cached(Rule.parse_conjunctive_query)
    textgen.copy_context = lambda c: {
        **c,
        "variables": dict(c["variables"]),
        "mapping": dict(c["mapping"]),
    }
    infos = textworld.EnvInfos(won=True, admissible_commands=True)
    return lambda path: textworld.start(path, infos, wrappers=[AlfredDemangler(), AlfredInfos])


class ALFWorld(Environment):
    """Reward: 1 when the task is done, else 0. Actions are understood in the words of all versions
    of the games: `put X in/on Y` and `move X to Y`, `toggle X` and `use X`."""

    shares_tasks, FAILED, VARIABLES = True, ("Nothing happens",), ("ALFWORLD_DATA",)
    SECONDS = {"expert": 0.6, "reset": 0.03, "step": 0.005}
    FOLDER = "json_2.1.1"
    SPLITS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
    MAX_STEPS = dict.fromkeys(
        (
            "pick_and_place_simple",
            "look_at_obj_in_light",
            "pick_clean_then_place_in_recep",
            "pick_heat_then_place_in_recep",
            "pick_cool_then_place_in_recep",
            "pick_two_obj_and_place",
        ),
        30,
    )
    VERBS = set(
        "go take put open close toggle clean heat cool examine look find locate search "
        "check choose repeat".split()
    )
    PUT = re.compile(r"(?:put|move|place) (.+?) (?:in/on|into|onto|in|on|to) (.+)")
    TOGGLE = re.compile(r"(?:use|toggle|turn on) (\S+ \d+)\b.*")

    def __init__(self, sessions: int = 8):
        self.env = self.path = None

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
                    trials = sorted(kind.glob("trial_*"))
                    found[split] |= {f"{name}/{trial.name}": trial for trial in trials}
        if not any(found.values()):
            others = ", ".join(sorted(p.name for p in data.glob("json_*") if p.name != cls.FOLDER))
            others = f" ({data} has {others} only)" if others else ""
            raise InputError(
                f"no ALFWorld games in {data / cls.FOLDER}{others}: fetch them with "
                f"`make data`, or set ALFWORLD_DATA to the folder of {cls.FOLDER}"
            )
        return found

    def columns(self, split: str) -> list[list[str]]:
        """The games 'TYPE/TRIAL' of each type in a seeded order. Games that are incomplete or not
        known to be solvable are named on stderr and left out."""
        columns, bad = {kind: [] for kind in self.MAX_STEPS}, []
        for task, folder in self.games()[split].items():
            if reason := self._unfit(folder):
                bad.append(f"left out: {folder}: {reason}")
            else:
                columns[task_type(task)].append(task)
        for line in bad[:5] + [f"left out: {len(bad) - 5} more games"] * (len(bad) > 5):
            print(line, file=sys.stderr, flush=True)
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
        if not any(task in tasks for tasks in cls.games().values()):
            raise InputError(
                f"unknown ALFWorld task {task!r}: it must be TYPE/TRIAL, a trial "
                f"folder of the games, with TYPE one of {', '.join(cls.MAX_STEPS)}"
            )

    def reset(self, task: str) -> str:
        """Start `task`; the instruction u: the room and the task, without the game's banner."""
        self.check(task)
        self.task = task
        folder = next(tasks[task] for tasks in self.games().values() if task in tasks)
        path = folder / "game.tw-pddl"
        try:
            if self.env is None:
                self.env = textworld()(str(path))
            elif path != self.path:
                self.env.load(str(path))
            self.state = self.env.reset()
        except (Exception, SystemExit) as e:
            self.env = None
            if isinstance(e, InputError):
                raise
            raise InputError(
                f"{path} cannot be played ({type(e).__name__}: {e}): fetch the games "
                "again (make data)"
            ) from None
        self.path = path
        return self.state.feedback.split("\n\n", 1)[1]

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success)."""
        known = self.state.admissible_commands
        command = next((c for c in self.meanings(action) if c in known), None)
        if command is None:
            return "Nothing happens.", float(self.state.won), self.state.won, self.state.won
        self.state, _, _ = self.env.step(command)
        observation = re.sub(r"^You arrive at .*?\. ", "", self.state.feedback)
        return observation, float(self.state.won), self.state.won, self.state.won

    @classmethod
    def meanings(cls, action: str) -> list[str]:
        """The commands that an action can mean, in the words of any version of the games. Capitals,
        quotes and a trailing dot are ignored."""
        action = " ".join(action.strip(" \t\"'`.").lower().split())
        if match := cls.PUT.fullmatch(action):
            x, y = match.groups()
            return [f"move {x} to {y}", f"put {x} in/on {y}", f"put {x} in {y}", f"put {x} on {y}"]
        if match := cls.TOGGLE.fullmatch(action):
            return [f"use {match[1]}", f"toggle {match[1]}"]
        return [action]

    def expert(self, task: str) -> dict | None:
        """{"instruction", "steps": [[action, observation], ...], "reward", "by"}: the trajectory of
        alfworld's hand-coded expert, which searches as a person would ("search"); if it does not
        succeed within the step limit, of the game's own walkthrough; None if that fails too.
        Actions are in the words of the prompt."""
        for by, actions in (("search", self._search), ("walkthrough", self._walkthrough)):
            u = self.reset(task)
            if steps := self._replay(actions()):
                return {"instruction": u, "steps": steps, "reward": 1.0, "by": by}
        return None

    def _walkthrough(self):
        return iter(json.loads(self.path.read_bytes()).get("walkthrough") or [])

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
        seen. They end when the expert gives up (it raises a dozen kinds of errors)."""
        from alfworld.agents.expert import HandCodedTWAgent

        last = "look"
        random.seed(self.path.parent.name)  # the expert draws between equal choices
        self.env.request_infos.facts = True
        try:
            self.state = self.env.reset()
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
                action = action if action in self.state.admissible_commands else "look"
                yield action
                # it waits for "put", the word of older games, to know that its hands are empty
                last = re.sub(r"^move (.+?) to ", r"put \1 in/on ", action)
        except Exception:
            return
        finally:
            self.env.request_infos.facts = False

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: expert steps -> plan steps. A thing is searched for in all kinds of
        places where the expert looked ("go to where the mug may be, such as the shelf or the
        desk"): nobody could know the last one before. Instance numbers, looking around and closing
        doors are left out."""
        plan, places, opened, taken = [], [], False, collections.Counter()
        two = " two " in u.rsplit("Your task is to:", 1)[-1]
        for action, _ in steps:
            verb, *rest = re.sub(r" \d+\b", "", action).split()
            if verb == "go":
                places, opened = [*places, rest[-1]], False
            elif verb == "open":
                opened = True
            elif verb in ("take", "put", "heat", "cool", "clean", "toggle"):
                thing = rest[0]
                taken[thing] += verb == "take"
                if two and taken[thing]:
                    which = ["first", "second", "next"][min(taken[thing], 3) - 1]
                    thing = f"{which} {thing}"
                search = verb in ("take", "toggle")
                if places and search:
                    kinds = " or ".join(f"the {place}" for place in dict.fromkeys(places))
                    plan.append(f"go to where the {thing} may be, such as {kinds}")
                elif places:
                    plan += [f"go to the {places[-1]}"] + [f"open the {places[-1]}"] * opened
                with_place = "" if search else f" {' '.join(rest[1:-1])} the {rest[-1]}"
                plan.append(f"{verb} the {thing}{with_place}")
                places = []
        return plan
