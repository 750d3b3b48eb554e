"""A toy environment: four rooms in a row, a thing to find in one of them.

This is an example of an environment. To make one of your own, copy this folder to data/NAME/ and
change env.py and the prompts (agent.txt, planner.txt, teacher.txt). What is not defined here has a
default in `common.Environment`, and so has all that is not in README.md's smallest example.
"""

from common import Environment, InputError, task_type


class Corridor(Environment):
    """Reward: 0.5 in the thing's room, 1 (success) when it is taken. Touching the trap loses.

    An object is one session: it plays one episode at a time, and many live in one process."""

    # The splits: train, and any number of test splits. What a value holds is up to `columns`, which
    # alone reads it: here the number of the split's first task.
    SPLITS = {"train": 0, "seen": 10, "unseen": 20}
    MAX_STEPS = {"find-lamp": 6, "find-key": 8}  # {task type: step limit of an episode}
    VERBS = {"walk", "take", "go"}  # the first words that quality control allows in a plan step
    FAILED = ("You cannot",)  # how an observation begins that says: invalid action
    COUNTED = ("You cannot",)  # optional: ten such observations in a row end an episode
    SECONDS = {"expert": 0.001, "reset": 0.001, "step": 0.001}  # measured, for `make estimate`

    def columns(self, split):
        """The tasks of a split, a list for each task type; the same ones at every call. A task is
        named TYPE/VARIATION: find-lamp/0, find-lamp/1, ..."""
        first = self.SPLITS[split]
        columns = []
        for kind in self.MAX_STEPS:
            columns.append([f"{kind}/{number}" for number in range(first, first + 4)])
        return columns

    @classmethod
    def check(cls, task):
        """Raise `InputError` if there is no such task, and say what a task looks like."""
        if task_type(task) not in cls.MAX_STEPS or not task.split("/")[-1].isdecimal():
            raise InputError(f"unknown task {task!r}: TYPE/NUMBER, TYPE one of find-lamp, find-key")

    def reset(self, task):
        """Start an episode of the task, always in the same state; returns its instruction u."""
        self.check(task)
        kind, number = task.split("/")
        self.thing = kind.removeprefix("find-")
        self.goal = 1 + int(number) % 3  # the thing's room; the episode begins in room 0
        self.room = 0
        self.reward = 0.0
        return f"Find the {self.thing} of corridor {number}."

    def step(self, action):
        """(observation, reward so far in [0, 1], done, success). An agent can say anything: answer
        an action that makes no sense with an observation that begins as in `FAILED`."""
        if action == "touch the trap":
            return "You are lost.", self.reward, True, False
        if action == "walk on" and self.room < 3:
            self.room += 1
            if self.room != self.goal:
                return "You see nothing.", self.reward, False, False
            self.reward = 0.5
            return f"You see a {self.thing}.", self.reward, False, False
        if action == f"take {self.thing}" and self.room == self.goal:
            return f"You have the {self.thing}.", 1.0, True, True
        return "You cannot do that.", self.reward, False, False

    def expert(self, task):
        """A trajectory that solves the task, from which the teacher writes a seed plan; None if
        there is none."""
        u = self.reset(task)
        actions = ["walk on"] * self.goal + [f"take {self.thing}"]
        steps = []
        for action in actions:
            observation, reward, _done, _success = self.step(action)
            steps.append([action, observation])
        return {"instruction": u, "steps": steps, "reward": reward}

    @staticmethod
    def abstract(u, steps):
        """A plan, a step each, from an expert's steps, without a model (`--teacher rules`). It must
        not tell what nobody can know before the task is played: here the room."""
        return ["walk on until the thing is there", "take the thing"]
