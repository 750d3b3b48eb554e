"""Every family of models that people may take as a planner trains right, or is refused at once."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import stage, write_jsonl
from families import FAMILIES, PROCESSOR_FILES, REFUSED, SINGLE, WITHOUT_ADAPTERS, save_family
from safetensors.torch import load_file
from test_training import PAIRS, TALKS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import common
from common import InputError, read_rows

sft, dpo = stage("02_sft"), stage("04_dpo")
FAST = ("llama", "qwen3", "qwen3_5", "gemma3", "gpt_oss")


class Watch:
    """What a run of a stage computes before its first step, and with the trained model."""

    def __init__(self, monkeypatch):
        self.calls = []  # of `target_log_probs`: (examples, log-probabilities)
        self.before = []  # those with the base model, of the run itself
        self.after = []  # one with the trained model
        target_log_probs = common.target_log_probs
        begin = common.Training.__init__
        set_learning_rate = common.set_learning_rate
        finish = common.Training.finish

        def record(model, examples, *args, **options):
            log_probs, owners = target_log_probs(model, examples, *args, **options)
            self.calls.append((examples, log_probs.detach()))
            return log_probs, owners

        def begun(run, *args):
            begin(run, *args)
            self.calls.clear()

        def end_of_first_step(optimizer, step, *args):
            if step > 0:
                self.before = self.before or list(self.calls)
            return set_learning_rate(optimizer, step, *args)

        def finished(run, method):
            self.before = self.before or list(self.calls)
            self.packing = run.model.packing
            rows, _ = self.before[0]
            with torch.no_grad():
                self.after = [(rows, target_log_probs(run.model, rows)[0])]
            finish(run, method)

        monkeypatch.setattr(common, "target_log_probs", record)
        monkeypatch.setattr(common, "set_learning_rate", end_of_first_step)
        monkeypatch.setattr(common.Training, "__init__", begun)
        monkeypatch.setattr(common.Training, "finish", finished)


class Killed(BaseException):
    """A kill."""


def load(folder):
    """The plain model, of the class that the folder names."""
    [class_name] = config_of(folder)["architectures"]
    model = getattr(transformers, class_name).from_pretrained(folder).eval()
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # SDPA ignores the soft cap
    return model


def alone(model, examples):
    """The log-probability of each target of the examples, each sequence by itself."""
    values = []
    for example in examples:
        for ids, mask in example.sequences:
            with torch.no_grad():
                # a short row first: the rotary embeddings of some models remember a longer one
                model(input_ids=torch.tensor([ids[:2]]), use_cache=False)
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            log_probs = logits.float().log_softmax(-1)
            values += [log_probs[i - 1, ids[i]] for i in range(1, len(ids)) if mask[i]]
    return torch.stack(values)


def assert_alone(model, calls) -> None:
    assert calls
    for examples, log_probs in calls:
        torch.testing.assert_close(log_probs, alone(model, examples), rtol=0, atol=1e-4)


def weights_of(folder: Path) -> dict:
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def config_of(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    return config


def tied(model) -> set:
    """The names of the weights that are one tensor."""
    names = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {tuple(group) for group in names.values() if len(group) > 1}


def assert_saved(out: Path, base: Path) -> None:
    """All files and weights of the base model, the weights changed where a planner has any."""
    assert config_of(out) == config_of(base)
    before = weights_of(base)
    after = weights_of(out)
    assert after.keys() == before.keys()
    changed = []
    for name, weight in before.items():
        assert after[name].shape == weight.shape and after[name].dtype == weight.dtype, name
        if not torch.equal(after[name], weight):
            changed.append(name)
    assert changed and not any("vision" in name or "audio" in name for name in changed)
    for file in PROCESSOR_FILES:
        assert (out / file).exists() == (base / file).exists(), file


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_rows(out / "metrics.jsonl")]


def families() -> list:
    """Those that the installed transformers has; slow, but for a few."""
    found = []
    for name in FAMILIES:
        if name.split()[0] in CONFIG_MAPPING:
            found.append(pytest.param(name, marks=() if name in FAST else pytest.mark.slow))
    return found


class Family:
    """A base model in `folder`, and the rows for both stages."""

    def __init__(self, folder: Path, name: str, tokenizer, monkeypatch):
        self.folder = folder
        self.base = folder / "base"
        self.monkeypatch = monkeypatch
        save_family(self.base, name, tokenizer)
        talks = [{"messages": talk} for talk in TALKS]
        self.data = {
            sft: str(write_jsonl(folder / "talks.jsonl", talks)),
            dpo: str(write_jsonl(folder / "pairs.jsonl", PAIRS)),
        }

    def train(self, module, out: str, stop_after=None, **settings) -> Watch:
        """Run a stage with all rows in one step. The end of the process comes after the checkpoint
        of step `stop_after`."""
        end_step = common.Training.end_step

        def stop(run, done, metrics):
            line = end_step(run, done, metrics)
            if done == stop_after:
                run.append.__exit__()  # as the end of the process would
                raise Killed
            return line

        args = module.Args(model=str(self.base), data=self.data[module], out=str(self.folder / out))
        args.precision = "fp32"
        args.lr = 1e-2
        args.seed = 1  # another order than that of the reference's log-probabilities
        for name, value in settings.items():
            setattr(args, name, value)
        with self.monkeypatch.context() as patch:
            patch.setattr(common.Training, "end_step", stop)
            watch = Watch(patch)
            try:
                module.main(args)
            except Killed:
                pass
            finally:
                AcceleratorState._reset_state(True)
        return watch

    def check_sft(self, packed: bool) -> None:
        run = self.train(sft, "sft", epochs=2)
        assert (run.packing != "single") == packed
        plain = load(self.base)
        assert_alone(plain, run.before)
        trained = load(self.folder / "sft")
        assert_alone(trained, run.after)
        assert tied(trained) == tied(plain)
        assert_saved(self.folder / "sft", self.base)

    def check_resume(self) -> None:
        """Bit for bit as without the kill, and as without gradient checkpointing."""
        options = {"epochs": 2, "save_steps": 1, "gradient_checkpointing": True}
        self.train(sft, "killed", stop_after=1, **options)
        assert (self.folder / "killed.partial" / "step-1").exists()
        self.train(sft, "killed", **options)
        assert losses(self.folder / "killed") == losses(self.folder / "sft")
        whole = weights_of(self.folder / "sft")
        for name, weight in weights_of(self.folder / "killed").items():
            assert torch.equal(weight, whole[name]), name

    def check_dpo(self, rank: int) -> None:
        out = f"mpo-{rank}"
        run = self.train(dpo, out, epochs=1, lora_rank=rank)
        assert_alone(load(self.base), run.before)
        assert losses(self.folder / out)[0] == pytest.approx(math.log(2), abs=1e-5)
        assert_alone(load(self.folder / out), run.after)
        assert_saved(self.folder / out, self.base)

    def check_refused(self, reason: str, rank: int = 0) -> None:
        with pytest.raises(InputError, match=reason) as error:
            self.train(sft, "refused", epochs=2, lora_rank=rank)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", families())
def test_family(tmp_path, tokenizer, monkeypatch, name):
    """SFT, whole and killed after a checkpoint, and DPO of all weights and of adapters. Packed
    log-probabilities are those of rows alone in the plain model, of the base and of what is
    trained; what is saved has all that the base has."""
    family = Family(tmp_path, name, tokenizer, monkeypatch)
    if name in REFUSED:
        family.check_refused(REFUSED[name])
        return
    family.check_sft(packed=name not in SINGLE)
    family.check_resume()
    family.check_dpo(rank=0)
    if name in WITHOUT_ADAPTERS:
        family.check_refused("no linear layer for adapters", rank=2)
    else:
        family.check_dpo(rank=2)
