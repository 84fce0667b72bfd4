"""What a recipe says, as data: `Recipe`. Reading files and overrides is in `recipe_file`."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_serializer, field_validator, model_validator

from bitwright.rules import Rule, rules
from bitwright.spec import MAX_BITS, MIN_BITS, GridName
from bitwright.topology import Topology

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch takes
Threads = Annotated[int, Field(ge=1, le=1024)]  # OpenMP dies of far more
Fraction = Annotated[float, Field(ge=0, lt=1)]

WHERE = ("device", "threads")  # keys that say where a run happens, not what it computes


class Section(BaseModel):
    """Base of all parts of a recipe: unknown keys and wrong types are refused, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataSection(Section):
    """name: a key of `bitwright.training.data.DATA`. dir: the first folder to look in. options: see `load_data`."""

    name: str
    dir: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class ModelSection(Section):
    """name (`FILE.py:NAME`: the user's own) and options: see `bitwright.training.models.build_model`."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _not_from_data(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key in ("num_classes", "in_channels", "image_size"):
            if key in options:
                raise ValueError(f"no {key!r} here: it comes from the data")
        return options


class OptimizerSection(Section):
    """How weights move.

    lr: rate at the top of the schedule. momentum, nesterov: of SGD. decay_norms: False spares biases and norms the
    weight decay. quantizer_lr: rate of scales and clipping bounds, default `lr`. quantizer_weight_decay: default 0,
    because decay pulls a scale to zero. clip_norm: largest gradient norm, default no clipping. accumulate: batches
    per optimizer step. ema: decay of an averaged model, which is then the one that is evaluated and exported.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 1e-4
    decay_norms: bool = True
    quantizer_lr: Positive | None = None
    quantizer_weight_decay: NotNegative = 0.0
    label_smoothing: Fraction = 0.0
    clip_norm: Positive | None = None
    accumulate: Count = 1
    ema: Fraction | None = None


class ScheduleSection(Section):
    """epochs, batch_size; warmup_epochs: linear from 0 (fractions allowed); kind: the way down from `lr` to 0."""

    epochs: Count = 30
    batch_size: Count = 128
    warmup_epochs: NotNegative = 0.0
    kind: Literal["cosine", "linear", "constant"] = "cosine"

    @model_validator(mode="after")
    def _warm_in_time(self) -> "ScheduleSection":
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs up to epochs, which is {self.epochs}")
        return self


class PartnerSection(Section):
    """The float network of the same architecture that quantized training starts from and methods learn from.

    One of: checkpoint (a file with its weights); pretrained (what torchvision or timm publishes); neither: it is
    trained first with this optimizer, schedule and seed, kept in the cache folder and shared by all runs that ask
    for the same.
    """

    checkpoint: str | None = None
    pretrained: bool = False
    optimizer: OptimizerSection = OptimizerSection(lr=0.1)
    schedule: ScheduleSection = ScheduleSection()
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_source(self) -> "PartnerSection":
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("either checkpoint or pretrained, not both")
        return self


class TeacherSection(PartnerSection):
    """The float network that `kd` and `relational` learn from in the partner's place: another architecture, say.

    model: as in a recipe; its weights come from where a partner's do.
    """

    model: ModelSection


class CalibrationSection(Section):
    """samples: training images that set signedness and scales before the first step; batch_size: of those passes."""

    samples: Count = 512
    batch_size: Count = 128


class Recipe(Section):
    """One run.

    bits: `wNaM` for the usual rules (`bitwright.rules`) with `ends` (bit-width of the first and last layer, None:
    like the rest), `grid` and `estimator` with their options; `float`: no quantizers, an ordinary training. rules: an
    ordered list that comes after those. topology: of output quantizers (`bitwright.topology`); rules come after it
    too, so that they can change or remove its quantizers. reproducible: evaluation and file agree to the last bit
    (`bitwright.make_reproducible`); a transformer's file is slower then. methods: names, or {name: options}. partner:
    see `PartnerSection`; None starts from fresh weights. teacher: see `TeacherSection`; None: the partner teaches. amp:
    autocast of training steps; evaluation is float32. compile: by Inductor; activation_memory: the share that it keeps
    then (`bitwright.compile_model`). threads: of the CPU, default all cores; results are bit-identical for the same
    number only. device: auto, cpu, cuda, cuda:N.
    """

    data: DataSection
    model: ModelSection
    bits: str | None = None
    ends: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | None = 8
    grid: GridName = "lsq"
    grid_options: dict[str, Any] = Field(default_factory=dict)
    estimator: str = "clipped_ste"
    estimator_options: dict[str, Any] = Field(default_factory=dict)
    topology: Topology = "res8"
    reproducible: bool = False
    rules: list[Rule] = Field(default_factory=list)
    methods: list[dict[str, dict[str, Any]]] = Field(default_factory=list)
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    partner: PartnerSection | None = None
    teacher: TeacherSection | None = None
    calibration: CalibrationSection = CalibrationSection()
    seed: Seed = 0
    amp: Literal["none", "bf16"] = "none"
    channels_last: bool = False
    compile: bool = False
    activation_memory: Annotated[float, Field(ge=0, le=1)] = 1.0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Threads | None = None

    @model_validator(mode="after")
    def _compiled_only(self) -> "Recipe":
        if self.activation_memory != 1.0 and not self.compile:
            raise ValueError("activation_memory needs compile: true")
        return self

    @model_validator(mode="after")
    def _taught(self) -> "Recipe":
        if self.teacher is not None and not any({"kd", "relational"} & entry.keys() for entry in self.methods):
            raise ValueError("teacher: nothing learns from it; add kd or relational to methods")
        return self

    _source: str = PrivateAttr("recipe")

    @field_validator("methods", mode="before")
    @classmethod
    def _names_to_options(cls, value: Any) -> Any:
        """`kd` and `{kd: null}` mean `{kd: {}}`."""
        if not isinstance(value, list):
            return value
        found = [{v: {}} if isinstance(v, str) else v for v in value]
        for entry in found:
            if isinstance(entry, dict) and len(entry) != 1:
                raise ValueError("a list of names or of {name: options}, one name in each")
        return [{k: {} if o is None else o for k, o in v.items()} if isinstance(v, dict) else v for v in found]

    @field_serializer("rules")
    def _only_what_was_said(self, value: list[Rule]) -> list[dict[str, Any]]:
        """In a rule, a field that is absent and a field that is None differ."""
        return [rule.model_dump(mode="json", exclude_unset=True) for rule in value]

    @property
    def source(self) -> str:
        """The file or built-in name that the recipe was read from, for messages."""
        return self._source

    @property
    def quantized(self) -> bool:
        """Whether the network gets quantizers at all."""
        return self.bits != "float" or bool(self.rules)

    def all_rules(self, outputs: Sequence[Rule] = ()) -> list[Rule]:
        """The usual rules, then `outputs`, then the recipe's own. Raises: BitwrightError for bits of another form."""
        if self.bits in (None, "float"):
            return [*outputs, *self.rules]
        usual = rules(
            self.bits,
            ends=self.ends,
            grid=self.grid,
            estimator=self.estimator,
            grid_options=self.grid_options,
            estimator_options=self.estimator_options,
        )
        return [*usual, *outputs, *self.rules]

    def digest(self) -> str:
        """Hexadecimal hash of everything that decides what the run computes; where it runs does not count."""
        content = self.model_dump(mode="json", exclude={*WHERE})
        del content["data"]["dir"]
        # Keys that came later: with what was all there was before, earlier runs and partners keep their names.
        later = {"topology": "fpres", "activation_memory": 1.0, "reproducible": False, "teacher": None}
        for key, first in later.items():
            if content[key] == first:
                del content[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def float_recipe(recipe: Recipe, partner: PartnerSection) -> Recipe:
    """The recipe that trains the float partner of `recipe`: same data and model, no quantizers, no methods."""
    made = recipe.model_copy(
        update={
            "bits": "float",
            "rules": [],
            "methods": [],
            "partner": None,
            "teacher": None,
            "optimizer": partner.optimizer,
            "schedule": partner.schedule,
            "seed": partner.seed,
            # Of no effect without quantizers: fixed, so that runs that differ in them share a partner.
            "ends": 8,
            "grid": "lsq",
            "grid_options": {},
            "estimator": "clipped_ste",
            "estimator_options": {},
            "topology": "fpres",
            "reproducible": False,
            "calibration": CalibrationSection(),
        }
    )
    made._source = recipe.source
    return made


def teacher_recipe(recipe: Recipe, teacher: TeacherSection) -> Recipe:
    """The recipe whose partner is the teacher of `recipe`."""
    origin = PartnerSection(**{name: getattr(teacher, name) for name in PartnerSection.model_fields})
    made = recipe.model_copy(update={"model": teacher.model, "partner": origin, "teacher": None})
    made._source = recipe.source
    return made
