"""Methods as recipes name them: through the trainer, by name, combined, resumed."""

import pytest

from bitwright import BitwrightError, export, verify
from bitwright.training.folder import load_run
from bitwright.training.interrupt import Interrupted

from . import runs

PARTNER = runs.PARTNER


def test_every_name_trains_and_leaves_its_losses(tmp_path):
    summary = runs.train(
        tmp_path,
        PARTNER,
        "estimator=pege",
        "methods=[{bwrf: {backbone_kd: false}}, kd, relational, pege]",
        "schedule.epochs=2",
    )
    last = runs.rows_of(tmp_path)[-1]
    assert {
        "loss_task",
        "loss_kd",
        "loss_relational",
        "loss_bwrf_branches",
        "pege/rate",
        "pege/discretization_error",
    } <= last.keys()
    assert last["pege/rate"] == 1.0
    assert summary["methods"] == {}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("[{kd: {foo: 1}}]", r"methods\.0\.kd: unknown option 'foo'; accepted: teacher_dtype, temperature, weight"),
        ("[kd, {kd: {weight: 2}}]", r"methods\.1: 'kd' is there already; use each method once"),
        ("[{kd: {temperature: abc}}]", r"methods\.0\.kd: temperature='abc' is not accepted; use a valid number"),
        ("[{kd: {weight: true}}]", r"methods\.0\.kd: weight=True is not accepted; use a valid number"),
        ("[kd, {bwrf: {sample: maybe}}]", r"methods\.1\.bwrf: sample='maybe' is not accepted; use a valid boolean"),
        ("[{bwrf: {seed: abc}}]", r"methods\.0\.bwrf: seed='abc' is not accepted; use a valid integer"),
        ("[{adaqat: {budget: 100KB}}]", r"methods\.0\.adaqat: budget='100KB' is not accepted; use a.* object"),
        ("[{adaqat: {fixed: [1]}}]", r"methods\.0\.adaqat: fixed=\[1\] is not accepted; use a valid string"),
        ("[allocation]", r"methods\.0\.allocation: needs the option 'budget'"),
    ],
)
def test_options_that_are_not_accepted_make_no_folder(tmp_path, methods, message):
    with pytest.raises(BitwrightError, match=message):
        runs.train(tmp_path, PARTNER, f"methods={methods}")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("two_passes", ["saq", "gaqat"])
def test_the_rest_of_the_family_trains_together(tmp_path, two_passes):
    methods = f"[kd, {{{two_passes}: {{rho: 0.1}}}}, cage, {{allocation: {{budget: {{size: 4KB}}, steps: 2}}}}]"
    summary = runs.train(tmp_path, PARTNER, "bits=w8a8", f"methods={methods}", "schedule.epochs=2")
    metric = {"saq": "saq/sharpness", "gaqat": "gaqat/frozen"}[two_passes]
    assert {metric, "cage/distance", "allocation/weight_bits"} <= runs.rows_of(tmp_path)[-1].keys()
    assert summary["size_bytes"] == summary["methods"]["allocation"]["cost"]["size"] <= 4000
    assert len(set(summary["weight_bits"].values())) > 1


def test_the_constrained_network_reports_its_duals(tmp_path):
    summary = runs.train(tmp_path, PARTNER, "methods=[kd, {constrained: {rate: 1.0}}]", "schedule.epochs=2")
    last = runs.rows_of(tmp_path)[-1]
    assert {"loss_kd", "loss_constrained", "loss_constrained_task", "constrained/output"} <= last.keys()
    told = summary["methods"]["constrained"]
    assert told["duals"] == {k.removeprefix("constrained/dual/"): v for k, v in last.items() if "/dual/" in k}
    assert told["duals"].keys() == told["slacks"].keys() == {"output", *summary["weight_bits"]}
    assert max(told["duals"].values()) > 0


def test_amed_meets_its_budget(tmp_path):
    methods = "methods=[{amed: {every: 1, budget: {bitops: 1.6e6}}}]"
    summary = runs.train(tmp_path, PARTNER, "bits=w8a8", methods, "schedule.epochs=2")
    assert summary["methods"]["amed"]["cost"]["bitops"] == pytest.approx(summary["bitops"])
    assert summary["bitops"] <= 1.6e6
    assert {"amed/weight_bits", "amed/bitops"} <= runs.rows_of(tmp_path)[-1].keys()


def test_ewgs_moves_its_factor_from_the_runs_own_batches(tmp_path):
    runs.train(tmp_path, PARTNER, "estimator=ewgs", "methods=[{ewgs: {every: 1, iterations: 2}}]", "schedule.epochs=1")
    assert runs.rows_of(tmp_path)[-1]["ewgs/delta"] >= 0


@pytest.mark.parametrize("more", [[], ["optimizer.ema=0.5"]], ids=["", "ema"])
def test_hgq_meets_its_budget_and_the_file_is_what_was_trained(tmp_path, snapping, more):
    methods = "methods=[kd, {hgq: {budget: {bitops: 1.6e6}}}]"
    summary = runs.train(tmp_path, PARTNER, "bits=w6a6", methods, "schedule.epochs=3", *more)
    assert summary["methods"]["hgq"]["cost"]["bitops"] == pytest.approx(summary["bitops"])
    assert summary["bitops"] <= 1.6e6
    assert summary["methods"]["hgq"]["frozen"]
    assert {"hgq/weight_bits", "hgq/lambda_bitops"} <= runs.rows_of(tmp_path)[-1].keys()
    run, file = load_run(tmp_path / "run"), tmp_path / "net.onnx"
    images = next(iter(run.dataset.test_batches(batch_size=50, device=run.device)))[0]
    export(run.model, file, images[:1])
    report = verify(run.model, file, [images])
    assert report.ok
    assert len(set(summary["weight_bits"].values())) > 1


@pytest.mark.parametrize("more", [[], ["optimizer.ema=0.5"], ["amp=bf16"]], ids=["", "ema", "bf16"])
def test_csq_hardens_inside_its_budget_and_the_file_is_what_was_trained(tmp_path, snapping, more):
    methods = "methods=[kd, {csq: {budget: {size: 2.4KB}}}]"
    summary = runs.train(tmp_path, PARTNER, "bits=w8a4", methods, "schedule.epochs=5", *more)
    told = summary["methods"]["csq"]
    assert told["cost"]["size"] == summary["size_bytes"] <= 2400
    assert told["frozen"]
    assert {n: w["weight"] for n, w in told["widths"].items()}.items() <= summary["weight_bits"].items()
    assert {"csq/weight_bits", "csq/temperature", "loss_csq"} <= runs.rows_of(tmp_path)[0].keys()
    run, file = load_run(tmp_path / "run"), tmp_path / "net.onnx"
    images = next(iter(run.dataset.test_batches(batch_size=50, device=run.device)))[0]
    export(run.model, file, images[:1])
    assert verify(run.model, file, [images]).ok


@pytest.mark.parametrize("more", [[], ["optimizer.ema=0.5"]], ids=["", "ema"])
def test_bits_per_channel_are_shipped_at_the_widest_and_sizes_say_so(tmp_path, snapping, more):
    methods = "methods=[{channel_bits: {shares: [0.25], steps: 2}}]"
    options = ("bits=w3a4", methods, "schedule.epochs=2", *more)
    summary = runs.train(tmp_path / "whole", *options)
    told = summary["methods"]["channel_bits"]["channels"]
    assert {name: summary["weight_bits"][name] for name in told} == dict.fromkeys(told, 3)
    assert "channel_bits/moved" in runs.rows_of(tmp_path / "whole")[-1]
    with pytest.raises(Interrupted):
        runs.train(tmp_path / "cut", *options, stop=runs.StopAfter(7))
    runs.resume(tmp_path / "cut")
    whole, cut = (runs.state_of(tmp_path / name) for name in ("whole", "cut"))
    runs.assert_same(whole["model"], cut["model"], "model")
    run, file = load_run(tmp_path / "whole" / "run"), tmp_path / "net.onnx"
    images = next(iter(run.dataset.test_batches(batch_size=50, device=run.device)))[0]
    report = export(run.model, file, images[:1])
    assert verify(run.model, file, [images]).ok
    widest = {layer.name: layer.bits for layer in report.layers}
    assert {name: widest[name] for name in told} == {name: max(map(int, found)) for name, found in told.items()}


@pytest.mark.parametrize("looks", [3, 11, 19], ids=["soft", "chosen", "hard"])
def test_a_stopped_csq_run_ends_as_one_that_was_not(tmp_path, looks):
    methods = "methods=[{csq: {mean_bits: 3}}]"
    options = ("bits=w8a4", methods, "schedule.epochs=5")
    runs.train(tmp_path / "whole", *options)
    with pytest.raises(Interrupted):
        runs.train(tmp_path / "cut", *options, stop=runs.StopAfter(looks))
    runs.resume(tmp_path / "cut")
    whole, cut = (runs.state_of(tmp_path / name) for name in ("whole", "cut"))
    for part in ("model", "step", "optimizer"):
        runs.assert_same(whole[part], cut[part], part)


@pytest.mark.slow
def test_adaqat_meets_its_budgets_from_below_and_says_so(tmp_path):
    """Budgets in the cost table's own numbers; the widths, their path and their cost are in the summary."""
    budget = {"bitops": 1.6e6, "size": 3900}
    options = (
        f"methods=[{{adaqat: {{granularity: layer, every: 1, budget: {{bitops: 1.6e6, size: {budget['size']}}}}}}}]"
    )
    summary = runs.train(tmp_path, PARTNER, "bits=w8a8", options, "schedule.epochs=6")
    assert summary["bitops"] <= budget["bitops"]
    assert summary["size_bytes"] <= budget["size"]
    told = summary["methods"]["adaqat"]
    assert told["cost"]["bitops"] == pytest.approx(summary["bitops"])
    assert told["cost"]["size"] == pytest.approx(summary["size_bytes"])
    assert told["frozen"]
    assert told["path"]
    ours = {name: bits["weight"] for name, bits in told["widths"].items() if "weight" in bits}
    assert ours == {name: summary["weight_bits"][name] for name in ours}
