"""ALFWorld's text games (Shridhar et al. 2020), alfworld 0.4."""

import collections
import copy
import functools
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

from common import Environment, InputError, task_type


class AlfredGame:
    """One ALFWorld game, translated once, and a table of all that was seen in it: state -> command ->
    (observation, next state). A game is deterministic, and what it prints depends on the state alone (the
    engine sorts the facts it lists), so the M x N episodes of a task find most of their answers here.

    A state is named by the facts in which it differs from the first one. For an answer that is not in the
    table, one of a few engines (the planner's library and the facts of one state) is brought to the state
    by repeating the operators that lead there, which costs no text. They are shared by all games."""

    ENGINES, MAX_STATES = 16, 20_000  # of a process, 2.4 MB of library each; of a game, then its table starts over
    engines: list = []

    def __init__(self, path: Path):
        tw, data = self.textworld(), self.read(path)
        self.walkthrough, sentence = data.get("walkthrough") or [], self.TASK_RULE.search(data["grammar"])
        if not sentence:
            raise InputError(f"{path} states no task: it is from another version of ALFWorld; fetch the games again (make data)")
        # all games share one grammar but for the sentence that states the task
        base = tw.logic(data["pddl_domain"], data["grammar"].replace(sentence[1], '""'))
        task = tw.textgen.ContextSensitiveGrammar.parse(json.dumps({"task": [{"rhs": json.loads(sentence[1])}]}))
        self.logic, self.grammar = copy.copy(base), copy.copy(base.grammar)
        self.grammar._rules = {**base.grammar._rules, **task._rules}
        self.logic.grammar = self.grammar
        engine = self._engine()
        try:
            self.initial = tw.PddlState(engine.lib, data["pddl_problem"], self.logic)
        except (Exception, SystemExit) as e:
            raise InputError(f"{path} cannot be translated ({type(e).__name__}: {e}); fetch the games again (make data)") from None
        self.sas, self.facts = self.initial.sas.encode(), frozenset(self.initial.facts)
        self.names = {v.name: tw.EntityInfo(v.name, v.type) for fact in self.facts for v in fact.arguments}
        demangler = tw.Demangler(game_infos=self.names)
        for info in self.names.values():
            info.name, info.definite, info.indefinite = demangler.demangle_alfred_name(info.id), "the", "a"
        self.operators: dict[int, SimpleNamespace] = {}
        self._start_over()
        self.intro = self._say("#intro#", self.initial)

    TASK_RULE = re.compile(r'"task":\s*\[\s*\{\s*"rhs":\s*("(?:[^"\\]|\\.)*")')

    @staticmethod
    def read(path: Path) -> dict:
        """The game's data. Raises `InputError` for a file that is missing, truncated or of another version."""
        try:
            data = json.loads(path.read_bytes())
        except OSError as e:
            raise InputError(f"cannot read the game {path} ({e.strerror}): fetch the games again (make data)") from None
        except ValueError as e:
            raise InputError(f"{path} is not whole ({e}): fetch the games again (make data)") from None
        missing = [k for k in ("pddl_domain", "pddl_problem", "grammar") if not isinstance(data, dict) or k not in data]
        if missing:
            raise InputError(f"{path} has no {missing[0]!r}: it is from another version of ALFWorld; fetch the games again (make data)")
        return data

    @staticmethod
    @functools.cache
    def textworld():
        """TextWorld's PDDL engine, with what never changes computed once:

        - `PddlState` translates the game twice; the second translation is for the planner expert only;
        - every derivation parses its rule, and every condition, with TatSu: they are parsed once;
        - contexts are copied deeply, entities and all, at every symbol: one level is enough, as nobody
          changes an entity."""
        try:
            import fast_downward
            from alfworld.agents.utils.misc import Demangler
            from textworld.envs.pddl import logic, textgen
            from textworld.generator.game import EntityInfo
            from textworld.logic import Action, Placeholder, Rule, Variable
        except ImportError as e:
            raise InputError(f"ALFWorld needs the package alfworld ({e}): pip install alfworld==0.4.2") from None
        translate, cached = fast_downward.pddl2sas, functools.lru_cache(4096)
        fast_downward.pddl2sas = lambda domain, problem, verbose=False, optimize=False: (
            (None, "") if optimize else translate(domain, problem, verbose))
        textgen._parse_and_convert = cached(textgen._parse_and_convert)
        Rule.parse_conjunctive_query = cached(Rule.parse_conjunctive_query)
        textgen.copy_context = lambda c: {**c, "variables": dict(c["variables"]), "mapping": dict(c["mapping"])}
        return SimpleNamespace(
            textgen=textgen, logic=functools.lru_cache(8)(logic.GameLogic), PddlState=logic.PddlState, EntityInfo=EntityInfo,
            Demangler=Demangler, Action=Action, Placeholder=Placeholder, Variable=Variable, Operator=fast_downward.Operator,
            load_lib=fast_downward.load_lib)

    def _start_over(self) -> None:
        self.start = SimpleNamespace(key=frozenset(), path=(), commands=None, next={}, won=False)
        self.states = {self.start.key: self.start}

    def _engine(self):
        """An engine to use for something else: a new one, or the one not used for longest."""
        engines = AlfredGame.engines
        if len(engines) < self.ENGINES:
            engines.append(SimpleNamespace(lib=self.textworld().load_lib()))
            engines[-1].lib.load_sas_replan = lambda sas: None
        else:
            engines.append(engines.pop(0))
        engines[-1].game = engines[-1].here = None
        return engines[-1]

    def at(self, here):
        """An engine in the state `here`."""
        mine = [e for e in AlfredGame.engines if e.game is self]
        engine = next((e for e in mine if e.here is here), None)
        if engine is None:  # one that is on the way there, or one that starts over
            engine = max((e for e in mine if here.path[: len(e.path)] == e.path), key=lambda e: len(e.path), default=None)
            if engine is None:
                engine = self._engine()
                engine.lib.load_sas(self.sas)
                engine.game, engine.path, engine.facts = self, (), self._copy(self.initial, engine.lib)
            for operator in here.path[len(engine.path) :]:
                self._apply(engine, operator)
            engine.here = here
        AlfredGame.engines.remove(engine)
        AlfredGame.engines.append(engine)
        return engine

    @staticmethod
    def _copy(state, lib):
        """`PddlState` with facts of its own: making one anew reads every atom from the library again."""
        new = copy.copy(state)
        new._facts = collections.defaultdict(set, {k: set(v) for k, v in state._facts.items()})
        new._vars_by_type = collections.defaultdict(set, {k: set(v) for k, v in state._vars_by_type.items()})
        new._vars_by_name, new._var_counts, new.downward_lib = dict(state._vars_by_name), state._var_counts.copy(), lib
        return new

    def _apply(self, engine, number: int) -> None:
        operator = self.operators[number]
        engine.game = engine.here = None  # where it is, is not known until all of this is done
        engine.facts._operators = {number: operator}
        engine.facts.apply(operator)
        engine.game, engine.path = self, (*engine.path, number)

    def _say(self, rule: str, facts, mapping: dict | None = None) -> str:
        mapping = mapping or {}
        variables = {ph.name: self.names[var.name] for ph, var in mapping.items()}
        return self.grammar.derive(rule, {"state": facts, "facts": (), "variables": variables, "mapping": mapping,
                                          "entity_infos": self.names})

    def commands(self, here) -> dict[str, int]:
        """{admissible command: its operator} in the state `here`, in the engine's order."""
        if here.commands is None:
            tw, engine = self.textworld(), self.at(here)
            found = (tw.Operator * engine.lib.get_applicable_operators_count())()
            engine.lib.get_applicable_operators(found)
            here.commands = {}
            for o in found:
                operator = self.operators.get(o.id) or self._operator(o, engine.facts)
                here.commands.setdefault(operator.command, operator.id)
        return here.commands

    def _operator(self, o, facts):
        """What the library's operator `o` is called and says. Its command never changes: names are fixed and
        receptacles stay where they are."""
        tw, (name, *arguments) = self.textworld(), o.name.split()
        action = tw.Action(name=name, preconditions=[], postconditions=[])
        action.mapping = {tw.Placeholder(p.name.strip("?"), p.type_name): tw.Variable(argument, p.type_name)
                          for p, argument in zip(facts._actions[name].parameters, arguments, strict=False)}
        action.command_template = self._say(self.logic.actions[name].template, facts, action.mapping)
        command = action.format_command({k: info.name for k, info in self.names.items()})
        self.operators[o.id] = SimpleNamespace(id=o.id, nb_effect_atoms=o.nb_effect_atoms, command=command,
                                               mapping=action.mapping, rule=self.logic.actions[name].feedback_rule)
        return self.operators[o.id]

    def play(self, here, command: str):
        """(observation, next state) of an admissible command."""
        if command not in here.next:
            number = self.commands(here)[command]
            engine, operator = self.at(here), self.operators[number]
            self._apply(engine, number)
            key = self.facts.symmetric_difference(engine.facts.facts)
            there = self.states.get(key)
            if there is None:
                if len(self.states) >= self.MAX_STATES:
                    self._start_over()
                there = self.states[key] = SimpleNamespace(key=key, path=engine.path, commands=None, next={},
                                                           won=bool(engine.lib.check_goal()))
            engine.here = there
            here.next[command] = self._say(operator.rule, engine.facts, operator.mapping), there
        return here.next[command]


class ALFWorld(Environment):
    """ALFWorld's text games (Shridhar et al. 2020), alfworld 0.4; all sessions of a process share the games they
    play (`AlfredGame`).

    Reward: 1 when the task is done, else 0. What the agent says is understood in the words of every
    version of the games: `put X in/on Y` and `move X to Y`, `toggle X` and `use X`."""

    shares_tasks, FAILED = True, ("Nothing happens",)
    FOLDER, SPLITS = "json_2.1.1", {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
    MAX_STEPS = dict.fromkeys(("pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep",
                               "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep", "pick_two_obj_and_place"), 30)
    VERBS = set("go take put open close toggle clean heat cool examine look find locate search check choose repeat".split())
    PUT = re.compile(r"(?:put|move|place) (.+?) (?:in/on|into|onto|in|on|to) (.+)")
    TOGGLE = re.compile(r"(?:use|toggle|turn on) (\S+ \d+)\b.*")

    def __init__(self, sessions: int = 8):
        self.game = self.here = None

    # -- the protocol ----------------------------------------------------------------------------

    @classmethod
    @functools.cache
    def games(cls) -> dict[str, dict[str, Path]]:
        """{split: {task 'TYPE/TRIAL': the game's folder}}. Raises `InputError` when there are no games."""
        data = Path(os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser()
        found = {split: {f"{kind.name.split('-')[0]}/{trial.name}": trial
                         for kind in sorted((data / cls.FOLDER / folder).glob("*-*")) for trial in sorted(kind.glob("trial_*"))
                         if kind.name.split("-")[0] in cls.MAX_STEPS and "movable" not in kind.name and "Sliced" not in kind.name}
                 for split, folder in cls.SPLITS.items()}
        if not any(found.values()):
            others = ", ".join(sorted(p.name for p in data.glob("json_*") if p.name != cls.FOLDER))
            raise InputError(f"no ALFWorld games in {data / cls.FOLDER}{f' ({data} has {others} only)' if others else ''}: fetch them with "
                             f"`make data`, or set ALFWORLD_DATA to the folder that has {cls.FOLDER}")
        return found

    def columns(self, split: str) -> list[list[str]]:
        """The games 'TYPE/TRIAL' of each type in a seeded order. Games that are not whole, or that the games' makers
        found unsolvable, are named and left out."""
        columns, bad = {kind: [] for kind in self.MAX_STEPS}, []
        for task, folder in self.games()[split].items():
            if reason := self._unfit(folder):
                bad.append(f"left out: {folder}: {reason}")
            else:
                columns[task_type(task)].append(task)
        print(*bad[:5], *([f"left out: {len(bad) - 5} more games"] if len(bad) > 5 else []), sep="\n", end="\n" if bad else "",
              file=sys.stderr, flush=True)
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
            return "game.tw-pddl is not whole"
        return None if re.search(rb'"solvable"\s*:\s*true', content) else "not known to be solvable"

    @classmethod
    def check(cls, task: str) -> None:
        if task_type(task) not in cls.MAX_STEPS or not any(task in tasks for tasks in cls.games().values()):
            raise InputError(f"unknown ALFWorld task {task!r}: it must be TYPE/TRIAL, a trial folder of the games, with TYPE one of "
                             f"{', '.join(cls.MAX_STEPS)}")

    @staticmethod
    @functools.lru_cache(32)
    def _load(folder: Path) -> AlfredGame:
        return AlfredGame(folder / "game.tw-pddl")

    def reset(self, task: str) -> str:
        """Start `task`; the instruction u: the room and the task, without the game's banner."""
        self.check(task)
        self.task, self.folder = task, next(tasks[task] for tasks in self.games().values() if task in tasks)
        self.game = self._load(self.folder)
        self.here = self.game.start
        return self.game.intro.split("\n\n", 1)[1]

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success)."""
        known = self.game.commands(self.here)
        command = next((c for c in self.meanings(action) if c in known), None)
        if command is None:
            observation = "Nothing happens."
        else:
            observation, self.here = self.game.play(self.here, command)
        return re.sub(r"^You arrive at .*?\. ", "", observation), float(self.here.won), self.here.won, self.here.won

    @classmethod
    def meanings(cls, action: str) -> list[str]:
        """The commands an action can mean, in the words of any version of the games. Capitals, quotes and
        a trailing dot are forgiven."""
        action = " ".join(action.strip(" \t\"'`.").lower().split())
        if match := cls.PUT.fullmatch(action):
            x, y = match.groups()
            return [f"move {x} to {y}", f"put {x} in/on {y}", f"put {x} in {y}", f"put {x} on {y}"]
        if match := cls.TOGGLE.fullmatch(action):
            return [f"use {match[1]}", f"toggle {match[1]}"]
        return [action]

    def expert(self, task: str) -> dict | None:
        """{"instruction", "steps": [[action, observation], ...], "reward", "by", "guided"}: the trajectory of
        alfworld's hand-coded expert, which searches as a person would; where it does not succeed within
        the step limit, of the game's own walkthrough; None if that fails too. Actions are in the words of
        the prompt. `guided`: the steps of an expert who has the plan."""
        for by, actions in (("search", self._search), ("walkthrough", lambda: iter(self.game.walkthrough))):
            u = self.reset(task)
            if e := self._replay(actions()):
                self.reset(task)
                return {"instruction": u, "steps": e, "reward": 1.0, "by": by, "guided": self._replay(self._guided(e)) or e}
        return None

    def _replay(self, actions) -> list | None:
        """[[action, observation], ...] until the task is done; None when it is not within the step limit.
        Looking around is left out: it changes nothing, and the prompt's action list does not have it."""
        steps = []
        for action in itertools.islice(actions, self.max_steps(self.task)):
            observation, _, _, success = self.step(action)
            if action.split()[0] not in ("look", "examine", "inventory", "help"):
                steps.append([self.spoken(action), observation])
            if success:
                return steps
        return None

    @staticmethod
    def _guided(steps: list):
        """The actions without the search of places of a kind that a plan would not name: before each
        manipulation only those of the kind where it takes place."""
        search = []
        for action, _ in steps:
            if action.startswith(("go to ", "open ", "close ")):
                search.append(action)
                continue
            kind = next((a.split()[-2] for a in reversed(search) if a.startswith("go to ")), None)
            yield from (a for a in search if a.split()[-2] == kind)
            yield action
            search = []

    @staticmethod
    def spoken(command: str) -> str:
        """A command in the words of the prompt's action list (paper figure 11)."""
        return re.sub(r"^use ", "toggle ", re.sub(r"^move (.+?) to (.+)", r"put \1 in/on \2", command))

    def _search(self):
        """The actions of alfworld's hand-coded expert, one at a time: what it does next depends on what it
        sees. It ends where the expert gives up (it raises a dozen kinds of errors)."""
        from alfworld.agents.expert import HandCodedTWAgent

        game, last = self.game, "look"
        tell = collections.namedtuple("Fact", "name names")
        random.seed(self.folder.name)  # where it is indifferent it draws
        try:
            expert = HandCodedTWAgent(max_steps=200)
            expert.reset(str(self.folder / "game.tw-pddl"))
            expert.observe(game.intro)
            raw = game.intro
            while True:
                facts = sorted(tell(f.name, tuple(game.names[v.name].name for v in f.arguments)) for f in game.at(self.here).facts.facts)
                commands = sorted(game.commands(self.here))
                action = expert.act({"feedback": raw, "facts": facts, "admissible_commands": commands}, 0, False, last)
                before, action = self.here, action if action in commands else "look"
                yield action
                raw = before.next[action][0]
                # it waits for "put", as the games said before version 0.4, to know that its hands are empty
                last = re.sub(r"^move (.+?) to ", r"put \1 in/on ", action)
        except Exception:
            return

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: expert actions -> plan steps. What the expert visited in vain is dropped and
        what it found is searched for ("go to where a mug may be, such as a shelf"); instance numbers go;
        looking around and closing doors are left out."""
        plan, place, opened, taken = [], None, False, collections.Counter()
        two = " two " in u.rsplit("Your task is to:", 1)[-1]
        for action, _ in steps:
            verb, *rest = re.sub(r" \d+\b", "", action).split()
            if verb == "go":
                place, opened = rest[-1], False
            elif verb == "open":
                opened = True
            elif verb in ("take", "put", "heat", "cool", "clean", "toggle"):
                thing = rest[0]
                taken[thing] += verb == "take"
                if two and taken[thing]:
                    thing = f"{['first', 'second', 'next'][min(taken[thing], 3) - 1]} {thing}"
                if place:
                    unsure = verb in ("take", "toggle")
                    plan.append(f"go to where the {thing} may be, such as the {place}" if unsure else f"go to the {place}")
                    plan += [f"open the {place}"] * opened
                plan.append(f"{verb} the {thing}" + (f" {' '.join(rest[1:-1])} the {rest[-1]}" if rest[1:] else ""))
                place = None
        return plan
