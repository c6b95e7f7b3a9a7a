"""What a stage is: a configuration whose fields are the recipe's keys, and one verb.

A stage reads artifacts by role and leaves folders under roles of its own; it knows no other stage. A recipe can have a stage read
or write a role under another name (``reads = { teacher = "assistant" }``). Roles in use:

    ``model``      the PyTorch model of this moment: config.json, model.safetensors, tokenizer files
    ``teacher``    the model that students learn from, and that their metrics are compared with
    ``source``     the checkpoint the recipe starts from
    ``baseline``   the fine-tuned model as it was before anything was compressed
    ``exported``   model files in full precision
    ``baseline_file``  the baseline as ONNX file
    ``quantized``  int8 model files
    ``tuned``      how a runtime is to run each file
    ``measured``   latency and memory
    ``bundle``     the folder that ships

Plug-ins register a class of their own under the entry-point group ``pocketbert.methods``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from pipeline.flow.cache import Artifact, Cache
from pipeline.flow.progress import Progress
from pipeline.flow.train_section import TrainSection
from pipeline.tasks.base import Data, Row, Task
from runtimes.errors import BadInput

if TYPE_CHECKING:
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.tasks.batches import EncodedTexts

UNEQUAL_LAYERS = "layers of unequal shape"
SHARED_LAYERS = "layers that share weights"
THIN_MATRICES = "matrices that are products of thin ones"
QUATERNIONS = "quaternion matrices"
ZEROS = "single weights that are zero"
"""What a stage may leave behind, in words for the message that refuses a later one."""


def not_on_shared_or_quaternions(what: str) -> dict[str, str]:
    """:attr:`Stage.refuses` of a stage that cuts ``what`` layer by layer."""
    return {
        SHARED_LAYERS: f"cutting {what} layer by layer would untie them; prune before sharing",
        QUATERNIONS: f"each of their weights serves in four places, so {what} cannot be cut out alone; prune before",
    }


@dataclass
class Subject:
    """One row of the ledger: a model or a file, and what is known of it.

    ``file`` is its path inside the bundle, None for a PyTorch model. ``metrics`` by split and name.
    """

    name: str
    unique_params: int
    size_bytes: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    file: str | None = None
    precision: str = "fp32"
    notes: list[str] = field(default_factory=list)


@dataclass
class Context:
    """What a running stage gets.

    Attributes:
        name: of the recipe.
        seed: of everything that is drawn.
        source_name: the model that the recipe names, without the folders of this machine.
        lock: the recipe with every default, as TOML.
        inputs: artifacts of the roles it needs.
        output: an empty folder; each subfolder becomes the artifact of the role it is named after.
        work: a folder that outlives a kill, for checkpoints of this stage.
        history: ledger records of the stages before, for stages that report.
        aliases: roles whose artifact is the subfolder of another role.
        train: how training fits the machine.
        expected: what the model gives in PyTorch for each of some inputs, by their fingerprint; kept because every file is compared with them.
        measurements: latency and memory, for the ledger.
    """

    name: str
    seed: int
    task: Task
    data: Data
    source_name: str
    lock: str
    inputs: dict[str, Artifact]
    output: Path
    work: Path
    progress: Progress
    history: list[dict[str, Any]]
    cache: Cache
    train: TrainSection = field(default_factory=TrainSection)
    subjects: list[Subject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    expected: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def folder(self, role: str) -> Path:
        """The artifact folder of an input role."""
        return self.inputs[role].folder

    def load(self, role: str) -> Checkpoint:
        """The model of an input role."""
        from pipeline.models.checkpoint import Checkpoint  # a recipe can be checked, and a ledger read, without torch

        return Checkpoint.load(self.folder(role))

    def note(self, message: str) -> None:
        """Say something to the user, now and in the ledger."""
        self.notes.append(message)
        self.progress.say(f"  {message}")

    def encode(self, checkpoint: Checkpoint, split: str | Sequence[Row]) -> EncodedTexts:
        """The rows of a split (or rows themselves) as the tokenizer of ``checkpoint`` has them, with their targets.

        Raises:
            BadInput: a row that makes no input, such as a question longer than a window.
        """
        rows = self.data.split(split) if isinstance(split, str) else split
        try:
            return self.task.encode(checkpoint.tokenizer, rows, self.data, checkpoint.model.config.pad_token_id)
        except BadInput as error:
            raise BadInput(f"task.data: {split} rows: {error}" if isinstance(split, str) else str(error)) from error


def _merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``defaults`` with what is given, table by table."""
    both = {key: _merged(defaults[key], value) for key, value in given.items() if isinstance(value, dict) and isinstance(defaults.get(key), dict)}
    return defaults | given | both


class Stage(BaseModel):
    """Base of every stage. Fields of the subclass are the keys of its ``[[stage]]`` table.

    Class attributes:
        use: the name in recipes.
        version: raised when the same configuration would give another result although no code changed.
        needs, uses, gives: roles it must have, roles it reads where they exist, roles it writes.
        reads_ledger: whether the records of the stages before are part of its input.
        measures: whether it measures latencies, which a budget needs.
        trains: whether it trains, so that all processes of a distributed run take part.
        leaves: what it makes of the model that some later stage cannot work on (:data:`UNEQUAL_LAYERS`, ...); a property where
            that is a matter of the configuration.
        refuses: which of these it cannot work on, with the reason.
        paper: where the method comes from; empty for plumbing.
        equations: what it computes, in words.
        effect: what it does to size and speed, in a sentence.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    use: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("model",)
    uses: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ("model",)
    reads_ledger: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    leaves: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[dict[str, str]] = {}
    paper: ClassVar[str] = ""
    equations: ClassVar[str] = ""
    effect: ClassVar[str] = ""

    reads: dict[str, str] = {}
    """Roles to read in place of the usual ones, such as ``{ teacher = "assistant" }``."""
    writes: dict[str, str] = {}
    """Roles to write in place of the usual ones, such as ``{ model = "assistant" }``."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_own_defaults(cls, values: Any) -> Any:
        """A nested table that names some keys leaves the others as this stage has them, not as the table's class does."""
        if not isinstance(values, dict):
            return values
        merged = dict(values)
        for name, value in values.items():
            default = cls.model_fields[name].get_default(call_default_factory=True) if name in cls.model_fields else None
            if isinstance(default, BaseModel) and isinstance(value, dict):
                merged[name] = _merged(default.model_dump(), value)
        return merged

    @property
    def without_labels(self) -> str:
        """What to do where training rows have no labels, which this stage as it is configured learns from; empty if it does not."""
        heal = getattr(self, "heal", None)
        return 'set heal.learn_from = "unpruned"' if getattr(heal, "learn_from", None) == "labels" else ""

    def check_task(self, task: Task) -> None:
        """Refuse a task that this stage makes no sense for, before any work.

        Raises:
            BadInput: with the reason.
        """

    @abstractmethod
    def run(self, context: Context) -> None:
        """Read ``context.inputs``, write ``context.output/<role>``, report into ``context.subjects``.

        Raises:
            BadInput: configuration and input do not fit.
            GateFailed: the result must not ship.
        """
