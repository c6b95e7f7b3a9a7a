"""What a stage is: a configuration whose fields are the recipe's keys, and one verb.

A stage reads artifacts by role and leaves folders under roles of its own; it knows no other stage. Roles in use:

    ``model``      the PyTorch model of this moment: config.json, model.safetensors, tokenizer files
    ``teacher``    the fine-tuned model that students learn from, and that accuracy is compared with
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

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from pipeline.flow.progress import Progress
from pipeline.tasks.text_classification import ClassificationData

if TYPE_CHECKING:
    from pipeline.flow.cache import Cache
    from pipeline.flow.recipe import Recipe, TaskSection


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


@dataclass(frozen=True)
class Artifact:
    """An immutable folder, and the SHA-256 of everything in it."""

    folder: Path
    sha256: str


@dataclass
class Subject:
    """One row of the ledger: a model or a file, and what is known of it.

    ``file`` is its path inside the bundle, None for a PyTorch model. ``accuracy`` in per cent by split.
    """

    name: str
    unique_params: int
    size_bytes: int
    accuracy: dict[str, float] = field(default_factory=dict)
    file: str | None = None
    precision: str = "fp32"
    notes: list[str] = field(default_factory=list)


@dataclass
class Context:
    """What a running stage gets.

    Args:
        inputs: artifacts of the roles it needs.
        output: an empty folder; each subfolder becomes the artifact of the role it is named after.
        work: a folder that outlives a kill, for checkpoints of this stage.
        history: ledger records of the stages before, for stages that report.
        aliases: roles whose artifact is the subfolder of another role.
        measurements: latency and memory, for the ledger.
    """

    recipe: Recipe
    source: Path
    data: ClassificationData
    inputs: dict[str, Artifact]
    output: Path
    work: Path
    progress: Progress
    history: list[dict[str, Any]]
    cache: Cache
    subjects: list[Subject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def task(self) -> TaskSection:
        return self.recipe.task

    @property
    def seed(self) -> int:
        return self.recipe.seed

    def folder(self, role: str) -> Path:
        """The artifact folder of an input role."""
        return self.inputs[role].folder

    def note(self, message: str) -> None:
        """Say something to the user, now and in the ledger."""
        self.notes.append(message)
        self.progress.say(f"  {message}")

    @cached_property
    def label_index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.data.labels)}


class Stage(BaseModel):
    """Base of every stage. Fields of the subclass are the keys of its ``[[stage]]`` table.

    Class attributes:
        use: the name in recipes.
        version: raised when the same configuration would give another result.
        needs, uses, gives: roles it must have, roles it reads where they exist, roles it writes.
        reads_ledger: whether the records of the stages before are part of its input.
        trains: whether it trains, so that all processes of a distributed run take part.
        leaves: what it makes of the model that some later stage cannot work on (:data:`UNEQUAL_LAYERS`, ...); a property where
            that is a matter of the configuration.
        refuses: which of these it cannot work on, with the reason.
        paper: where the method comes from; empty for plumbing.
        equations: what it computes, in words.
        effect: what it does to size and speed, in a sentence.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    use: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("model",)
    uses: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ("model",)
    reads_ledger: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    leaves: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[dict[str, str]] = {}
    paper: ClassVar[str] = ""
    equations: ClassVar[str] = ""
    effect: ClassVar[str] = ""

    def run(self, context: Context) -> None:
        """Read ``context.inputs``, write ``context.output/<role>``, report into ``context.subjects``.

        Raises:
            BadInput: configuration and input do not fit.
            GateFailed: the result must not ship.
        """
        raise TypeError(f"{type(self).__name__} has no run")
