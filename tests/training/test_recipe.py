import re

import pytest
import torch
import yaml

from bitwright.errors import BitwrightError
from bitwright.prepare import quant_layers, quantizers
from bitwright.training.data import load_data
from bitwright.training.recipe import Recipe, float_recipe
from bitwright.training.recipe_file import builtin_recipes, dump_recipe, load_recipe
from bitwright.training.setup import float_model, quantize

BASE = """
data: {name: digits}
model: {name: resnet8, options: {width: 4}}
bits: w4a4
optimizer: {lr: 1e-3}
rules:
  - {match: fc, weight: {bits: 2}, input: null}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE)
    return file


def error_of(path, *overrides):
    with pytest.raises(BitwrightError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_values_defaults_and_scientific_notation(path):
    recipe = load_recipe(path)
    assert recipe.optimizer.lr == 1e-3  # YAML 1.1 would read the text "1e-3"
    assert recipe.seed == 0
    assert recipe.partner is None
    assert recipe.source == str(path)


def test_what_is_written_reads_back_to_the_same_recipe(path, tmp_path):
    recipe = load_recipe(path, ["methods=[kd]", "partner={}"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    again = load_recipe(copy)
    assert again.model_dump() == recipe.model_dump()
    assert again.digest() == recipe.digest()
    # A rule's field that is absent leaves what earlier rules said; one that is None does not.
    assert again.rules[0].model_fields_set == {"match", "weight", "input"}


def test_shorthand_rules_come_before_the_recipes_own(path):
    dataset = load_data("digits")
    recipe = load_recipe(path)
    layers = quant_layers(quantize(recipe, float_model(recipe, dataset), dataset))
    assert layers["conv1"].weight_quantizer.spec.bits == 8
    assert layers["layer1.0.conv1"].weight_quantizer.spec.bits == 4
    assert layers["fc"].weight_quantizer.spec.bits == 2
    assert layers["fc"].input_quantizer is None


def test_overrides_reach_nested_keys_and_lists(path):
    recipe = load_recipe(path, ["schedule.epochs=3", "rules.0.weight.bits=3", "data.options.subset=100", "ends=null"])
    assert recipe.schedule.epochs == 3
    assert recipe.rules[0].weight.bits == 3
    assert recipe.data.options == {"subset": 100}
    assert recipe.ends is None


def test_a_later_override_wins(path):
    assert load_recipe(path, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("name", ["kd", "{kd: null}", "{kd: {}}"])
def test_methods_may_be_names_or_names_with_options(path, name):
    assert load_recipe(path, [f"methods=[{name}]"]).methods == [{"kd": {}}]


def test_digest_ignores_where_it_runs_and_nothing_else(path):
    base = load_recipe(path).digest()
    for same in ("device=cpu", "threads=1", "data.dir=/elsewhere"):
        assert load_recipe(path, [same]).digest() == base
    for other in ("seed=1", "rules.0.weight.bits=3", "data.options.subset=9", "amp=bf16", "calibration.samples=3"):
        assert load_recipe(path, [other]).digest() != base


def test_float_partners_are_shared_by_runs_that_differ_only_in_quantization(path):
    one = load_recipe(path, ["partner={schedule: {epochs: 2}}"])
    two = load_recipe(
        path,
        ["partner={schedule: {epochs: 2}}", "bits=w2a2", "ends=4", "methods=[kd]", "seed=5", "schedule.epochs=9"],
    )
    three = load_recipe(path, ["partner={schedule: {epochs: 3}}"])
    made = [float_recipe(r, r.partner) for r in (one, two, three)]
    assert made[0].digest() == made[1].digest() != made[2].digest()
    assert not made[0].quantized
    assert made[0].all_rules() == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rules.0.weight.bits=9", "rules.0.weight.bits: 9 is not accepted; use a whole number from 1 to 8"),
        ("ends=9", "ends: 9 is not accepted; use a whole number from 1 to 8"),
        ("bits=w9a4", "'w9a4' is not accepted; use wNaM with N and M from 1 to 8"),
        ("optimizer.momentun=3", "optimizer.momentun: unknown key; did you mean momentum"),
        ("rules.0.wieght={bits: 2}", "rules.0.wieght: unknown key; did you mean weight"),
        ("schedule.epochs=0", "schedule.epochs: 0 is not accepted; use a whole number of at least 1"),
        ("schedule={epochs: 2, warmup_epochs: 3}", "use warmup_epochs up to epochs, which is 2"),
        ("schedule.epochs=1.5", "schedule.epochs: 1.5 is not accepted; use a whole number"),
        ("schedule.epochs=many", "schedule.epochs: 'many' is not accepted; use a whole number"),
        ("optimizer.lr=-1", "optimizer.lr: -1 is not accepted; use a number above 0"),
        ("optimizer.lr=.nan", "optimizer.lr: nan is not accepted; use a number above 0"),
        ("optimizer.ema=1.5", "optimizer.ema: 1.5 is not accepted; use a number of at least 0 and below 1"),
        ("optimizer=sgd", "optimizer: 'sgd' is not accepted; use keys and values (name, lr,"),
        ("channels_last=1", "channels_last: 1 is not accepted; use true or false"),
        ("amp=fp16", "amp: 'fp16' is not accepted; use 'none' or 'bf16'"),
        ("grid=lsqq", "grid: 'lsqq' is not accepted; use 'lsq',"),
        ("estimator=st", "estimator: 'st' is not accepted; did you mean ste"),
        ("methods=kd", "methods: 'kd' is not accepted; use a list"),
        ("methods=[{a: {}, b: {}}]", "one name in each"),
        ("device=tpu", "device: 'tpu' is not accepted; use auto, cpu, cuda or cuda:N"),
        ("data.name=null", "data.name: None is not accepted; use text"),
        ("model={}", "model.name is missing"),
        ("model.options.num_classes=3", "comes from the data"),
        ("partner={checkpoint: a.pt, pretrained: true}", "either checkpoint or pretrained, not both"),
        ("rules.3.weight=1", "rules has 1 entries; use a number below that, not 3"),
        ("seed.x=1", None),
        ("seed=-1", "seed: -1 is not accepted; use a whole number of at least 0"),
        ("seed=99999999999999999999999", "seed: 99999999999999999999999 is not accepted"),
        ("threads=100000", "threads: 100000 is not accepted; use a whole number from 1 to 1024"),
        ("epochs", "'epochs' is not accepted; use key=value"),
        ("a=[", "the value is not valid YAML"),
    ],
)
def test_a_bad_value_is_one_line_with_key_value_and_what_is_accepted(path, override, message):
    text = error_of(path, override)
    if message is not None:
        assert message in text


def test_messages_name_the_file_or_the_command_line(path):
    path.write_text(BASE + "seed: a\n")
    assert error_of(path) == f"{path}: seed: 'a' is not accepted; use a whole number of at least 0 and below {2**63}"
    path.write_text(BASE)
    assert error_of(path, "seed=a").startswith("command line: seed: 'a'")


def test_keys_that_do_not_go_together_are_said_without_the_whole_recipe(path):
    assert error_of(path, "activation_memory=0.5") == f"{path}: activation_memory needs compile: true"


def test_forgotten_bits_are_not_a_float_network(path):
    path.write_text("data: {name: digits}\nmodel: {name: resnet8}\n")
    assert "bits is missing; use 'bits: w4a4'" in error_of(path)
    assert not load_recipe(path, ["bits=float"]).quantized


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
        ("a: [1\nb: 2\n", "not valid YAML in line 2"),
        ("just text", "not a recipe"),
        ("", "not a recipe"),
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(path, content, message):
    path.write_text(content)
    text = error_of(path)
    assert message in text
    assert text.startswith(str(path))


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(tmp_path / "binary.yaml")
    assert error_of(tmp_path / "none.yaml").endswith("no such file")
    assert "a folder, not a recipe" in error_of(tmp_path)
    assert "did you mean digits-w4a4" in error_of("digits-w4a5")


def outputs(recipe) -> set[str]:
    """Modules of a recipe's network that get an output quantizer."""
    dataset = load_data("digits")
    found = quantizers(quantize(recipe, float_model(recipe, dataset, fresh=True), dataset))
    return {n.removesuffix(".output_quantizer") for n in found if n.endswith(".output_quantizer")}


def test_the_topology_comes_before_the_recipes_own_rules_and_by_default_is_integer():
    usual = outputs(load_recipe("digits-w4a4"))
    assert {"relu", "layer2.0.bn2", "layer3.0.relu2"} <= usual
    own = ["rules=[{match: relu, output: null}, {match: layer1.0.add, output: {bits: 6}}]"]
    assert outputs(load_recipe("digits-w4a4", own)) == (usual - {"relu"}) | {"layer1.0.add"}
    assert outputs(load_recipe("digits-w4a4", ["topology=fpres"])) == set()
    # A convolution in float writes no integers: its output and all sums that it flows into stay as they are.
    floats = outputs(load_recipe("digits-w4a4", ["rules=[{match: layer1.0.conv2, weight: null}]"]))
    assert usual - floats == {"layer1.0.bn2", *(f"layer{i}.0.relu2" for i in (1, 2, 3))}
    with pytest.raises(BitwrightError, match="topology: 'res4' is not accepted; use 'fpres'"):
        load_recipe("digits-w4a4", ["topology=res4"])


def test_a_topology_counts_in_the_digest_but_not_in_the_partners():
    res8, fpres = load_recipe("digits-w4a4"), load_recipe("digits-w4a4", ["topology=fpres"])
    assert res8.digest() != fpres.digest()
    assert float_recipe(res8, res8.partner).digest() == float_recipe(fpres, fpres.partner).digest()


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_shipped_recipe_is_headed_and_its_rules_match_its_model(name):
    recipe = load_recipe(name)

    class Facts:  # what a model needs to know of data that may not be on this machine
        num_classes, in_channels, image_size = {
            "digits": (10, 1, 8),
            "fashion-mnist": (10, 1, 28),
            "cifar10": (10, 3, 32),
            "imagenet": (1000, 3, 224),
        }[recipe.data.name]
        blank = torch.zeros(1, in_channels, image_size, image_size)

    model = quantize(recipe, float_model(recipe, Facts(), fresh=True), Facts())  # pyright: ignore
    assert quant_layers(model)
    from importlib import resources

    text = (resources.files("bitwright") / "recipes" / f"{name}.yaml").read_text()
    head = text[: text.index("\ndata:")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(r"Expected: .+", head)
    assert re.search(r"Cost: .+", head)
    assert isinstance(yaml.safe_load(text), dict)
    assert isinstance(recipe, Recipe)
