import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from bitwright.errors import BitwrightError
from bitwright.layers.base import QuantLayer
from bitwright.methods import Method
from bitwright.quantizer import Quantizer
from bitwright.training import evaluate as evaluation
from bitwright.training.checkpoint import load_checkpoint
from bitwright.training.data import load_data
from bitwright.training.diagnose import Diverged, first_bad_layer
from bitwright.training.evaluate import evaluate, some_images
from bitwright.training.folder import RunFolder, load_run
from bitwright.training.interrupt import Interrupted
from bitwright.training.loop import Trainer
from bitwright.training.methods import METHODS
from bitwright.training.recipe_file import dump_recipe

from .runs import (
    PARTNER,
    StopAfter,
    assert_same,
    quiet,
    recipe,
    resume,
    rows_of,
    state_of,
    train,
    train_in_pieces,
)

FULL = (
    PARTNER,
    "methods=[kd]",
    "optimizer={name: adamw, lr: 0.003, accumulate: 3, ema: 0.9, clip_norm: 1.0, label_smoothing: 0.1}",
    "schedule.warmup_epochs=0.5",
    "channels_last=true",
)


def test_a_run_leaves_the_files_of_the_contract(tmp_path):
    summary = train(tmp_path, PARTNER, "schedule={epochs: 3, batch_size: 20}")
    run = tmp_path / "run"
    written = json.loads((run / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    keys = {"accuracy", "accuracy_best", "float_accuracy", "weight_bits", "input_bits", "bitops", "size_bytes"}
    keys |= {"epochs", "train_seconds", "seed", "versions"}
    assert keys <= written.keys()
    assert written["weight_bits"]["conv1"] == written["weight_bits"]["fc"] == 8
    assert written["input_bits"]["layer2.0.conv2"] == 4
    assert written["environment"]["threads"] == 1
    rows = rows_of(tmp_path)
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    assert rows[-1]["accuracy"] == written["accuracy"]
    assert max(r["accuracy"] for r in rows) == written["accuracy_best"]
    assert written["accuracy"] > 0.5  # it learns: chance is 0.1
    assert {p.name for p in run.iterdir()} == {
        *("recipe.yaml", "metrics.jsonl", "checkpoint.pt", "summary.json", "tensorboard")
    }
    assert load_run(run).recipe.digest() == recipe(tmp_path, PARTNER, "schedule={epochs: 3, batch_size: 20}").digest()


def test_events_hold_the_numbers_of_the_metrics(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def unsaved(*_):
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        save = Trainer._save
        # As if killed in the second epoch, between the event and the checkpoint.
        patch.setattr(Trainer, "_save", lambda self: unsaved() if self.epoch == 2 else save(self))
        with pytest.raises(Interrupted):
            train(tmp_path)
    assert len(rows_of(tmp_path)) == 1
    # Files of events are read in the order of their names, which hold the second.
    time.sleep(1.1)
    resume(tmp_path)
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = [(e.step, pytest.approx(e.value)) for e in log.Scalars("accuracy")]
    assert found == [(r["epoch"], r["accuracy"]) for r in rows_of(tmp_path)]


@pytest.mark.usefixtures("snapping")
def test_the_loaded_run_is_the_network_that_was_measured(tmp_path):
    for options in ((), ("optimizer.ema=0.8",)):
        summary = train(tmp_path, *options, overwrite=True)
        run = load_run(tmp_path / "run")
        batches = list(run.dataset.test_batches(batch_size=100, device="cpu"))
        assert evaluate(run.model, batches).accuracy == summary["accuracy"]
        # The same, counted by hand.
        right = sum(int((run.model(x).argmax(1) == y).sum()) for x, y in batches)
        assert right / run.dataset.test_size == summary["accuracy"]


@pytest.mark.parametrize("options", [(), FULL, ("amp=bf16",)], ids=["plain", "everything", "bf16"])
@pytest.mark.parametrize("looks", [8, 11])
def test_a_run_in_pieces_ends_bit_identical(tmp_path, options, looks):
    train(tmp_path / "whole", *options)
    stops = train_in_pieces(tmp_path / "pieces", *options, looks=looks)
    assert stops >= 2
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "pieces"))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "pieces")


@pytest.mark.usefixtures("snapping")
def test_a_run_in_pieces_ends_with_the_same_snapped_biases(tmp_path):
    train(tmp_path / "whole", "schedule.epochs=2")
    assert train_in_pieces(tmp_path / "pieces", "schedule.epochs=2", looks=8) >= 2
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "pieces"))


class Noisy(Method):
    """Remembers a number, draws from torch's global random state and counts epochs."""

    def __init__(self, model):
        self.memory, self.epochs, self.model = torch.zeros(1), 0, model

    def losses(self, batch, outputs):
        self.memory = 0.9 * self.memory + torch.randn(1)
        return {"noise": self.memory.abs().sum() * outputs.square().mean() * 1e-3}

    def after_epoch(self, metrics):
        self.epochs += 1
        metrics["noise_epochs"] = self.epochs

    def state_dict(self):
        return {"memory": self.memory, "epochs": self.epochs}

    def load_state_dict(self, state):
        self.memory, self.epochs = state["memory"], state["epochs"]


def test_methods_and_global_random_states_are_resumed(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", lambda options, context: Noisy(context.model))
    train(tmp_path / "whole", "methods=[noisy]")
    assert train_in_pieces(tmp_path / "pieces", "methods=[noisy]", looks=8) >= 2
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "pieces"))
    rows = rows_of(tmp_path / "pieces")
    assert [r["noise_epochs"] for r in rows] == [1, 2, 3]
    assert all(r["loss"] == pytest.approx(r["loss_task"] + r["loss_noise"], rel=1e-5) for r in rows)


def test_equal_seeds_equal_runs_other_seeds_other_runs(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, f"seed={seed}", "schedule.epochs=1")
    a, b, c = (state_of(tmp_path / name)["model"]["fc.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_accumulated_batches_make_one_step(tmp_path):
    train(tmp_path, "optimizer.accumulate=2", "schedule.epochs=2")
    assert [r["step"] for r in rows_of(tmp_path)] == [2, 4]


def test_a_finished_run_resumes_to_the_same_summary(tmp_path):
    first = train(tmp_path, "schedule.epochs=1")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert resume(tmp_path)["accuracy"] == first["accuracy"]
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_run_that_was_stopped_before_its_first_checkpoint_keeps_its_recipe(tmp_path):
    """Before: it trained by the changed recipe, and could then not be opened, as recipe.yaml said another one."""
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.recipe.write_text(dump_recipe(recipe(tmp_path)))
    with pytest.raises(BitwrightError, match=r"run: made by another recipe than with 'optimizer.lr=0.5'; only"):
        resume(tmp_path, "optimizer.lr=0.5")
    assert [path.name for path in folder.root.iterdir()] == ["recipe.yaml"]


def test_a_folder_with_a_run_is_kept_unless_told_otherwise(tmp_path):
    train(tmp_path, "schedule.epochs=1")
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    with pytest.raises(BitwrightError, match=r"holds a run already .*--resume .*--overwrite"):
        train(tmp_path, "schedule.epochs=2")
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    assert train(tmp_path, "schedule.epochs=2", overwrite=True)["epochs"] == 2


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path):
    train(tmp_path, "schedule.epochs=1")
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    with RunFolder(tmp_path / "run").alone():
        for again in (lambda: train(tmp_path, overwrite=True), lambda: resume(tmp_path)):
            with pytest.raises(BitwrightError, match="another process is training there; wait for it or give another"):
                again()
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    assert resume(tmp_path)["epochs"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rules=[{match: cnv1}]", r"tiny.yaml: rules\[0\].match: 'cnv1' names no layer .*did you mean conv1"),
        ("model.name=resnet9", r"tiny.yaml: unknown model 'resnet9'; did you mean"),
        ("model.options.widht=3", r"tiny.yaml: unknown option 'widht'"),
        ("data.name=digit", r"tiny.yaml: unknown data 'digit'; did you mean digits"),
        ("methods=[kdd]", r"tiny.yaml: methods.0: 'kdd' is not accepted; did you mean kd"),
        ("methods=[kd]", r"tiny.yaml: methods: kd learns from a float partner; add 'partner:'"),
        ("device=cuda:99", r"tiny.yaml: device: 'cuda:99' is not on this machine"),
        ("partner={checkpoint: nowhere.pt}", r"tiny.yaml: nowhere.pt: no such checkpoint file"),
        ("partner={pretrained: true}", r"tiny.yaml: model 'resnet8' has no published weights"),
    ],
)
def test_what_a_recipe_names_and_is_not_there_is_one_line(tmp_path, override, message):
    with pytest.raises(BitwrightError, match=message) as caught:
        train(tmp_path, override)
    assert "\n" not in str(caught.value)


def test_method_options_are_checked(tmp_path):
    with pytest.raises(BitwrightError, match=r"tiny.yaml: methods.0.kd: .*'temprature'"):
        train(tmp_path, PARTNER, "methods=[{kd: {temprature: 3}}]")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("[{kd: {temperature: -1}}]", r"tiny.yaml: kd: weight=1.0, temperature=-1 is not accepted"),
        ("[saq, gaqat]", r"tiny.yaml: methods: saq and gaqat both own the backward pass"),
        ("[pege]", r"tiny.yaml: pege: no quantizer of the model uses the estimator 'pege'"),
        ("[{bwrf: {blocks: [layer1, nowhere]}}]", r"tiny.yaml: bwrf: the model has no module 'nowhere'"),
        ("[{adaqat: {budget: {bitops: 10}}}]", r"tiny.yaml: adaqat: budget.bitops=10 cannot be met"),
        ("[{allocation: {budget: {size: 10}}}]", r"tiny.yaml: allocation: budget.size=10 cannot be met"),
        ("[{hgq: {budget: {size: 10}}}]", r"tiny.yaml: hgq: budget.size=10 cannot be met"),
        ("[{csq: {budget: {size: 10}}}]", r"tiny.yaml: csq: budget.size=10 cannot be met"),
        (
            "[{csq: {mean_bits: 3}}, cage]",
            r"tiny.yaml: methods: csq computes the weights, so that there are none",
        ),
        ("[{amed: {budget: {size: 10}}}]", r"tiny.yaml: amed: budget.size=10 cannot be met"),
        ("[{constrained: {rate: 0}}]", r"tiny.yaml: constrained: .*rate=0"),
        ("[constrained, saq]", r"tiny.yaml: methods: constrained and saq both own the backward pass"),
        ("[{hgq: {beta: 1}}, adaqat]", r"tiny.yaml: methods: hgq and adaqat both set bit-widths"),
        ("[{cage: {lam: -1}}]", r"tiny.yaml: cage: .*lam=-1"),
    ],
)
def test_methods_are_refused_before_a_partner_is_trained(tmp_path, methods, message):
    with pytest.raises(BitwrightError, match=message):
        train(tmp_path, PARTNER, f"methods={methods}")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


def test_bad_recipes_leave_no_folder(tmp_path):
    with pytest.raises(BitwrightError):
        train(tmp_path, "rules=[{match: nothing}]")
    assert not (tmp_path / "run").exists()


def test_resume_refuses_another_recipe_and_takes_another_place(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, stop=StopAfter(2))
    with pytest.raises(BitwrightError, match="made by another recipe"):
        resume(tmp_path, "seed=1")
    resume(tmp_path, "threads=1", "device=auto" if not torch.cuda.is_available() else "device=cpu")


def test_resume_of_damaged_or_missing_runs_is_one_line(tmp_path):
    with pytest.raises(BitwrightError, match=r"not a run \(no recipe.yaml in it\)"):
        resume(tmp_path)
    with pytest.raises(Interrupted):
        train(tmp_path, stop=StopAfter(2))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BitwrightError, match=r"checkpoint.pt: not a checkpoint, or a damaged one"):
        resume(tmp_path)


def test_a_loss_that_is_not_finite_names_the_layer_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    class Poison(Method):
        def after_step(self, step):
            if step.steps == 6:
                model.layer2[0].conv1.input_quantizer.grid.scale.data.fill_(math.nan)

    model = None

    def build(options, context):
        nonlocal model
        model = context.model
        return Poison()

    monkeypatch.setitem(METHODS, "poison", build)
    with pytest.raises(Diverged) as caught:
        train(tmp_path, "methods=[poison]")
    text = str(caught.value)
    assert "the loss is not finite in epoch 2, batch 3" in text
    assert "first: layer2.0.conv1.input_quantizer.grid.scale holds nan in 1 of 1 values" in text
    assert "\n" not in text
    state = state_of(tmp_path)
    assert (state["epoch"], state["position"]) == (1, 0)
    assert all(bool(torch.isfinite(v).all()) for v in state["model"].values() if v.is_floating_point())
    assert len(rows_of(tmp_path)) == 1


def test_a_rate_that_is_too_high_diverges_and_says_so(tmp_path):
    with pytest.raises(Diverged, match=r"not finite in epoch 1, batch \d.*first: .*try a lower optimizer.lr"):
        train(tmp_path, "optimizer={lr: 1.0e+30, momentum: 0}", "bits=float")
    state = state_of(tmp_path)
    assert (state["epoch"], state["position"]) == (0, 0)


def test_a_methods_loss_that_is_not_finite_is_named(tmp_path, monkeypatch):
    class Broken(Method):
        def losses(self, batch, outputs):
            return {"broken": outputs.sum() * math.inf}

    monkeypatch.setitem(METHODS, "broken", lambda options, context: Broken())
    with pytest.raises(Diverged, match="the loss 'broken' is not finite in epoch 1, batch 1"):
        train(tmp_path, "methods=[broken]")


def test_diagnosis_finds_the_first_place_in_the_order_of_execution():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert first_bad_layer(net, x) is None
    with torch.no_grad():
        net[3].bias.fill_(math.inf)
        assert first_bad_layer(net, x) == "3.bias holds infinity in 2 of 2 values"
        net[0].weight.fill_(3e38)
        assert first_bad_layer(net, x) == "the output of 0 (Linear) holds infinity in 2 of 2 values"
    assert first_bad_layer(net, x * math.nan) == "the input batch holds nan in 2 of 2 values"


def test_quantizers_that_do_not_run_stop_the_run(tmp_path, monkeypatch):
    real = evaluation.coverage

    def with_a_gap(model, batch):
        found = real(model, batch)
        return type(found)(found.ran[1:], found.ran[:1], ())

    monkeypatch.setattr(evaluation, "coverage", with_a_gap)
    with pytest.raises(BitwrightError, match=r"coverage: 1 of 23 quantizers did not run .*conv1.weight_quantizer"):
        train(tmp_path)


def test_float_recipes_have_no_quantizers(tmp_path):
    summary = train(tmp_path, "bits=float", "schedule.epochs=1")
    assert summary["weight_bits"] == summary["input_bits"] == {}
    assert "float_accuracy" not in summary
    assert not any(isinstance(m, QuantLayer | Quantizer) for m in load_run(tmp_path / "run").model.modules())


def test_compiled_steps_train_the_same_parameters(tmp_path, monkeypatch):
    compiled = []

    def spy(model, **_):
        compiled.append(model)
        return nn.Sequential(model)  # a wrapper that shares parameters, as torch.compile's is

    monkeypatch.setattr(torch, "compile", spy)
    train(tmp_path / "a", "compile=true", "schedule.epochs=1")
    train(tmp_path / "b", "schedule.epochs=1")
    assert len(compiled) == 1
    assert_same(state_of(tmp_path / "a")["model"], state_of(tmp_path / "b")["model"])


def test_one_line_per_epoch_where_there_is_no_terminal(tmp_path):
    reporter = quiet()
    train(tmp_path, reporter=reporter)
    lines = reporter.console.file.getvalue().splitlines()
    assert len(lines) == 3
    for n, (line, row) in enumerate(zip(lines, rows_of(tmp_path), strict=True), 1):
        assert line.startswith(f"epoch   {n}/3  loss {row['loss']:.4f}")
        assert f"test {row['accuracy']:.2%}" in line


def test_images_for_verification_are_distinct_and_test_images_first():
    dataset = load_data("digits")
    everything = torch.cat(list(some_images(dataset, 10_000, device="cpu", batch_size=100)))
    assert len(everything) == dataset.train_size + dataset.test_size == 1797
    assert torch.equal(everything[:500], torch.cat([x for x, _ in dataset.test_batches(batch_size=100, device="cpu")]))
    whole = torch.cat(
        [
            x
            for batches in (
                dataset.test_batches(batch_size=100, device="cpu"),
                dataset.calibration_batches(seed=5, batch_size=100, count=13, device="cpu"),
            )
            for x, _ in batches
        ]
    )
    assert torch.equal(everything.flatten(1).sort(0).values, whole.flatten(1).sort(0).values)  # the same images
    for count in (1, 250, 500, 501, 777):
        assert sum(len(x) for x in some_images(dataset, count, device="cpu", batch_size=100)) == count


# Real processes.


def start_process(folder, *arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-u", "-m", "bitwright", "train", *arguments, "--cache", str(folder / "cache")]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_lines(process, count):
    for _ in range(count):
        assert process.stdout.readline()


@pytest.mark.slow
@pytest.mark.usefixtures("snapping")
def test_killed_at_any_moment_and_resumed_ends_bit_identical(tmp_path):
    options = ["schedule.epochs=6", PARTNER, "methods=[kd]", "optimizer.ema=0.9"]
    recipe(tmp_path)
    train(tmp_path / "whole", *options)
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    given = [str(tmp_path / "tiny.yaml"), *options, "--out", str(tmp_path / "killed" / "run")]
    process = start_process(tmp_path, *given)
    kills = 0
    while True:
        # Past the imports, into the partner's or the run's own epochs.
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.6))
        process.kill()
        kills += finish(process)[0] == -signal.SIGKILL
        resumed = start_process(tmp_path, "--resume", str(tmp_path / "killed" / "run"))
        if kills >= 3:
            break
        process = resumed
    code, _, err = finish(resumed)
    assert code == 0, (seed, err)
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_step_save_and_exit(tmp_path, signum, code):
    options = ["schedule.epochs=400", "optimizer.accumulate=3"]
    recipe(tmp_path)
    process = start_process(tmp_path, str(tmp_path / "tiny.yaml"), *options, "--out", str(tmp_path / "run"))
    wait_for_lines(process, 2)
    process.send_signal(signum)
    found, _, err = finish(process)
    assert found == code
    assert "Traceback" not in err
    assert "stopped by" in err
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert 2 <= state["epoch"] < 400
    assert len(rows_of(tmp_path)) == state["epoch"]


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, stop=StopAfter(2))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code, _, err = finish(start_process(tmp_path, "--resume", str(tmp_path / "run"), preexec_fn=small_files))
    assert code == 2
    assert "checkpoint.pt: cannot be written" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]
    assert resume(tmp_path)["epochs"] == 3


@pytest.mark.parametrize("again", [False, True], ids=["removed", "replaced"])
def test_a_folder_that_was_removed_or_replaced_gets_no_files_of_the_old_run(tmp_path, monkeypatch, again):
    folder, epoch = tmp_path / "run", Trainer._train_epoch

    def meanwhile(self):
        shutil.move(folder, tmp_path / "away")
        if again:
            folder.mkdir()
        return epoch(self)

    monkeypatch.setattr(Trainer, "_train_epoch", meanwhile)
    with pytest.raises(BitwrightError, match=r"run: removed or replaced while a run was training there"):
        train(tmp_path, "schedule.epochs=1")
    assert not (folder / "checkpoint.pt").exists()
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(("key", "accepted"), [("grid_options", "init"), ("estimator_options", "none")])
def test_an_unknown_option_of_a_grid_or_estimator_is_answered_with_those_that_there_are(tmp_path, key, accepted):
    with pytest.raises(BitwrightError, match=rf"{key} of .* unexpected keyword argument 'foo'; accepted: {accepted}$"):
        train(tmp_path, f"{key}.foo=1")


def test_a_training_without_one_optimizer_step_is_refused(tmp_path):
    with pytest.raises(BitwrightError, match=r"optimizer\.accumulate: 13 is not accepted; use a number up to 12"):
        train(tmp_path, "optimizer.accumulate=13")
    assert not (tmp_path / "run").exists()
